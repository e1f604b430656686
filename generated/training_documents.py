"""Attention in chunks of 256 queries and 128 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where (k <= q) & (document_ids[b, q] ==
          document_ids[b, k])
          with dropout: a weight is 0 with probability 0.1, else divided by 1 less that,
          by Philox 4x32-10 of seed, b, h and positions; not in lse
          and the gradients of q, k, v, once, in reverse mode
          q       [2, 2048, 4, 64]  float32
          k       [2, 2048, 4, 64]  float32
          v       [2, 2048, 4, 64]  float32
          seed    [2]  uint32
          document_ids [2, 2048]  int32
          out     [2, 2048, 4, 64]  float32
plan      running · 256 queries × 128 keys · 4 kv heads of 2 batches a step · fori ·
          skip list; backward: by_queries · 256 queries × 128 keys · 4 kv heads a step ·
          delta again
          tiles of a head: 128; 56 always empty, at most 72 visited: document_ids says
          which at run time
cost      16.9 GFLOP, 10.6 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"batch": 2, "q_heads": 4, "kv_heads": 4, "q_len": 2048, "kv_len": 2048,
          "qk_dim": 64, "v_dim": 64, "mask": {"and": ["causal", "documents"]},
          "dropout": 0.1, "derivatives": "vjp", "memory_budget": "16MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 128, "head_chunk": 4, "batch_chunk": 2, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0, "skip": "list",
          "backward": "by_queries", "backward_q_chunk": 256, "backward_k_chunk": 128,
          "backward_head_chunk": 4, "backward_batch_chunk": 2, "backward_exp": "exp2",
          "backward_product_dtype": "float32", "backward_guard": false,
          "backward_scale": "queries", "backward_mass": "kept", "backward_skip": "list",
          "backward_delta": "again", "backward_store": "p", "backward_ds": "once",
          "backward_slices": "nd"}
"""

from functools import partial

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
Q_BLOCK, K_BLOCK = 256, 128  # of a tile, backward
Q_BLOCKS = -(-T // Q_BLOCK)
K_BLOCKS = -(-S // K_BLOCK)
B_BLOCK = 2  # batches of a tile, backward
G_BLOCK = 4  # kv heads of a tile, backward
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125
SCALE_2 = SCALE * LOG2E
DROPOUT = 0.1  # probability, of each weight
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v, *, seed, document_ids):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, D), "float32")
    _check("k", k, (B, S, G, D), "float32")
    _check("v", v, (B, S, G, D), "float32")
    _check("seed", seed, (2,), "uint32")
    _check("document_ids", document_ids, (B, S), "int32")
    q, k, v, seed, document_ids = _alike(q, k, v, seed, document_ids)

    return _attention(q, k, v, seed, document_ids)


@jax.custom_vjp
def _attention(q, k, v, seed, document_ids):
    out, _, _ = _forward(q, k, v, seed, document_ids)
    return out


def _attention_fwd(q, k, v, seed, document_ids):
    """The outputs, and what gradients are made of."""
    q, k, v, seed, document_ids = _first_only((q, k, v, seed, document_ids))
    out, lse, mass = _forward(q, k, v, seed, document_ids)
    return out, (q, k, v, seed, document_ids, out, lse, mass)


