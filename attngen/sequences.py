"""Where each sequence's tokens lie, for the reference; K/V as plain arrays of numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attngen import storage
from attngen.spec import AttentionSpec

if TYPE_CHECKING:
    from attngen.reference import Rounding

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sequence:
    """Args:
    b: its number, as masks and scores see it.
    place: where it lies along the first axis of q, k, v [place, heads, tokens, dim].
    q_first, q_len, k_first, k_len: its tokens there.
    offset: the position of its query 0.
    """

    b: int
    place: int
    q_first: int
    q_len: int
    k_first: int
    k_len: int
    offset: int

    def holds(self, rows: Array) -> Array:
        """Which of some queries are its own."""
        return (rows >= self.q_first) & (rows < self.q_first + self.q_len)

    @property
    def keys(self) -> slice:
        return slice(self.k_first, self.k_first + self.k_len)

    def keys_of(self, k: Array, v: Array, head: int) -> tuple[Array, Array]:
        """Its keys and values of a kv head, [tokens, dim]."""
        at = (self.place, head, self.keys)
        return k[at], v[at]


def of(spec: AttentionSpec, operands: Mapping[str, Array]) -> list[Sequence]:
    """Every sequence."""
    if spec.storage != "packed":
        starts = [(b, 0, spec.q_len, 0, spec.kv_len) for b in range(spec.batch)]
    else:
        q, k = (np.asarray(operands[f"cu_seqlens_{x}"], np.int64) for x in "qk")
        starts = [
            (0, int(q[b]), int(q[b + 1] - q[b]), int(k[b]), int(k[b + 1] - k[b]))
            for b in range(spec.batch)
        ]
    return [
        Sequence(b, *at, _offset(spec, operands, b, at[2], at[4]))
        for b, at in enumerate(starts)
    ]


def _offset(
    spec: AttentionSpec, operands: Mapping[str, Array], b: int, q_len: int, k_len: int
) -> int:
    """The position of query 0 of a sequence."""
    if spec.q_offset == "operand":
        return int(np.broadcast_to(operands["q_offset"], (spec.batch,))[b])
    if spec.static_q_offset is not None:
        return spec.static_q_offset
    return (int(operands["kv_lengths"][b]) if spec.kv_lengths else k_len) - q_len


def by_heads(spec: AttentionSpec, array: Array) -> Array:
    """[batch, heads, length, dim] of an array in the spec's layout, as a view.

    Packed sequences are one batch; pages are batches.
    """
    x = np.asarray(array)
    x = x[None] if spec.storage == "packed" else x
    return np.swapaxes(x, 1, 2) if spec.layout == "bthd" else x


def counted(spec: AttentionSpec) -> tuple[str, ...]:
    """The variables that dropout counts weights by: packed tokens where they lie."""
    if spec.storage == "packed":
        return ("b", "h", "q_index", "k_index")
    return ("b", "h", "q", "k")


def plain_keys(
    spec: AttentionSpec,
    name: str,
    x: Array,
    operands: Mapping[str, Array],
    how: Rounding,
) -> Array:
    """k or v as [place, kv_heads, kv_len, dim] in `how.wide`: pages in order, and scaled.

    Scaled ones are rounded as a product's factors are.
    """
    made: Array = by_heads(spec, x).astype(how.wide)
    if spec.is_quantised:
        scale = np.asarray(operands[f"{name}_scale"]).astype(how.wide)
        with np.errstate(all="ignore"):
            made = made * _spread(spec, scale, made.shape[2])
        made = made.astype(how.product).astype(how.wide)
    if spec.storage == "paged":
        made = _ordered(spec, made, np.asarray(operands["block_table"]), operands)
    return made


def _spread(spec: AttentionSpec, scale: Array, tokens: int) -> Array:
    """A factor for each token, [place, kv_heads, tokens, 1]."""
    if spec.kv_scale == "head":
        return scale[None, :, None, None]
    scale = scale[None] if spec.storage == "packed" else scale
    each: Array = np.repeat(scale, storage.scale_block(spec), axis=2)[
        :, :, :tokens, None
    ]
    return each


def _ordered(
    spec: AttentionSpec, pages: Array, table: Array, operands: Mapping[str, Array]
) -> Array:
    """Pages [page, kv_heads, page_size, dim] as [batch, kv_heads, kv_len, dim].

    NaN where a key isn't there: its entry of the table may point anywhere.
    """
    shape = (spec.batch, spec.kv_heads, spec.kv_len, pages.shape[3])
    made = np.full(shape, np.nan, pages.dtype)
    for b in range(spec.batch):
        count = spec.kv_len
        if spec.kv_lengths:
            count = min(max(int(operands["kv_lengths"][b]), 0), count)
        for start in range(0, count, spec.page_size):
            page = pages[table[b, start // spec.page_size]]
            stop = min(start + spec.page_size, count)
            made[b, :, start:stop] = page[:, : stop - start]
    return made
