"""Attention in chunks of 2048 queries and 77 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          q       [1, 4096, 8, 40]  float16
          k       [1, 77, 8, 40]  float16
          v       [1, 77, 8, 40]  float16
          out     [1, 4096, 8, 40]  float16
plan      running · 2048 queries × 77 keys · 1 kv head a step · fori
          tiles of a head: 2; 2 full, 0 on an edge, 0 empty and never visited
cost      404 MFLOP, 1.1 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 8, "q_len": 4096, "kv_len": 77, "qk_dim": 40,
          "v_dim": 40, "dtype": "float16", "memory_budget": "16MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 2048,
          "k_chunk": 77, "head_chunk": 1, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": true, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 4096, 77  # batch, queries, keys
H, G = 8, 8  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 40  # head dim
Q_CHUNK, K_CHUNK = 2048, 77  # of a tile
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.15811388300841897 * LOG2E
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D)
    """
    _check("q", q, (B, T, H, D), "float16")
    _check("k", k, (B, S, G, D), "float16")
    _check("v", v, (B, S, G, D), "float16")
    q, k, v = _alike(q, k, v)

    def queries(step, out_all):
        """One chunk of queries of the heads that are computed together."""
        i = step % Q_CHUNKS
        g = step // Q_CHUNKS
        q_start = i * Q_CHUNK
        at = (0, q_start, g, 0)
        # barriers, here and below: else XLA converts all of q, k, v outside the loops
        q_here, at = lax.optimization_barrier((q, at))
        rows = lax.dynamic_slice(q_here, at, (1, Q_CHUNK, 1, D))
        rows = rows.reshape(Q_CHUNK, D)
        rows = rows.astype(jnp.float32) * SCALE

        def tile(c):
            """Scores (Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (0, k_start, g, 0)
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
        carry = interior(0, carry)
        m, total, acc = carry
        out = acc / total[..., None]
        out = out.reshape(1, Q_CHUNK, 1, D).astype(jnp.float16)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, g, 0))
        return out_all

    out_all = jnp.zeros_like(q, jnp.float16, (B, T, H, D))
    return lax.fori_loop(0, G * Q_CHUNKS, queries, out_all)


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
