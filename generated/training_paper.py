"""Attention in chunks of 256 queries and 256 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          and the gradients of q, k, v, once, in reverse mode
          q       [1, 16384, 1, 64]  bfloat16
          k       [1, 16384, 1, 64]  bfloat16
          v       [1, 16384, 1, 64]  bfloat16
          out     [1, 16384, 1, 64]  float32
plan      running · 256 queries × 256 keys · 1 kv head a step · fori; backward:
          two_passes · 128 queries × 256 keys · 1 kv head a step · delta again
          tiles of a head: 4096; 4096 full, 0 on an edge, 0 empty and never visited
cost      309 GFLOP, 1011.1 KiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 1, "kv_heads": 1, "q_len": 16384, "kv_len": 16384, "qk_dim": 64,
          "v_dim": 64, "dtype": "bfloat16", "out_dtype": "float32", "derivatives":
          "vjp", "memory_budget": "1MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 256, "head_chunk": 1, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": true, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0, "backward":
          "two_passes", "backward_q_chunk": 128, "backward_k_chunk": 256,
          "backward_head_chunk": 1, "backward_batch_chunk": 1, "backward_exp": "exp2",
          "backward_product_dtype": "float32", "backward_guard": true, "backward_scale":
          "queries", "backward_mass": "none", "backward_delta": "again",
          "backward_store": "p", "backward_ds": "once", "backward_slices": "nd"}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 16384, 16384  # batch, queries, keys
H, G = 1, 1  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 256, 256  # of a tile
Q_BLOCK, K_BLOCK = 128, 256  # of a tile, backward
Q_BLOCKS = -(-T // Q_BLOCK)
K_BLOCKS = -(-S // K_BLOCK)
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125
SCALE_2 = SCALE * LOG2E
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D)
    """
    _check("q", q, (B, T, H, D), "bfloat16")
    _check("k", k, (B, S, G, D), "bfloat16")
    _check("v", v, (B, S, G, D), "bfloat16")
    q, k, v = _alike(q, k, v)

    return _attention(q, k, v)


@jax.custom_vjp
def _attention(q, k, v):
    out, _ = _forward(q, k, v)
    return out


def _attention_fwd(q, k, v):
    """The outputs, and what gradients are made of."""
    q, k, v = _first_only((q, k, v))
    out, lse = _forward(q, k, v)
    return out, (q, k, v, out, lse)


def _attention_bwd(kept, dout):
    """Of all arguments; None where they aren't floats."""
    kept, dout = _first_only((kept, dout))
    q, k, v, out, lse = kept
    dq, dk, dv = _backward(q, k, v, out, lse, dout)
    return dq, dk, dv


_attention.defvjp(_attention_fwd, _attention_bwd)


@jax.custom_jvp
def _first_only(x):
    return x


@_first_only.defjvp
def _no_second(x, dx):
    raise TypeError(
        "derivatives='vjp' has first derivatives; derivatives='any' has all of them"
    )


