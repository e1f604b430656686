"""Attention by whole squares in jax.numpy, straight from a spec: what JAX differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attngen import expr, reference

JNP = {
    name: getattr(jnp, made.__name__) for name, made in reference._NUMPY.items()
}  # the same functions


def attention(spec, q, k, v, operands):
    """The spec's outputs in float64, in its layout.

    NaN in keys and values stands for what no query sees.
    """
    if spec.layout == "bthd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    q, k, v = (x.astype("float64") for x in (q, k, v))
    k, v = (jnp.where(jnp.isnan(x), 0, x) for x in (k, v))
    k, v = (jnp.repeat(x, spec.repeats, 1) for x in (k, v))
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k) * spec.scale_value
    env = _env(spec, operands)
    seen = _seen(spec, env, operands)
    s = jnp.where(seen, s, 0)
    for score in spec.score:
        s = evaluate(score.expr, env | {"s": s}, operands)
        s = jnp.broadcast_to(s, seen.shape)
    there = seen & (s != -jnp.inf)
    m = lax.stop_gradient(jnp.where(there, s, -jnp.inf).max(-1, keepdims=True))
    if spec.sink:
        sink = operands["sink"].astype("float64")[None, :, None, None]
        m = jnp.maximum(m, lax.stop_gradient(sink))
    m = jnp.where(m == -jnp.inf, 0, m)
    p = jnp.where(there, jnp.exp(jnp.where(there, s, 0) - m), 0)
    total = p.sum(-1)
    any_key = there.any(-1)
    lse = jnp.where(
        any_key, m[..., 0] + jnp.log(jnp.where(any_key, total, 1)), -jnp.inf
    )
    if spec.sink:
        total = total + jnp.exp(sink - m)[..., 0]
    out = jnp.einsum("bhqk,bhkd->bhqd", p, v)
    out = jnp.where(
        any_key[..., None], out / jnp.where(any_key, total, 1)[..., None], 0
    )
    if spec.layout == "bthd":
        out = out.swapaxes(1, 2)
    found = {"out": out, "lse": lse}
    return tuple(found[name] for name in spec.outputs)


def _env(spec, operands):
    q = np.arange(spec.q_len)[:, None]
    k = np.arange(spec.kv_len)
    offset = operands.get("q_offset", spec.static_q_offset)
    if offset is None:
        offset = operands["kv_lengths"] - spec.q_len
    offset = jnp.broadcast_to(jnp.asarray(offset), (spec.batch,))
    return {
        "b": np.arange(spec.batch)[:, None, None, None],
        "h": np.arange(spec.q_heads)[:, None, None],
        "q_index": q,
        "k_index": k,
        "q": q + offset[:, None, None, None].astype("int64"),
        "k": k + spec.kv_offset,
    }


def _seen(spec, env, operands):
    shape = (spec.batch, spec.q_heads, spec.q_len, spec.kv_len)
    seen = jnp.ones(shape, bool)
    if spec.mask is not None:
        seen &= evaluate(spec.mask.expr, env, operands)
    if spec.kv_lengths:
        seen &= env["k_index"] < operands["kv_lengths"][:, None, None, None]
    if spec.q_lengths:
        seen &= env["q_index"] < operands["q_lengths"][:, None, None, None]
    return seen


def evaluate(node, env, operands):
    """An expression's values, as `reference.evaluate` has them, in float64."""
    if node.op == "const":
        return np.float64(node.value) if node.kind == "float" else node.value
    if node.op == "var":
        return env[str(node.value)]
    if node.op == "load":
        return _read(node, env, operands)
    args = [jnp.asarray(evaluate(a, env, operands)) for a in node.args]
    if node.op in expr.COMPARISONS and "s" not in expr.variables(node):
        args = [a.astype("float32") if a.dtype == "float64" else a for a in args]
    if node.op == "searchsorted":
        return (operands[node.value.name] <= args[0][..., None]).sum(-1)
    if node.op == "float":
        return args[0].astype("float64")
    if node.op == "int":
        return args[0].astype("int64")
    return JNP[node.op](*args)


def _read(node, env, operands):
    table = jnp.asarray(operands[node.value.name])
    index = []
    for i in node.args:
        name = f"{i.value}_index" if i.op == "var" and i.value in ("q", "k") else None
        index.append(jnp.asarray(env[name] if name else evaluate(i, env, operands)))
    inside = jnp.ones((), bool)
    for at, size in zip(index, table.shape, strict=True):
        inside = inside & (at >= 0) & (at < size)
    index = [jnp.clip(i, 0, n - 1) for i, n in zip(index, table.shape, strict=True)]
    values = table[tuple(index)]
    if node.kind == "bool":
        return values
    if node.kind == "int":
        return values.astype("int64")
    return jnp.where(inside, values.astype("float64"), jnp.nan)


def jitted(spec):
    return jax.jit(lambda *given: attention(spec, *given))
