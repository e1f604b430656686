"""Attention written plainly in jax.numpy, all pairs at once: what JAX differentiates itself.

It shares nothing with attngen but the trees of masks and scores.
"""

import jax
import jax.numpy as jnp

OPS = {
    "add": jnp.add,
    "sub": jnp.subtract,
    "mul": jnp.multiply,
    "div": jnp.divide,
    "floordiv": jnp.floor_divide,
    "mod": jnp.mod,
    "neg": jnp.negative,
    "abs": jnp.abs,
    "minimum": jnp.minimum,
    "maximum": jnp.maximum,
    "exp": jnp.exp,
    "log": jnp.log,
    "tanh": jnp.tanh,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "and": jnp.logical_and,
    "or": jnp.logical_or,
    "not": jnp.logical_not,
    "where": jnp.where,
    "float": lambda x: jnp.asarray(x, float),
    "int": lambda x: jnp.asarray(x, int),
}


def value(node, env, index, operands):
    if node.op == "const":
        return node.value
    if node.op == "var":
        return env[node.value]
    if node.op == "load":
        at = [
            index[i.value]
            if i.op == "var" and i.value in index
            else value(i, env, index, operands)
            for i in node.args
        ]
        return operands[node.value.name][tuple(at)]
    if node.op in ("lt", "le", "gt", "ge", "eq", "ne") and not reads_s(node):
        args = [value(a, env, index, operands) for a in node.args]
        if node.args[0].kind == "float":
            args = [jnp.asarray(a, jnp.float32) for a in args]
        return OPS[node.op](*args)
    return OPS[node.op](*(value(a, env, index, operands) for a in node.args))


def reads_s(node):
    return node.value == "s" or any(reads_s(a) for a in node.args)


def dense(spec, q, k, v, operands):
    """out and lse [b, h, t], of arrays in the spec's layout, in their dtypes."""
    if spec.layout == "bthd":
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if spec.kv_lengths:  # whatever lies behind them
        held = jnp.arange(spec.kv_len) < operands["kv_lengths"][:, None]
        k, v = (jnp.where(held[:, None, :, None], x, 0) for x in (k, v))
    repeats = spec.q_heads // spec.kv_heads
    k, v = (jnp.repeat(x, repeats, 1) for x in (k, v))
    stats = jnp.dtype(spec.stats_dtype) if q.dtype != jnp.float64 else q.dtype
    s = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=stats)
    s = s * spec.scale_value
    grids = jnp.ogrid[: spec.batch, : spec.q_heads, : spec.q_len, : spec.kv_len]
    index = dict(zip("bhqk", grids, strict=True))
    first = spec.static_q_offset
    if spec.q_offset == "operand":
        first = operands["q_offset"][:, None, None, None]
    elif first is None:
        first = operands["kv_lengths"][:, None, None, None] - spec.q_len
    env = index | {"q": index["q"] + first, "k": index["k"] + spec.kv_offset}
    for score in spec.score:
        s = value(score.expr, env | {"s": s}, index, operands)
    shape = (spec.batch, spec.q_heads, spec.q_len, spec.kv_len)
    there = jnp.broadcast_to(s, shape) != -jnp.inf
    if spec.mask is not None:
        there &= value(spec.mask.expr, env, index, operands)
    if spec.kv_lengths:
        there &= index["k"] < operands["kv_lengths"][:, None, None, None]
    if spec.q_lengths:
        there &= index["q"] < operands["q_lengths"][:, None, None, None]
    seen = there.any(-1, keepdims=True)
    safe = jnp.where(there, s, 0.0)  # where on both sides: 0 · ∞ is NaN
    m = jax.lax.stop_gradient(jnp.where(there, safe, -1e30).max(-1, keepdims=True))
    p = jnp.where(there, jnp.exp(jnp.where(there, safe - m, 0.0)), 0.0)
    total = jnp.where(seen, p.sum(-1, keepdims=True), 1.0)
    lse = jnp.where(seen, m + jnp.log(total), -jnp.inf)[..., 0]
    if spec.sink:
        sink = operands["sink"][None, :, None, None]
        total = total + jnp.where(seen, jnp.exp(jnp.where(seen, sink - m, 0)), 0)
    weights = (p / total).astype(v.dtype)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, v, preferred_element_type=stats)
    out = out.astype(q.dtype)
    if spec.layout == "bthd":
        out = jnp.swapaxes(out, 1, 2)
    return {"out": out, "lse": lse}