def _attention_bwd(kept, dout):
    """Of all arguments; None where they aren't floats."""
    kept, dout = _first_only((kept, dout))
    q, k, v, seed, document_ids, out, lse, mass = kept
    dq, dk, dv = _backward(q, k, v, seed, document_ids, out, lse, mass, dout)
    return dq, dk, dv, None, None


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
def _forward(q, k, v, seed, document_ids):
    """The outputs; under vmap, of one batch after another."""

    document_ids_at_chunks = _extremes(document_ids, K_CHUNK)

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all, mass_all = carried
        i = step
        q_start = i * Q_CHUNK
        at = (0, q_start, 0, 0)
        rows = lax.dynamic_slice(q, at, (B_CHUNK, Q_CHUNK, G_CHUNK, D))
        rows = rows.reshape(B_CHUNK, Q_CHUNK, G_CHUNK, D)
        rows = rows.transpose(0, 2, 1, 3)
        rows = rows * SCALE_2
        b_index = jnp.arange(B_CHUNK)[:, None, None, None]
        h_index = jnp.arange(G_CHUNK)[:, None, None]
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
            """Scores (B_CHUNK, G_CHUNK, Q_CHUNK, K_CHUNK), values, what is kept."""
            k_start = c * K_CHUNK
            at = (0, k_start, 0, 0)
            kc = lax.dynamic_slice(k, at, (B_CHUNK, K_CHUNK, G_CHUNK, D))
            vc = lax.dynamic_slice(v, at, (B_CHUNK, K_CHUNK, G_CHUNK, D))
            s = jnp.einsum("bgqd,bkgd->bgqk", rows, kc)
            k_index = k_start + jnp.arange(K_CHUNK)
            kept = _dropout(seed, b_index, h_index, q_index, k_index)
            return s, vc, kept

        def masked(c):
            """A tile with the scores of keys that aren't seen at -inf."""
            s, vc, kept = tile(c)
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
            return s, vc, kept

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
        lse = (m + jnp.log2(total)) / LOG2E
        # the sum of exp(s - lse): 1, but that lse is rounded
        mass = total * jnp.exp2(m - lse * LOG2E)
        mass = jnp.where(total == 0, 1, mass)
        lse = lse.reshape(B_CHUNK, G_CHUNK, Q_CHUNK)
        mass = mass.reshape(B_CHUNK, G_CHUNK, Q_CHUNK)
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / (total * (1 - DROPOUT))[..., None]
        out = out.transpose(0, 2, 1, 3)
        out = out.reshape(B_CHUNK, Q_CHUNK, G_CHUNK, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, 0, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (0, 0, q_start))
        mass_all = lax.dynamic_update_slice(mass_all, mass, (0, 0, q_start))
        return out_all, lse_all, mass_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    mass_all = jnp.ones_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, Q_CHUNKS, queries, (out_all, lse_all, mass_all))


