"""Attention in chunks of 512 queries and 512 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where (k <= q) | (k < 300)
          q       [1, 2048, 8, 64]  float32
          k       [1, 2048, 8, 64]  float32
          v       [1, 2048, 8, 64]  float32
          out     [1, 2048, 8, 64]  float32
plan      running · 512 queries × 512 keys · 1 kv head a step · fori by 2
          tiles of a head: 16; 6 full, 4 on an edge, 6 empty and never visited
cost      5.37 GFLOP (8.59 GFLOP without skipping), 2.8 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 8, "q_len": 2048, "kv_len": 2048, "qk_dim": 64,
          "v_dim": 64, "mask": {"or": ["causal", {"prefix": {"length": 300}}]},
          "memory_budget": "8MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 512,
          "k_chunk": 512, "head_chunk": 1, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 2, "diagonal": 0}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 2048, 2048  # batch, queries, keys
H, G = 8, 8  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 512, 512  # of a tile
UNROLL = 2  # tiles of a step, without a mask
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125 * LOG2E
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, D), "float32")
    _check("k", k, (B, S, G, D), "float32")
    _check("v", v, (B, S, G, D), "float32")
    q, k, v = _alike(q, k, v)

    def queries(step, out_all):
        """One chunk of queries of the heads that are computed together."""
        i = step % Q_CHUNKS
        g = step // Q_CHUNKS
        q_start = i * Q_CHUNK
        at = (0, q_start, g, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_CHUNK, 1, D))
        rows = rows.reshape(Q_CHUNK, D)
        rows = rows * SCALE
        q_index = q_start + jnp.arange(Q_CHUNK)[:, None]

        # Key chunks [0, last) hold what any query here sees, and
        # [0, full_last) only what every one of them sees.
        # q_lo and q_hi: positions, half-open
        q_lo = q_start
        q_hi = q_start + Q_CHUNK
        last = -(-jnp.maximum(q_hi, 300) // K_CHUNK)
        full_last = jnp.clip(jnp.maximum(q_lo + 1, 300) // K_CHUNK, 0, last)

        def tile(c):
            """Scores (Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (0, k_start, g, 0)
            kc = lax.dynamic_slice(k, at, (1, K_CHUNK, 1, D))
            vc = lax.dynamic_slice(v, at, (1, K_CHUNK, 1, D))
            kc = kc.reshape(K_CHUNK, D)
            vc = vc.reshape(K_CHUNK, D)
            s = jnp.einsum("qd,kd->qk", rows, kc)
            return s, vc

        def masked(c):
            """A tile with the scores of keys that aren't seen at -inf."""
            s, vc = tile(c)
            k_start = c * K_CHUNK
            k_index = k_start + jnp.arange(K_CHUNK)
            seen = (k_index <= q_index) | (k_index < 300)
            s = jnp.where(seen, s, -jnp.inf)
            there = (s != -jnp.inf).any(0)
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc

        def interior(c, carry):
            return _add(carry, *tile(c))

        def edge(c, carry):
            return _add(carry, *masked(c), unseen=True)

        def interiors(c, carry):
            """UNROLL chunks in a step."""
            for i in range(UNROLL):
                carry = interior(UNROLL * c + i, carry)
            return carry

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (Q_CHUNK,))
        total = jnp.zeros_like(rows, jnp.float32, (Q_CHUNK,))
        acc = jnp.zeros_like(rows, jnp.float32, (Q_CHUNK, D))
        carry = m, total, acc
        steps = jnp.maximum(full_last // UNROLL, 0)
        carry = lax.fori_loop(0, steps, interiors, carry)
        carry = lax.fori_loop(steps * UNROLL, full_last, interior, carry)
        carry = lax.fori_loop(full_last, last, edge, carry)
        m, total, acc = carry
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.reshape(1, Q_CHUNK, 1, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, g, 0))
        return out_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
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


def _add(carry, s, vc, *, unseen=False):
    """The running maximum, sum, and weighted sum of values, with one more tile.

    unseen: a score can be -inf, that of a key which its query doesn't see
    """
    m, total, acc = carry
    m_new = jnp.maximum(m, s.max(-1))
    m_safe = m_new
    if unseen:
        m_safe = jnp.where(m_new == -jnp.inf, 0, m_new)  # a row that saw no key yet
    p = _exp2(s - m_safe[..., None])
    rescale = jnp.exp2(m - m_safe)
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
