"""Bytes as people write them: binary units, and decimal ones where they are asked for."""

from __future__ import annotations

import re

from attngen.errors import BudgetError

UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40} | {
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?) ?([A-Za-z]*)", re.ASCII)


def parse_bytes(size: int | str) -> int:
    """A number of bytes from an integer, or from text such as "64MiB", "2 GB", "4096".

    Raises:
        BudgetError: it can't be read, or isn't positive.
    """
    number = size if isinstance(size, int) and not isinstance(size, bool) else None
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip(" "))):
        unit = UNITS.get(match[2].upper() or "B")
        if unit is not None:
            number = (
                int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
            )
    if number is None or number <= 0:
        raise BudgetError(
            "A number of bytes can't be read.",
            got=repr(size),
            needed="a positive integer, or a number and one of B, KiB, MiB, GiB, KB, MB, GB",
            hint='for example memory_budget="64MiB"',
        )
    return number


def show_bytes(count: float) -> str:
    """Bytes for people: 612 B, 1.5 KiB, 21.1 MiB. Never for computing with."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def show_count(count: float) -> str:
    """A large count for people: 464 G, 1.2 T."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:  # 999 500 rounds to 1 M, not to 1e+03 k
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} "


def show_time(seconds: float) -> str:
    """Seconds for people: 85 µs, 12.3 ms, 1.24 s."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e6:.0f} µs"
