"""The paper's own algorithm, with its chunk sizes: Rabe & Staats, arXiv 2112.05682, figure 1.

Chunks of queries one after the other; for each, every chunk of keys is summarised by its
weighted values, its weights and its maximum, under `jax.checkpoint`; at the end the
summaries are combined. The paper has one sequence without mask or grouped heads, of whole
chunks: here the batch is a vmap, masks and scores are applied within the summaries, and a
ragged end is padded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from attngen.operands import LETTERS, Operand
from attngen.peers import Ready
from attngen.peers.expressions import Frame, axis_order, broadcast_shape, scored, seen
from attngen.peers.jax_common import JAX, finite, jax_arrays, ready, select
from attngen.reference import Array
from attngen.spec import AttentionSpec

Q_CHUNK, K_CHUNK = 1024, 4096


class Paper:
    """See the module."""

    name = "paper"
    package = "jax"
    layout = "bthd"

    def refuse(self, spec: AttentionSpec) -> str | None:
        return "the paper has no sinks" if spec.sink else None

    def matrix_bytes(self, spec: AttentionSpec) -> int:
        """Of a tile's scores and exponentials, for the whole batch and all heads."""
        chunks = _Chunks.of(spec)
        return 2 * 4 * spec.batch * spec.q_heads * chunks.q * chunks.k

    def function(self, spec: AttentionSpec) -> Callable[..., Any]:
        """Of q, k, v in the layout "bthd", and the operands by name: for any target."""
        chunks = _Chunks.of(spec)

        def attention(q: Any, k: Any, v: Any, **operands: Any) -> Any:
            return _attention(spec, chunks, q, k, v, operands)

        return attention

    def make(self, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
        chunks = _Chunks.of(spec)
        said = f"chunks of {chunks.q} queries and {chunks.k} keys"
        if spec.expressions or spec.kv_lengths or spec.q_lengths:
            said += ", masks and scores applied in the summaries"
        if chunks.q_padded > spec.q_len or chunks.k_padded > spec.kv_len:
            said += ", the ragged end padded"
        return ready(self.function(spec), jax_arrays(spec, arrays), said)


@dataclass(frozen=True)
class _Chunks:
    """Sizes of the chunks, and lengths as whole chunks of them."""

    q: int
    k: int
    q_padded: int
    k_padded: int

    @classmethod
    def of(cls, spec: AttentionSpec) -> _Chunks:
        q, k = min(Q_CHUNK, spec.q_len), min(K_CHUNK, spec.kv_len)
        return cls(q, k, -(-spec.q_len // q) * q, -(-spec.kv_len // k) * k)

    @property
    def lengths(self) -> dict[str, int]:
        return {"q": self.q_padded, "k": self.k_padded}


def _attention(
    spec: AttentionSpec,
    chunks: _Chunks,
    q: Any,
    k: Any,
    v: Any,
    operands: Mapping[str, Any],
) -> Any:
    import jax
    import jax.numpy as jnp

    q = _pad(q, 1, chunks.q_padded)
    k, v = (_pad(x, 1, chunks.k_padded) for x in (k, v))
    declared = {o.name: o for o in spec.operands}
    padded = {n: _pad_operand(declared[n], x, chunks) for n, x in operands.items()}
    one = functools.partial(_one_sequence, spec, chunks, padded)
    out, lse = jax.vmap(one)(jnp.arange(spec.batch), q, k, v)
    out = out[:, : spec.q_len].astype(spec.out_dtype_name)
    return select(spec, out, lse[:, :, : spec.q_len])


def _pad(x: Any, axis: int, length: int) -> Any:
    import jax.numpy as jnp

    widths = [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths) if x.shape[axis] < length else x


def _pad_operand(operand: Operand, x: Any, chunks: _Chunks) -> Any:
    for axis, letter in enumerate(operand.axes):
        if letter in ("q", "k"):
            x = _pad(x, axis, chunks.lengths[str(letter)])
    return x


def _one_sequence(
    spec: AttentionSpec,
    chunks: _Chunks,
    operands: Mapping[str, Any],
    b: Any,
    q: Any,
    k: Any,
    v: Any,
) -> tuple[Any, Any]:
    """q: [t, h, d], k and v: [n, h, d], in whole chunks → out [t, h, d], lse [h, t]."""
    import jax.numpy as jnp
    from jax import lax

    def query_chunk(start: Any) -> tuple[Any, Any]:
        some = lax.dynamic_slice_in_dim(q, start, chunks.q)
        some = some * jnp.asarray(spec.scale_value, q.dtype)
        some = some.reshape(chunks.q, spec.kv_heads, spec.repeats, spec.qk_dim)

        def key_chunk(k_start: Any) -> tuple[Any, Any, Any]:
            keys, values = (
                lax.dynamic_slice_in_dim(x, k_start, chunks.k) for x in (k, v)
            )
            at = (b, start, k_start)
            return _summarise(spec, chunks, operands, at, some, keys, values)

        values, weights, maxima = lax.map(key_chunk, jnp.arange(0, len(k), chunks.k))
        return _combine(values, weights, maxima)

    out, lse = lax.map(query_chunk, jnp.arange(0, len(q), chunks.q))
    # [chunks, h, q, d] → [t, h, d], and [chunks, h, q] → [h, t]
    out = out.transpose(0, 2, 1, 3).reshape(len(q), spec.q_heads, spec.v_dim)
    return out, lse.transpose(1, 0, 2).reshape(spec.q_heads, len(q))


def _summarise(
    spec: AttentionSpec,
    chunks: _Chunks,
    operands: Mapping[str, Any],
    at: tuple[Any, Any, Any],
    q: Any,
    k: Any,
    v: Any,
) -> tuple[Any, Any, Any]:
    """Weighted values [h, q, d], weights [h, q] and maximum [h, q] of a chunk of keys."""
    import jax
    import jax.numpy as jnp

    stats: dict[str, Any] = {
        "precision": "highest",
        "preferred_element_type": spec.stats_dtype,
    }

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def summary(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        s = jnp.einsum("qhrd,khd->hrqk", q, k, **stats)
        s = s.reshape(spec.q_heads, chunks.q, chunks.k)
        frame = _frame(spec, chunks, operands, *at)
        s = scored(frame, s)
        there = seen(frame)
        if chunks.k_padded > spec.kv_len:
            inside = frame.index["k"] < spec.kv_len
            there = inside if there is None else there & inside
        s = s if there is None else jnp.where(there, s, -jnp.inf)
        m = jax.lax.stop_gradient(s.max(-1))
        p = jnp.exp(s - finite(m)[..., None])
        grouped = p.reshape(spec.kv_heads, spec.repeats, chunks.q, chunks.k)
        values = jnp.einsum("hrqk,khd->hrqd", grouped.astype(v.dtype), v, **stats)
        return values.reshape(spec.q_heads, chunks.q, spec.v_dim), p.sum(-1), m

    found: tuple[Any, Any, Any] = summary(q, k, v)
    return found


def _combine(values: Any, weights: Any, maxima: Any) -> tuple[Any, Any]:
    """Summaries [chunks, …] → out [h, q, d] and lse [h, q]."""
    import jax.numpy as jnp

    top = finite(maxima.max(0))
    factors = jnp.exp(maxima - top)
    total = (weights * factors).sum(0)
    summed = (values * factors[..., None]).sum(0)
    return summed / jnp.where(total == 0, 1, total)[..., None], top + jnp.log(total)


def _frame(
    spec: AttentionSpec,
    chunks: _Chunks,
    operands: Mapping[str, Any],
    b: Any,
    q_start: Any,
    k_start: Any,
) -> Frame:
    """The frame of one tile, [h, q, k]; operands are sliced where they can be."""
    import jax.numpy as jnp
    from jax import lax

    index = {
        "b": b,
        "h": jnp.arange(spec.q_heads)[:, None, None],
        "q": (q_start + jnp.arange(chunks.q))[:, None],
        "k": k_start + jnp.arange(chunks.k),
    }
    starts = {"b": (b, 1), "q": (q_start, chunks.q), "k": (k_start, chunks.k)}

    def aligned(operand: Operand, table: Any) -> Any:
        shape = broadcast_shape(operand, spec.lengths | chunks.lengths)
        table = table.transpose(axis_order(operand)).reshape(shape)
        for axis, letter in enumerate(LETTERS):
            if letter in operand.axes and letter in starts:
                table = lax.dynamic_slice_in_dim(table, *starts[letter], axis)
        return table[0]

    return Frame(spec, JAX, index, operands, aligned)


PAPER = Paper()