@jax.custom_batching.sequential_vmap
def _backward(q, k, v, seed, document_ids, out, lse, mass, dout):
    """Tiles are made again, from lse -> dq, dk, dv."""
    document_ids_at_chunks = _extremes(document_ids, K_BLOCK)

    def queries_of(i):
        """A chunk of queries -> rows, d_rows, lse_row, delta_row, mass_row."""
        q_start = i * Q_BLOCK
        at = (0, q_start, 0, 0)
        rows = lax.dynamic_slice(q, at, (B_BLOCK, Q_BLOCK, G_BLOCK, D))
        rows = rows.reshape(B_BLOCK, Q_BLOCK, G_BLOCK, D)
        rows = rows.transpose(0, 2, 1, 3)
        rows = rows * SCALE_2
        d_rows = lax.dynamic_slice(dout, at, (B_BLOCK, Q_BLOCK, G_BLOCK, D))
        d_rows = d_rows.reshape(B_BLOCK, Q_BLOCK, G_BLOCK, D)
        d_rows = d_rows.transpose(0, 2, 1, 3)
        out_rows = lax.dynamic_slice(out, at, (B_BLOCK, Q_BLOCK, G_BLOCK, D))
        out_rows = out_rows.reshape(B_BLOCK, Q_BLOCK, G_BLOCK, D)
        out_rows = out_rows.transpose(0, 2, 1, 3)
        at = (0, 0, q_start)
        lse_row = lax.dynamic_slice(lse, at, (B_BLOCK, G_BLOCK, Q_BLOCK))
        lse_row = lse_row.reshape(B_BLOCK, G_BLOCK, Q_BLOCK)
        known = lse_row != -jnp.inf  # else the query sees no key
        lse_row = jnp.where(known, lse_row, jnp.inf)
        rows = jnp.where(known[..., None], rows, 0)
        d_rows = jnp.where(known[..., None], d_rows, 0)
        delta_row = (d_rows * out_rows).sum(-1)
        d_rows /= 1 - DROPOUT
        lse_row *= LOG2E
        mass_row = lax.dynamic_slice(mass, at, (B_BLOCK, G_BLOCK, Q_BLOCK))
        mass_row = mass_row.reshape(B_BLOCK, G_BLOCK, Q_BLOCK)
        delta_row = jnp.where(known, delta_row, 0)
        return rows, d_rows, lse_row, delta_row, mass_row

    def keys_of(c):
        """A chunk of keys, and their values."""
        k_start = c * K_BLOCK
        at = (0, k_start, 0, 0)
        kc = lax.dynamic_slice(k, at, (B_BLOCK, K_BLOCK, G_BLOCK, D))
        kc = kc.reshape(B_BLOCK, K_BLOCK, G_BLOCK, D)
        vc = lax.dynamic_slice(v, at, (B_BLOCK, K_BLOCK, G_BLOCK, D))
        vc = vc.reshape(B_BLOCK, K_BLOCK, G_BLOCK, D)
        return kc, vc

    def tile(i, c, of_queries, of_keys, masked):
        """A tile made again -> p, ds (the cotangent of scale q·k), and its keys."""
        q_start = i * Q_BLOCK
        k_start = c * K_BLOCK
        rows, d_rows, lse_row, delta_row, mass_row = of_queries
        kc, vc = of_keys
        b_index = jnp.arange(B_BLOCK)[:, None, None, None]
        h_index = jnp.arange(G_BLOCK)[:, None, None]
        q_index = q_start + jnp.arange(Q_BLOCK)[:, None]
        document_ids_at_bq = lax.dynamic_slice(
            document_ids,
            (0, q_start),
            (B_BLOCK, Q_BLOCK),
        )
        document_ids_at_bq = document_ids_at_bq.reshape(B_BLOCK, 1, Q_BLOCK, 1)
        k_index = k_start + jnp.arange(K_BLOCK)
        s = jnp.einsum("bgqd,bkgd->bgqk", rows, kc)
        p = jnp.exp2(s - lse_row[..., None])
        p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded
        if masked:
            document_ids_at_bk = lax.dynamic_slice(
                document_ids,
                (0, k_start),
                (B_BLOCK, K_BLOCK),
            )
            document_ids_at_bk = document_ids_at_bk.reshape(B_BLOCK, 1, 1, K_BLOCK)
            seen = (k_index <= q_index) & (document_ids_at_bq == document_ids_at_bk)
            there = jnp.broadcast_to(seen, s.shape).any(2).transpose(0, 2, 1)[..., None]
            kc = jnp.where(there, kc, 0)  # else NaN, perhaps
            vc = jnp.where(there, vc, 0)
            p = jnp.where(seen, p, 0)
        p = lax.optimization_barrier(p)  # made once
        kept = _dropout(seed, b_index, h_index, q_index, k_index)
        kept = lax.optimization_barrier(kept)  # made once
        dp = jnp.einsum("bgqd,bkgd->bgqk", d_rows, vc)
        dp = jnp.where(kept, dp, 0)
        ds = p * (dp - delta_row[..., None])
        return jnp.where(kept, p, 0), ds, kc

    def heads(step, carried):
        """All queries and keys of the heads that are computed together."""
        dq, dk, dv = carried

        def queries(i, carried):
            """One chunk of queries, and all keys that any of it sees."""
            dq, dk_here, dv_here = carried
            q_start = i * Q_BLOCK

            # What each key chunk holds, told by its ends and by what is read there.
            document_ids_at_bq = lax.dynamic_slice(
                document_ids,
                (0, q_start),
                (B_BLOCK, Q_BLOCK),
            )
            document_ids_at_bq = document_ids_at_bq.reshape(B_BLOCK, 1, Q_BLOCK, 1)
            key = jnp.arange(K_BLOCKS) * K_BLOCK
            q_lo = q_start
            q_hi = q_start + Q_BLOCK
            k_lo = key
            k_hi = key + K_BLOCK
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
            of_queries = queries_of(i)
            rows, d_rows, *_ = of_queries
            rows = rows.transpose(0, 1, 3, 2)
            d_rows = d_rows.transpose(0, 1, 3, 2)
            # a barrier: else they are transposed for each tile
            rows, d_rows = lax.optimization_barrier((rows, d_rows))

            def add(n, carry, masked):
                dq_here, dk_here, dv_here = carry
                c = order[n]
                of_keys = keys_of(c)
                p, ds, kc = tile(i, c, of_queries, of_keys, masked)
                k_start = c * K_BLOCK
                part = jnp.einsum("bgdq,bgqk->bgdk", d_rows, p)
                dv_here = _add_at(dv_here, part, (0, 0, 0, k_start))
                part = jnp.einsum("bgdq,bgqk->bgdk", rows, ds)
                dk_here = _add_at(dk_here, part, (0, 0, 0, k_start))
                dq_here += jnp.einsum("bgqk,bkgd->bgqd", ds, kc)
                return dq_here, dk_here, dv_here

            dq_here = jnp.zeros_like(q, jnp.float32, (B_BLOCK, G_BLOCK, Q_BLOCK, D))
            carry = dq_here, dk_here, dv_here
            carry = lax.fori_loop(0, full, partial(add, masked=False), carry)
            carry = lax.fori_loop(full, visited, partial(add, masked=True), carry)
            dq_here, dk_here, dv_here = carry
            dq_here *= SCALE
            at = (0, q_start, 0, 0)
            dq_here = dq_here.transpose(0, 2, 1, 3)
            dq_here = dq_here.reshape(B_BLOCK, Q_BLOCK, G_BLOCK, D)
            dq = lax.dynamic_update_slice(dq, dq_here, at)
            return dq, dk_here, dv_here

        dk_here = jnp.zeros_like(q, jnp.float32, (B_BLOCK, G_BLOCK, D, S))
        dv_here = jnp.zeros_like(q, jnp.float32, (B_BLOCK, G_BLOCK, D, S))
        carried = dq, dk_here, dv_here
        dq, dk_here, dv_here = lax.fori_loop(0, Q_BLOCKS, queries, carried)
        dk_here = dk_here / LOG2E
        at = (0, 0, 0, 0)
        dk_here = dk_here.transpose(0, 3, 1, 2)
        dk_here = dk_here.reshape(B_BLOCK, S, G_BLOCK, D)
        dk = lax.dynamic_update_slice(dk, dk_here, at)
        dv_here = dv_here.transpose(0, 3, 1, 2)
        dv_here = dv_here.reshape(B_BLOCK, S, G_BLOCK, D)
        dv = lax.dynamic_update_slice(dv, dv_here, at)
        return dq, dk, dv

    # written whole, whatever it begins with: of arrays that begin alike XLA makes one
    dq = jnp.full_like(q, 1, jnp.float32, (B, T, H, D))
    dk = jnp.full_like(q, 2, jnp.float32, (B, S, G, D))
    dv = jnp.full_like(q, 3, jnp.float32, (B, S, G, D))
    carried = dq, dk, dv
    dq, dk, dv = heads(0, carried)
    return dq, dk, dv


