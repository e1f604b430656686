"""Attention in chunks of 256 queries and 128 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where (k <= q) & (document_ids[b, q] ==
          document_ids[b, k])
          q       [2, 2048, 4, 64]  bfloat16
          k       [2, 2048, 4, 64]  bfloat16
          v       [2, 2048, 4, 64]  bfloat16
          document_ids [2, 2048]  int32
          out     [2, 2048, 4, 64]  bfloat16
plan      running · 256 queries × 128 keys · 4 kv heads of 2 batches a step · fori ·
          skip list
          tiles of a head: 128; 56 always empty, at most 72 visited: document_ids says
          which at run time
cost      4.83 GFLOP (8.59 GFLOP without skipping), 3.5 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"batch": 2, "q_heads": 4, "kv_heads": 4, "q_len": 2048, "kv_len": 2048,
          "qk_dim": 64, "v_dim": 64, "dtype": "bfloat16", "mask": {"and": ["causal",
          "documents"]}, "memory_budget": "16MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 128, "head_chunk": 4, "batch_chunk": 2, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": true, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0, "skip": "list"}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 2, 2048, 2048  # batch, queries, keys
H, G = 4, 4  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 256, 128  # of a tile
K_CHUNKS = -(-S // K_CHUNK)
B_CHUNK = 2  # batches of a tile
G_CHUNK = 4  # kv heads of a tile
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125 * LOG2E
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v, *, document_ids):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, D), "bfloat16")
    _check("k", k, (B, S, G, D), "bfloat16")
    _check("v", v, (B, S, G, D), "bfloat16")
    _check("document_ids", document_ids, (B, S), "int32")
    q, k, v, document_ids = _alike(q, k, v, document_ids)

    document_ids_at_chunks = _extremes(document_ids, K_CHUNK)

    def queries(step, out_all):
        """One chunk of queries of the heads that are computed together."""
        i = step
        q_start = i * Q_CHUNK
        at = (0, q_start, 0, 0)
        # barriers, here and below: else XLA converts all of q, k, v outside the loops
        q_here, at = lax.optimization_barrier((q, at))
        rows = lax.dynamic_slice(q_here, at, (B_CHUNK, Q_CHUNK, G_CHUNK, D))
        rows = rows.reshape(B_CHUNK, Q_CHUNK, G_CHUNK, D)
        rows = rows.transpose(0, 2, 1, 3)
        rows = rows.astype(jnp.float32) * SCALE
        q_index = q_start + jnp.arange(Q_CHUNK)[:, None]
        document_ids_at_bq = lax.dynamic_slice(
            document_ids,
            (0, q_start),
            (B_CHUNK, Q_CHUNK),
        )
        document_ids_at_bq = document_ids_at_bq.reshape(B_CHUNK, 1, Q_CHUNK, 1)

        # What each key chunk holds, told by its ends and by what is read there.
        key = jnp.arange(K_CHUNKS) * K_CHUNK
        q_lo = q_start
        q_hi = q_start + Q_CHUNK
        k_lo = key
        k_hi = key + K_CHUNK
        document_ids_at_bq_min = document_ids_at_bq.min()
        document_ids_at_bq_max = document_ids_at_bq.max()
        document_ids_at_bk_min = document_ids_at_chunks[0].min(0)
        document_ids_at_bk_max = document_ids_at_chunks[1].max(0)
        some = k_lo < q_hi
        some &= document_ids_at_bq_min <= document_ids_at_bk_max
        some &= document_ids_at_bk_min <= document_ids_at_bq_max
        every = k_hi <= q_lo + 1
        every &= document_ids_at_bk_max <= document_ids_at_bq_min
        every &= document_ids_at_bq_max <= document_ids_at_bk_min
        kind = jnp.where(every, 0, jnp.where(some, 1, 2))
        order = jnp.argsort(kind)  # the full ones first, the empty ones last
        full, visited = (kind == 0).sum(), (kind < 2).sum()

        def tile(c):
            """Scores (B_CHUNK, G_CHUNK, Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (0, k_start, 0, 0)
            k_here, v_here, at = lax.optimization_barrier((k, v, at))
            kc = lax.dynamic_slice(k_here, at, (B_CHUNK, K_CHUNK, G_CHUNK, D))
            vc = lax.dynamic_slice(v_here, at, (B_CHUNK, K_CHUNK, G_CHUNK, D))
            kc = kc.astype(jnp.float32)
            vc = vc.astype(jnp.float32)
            s = jnp.einsum("bgqd,bkgd->bgqk", rows, kc)
            return s, vc

        def masked(c):
            """A tile with the scores of keys that aren't seen at -inf."""
            s, vc = tile(c)
            k_start = c * K_CHUNK
            k_index = k_start + jnp.arange(K_CHUNK)
            document_ids_at_bk = lax.dynamic_slice(
                document_ids,
                (0, k_start),
                (B_CHUNK, K_CHUNK),
            )
            document_ids_at_bk = document_ids_at_bk.reshape(B_CHUNK, 1, 1, K_CHUNK)
            seen = (k_index <= q_index) & (document_ids_at_bq == document_ids_at_bk)
            s = jnp.where(seen, s, -jnp.inf)
            there = (s != -jnp.inf).any(2).transpose(0, 2, 1)
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc

        def interior(i, carry):
            return _add(carry, *tile(order[i]))

        def edge(i, carry):
            return _add(carry, *masked(order[i]), unseen=True)

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (B_CHUNK, G_CHUNK, Q_CHUNK))
        total = jnp.zeros_like(rows, jnp.float32, (B_CHUNK, G_CHUNK, Q_CHUNK))
        acc = jnp.zeros_like(rows, jnp.float32, (B_CHUNK, G_CHUNK, Q_CHUNK, D))
        carry = m, total, acc
        carry = lax.fori_loop(0, full, interior, carry)
        carry = lax.fori_loop(full, visited, edge, carry)
        m, total, acc = carry
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.transpose(0, 2, 1, 3)
        out = out.reshape(B_CHUNK, Q_CHUNK, G_CHUNK, D).astype(jnp.bfloat16)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, 0, 0))
        return out_all

    out_all = jnp.zeros_like(q, jnp.bfloat16, (B, T, H, D))
    return lax.fori_loop(0, Q_CHUNKS, queries, out_all)


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


def _extremes(x, chunk):
    """The least and the greatest value in each chunk, along the last axis."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % chunk)], mode="edge")
    x = x.reshape(*x.shape[:-1], -1, chunk)
    return x.min(-1), x.max(-1)


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
    pv = jnp.einsum("bgqk,bkgd->bgqd", p, vc)
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
