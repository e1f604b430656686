"""Forward and backward passes, planned each on its own, joined to plans."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from attngen.dtypes import BYTES
from attngen.errors import PlanError
from attngen.plans import Choice, Option
from attngen.spec import AttentionSpec

PREFIX = "backward"
FASTEST = 12  # of each, that are joined; and all that are smaller than any faster one

Space = Mapping[str, Mapping[str, Sequence[Option]]]  # as in legality.py

T = TypeVar("T")


@functools.lru_cache(maxsize=64)
def forward_spec(spec: AttentionSpec) -> AttentionSpec:
    """What the forward pass of a spec with derivatives "vjp" computes: lse, too."""
    if spec.derivatives != "vjp":
        return spec
    outputs = ("out", "lse") if "out" in spec.outputs else ("lse",)
    return dataclasses.replace(spec, derivatives=None, outputs=outputs)


def kept_bytes(spec: AttentionSpec) -> int:
    """What the forward pass keeps for the backward pass, beside inputs and outputs."""
    if spec.derivatives != "vjp":
        return 0
    rows = spec.batch * spec.q_heads * spec.q_len // spec.devices
    numbers = ("lse" not in spec.outputs) + (spec.dtype == spec.stats_dtype)
    return rows * numbers * BYTES[spec.stats_dtype]


def forward_part(choice: Choice) -> dict[str, Option]:
    """Of a plan's choices those of its forward pass."""
    return {n: v for n, v in choice.items() if not n.startswith(PREFIX)}


def backward_part(choice: Choice) -> dict[str, Option]:
    """Those of its backward pass, under the names that a forward plan's choices have."""
    found: dict[str, Option] = {}
    for name, value in choice.items():
        if name == PREFIX:
            found["algorithm"] = value
        elif name.startswith(f"{PREFIX}_"):
            found[name.removeprefix(f"{PREFIX}_")] = value
    return found


def backward_names(choice: Mapping[str, T]) -> dict[str, T]:
    """The choices of a backward pass under the names that they have in a plan."""
    return {
        PREFIX if n == "algorithm" else f"{PREFIX}_{n}": v for n, v in choice.items()
    }


def check_names(spaces: tuple[Space, Space], fix: Mapping[str, Option]) -> None:
    """Refuse a fixed choice that neither pass has.

    Args:
        spaces: of the forward and of the backward pass.

    Raises:
        PlanError: there is one.
    """
    forward, backward = (
        ["algorithm", *dict.fromkeys(n for axes in space.values() for n in axes)]
        for space in spaces
    )
    known = [*forward, *backward_names(dict.fromkeys(backward))]
    for name in fix:
        if name not in known:
            raise PlanError(
                f"There is no choice {name!r} to fix.",
                got=name,
                needed="one of " + ", ".join(known),
            )


def renamed(error: PlanError, names: Iterable[str]) -> PlanError:
    """An error about a backward pass, with the names that its choices have in a plan."""
    own = "|".join(sorted({"algorithm", *names}, key=len, reverse=True))

    def told(text: object) -> str | None:
        if text is None:
            return None
        return re.sub(
            rf"\b({own})\b(?= ?=| must| can't| \d)|^({own})$", _named, str(text)
        )

    what = error.what.removesuffix(".") + ", of the backward pass."
    needed, hint = told(error.needed), told(error.hint)
    return PlanError(what, got=told(error.got), needed=needed, hint=hint)


def _named(found: re.Match[str]) -> str:
    return PREFIX if found[0] == "algorithm" else f"{PREFIX}_{found[0]}"


def worth(priced: Sequence[T], bytes_of: Callable[[T], int]) -> list[T]:
    """Of candidates that are sorted by time the fastest few, and each with fewer bytes than
    all before it."""
    kept: list[T] = []
    least: int | None = None
    for candidate in priced:
        smaller = least is None or bytes_of(candidate) < least
        if len(kept) < FASTEST or smaller:
            kept.append(candidate)
        if smaller:
            least = bytes_of(candidate)
    return kept
