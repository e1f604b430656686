"""Attention in chunks of 256 queries and 128 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          then    s = s + slopes[h] * (k - q)
          key k is there for query q where k <= q
          q       [1, 8, 1000, 72]  float32
          k       [1, 8, 1000, 72]  float32
          v       [1, 8, 1000, 72]  float32
          slopes  [8]  float32
          out     [1, 8, 1000, 72]  float32
          lse     [1, 8, 1000]  float32
plan      running · 256 queries × 128 keys · 8 kv heads a step · fori by 2
          tiles of a head: 32; 11 full, 9 on an edge, 12 empty and never visited
cost      1.51 GFLOP (2.3 GFLOP without skipping), 4.5 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 8, "q_len": 1000, "kv_len": 1000, "qk_dim": 72,
          "v_dim": 72, "layout": "bhtd", "mask": "causal", "score": ["alibi"],
          "outputs": ["out", "lse"], "memory_budget": "8MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 128, "head_chunk": 8, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 2, "diagonal": 0}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 1000, 1000  # batch, queries, keys
H, G = 8, 8  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 72  # head dim
Q_CHUNK, K_CHUNK = 256, 128  # of a tile
UNROLL = 2  # tiles of a step, without a mask
G_CHUNK = 8  # kv heads of a tile
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.11785113019775792
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v, *, slopes):
    """Attention of the arrays that are checked first -> out, lse.

    out (B, H, T, D), 0 where a query sees no key
    lse (B, H, T): log of the sum of exp(s), -inf where a query sees no key
    """
    _check("q", q, (B, H, T, D), "float32")
    _check("k", k, (B, G, S, D), "float32")
    _check("v", v, (B, G, S, D), "float32")
    _check("slopes", slopes, (H,), "float32")
    q, k, v, slopes = _alike(q, k, v, slopes)

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all = carried
        i = step
        q_start = jnp.minimum(i * Q_CHUNK, T - Q_CHUNK)  # the last overlaps
        at = (0, 0, q_start, 0)
        rows = lax.dynamic_slice(q, at, (1, G_CHUNK, Q_CHUNK, D))
        rows = rows.reshape(G_CHUNK, Q_CHUNK, D)
        rows = rows * SCALE
        slopes_at_h = lax.dynamic_slice(slopes, (0,), (G_CHUNK,))
        slopes_at_h = slopes_at_h.reshape(G_CHUNK, 1, 1)
        q_index = q_start + jnp.arange(Q_CHUNK)[:, None]

        # Key chunks [0, last) hold what any query here sees, and
        # [0, full_last) only what every one of them sees.
        # q_lo and q_hi: positions, half-open
        q_lo = q_start
        q_hi = q_start + Q_CHUNK
        last = -(-q_hi // K_CHUNK)
        full_last = jnp.clip((q_lo + 1) // K_CHUNK, 0, last)

        def tile(c):
            """Scores (G_CHUNK, Q_CHUNK, K_CHUNK) and values."""
            k_start = jnp.minimum(c * K_CHUNK, S - K_CHUNK)  # the last overlaps
            at = (0, 0, k_start, 0)
            kc = lax.dynamic_slice(k, at, (1, G_CHUNK, K_CHUNK, D))
            vc = lax.dynamic_slice(v, at, (1, G_CHUNK, K_CHUNK, D))
            kc = kc.reshape(G_CHUNK, K_CHUNK, D)
            vc = vc.reshape(G_CHUNK, K_CHUNK, D)
            s = jnp.einsum("gqd,gkd->gqk", rows, kc)
            k_index = k_start + jnp.arange(K_CHUNK)
            s = s + slopes_at_h * jnp.float32(k_index - q_index)
            there = (s != -jnp.inf).any(1)
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc

        def masked(c):
            """A tile with the scores of keys that aren't seen at -inf."""
            s, vc = tile(c)
            k_start = jnp.minimum(c * K_CHUNK, S - K_CHUNK)  # the last overlaps
            k_index = k_start + jnp.arange(K_CHUNK)
            seen = k_index <= q_index
            seen &= k_index >= c * K_CHUNK
            s = jnp.where(seen, s, -jnp.inf)
            there = (s != -jnp.inf).any(1)
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc

        def interior(c, carry):
            return _add(carry, *tile(c), unseen=True)

        def edge(c, carry):
            return _add(carry, *masked(c), unseen=True)

        def interiors(c, carry):
            """UNROLL chunks in a step."""
            for i in range(UNROLL):
                carry = interior(UNROLL * c + i, carry)
            return carry

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (G_CHUNK, Q_CHUNK))
        total = jnp.zeros_like(rows, jnp.float32, (G_CHUNK, Q_CHUNK))
        acc = jnp.zeros_like(rows, jnp.float32, (G_CHUNK, Q_CHUNK, D))
        carry = m, total, acc
        steps = jnp.maximum(full_last // UNROLL, 0)
        carry = lax.fori_loop(0, steps, interiors, carry)
        carry = lax.fori_loop(steps * UNROLL, full_last, interior, carry)
        carry = lax.fori_loop(full_last, last, edge, carry)
        m, total, acc = carry
        lse = (m + jnp.log(total)).reshape(1, G_CHUNK, Q_CHUNK)
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.reshape(1, G_CHUNK, Q_CHUNK, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, 0, q_start, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (0, 0, q_start))
        return out_all, lse_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, H, T, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, Q_CHUNKS, queries, (out_all, lse_all))


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
    pv = jnp.einsum("gqk,gkd->gqd", p, vc)
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
