"""What operands of packed and paged K/V hold, checked where the host can look at it.

Kernels take such values on trust: an offset beyond the tokens, or a page that isn't there,
would be read from other sequences' memory. NumPy arrays are looked at in every call, other
arrays (a transfer) only with the environment variable ATTNGEN_CHECK=1, and nothing inside a
trace.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from attngen.errors import OperandError
from attngen.spec import AttentionSpec

Array = np.ndarray[Any, Any]
MODE = "ATTNGEN_CHECK"


def check(spec: AttentionSpec, given: Mapping[str, Any]) -> None:
    """Refuse offsets, lengths and tables that can't be followed.

    Args:
        given: q, k, v and the operands by name, in the shapes that they should have.

    Raises:
        OperandError: as it says.
    """
    if spec.storage == "dense" or not all(hasattr(given[x], "shape") for x in "qk"):
        return
    known = {
        o.name: values
        for o in spec.own_operands
        if (values := _values(given.get(o.name))) is not None
    }
    if spec.storage == "packed":
        token = 0 if spec.layout == "bthd" else 1
        for x in "qk":
            if (offsets := known.get(f"cu_seqlens_{x}")) is not None:
                _check_offsets(f"cu_seqlens_{x}", offsets, x, given[x].shape[token])
    elif "block_table" in known and ("kv_lengths" in known or not spec.kv_lengths):
        pages = given["k"].shape[0]
        _check_pages(spec, known["block_table"], known.get("kv_lengths"), pages)


def _values(x: Any) -> Array | None:
    """An array's values, where they may be looked at."""
    if isinstance(x, np.ndarray):
        return x
    if x is None or os.environ.get(MODE) != "1" or _is_traced(x):
        return None
    return np.asarray(x.cpu() if hasattr(x, "cpu") else x)


def _is_traced(x: Any) -> bool:
    """Whether an array has no values yet: JAX's tracers, and tensors that torch traces."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if jax is not None and isinstance(x, jax.core.Tracer):
        return True
    return torch is not None and bool(torch.compiler.is_compiling())


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


def _check_pages(
    spec: AttentionSpec, table: Array, lengths: Array | None, pages: int
) -> None:
    """Of paged K/V: the lengths of sequences (None: kv_len each), and the pages they need."""
    size, room = spec.page_size, table.shape[1] * spec.page_size
    counts = np.full(len(table), min(spec.kv_len, room))
    if lengths is not None:
        counts = np.maximum(lengths, 0)
        for b in np.flatnonzero(counts > room)[:1]:
            raise OperandError(
                "A sequence is longer than its pages.",
                got=f"kv_lengths[{b}] = {lengths[b]}",
                needed=f"at most {room}: {table.shape[1]} pages of {size} tokens",
                hint="block_table has a column for each page of the longest sequence",
            )
    used = np.arange(table.shape[1])[None, :] * size < counts[:, None]
    for b, i in np.argwhere(used & ((table < 0) | (table >= pages)))[:1]:
        raise OperandError(
            "A page that a sequence needs isn't there.",
            got=f"block_table[{b}, {i}] = {table[b, i]}",
            needed=f"a page from 0 to {pages - 1}",
            hint=f"sequence {b} has {counts[b]} keys, in {-(-counts[b] // size)} pages",
        )
