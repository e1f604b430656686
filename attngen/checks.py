"""What operands of packed and paged K/V hold, checked where the host can look at it.

Kernels take such values on trust: an offset beyond the tokens, or a page that isn't there,
would be read from other sequences' memory. NumPy arrays are looked at in every call, other
arrays (a transfer) only with the environment variable ATTNGEN_CHECK=1, and nothing inside a
trace.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from attngen.errors import OperandError
from attngen.spec import AttentionSpec
from attngen.spec_checks import OFFSETS_HINT, relating
from attngen.traced import is_traced

Array = np.ndarray[Any, Any]
MODE = "ATTNGEN_CHECK"
NAMES = ("cu_seqlens_q", "cu_seqlens_k", "kv_lengths", "block_table")


def check(spec: AttentionSpec, given: Mapping[str, Any]) -> None:
    """Refuse offsets, lengths and tables that can't be followed.

    Args:
        spec: of packed or paged K/V.
        given: q, k, v and the operands by name, in the shapes that they should have.

    Raises:
        OperandError: as it says.
    """
    if any(is_traced(x) for x in given.values()):
        return
    known = {
        name: values
        for name in NAMES
        if name in given and (values := _values(given[name])) is not None
    }
    if spec.storage == "packed":
        token = 0 if spec.layout == "bthd" else 1
        for x in "qk":
            if (offsets := known.get(f"cu_seqlens_{x}")) is not None:
                _check_offsets(f"cu_seqlens_{x}", offsets, x, given[x].shape[token])
        if spec.q_offset is None and len(known) == 2 and relating(spec):
            _check_counts(known["cu_seqlens_q"], known["cu_seqlens_k"])
        return
    room = given["block_table"].shape[1] * spec.page_size
    counts = np.full(given["block_table"].shape[0], min(spec.kv_len, room))
    if spec.kv_lengths:
        if "kv_lengths" not in known:
            return
        most = min(spec.kv_len, room)
        counts = _check_lengths(known["kv_lengths"], most, spec.page_size)
    if "block_table" in known:
        _check_pages(known["block_table"], counts, spec.page_size, given["k"].shape[0])


def _values(x: Any) -> Array | None:
    """An array's values, where they may be looked at."""
    if isinstance(x, np.ndarray):
        return x
    return np.asarray(x) if os.environ.get(MODE) == "1" else None


def _check_offsets(name: str, offsets: Array, x: str, tokens: int) -> None:
    hint = f"sequence b has the tokens {name}[b] to {name}[b + 1] - 1 of {x}"
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if offsets[0] != 0:
        got, needed = f"{name}[0] = {offsets[0]}", f"{name}[0] = 0"
    elif len(falls):
        i = int(falls[0])
        got = f"{name}[{i}] = {offsets[i]}, {name}[{i + 1}] = {offsets[i + 1]}"
        needed = "offsets of which none is below the one before it"
    elif offsets[-1] > tokens:
        got = f"{name}[{len(offsets) - 1}] = {offsets[-1]}"
        needed = f"at most {tokens}, the tokens of {x}"
    else:
        return
    raise OperandError(
        f"{name} isn't where sequences begin.", got=got, needed=needed, hint=hint
    )


def _check_counts(of_q: Array, of_k: Array) -> None:
    """Where nothing says otherwise, a sequence's first query stands at its first key."""
    queries, keys = np.diff(of_q), np.diff(of_k)
    for b in np.flatnonzero(queries != keys)[:1]:
        raise OperandError(
            "A sequence has other queries than keys, and a mask or score relates q to k: "
            "where do its queries stand?",
            got=f"sequence {b} of {queries[b]} queries and {keys[b]} keys, no q_offset",
            needed='q_offset: an integer, "bottom_right" or "operand"',
            hint=OFFSETS_HINT,
        )


def _check_lengths(lengths: Array, room: int, size: int) -> Array:
    """How many keys sequences have, each at most `room`, in pages of a size."""
    for b in np.flatnonzero(lengths > room)[:1]:
        raise OperandError(
            "A sequence is longer than its pages.",
            got=f"kv_lengths[{b}] = {lengths[b]}",
            needed=f"at most {room}, in {-(-room // size)} pages of {size} tokens",
            hint="block_table has a column for each page of the longest sequence",
        )
    counts: Array = np.maximum(lengths, 0)
    return counts


def _check_pages(table: Array, counts: Array, size: int, pages: int) -> None:
    """Of sequences of so many keys: the pages that they need are there."""
    used = np.arange(table.shape[1])[None, :] * size < counts[:, None]
    for b, i in np.argwhere(used & ((table < 0) | (table >= pages)))[:1]:
        raise OperandError(
            "A page that a sequence needs isn't there.",
            got=f"block_table[{b}, {i}] = {table[b, i]}",
            needed=f"a page from 0 to {pages - 1}",
            hint=f"sequence {b} has {counts[b]} keys, in {-(-counts[b] // size)} pages",
        )
