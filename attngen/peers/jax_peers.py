"""Attention in jax.numpy with the whole score matrix, and jax.nn's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from attngen.peers import Ready
from attngen.peers.expressions import masked, scored, seen, summed, whole
from attngen.peers.forms import Band, added, band
from attngen.peers.jax_common import JAX, finite, jax_arrays, ready, select
from attngen.peers.matrices import Matrix, score_bytes
from attngen.reference import Array
from attngen.spec import AttentionSpec

ARRAY_BYTES = 5  # of a mask or bias array's element: itself, and what it is made from


class Plain:
    """Softmax attention as one writes it: all scores, their softmax, their product with v.

    The mask and the scores' functions are evaluated over arrays of indices within the call;
    XLA decides what of that it stores.
    """

    name = "plain jnp"
    package = "jax"
    layout = None

    def refuse(self, spec: AttentionSpec) -> str | None:
        return None

    def matrix_bytes(self, spec: AttentionSpec) -> int:
        return score_bytes(spec)

    def function(self, spec: AttentionSpec) -> Callable[..., Any]:
        """Of q, k, v, and the operands by name: to be compiled for any target."""

        def attention(q: Any, k: Any, v: Any, **operands: Any) -> Any:
            return _plain(spec, q, k, v, operands)

        return attention

    def make(self, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
        said = "all scores at once"
        said += "" if spec.mask is None else ", masked by a comparison of indices"
        return ready(self.function(spec), jax_arrays(spec, arrays), said)


def _plain(
    spec: AttentionSpec, q: Any, k: Any, v: Any, operands: Mapping[str, Any]
) -> Any:
    import jax.numpy as jnp

    tokens, heads = (1, 2) if spec.layout == "bthd" else (2, 1)
    letters = "bqhrd,bkhd" if spec.layout == "bthd" else "bhrqd,bhkd"
    queries, keys = letters.split(",")
    grouped = [spec.batch, 0, 0, spec.qk_dim]
    grouped[tokens], grouped[heads] = spec.q_len, spec.kv_heads
    grouped.insert(heads + 1, spec.repeats)
    stats: dict[str, Any] = {
        "precision": spec.precision,
        "preferred_element_type": spec.stats_dtype,
    }
    s = jnp.einsum(f"{letters}->bhrqk", q.reshape(grouped), k, **stats)
    s = s.reshape(spec.batch, spec.q_heads, spec.q_len, spec.kv_len) * spec.scale_value
    frame = whole(spec, JAX, operands)
    s = scored(frame, s)
    there = seen(frame)
    s = s if there is None else jnp.where(there, s, -jnp.inf)
    m = s.max(-1, keepdims=True)
    m = finite(m)
    p = jnp.exp(s - m)
    total = p.sum(-1)
    lse = m[..., 0] + jnp.log(total)
    if spec.sink:
        total = total + jnp.exp(operands["sink"][:, None] - m[..., 0])
    # Divided before the product: [q, k] once more, and the plainest order.
    p = p / jnp.where(total == 0, 1, total)[..., None]
    p = p.reshape(spec.batch, spec.kv_heads, spec.repeats, spec.q_len, spec.kv_len)
    out = jnp.einsum(f"bhrqk,{keys}->{queries}", p.astype(v.dtype), v, **stats)
    out = out.reshape(spec.shape_of("out")).astype(spec.out_dtype_name)
    return select(spec, out, lse)


class JaxNN:
    """jax.nn.dot_product_attention, with the arguments that say the spec."""

    name = "jax.nn"
    package = "jax"
    layout = "bthd"

    def refuse(self, spec: AttentionSpec) -> str | None:
        if spec.sink:
            return "has no sinks"
        if added(spec) is None:
            return "its scores can only have a bias added to them"
        if spec.v_dim != spec.qk_dim:
            return "takes only v_dim = qk_dim"
        return None

    def matrix_bytes(self, spec: AttentionSpec) -> int:
        return score_bytes(spec) + ARRAY_BYTES * sum(
            matrix.elements for matrix in _matrices(spec)
        )

    def make(self, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
        import jax

        given = jax_arrays(spec, arrays)
        static = _static(spec)
        start = time.perf_counter()
        made = jax.block_until_ready(jax.jit(lambda x: _arrays(spec, x))(given))
        seconds = time.perf_counter() - start
        dynamic = {n: given[n] for n in "qkv"} | made
        for name, argument in _LENGTHS.items():
            if getattr(spec, name):
                dynamic[argument] = given[name]

        def attention(q: Any, k: Any, v: Any, **named: Any) -> Any:
            import jax

            lse = "lse" in spec.outputs
            found = jax.nn.dot_product_attention(
                q, k, v, scale=spec.scale_value, return_residual=lse, **static, **named
            )
            out, rest = found if lse else (found, None)
            if rest is not None:
                rest = rest.swapaxes(1, 2).astype(spec.stats_dtype)
            return select(spec, out.astype(spec.out_dtype_name), rest)

        said = [f"{n}={x}" for n, x in static.items()]
        said += [n for n in dynamic if n in _LENGTHS.values()]
        said += [f"a {n} array made outside the call" for n in made]
        times = {"arrays": seconds} if made else {}
        return ready(attention, dynamic, ", ".join(said) or "as it is", times)


_LENGTHS = {"kv_lengths": "key_value_seq_lengths", "q_lengths": "query_seq_lengths"}


def _static(spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that say the mask; empty where an array must."""
    limits = band(spec)
    if limits is None or (limits.low or 0) > 0 or (limits.high or 0) < 0:
        return {}
    found: dict[str, Any] = {"is_causal": True} if limits.high == 0 else {}
    if limits.low is not None or limits.high:
        left = spec.q_len if limits.low is None else -limits.low
        right = spec.kv_len if limits.high is None else limits.high
        found["local_window_size"] = (left, right)
    return found


def _needs_mask(spec: AttentionSpec) -> bool:
    return band(spec) != Band() and not _static(spec)


def _matrices(spec: AttentionSpec) -> list[Matrix]:
    """What must be said by arrays."""
    said = [added(spec) or ()]
    if spec.mask is not None and _needs_mask(spec):
        said.append((spec.mask.expr,))
    return [Matrix.of(spec, *nodes) for nodes in said if nodes]


def _arrays(spec: AttentionSpec, operands: Mapping[str, Any]) -> dict[str, Any]:
    """mask and bias as the arrays that jax.nn takes, [b or 1, h or 1, q, k]."""
    import jax.numpy as jnp

    frame = whole(spec, JAX, operands)
    made: dict[str, Any] = {}
    if _needs_mask(spec):
        made["mask"] = masked(frame)
    if (bias := summed(frame, added(spec) or ())) is not None:
        made["bias"] = bias

    def matrix(x: Any) -> Any:
        shape = (1,) * (4 - jnp.ndim(x)) + jnp.shape(x)
        return jnp.broadcast_to(x, (*shape[:2], spec.q_len, spec.kv_len))

    return {name: matrix(x) for name, x in made.items()}


PLAIN, JAX_NN = Plain(), JaxNN()