def _add_at(x, part, at):
    return lax.dynamic_update_slice(x, lax.dynamic_slice(x, at, part.shape) + part, at)


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


def _dropout(seed, b, h, q, k):
    """Which weights are kept: by Philox 4x32-10, of positions, whatever the tile.

    The key is the seed, the counter (k // 4, q, h, b), and k % 4 tells which of four
    words is compared with DROPOUT: all are made for each weight, for one of them.
    """
    x0, x1, x2, x3 = (x.astype(jnp.uint32) for x in (k >> 2, q, h, b))
    key0, key1 = seed
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high1, low1 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0 += jnp.uint32(0x9E3779B9)
        key1 += jnp.uint32(0xBB67AE85)
    first, second = k & 2 == 0, k & 1 == 0
    word = jnp.where(first, jnp.where(second, x0, x1), jnp.where(second, x2, x3))
    return word >= jnp.uint32(429496730)  # DROPOUT * 2**32


def _multiply(x, factor):
    """The high and the low word of a product of words of 32 bits."""
    y = jnp.full_like(x, jnp.uint32(factor))
    # XLA compiles no mulhi for several devices (jax 0.12)
    if hasattr(lax, "mulhi") and not jax.sharding.get_abstract_mesh().manual_axes:
        return lax.mulhi(x, y), x * y
    # of halves of 16 bits, which cost three times as much
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF
    middle = y_high * x_low + (y_low * x_low >> 16)
    other = y_low * x_high + (middle & 0xFFFF)
    return y_high * x_high + (middle >> 16) + (other >> 16), x * y


def _extremes(x, chunk):
    """The least and the greatest value in each chunk, along the last axis."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % chunk)], mode="edge")
    x = x.reshape(*x.shape[:-1], -1, chunk)
    return x.min(-1), x.max(-1)


def _add(carry, s, vc, kept, *, unseen=False):
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
    left = jnp.where(kept, p, 0)  # those of dropout, to be divided by 1 - DROPOUT
    pv = jnp.einsum("bgqk,bkgd->bgqd", left, vc)
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
