"""Attention in chunks of 512 queries and 512 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1.0
          then    s = s + relative_bias[h, minimum(abs(k - q), 8) + (abs(k - q) >= 12) +
          (abs(k - q) >= 16) + (abs(k - q) >= 23) + (abs(k - q) >= 32) + (abs(k - q) >=
          46) + (abs(k - q) >= 64) + (abs(k - q) >= 91) + 16 * (k > q)]
          q       [1, 512, 16, 64]  float32
          k       [1, 512, 16, 64]  float32
          v       [1, 512, 16, 64]  float32
          relative_bias [16, 32]  float32
          out     [1, 512, 16, 64]  float32
plan      running · 512 queries × 512 keys · 2 kv heads a step · fori
          tiles of a head: 1; 1 full, 0 on an edge, 0 empty and never visited
cost      1.07 GFLOP, 3.7 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 16, "kv_heads": 16, "q_len": 512, "kv_len": 512, "qk_dim": 64,
          "v_dim": 64, "scale": 1.0, "score": ["relative_buckets"], "memory_budget":
          "64MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 512,
          "k_chunk": 512, "head_chunk": 2, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 512, 512  # batch, queries, keys
H, G = 16, 16  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 512, 512  # of a tile
G_CHUNK = 2  # kv heads of a tile
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 1.0


def attention(q, k, v, *, relative_bias):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, D), "float32")
    _check("k", k, (B, S, G, D), "float32")
    _check("v", v, (B, S, G, D), "float32")
    _check("relative_bias", relative_bias, (H, 32), "float32")
    q, k, v, relative_bias = _alike(q, k, v, relative_bias)

    def queries(step, out_all):
        """One chunk of queries of the heads that are computed together."""
        g = step * G_CHUNK
        at = (0, 0, g, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_CHUNK, G_CHUNK, D))
        rows = rows.reshape(Q_CHUNK, G_CHUNK, D)
        rows = rows.transpose(1, 0, 2)
        rows = rows * SCALE
        q_index = jnp.arange(Q_CHUNK)[:, None]
        h_index = g + jnp.arange(G_CHUNK)[:, None, None]

        def tile(c):
            """Scores (G_CHUNK, Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (0, k_start, g, 0)
            kc = lax.dynamic_slice(k, at, (1, K_CHUNK, G_CHUNK, D))
            vc = lax.dynamic_slice(v, at, (1, K_CHUNK, G_CHUNK, D))
            kc = kc.reshape(K_CHUNK, G_CHUNK, D)
            vc = vc.reshape(K_CHUNK, G_CHUNK, D)
            s = jnp.einsum("gqd,kgd->gqk", rows, kc)
            k_index = k_start + jnp.arange(K_CHUNK)
            index_1_1 = k_index - q_index
            index_1_2 = jnp.abs(index_1_1)
            index_1_3 = jnp.minimum(index_1_2, 8) + jnp.int32(index_1_2 >= 12)
            index_1_3 = index_1_3 + jnp.int32(index_1_2 >= 16)
            index_1_3 = index_1_3 + jnp.int32(index_1_2 >= 23)
            index_1_3 = index_1_3 + jnp.int32(index_1_2 >= 32)
            index_1_3 = index_1_3 + jnp.int32(index_1_2 >= 46)
            index_1_3 = index_1_3 + jnp.int32(index_1_2 >= 64)
            index_1_3 = index_1_3 + jnp.int32(index_1_2 >= 91)
            index_1 = index_1_3 + 16 * jnp.int32(k_index > q_index)
            relative_bias_at_i0 = relative_bias.at[h_index, index_1].get(
                mode="promise_in_bounds",
            )
            s = s + relative_bias_at_i0
            there = (s != -jnp.inf).any(1).transpose(1, 0)
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc

        def interior(c, carry):
            return _add(carry, *tile(c), unseen=True)

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (G_CHUNK, Q_CHUNK))
        total = jnp.zeros_like(rows, jnp.float32, (G_CHUNK, Q_CHUNK))
        acc = jnp.zeros_like(rows, jnp.float32, (G_CHUNK, Q_CHUNK, D))
        carry = m, total, acc
        carry = interior(0, carry)
        m, total, acc = carry
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.transpose(1, 0, 2)
        out = out.reshape(1, Q_CHUNK, G_CHUNK, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, 0, g, 0))
        return out_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    return lax.fori_loop(0, (G // G_CHUNK), queries, out_all)


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


def _add(carry, s, vc, *, unseen=False):
    """The running maximum, sum, and weighted sum of values, with one more tile.

    unseen: a score can be -inf, that of a key which its query doesn't see
    """
    m, total, acc = carry
    m_new = jnp.maximum(m, s.max(-1))
    m_safe = m_new
    if unseen:
        m_safe = jnp.where(m_new == -jnp.inf, 0, m_new)  # a row that saw no key yet
    p = _exp2((s - m_safe[..., None]) * LOG2E)
    rescale = jnp.exp(m - m_safe)
    pv = jnp.einsum("gqk,kgd->gqd", p, vc)
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
