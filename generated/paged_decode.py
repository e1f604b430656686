"""Attention in chunks of 4 queries and 512 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where k <= q
          and its index < kv_lengths[b]
          positions: query 0 is at bottom_right, key 0 at 0
          of paged k and v: key i of sequence b is token i%16 of page block_table[b,
          i//16]; entries behind its last key aren't followed
          of quantised k and v: each is its int8 number times k_scale, or v_scale, of
          its kv head and token
          q       [8, 4, 16, 128]  float32
          k       [4096, 16, 4, 128]  int8
          v       [4096, 16, 4, 128]  int8
          kv_lengths [8]  int32
          block_table [8, 512]  int32
          k_scale [4096, 4, 16]  float32
          v_scale [4096, 4, 16]  float32
          out     [8, 4, 16, 128]  float32
plan      running · 4 queries × 512 keys · 1 kv head a step · fori by 2
          tiles of a head: 16; 15 full, 1 on an edge, 0 empty and never visited
cost      2.15 GFLOP, 1.2 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"batch": 8, "q_heads": 16, "kv_heads": 4, "q_len": 4, "kv_len": 8192,
          "qk_dim": 128, "v_dim": 128, "kv_dtype": "int8", "q_offset": "bottom_right",
          "mask": "causal", "kv_lengths": true, "storage": "paged", "kv_scale": "token",
          "memory_budget": "8MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 4,
          "k_chunk": 512, "head_chunk": 1, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": true, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 2, "diagonal": 0}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 8, 4, 8192  # batch, queries, keys
PAGES, PAGE_SIZE = 4096, 16  # pages of K/V, tokens of a page
H, G = 16, 4  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 128  # head dim
Q_CHUNK, K_CHUNK = 4, 512  # of a tile
UNROLL = 2  # tiles of a step, without a mask
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.08838834764831845 * LOG2E


def attention(q, k, v, *, kv_lengths, block_table, k_scale, v_scale):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, D), "float32")
    _check("k", k, (PAGES, PAGE_SIZE, G, D), "int8")
    _check("v", v, (PAGES, PAGE_SIZE, G, D), "int8")
    _check("kv_lengths", kv_lengths, (B,), "int32")
    _check("block_table", block_table, (B, 512), "int32")
    _check("k_scale", k_scale, (4096, 4, 16), "float32")
    _check("v_scale", v_scale, (4096, 4, 16), "float32")
    q_offset = kv_lengths - T  # the last query stands at the last key that is there
    kv_lengths = jnp.minimum(kv_lengths, S)
    q, k, v, kv_lengths, block_table, k_scale, v_scale, q_offset = _alike(
        q, k, v, kv_lengths, block_table, k_scale, v_scale, q_offset
    )

    def queries(step, out_all):
        """One chunk of queries of the heads that are computed together."""
        g = step % G
        b = step // G
        at = (b, 0, g * R, 0)
        # barriers, here and below: else XLA converts all of q, k, v outside the loops
        q_here, at = lax.optimization_barrier((q, at))
        rows = lax.dynamic_slice(q_here, at, (1, Q_CHUNK, R, D))
        rows = rows.reshape(Q_CHUNK, R, D)
        rows = rows.transpose(1, 0, 2)
        rows = rows * SCALE
        q_index = jnp.arange(Q_CHUNK)[:, None]
        offset_at_b = q_offset[b]
        q_pos = q_index + offset_at_b
        kv_length = kv_lengths[b]

        # Key chunks [0, last) hold what any query here sees, and
        # [0, full_last) only what every one of them sees.
        kv_count = kv_lengths[b].astype(int)
        offset = q_offset[b].astype(int)
        # q_lo and q_hi: positions, half-open
        q_lo = 0 + offset
        q_hi = Q_CHUNK + offset
        last = -(-jnp.minimum(q_hi, kv_count) // K_CHUNK)
        full_last = jnp.clip(jnp.minimum(q_lo + 1, kv_count) // K_CHUNK, 0, last)

        def tile(c):
            """Scores (R, Q_CHUNK, K_CHUNK), values, scales."""
            k_start = c * K_CHUNK
            k_here, v_here, k_start = lax.optimization_barrier((k, v, k_start))
            pages_at_c = lax.dynamic_slice(
                block_table,
                (b, k_start // PAGE_SIZE),
                (1, K_CHUNK // PAGE_SIZE),
            )
            pages_at_c = jnp.clip(pages_at_c[0], 0, PAGES - 1)
            kc = k_here[pages_at_c, :, g]
            vc = v_here[pages_at_c, :, g]
            tokens_at_c = k_start + jnp.arange(K_CHUNK)
            places_at_c = tokens_at_c % PAGE_SIZE
            pages_at_c = block_table[b, tokens_at_c // PAGE_SIZE]
            pages_at_c = jnp.clip(pages_at_c, 0, PAGES - 1)
            at = pages_at_c, g, places_at_c
            k_scale_at_c = k_scale[at].reshape(K_CHUNK)
            v_scale_at_c = v_scale[at].reshape(K_CHUNK)
            kc = kc.reshape(K_CHUNK, D).astype(jnp.float32)
            vc = vc.reshape(K_CHUNK, D).astype(jnp.float32)
            s = jnp.einsum("rqd,kd->rqk", rows, kc)
            s *= k_scale_at_c
            return s, vc, v_scale_at_c

        def masked(c):
            """A tile with the scores of keys that aren't seen at -inf."""
            s, vc, v_scale_at_c = tile(c)
            k_start = c * K_CHUNK
            k_index = k_start + jnp.arange(K_CHUNK)
            seen = k_index <= q_pos
            seen &= k_index < kv_length
            s = jnp.where(seen, s, -jnp.inf)
            there = (s != -jnp.inf).any((0, 1))
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc, v_scale_at_c

        def interior(c, carry):
            return _add(carry, *tile(c))

        def edge(c, carry):
            return _add(carry, *masked(c), unseen=True)

        def interiors(c, carry):
            """UNROLL chunks in a step."""
            for i in range(UNROLL):
                carry = interior(UNROLL * c + i, carry)
            return carry

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (R, Q_CHUNK))
        total = jnp.zeros_like(rows, jnp.float32, (R, Q_CHUNK))
        acc = jnp.zeros_like(rows, jnp.float32, (R, Q_CHUNK, D))
        carry = m, total, acc
        steps = jnp.maximum(full_last // UNROLL, 0)
        carry = lax.fori_loop(0, steps, interiors, carry)
        carry = lax.fori_loop(steps * UNROLL, full_last, interior, carry)
        carry = lax.fori_loop(full_last, last, edge, carry)
        m, total, acc = carry
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.transpose(1, 0, 2)
        out = out.reshape(1, Q_CHUNK, R, D)
        out_all = lax.dynamic_update_slice(out_all, out, (b, 0, g * R, 0))
        return out_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    return lax.fori_loop(0, B * G, queries, out_all)


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


def _add(carry, s, vc, v_scale_at_c, *, unseen=False):
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
    scaled = p * v_scale_at_c
    if unseen:
        scaled = jnp.where(p == 0, 0, scaled)  # a scale that isn't there may be NaN
    pv = jnp.einsum("rqk,kd->rqd", scaled, vc)
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