@jax.custom_batching.sequential_vmap
def _forward(q, k, v):
    """The outputs; under vmap, of one batch after another."""

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all = carried
        i = step
        q_start = i * Q_CHUNK
        at = (0, q_start, 0, 0)
        # barriers, here and below: else XLA converts all of q, k, v outside the loops
        q_here, at = lax.optimization_barrier((q, at))
        rows = lax.dynamic_slice(q_here, at, (1, Q_CHUNK, 1, D))
        rows = rows.reshape(Q_CHUNK, D)
        rows = rows.astype(jnp.float32) * SCALE_2

        def tile(c):
            """Scores (Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (0, k_start, 0, 0)
            k_here, v_here, at = lax.optimization_barrier((k, v, at))
            kc = lax.dynamic_slice(k_here, at, (1, K_CHUNK, 1, D))
            vc = lax.dynamic_slice(v_here, at, (1, K_CHUNK, 1, D))
            kc = kc.reshape(K_CHUNK, D).astype(jnp.float32)
            vc = vc.reshape(K_CHUNK, D).astype(jnp.float32)
            s = jnp.einsum("qd,kd->qk", rows, kc)
            return s, vc

        def interior(c, carry):
            return _add(carry, *tile(c))

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (Q_CHUNK,))
        total = jnp.zeros_like(rows, jnp.float32, (Q_CHUNK,))
        acc = jnp.zeros_like(rows, jnp.float32, (Q_CHUNK, D))
        carry = m, total, acc
        carry = lax.fori_loop(0, 64, interior, carry)
        m, total, acc = carry
        lse = ((m + jnp.log2(total)) / LOG2E).reshape(1, 1, Q_CHUNK)
        out = acc / total[..., None]
        out = out.reshape(1, Q_CHUNK, 1, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, 0, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (0, 0, q_start))
        return out_all, lse_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, Q_CHUNKS, queries, (out_all, lse_all))


@jax.custom_batching.sequential_vmap
def _backward(q, k, v, out, lse, dout):
    """Tiles are made again, from lse -> dq, dk, dv."""

    def queries_of(i):
        """A chunk of queries -> rows, d_rows, lse_row, delta_row."""
        q_start = i * Q_BLOCK
        at = (0, q_start, 0, 0)
        # barriers, here and below: else XLA converts whole arrays outside the loops
        q_here, dout_here, out_here, at = lax.optimization_barrier((q, dout, out, at))
        rows = lax.dynamic_slice(q_here, at, (1, Q_BLOCK, 1, D)).reshape(Q_BLOCK, D)
        rows = rows.astype(jnp.float32) * SCALE_2
        d_rows = lax.dynamic_slice(dout_here, at, (1, Q_BLOCK, 1, D))
        d_rows = d_rows.reshape(Q_BLOCK, D)
        out_rows = lax.dynamic_slice(out_here, at, (1, Q_BLOCK, 1, D))
        out_rows = out_rows.reshape(Q_BLOCK, D)
        at = (0, 0, q_start)
        lse_row = lax.dynamic_slice(lse, at, (1, 1, Q_BLOCK)).reshape(Q_BLOCK)
        delta_row = (d_rows * out_rows).sum(-1)
        lse_row *= LOG2E
        return rows, d_rows, lse_row, delta_row

    def keys_of(c):
        """A chunk of keys, and their values."""
        k_start = c * K_BLOCK
        at = (0, k_start, 0, 0)
        # barriers, here and below: else XLA converts whole arrays outside the loops
        k_here, v_here, at = lax.optimization_barrier((k, v, at))
        kc = lax.dynamic_slice(k_here, at, (1, K_BLOCK, 1, D)).reshape(K_BLOCK, D)
        kc = kc.astype(jnp.float32)
        vc = lax.dynamic_slice(v_here, at, (1, K_BLOCK, 1, D)).reshape(K_BLOCK, D)
        vc = vc.astype(jnp.float32)
        return kc, vc

    def tile(i, c, of_queries, of_keys):
        """A tile made again -> p, ds (the cotangent of scale q·k), and its keys."""
        rows, d_rows, lse_row, delta_row = of_queries
        kc, vc = of_keys
        s = jnp.einsum("qd,kd->qk", rows, kc)
        p = jnp.exp2(s - lse_row[..., None])
        p = lax.optimization_barrier(p)  # made once
        dp = jnp.einsum("qd,kd->qk", d_rows, vc)
        ds = p * (dp - delta_row[..., None])
        return p, ds, kc

    def queries(step, carried):
        """One chunk of queries: dq."""
        dq = carried
        i = step
        q_start = i * Q_BLOCK
        of_queries = queries_of(i)

        def add(c, carry):
            dq_here = carry
            of_keys = keys_of(c)
            _, ds, kc = tile(i, c, of_queries, of_keys)
            dq_here += jnp.einsum("qk,kd->qd", ds, kc)
            return dq_here

        dq_here = jnp.zeros_like(q, jnp.float32, (Q_BLOCK, D))
        carry = dq_here
        carry = lax.fori_loop(0, 64, add, carry)
        dq_here = carry
        dq_here *= SCALE
        at = (0, q_start, 0, 0)
        dq_here = dq_here.reshape(1, Q_BLOCK, 1, D).astype(jnp.bfloat16)
        dq = lax.dynamic_update_slice(dq, dq_here, at)
        return dq

    # written whole, whatever it begins with: of arrays that begin alike XLA makes one
    dq = jnp.full_like(q, 1, jnp.bfloat16, (B, T, H, D))
    dq = lax.fori_loop(0, Q_BLOCKS, queries, dq)

    def keys(step, carried):
        """One chunk of keys: dk and dv."""
        dk, dv = carried
        c = step
        k_start = c * K_BLOCK
        of_keys = keys_of(c)

        def add(i, carry):
            dk_here, dv_here = carry
            of_queries = queries_of(i)
            rows, d_rows, *_ = of_queries
            p, ds, _ = tile(i, c, of_queries, of_keys)
            dv_here += jnp.einsum("qd,qk->dk", d_rows, p)
            dk_here += jnp.einsum("qd,qk->dk", rows, ds)
            return dk_here, dv_here

        dk_here = jnp.zeros_like(q, jnp.float32, (D, K_BLOCK))
        dv_here = jnp.zeros_like(q, jnp.float32, (D, K_BLOCK))
        carry = dk_here, dv_here
        carry = lax.fori_loop(0, 128, add, carry)
        dk_here, dv_here = carry
        dk_here = dk_here / LOG2E
        at = (0, k_start, 0, 0)
        dk_here = dk_here.transpose(1, 0)
        dk_here = dk_here.reshape(1, K_BLOCK, 1, D).astype(jnp.bfloat16)
        dk = lax.dynamic_update_slice(dk, dk_here, at)
        dv_here = dv_here.transpose(1, 0)
        dv_here = dv_here.reshape(1, K_BLOCK, 1, D).astype(jnp.bfloat16)
        dv = lax.dynamic_update_slice(dv, dv_here, at)
        return dk, dv

    # written whole, whatever it begins with: of arrays that begin alike XLA makes one
    dk = jnp.full_like(q, 2, jnp.bfloat16, (B, S, G, D))
    dv = jnp.full_like(q, 3, jnp.bfloat16, (B, S, G, D))
    carried = dk, dv
    dk, dv = lax.fori_loop(0, K_BLOCKS, keys, carried)
    return dq, dk, dv


def _check(name, x, shape, dtype):
    if x.shape != shape or x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}{x.shape}, not {dtype}{shape}")


def _alike(*arrays):
    """The arrays; in a jax.shard_map each varies over all devices that any varies over.

    What a loop carries has to begin so, and does by zeros_like. Gradients of an array
    are summed over the devices that it didn't vary over.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    nought = sum(jnp.zeros_like(x, jnp.int32, ()) for x in arrays)
    return [x + nought.astype(x.dtype) for x in arrays]


def _add(carry, s, vc):
    """The running maximum, sum, and weighted sum of values, with one more tile."""
    m, total, acc = carry
    m_new = jnp.maximum(m, s.max(-1))
    p = _exp2(s - m_new[..., None])
    rescale = jnp.exp2(m - m_new)
    pv = jnp.einsum("qk,kd->qd", p, vc)
    return m_new, total * rescale + p.sum(-1), acc * rescale[..., None] + pv


@jax.custom_jvp
def _exp2(x):
    """2**x for x <= 0, to a relative error of 2e-7 above 2**-126; 0 of -inf."""
    y = jnp.maximum(x, -127)  # of which all bits will be 0
    whole = lax.round(y, lax.RoundingMethod.TO_NEAREST_EVEN)
    power = jnp.float32(0.00132647273)
    for coefficient in (0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1):
        power = power * (y - whole) + coefficient
    bits = lax.bitcast_convert_type(power, jnp.int32)
    bits += whole.astype(jnp.int32) << 23  # to the exponent
    return lax.bitcast_convert_type(bits, jnp.float32)


_exp2.defjvps(lambda dx, power, x: dx * power / LOG2E)  # d 2**x = log(2) * 2**x
