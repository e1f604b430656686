"""Attention in chunks of 256 queries and 256 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where k <= q
          positions: query 0 is at bottom_right, key 0 at 0
          of 8 packed sequences: b has the queries cu_seqlens_q[b] to
          cu_seqlens_q[b+1]-1, and keys by cu_seqlens_k; q and k are positions in it;
          other tokens see nothing
          and the gradients of q, k, v, once, in reverse mode
          q       [4096, 8, 64]  float32
          k       [4096, 2, 64]  float32
          v       [4096, 2, 64]  float32
          cu_seqlens_q [9]  int32
          cu_seqlens_k [9]  int32
          out     [4096, 8, 64]  float32
plan      running · 256 queries × 256 keys · 2 kv heads a step · fori · skip list;
          backward: by_queries · 128 queries × 256 keys · 2 kv heads a step · delta
          again
          tiles of a head: 256; 0 always empty, at most 256 visited: cu_seqlens_k and
          cu_seqlens_q say which at run time
cost      120 GFLOP, 8.7 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"batch": 8, "q_heads": 8, "kv_heads": 2, "q_len": 4096, "kv_len": 4096,
          "qk_dim": 64, "v_dim": 64, "q_offset": "bottom_right", "mask": "causal",
          "storage": "packed", "derivatives": "vjp", "memory_budget": "16MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 256, "head_chunk": 2, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0, "skip": "list",
          "backward": "by_queries", "backward_q_chunk": 128, "backward_k_chunk": 256,
          "backward_head_chunk": 2, "backward_batch_chunk": 1, "backward_exp": "exp2",
          "backward_product_dtype": "float32", "backward_guard": false,
          "backward_scale": "queries", "backward_mass": "kept", "backward_skip": "list",
          "backward_delta": "again", "backward_store": "p", "backward_ds": "once",
          "backward_slices": "nd"}
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 4096, 4096  # one batch, all tokens
SEQUENCES = 8  # packed behind each other
H, G = 8, 2  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 256, 256  # of a tile
K_CHUNKS = -(-S // K_CHUNK)
G_CHUNK = 2  # kv heads of a tile
Q_BLOCK, K_BLOCK = 128, 256  # of a tile, backward
Q_BLOCKS = -(-T // Q_BLOCK)
K_BLOCKS = -(-S // K_BLOCK)
G_BLOCK = 2  # kv heads of a tile, backward
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125
SCALE_2 = SCALE * LOG2E
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k):
    """Attention of the arrays that are checked first -> out.

    out (T, H, D), 0 where a query sees no key
    """
    _check("q", q, (T, H, D), "float32")
    _check("k", k, (S, G, D), "float32")
    _check("v", v, (S, G, D), "float32")
    _check("cu_seqlens_q", cu_seqlens_q, (SEQUENCES + 1,), "int32")
    _check("cu_seqlens_k", cu_seqlens_k, (SEQUENCES + 1,), "int32")
    q = q[None]  # all tokens are one batch, whose mask tells sequences apart
    k = k[None]
    v = v[None]
    out = _one_batch(q, k, v, cu_seqlens_k, cu_seqlens_q)
    return out[0]


def _one_batch(q, k, v, cu_seqlens_k, cu_seqlens_q):
    """Attention of [B, ...], of tokens that see those of their own sequence."""
    q, k, v, cu_seqlens_k, cu_seqlens_q = _alike(q, k, v, cu_seqlens_k, cu_seqlens_q)

    return _attention(q, k, v, cu_seqlens_k, cu_seqlens_q)


@jax.custom_vjp
def _attention(q, k, v, cu_seqlens_k, cu_seqlens_q):
    out, _, _ = _forward(q, k, v, cu_seqlens_k, cu_seqlens_q)
    return out


def _attention_fwd(q, k, v, cu_seqlens_k, cu_seqlens_q):
    """The outputs, and what gradients are made of."""
    q, k, v, cu_seqlens_k, cu_seqlens_q = _first_only(
        (q, k, v, cu_seqlens_k, cu_seqlens_q)
    )
    out, lse, mass = _forward(q, k, v, cu_seqlens_k, cu_seqlens_q)
    return out, (q, k, v, cu_seqlens_k, cu_seqlens_q, out, lse, mass)


def _attention_bwd(kept, dout):
    """Of all arguments; None where they aren't floats."""
    kept, dout = _first_only((kept, dout))
    q, k, v, cu_seqlens_k, cu_seqlens_q, out, lse, mass = kept
    dq, dk, dv = _backward(q, k, v, cu_seqlens_k, cu_seqlens_q, out, lse, mass, dout)
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
def _forward(q, k, v, cu_seqlens_k, cu_seqlens_q):
    """The outputs; under vmap, of one batch after another."""

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all, mass_all = carried
        i = step
        q_start = i * Q_CHUNK
        at = (0, q_start, 0, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_CHUNK, G_CHUNK * R, D))
        rows = rows.reshape(Q_CHUNK, G_CHUNK, R, D)
        rows = rows.transpose(1, 2, 0, 3)
        rows = rows * SCALE_2
        q_index = q_start + jnp.arange(Q_CHUNK)[:, None]
        cu_seqlens_q_at_to_q = jnp.searchsorted(
            cu_seqlens_q,
            q_index,
            side="right",
            method="compare_all",
        )
        index_2 = jnp.maximum(jnp.minimum(cu_seqlens_q_at_to_q, 8) - 1, 0) + 1
        cu_seqlens_q_at_i1 = cu_seqlens_q.at[index_2].get(mode="promise_in_bounds")

        # What each key chunk holds, told by its ends.
        key = jnp.arange(K_CHUNKS) * K_CHUNK
        q_lo = q_start
        q_hi = q_start + Q_CHUNK
        k_lo = key
        k_hi = key + K_CHUNK
        cu_seqlens_q_at_ends_1 = jnp.searchsorted(
            cu_seqlens_q,
            q_lo,
            side="right",
            method="compare_all",
        )
        cu_seqlens_q_at_ends_2 = jnp.searchsorted(
            cu_seqlens_q,
            q_hi - 1,
            side="right",
            method="compare_all",
        )
        cu_seqlens_k_at_ends_3 = jnp.searchsorted(
            cu_seqlens_k,
            k_lo,
            side="right",
            method="compare_all",
        )
        cu_seqlens_k_at_ends_4 = jnp.searchsorted(
            cu_seqlens_k,
            k_hi - 1,
            side="right",
            method="compare_all",
        )
        limit_1 = jnp.maximum(jnp.minimum(cu_seqlens_k_at_ends_3, 8) - 1, 0)
        cu_seqlens_k_at_tile_1 = limit_1 + 1
        cu_seqlens_k_at_tile_1 = cu_seqlens_k[cu_seqlens_k_at_tile_1]
        limit_1 = jnp.maximum(jnp.minimum(cu_seqlens_q_at_ends_2, 8) - 1, 0)
        cu_seqlens_q_at_tile_4 = limit_1 + 1
        cu_seqlens_q_at_tile_4 = cu_seqlens_q[cu_seqlens_q_at_tile_4]
        limit_4 = jnp.minimum(cu_seqlens_q_at_ends_2, cu_seqlens_k_at_ends_4)
        limit_3 = jnp.minimum(limit_4, 8)
        limit_2 = limit_3 - 1
        limit_1 = jnp.maximum(limit_2, 0)
        cu_seqlens_k_at_tile_6 = limit_1 + 1
        cu_seqlens_k_at_tile_6 = cu_seqlens_k[cu_seqlens_k_at_tile_6]
        limit_4 = jnp.maximum(cu_seqlens_q_at_ends_1, cu_seqlens_k_at_ends_3)
        limit_3 = jnp.minimum(limit_4, 8)
        limit_2 = limit_3 - 1
        limit_1 = jnp.maximum(limit_2, 0)
        cu_seqlens_q_at_tile_7 = limit_1 + 1
        cu_seqlens_q_at_tile_7 = cu_seqlens_q[cu_seqlens_q_at_tile_7]
        some = jnp.maximum(cu_seqlens_q_at_ends_1, cu_seqlens_k_at_ends_3) <= 8
        some &= cu_seqlens_q_at_ends_1 <= cu_seqlens_k_at_ends_4
        some &= cu_seqlens_k_at_ends_3 <= cu_seqlens_q_at_ends_2
        some_part_1 = k_lo + cu_seqlens_q_at_tile_7
        some &= some_part_1 < cu_seqlens_k_at_tile_6 + q_hi
        every = cu_seqlens_q_at_ends_2 <= 8
        every &= cu_seqlens_k_at_ends_4 <= cu_seqlens_q_at_ends_1
        every &= cu_seqlens_q_at_ends_2 <= cu_seqlens_k_at_ends_3
        every_part_1 = q_lo + cu_seqlens_k_at_tile_1 + 1
        every &= cu_seqlens_q_at_tile_4 + k_hi <= every_part_1
        kind = jnp.where(every, 0, jnp.where(some, 1, 2))
        order = jnp.argsort(kind)  # the full ones first, the empty ones last
        full, visited = (kind == 0).sum(), (kind < 2).sum()

        def tile(c):
            """Scores (G_CHUNK, R, Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (0, k_start, 0, 0)
            kc = lax.dynamic_slice(k, at, (1, K_CHUNK, G_CHUNK, D))
            vc = lax.dynamic_slice(v, at, (1, K_CHUNK, G_CHUNK, D))
            kc = kc.reshape(K_CHUNK, G_CHUNK, D)
            vc = vc.reshape(K_CHUNK, G_CHUNK, D)
            s = jnp.einsum("grqd,kgd->grqk", rows, kc)
            return s, vc

        def masked(c):
            """A tile with the scores of keys that aren't seen at -inf."""
            s, vc = tile(c)
            k_start = c * K_CHUNK
            k_index = k_start + jnp.arange(K_CHUNK)
            cu_seqlens_k_at_to_k = jnp.searchsorted(
                cu_seqlens_k,
                k_index,
                side="right",
                method="compare_all",
            )
            index_1 = jnp.maximum(jnp.minimum(cu_seqlens_k_at_to_k, 8) - 1, 0) + 1
            cu_seqlens_k_at_i0 = cu_seqlens_k.at[index_1].get(mode="promise_in_bounds")
            part_2 = cu_seqlens_q_at_to_q == cu_seqlens_k_at_to_k
            part_1 = (cu_seqlens_q_at_to_q <= 8) & part_2
            part_3 = k_index - cu_seqlens_k_at_i0
            seen = part_1 & (part_3 <= q_index - cu_seqlens_q_at_i1)
            s = jnp.where(seen, s, -jnp.inf)
            there = (s != -jnp.inf).any((1, 2)).transpose(1, 0)
            vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
            return s, vc

        def interior(i, carry):
            return _add(carry, *tile(order[i]))

        def edge(i, carry):
            return _add(carry, *masked(order[i]), unseen=True)

        m = jnp.full_like(rows, -jnp.inf, jnp.float32, (G_CHUNK, R, Q_CHUNK))
        total = jnp.zeros_like(rows, jnp.float32, (G_CHUNK, R, Q_CHUNK))
        acc = jnp.zeros_like(rows, jnp.float32, (G_CHUNK, R, Q_CHUNK, D))
        carry = m, total, acc
        carry = lax.fori_loop(0, full, interior, carry)
        carry = lax.fori_loop(full, visited, edge, carry)
        m, total, acc = carry
        lse = (m + jnp.log2(total)) / LOG2E
        # the sum of exp(s - lse): 1, but that lse is rounded
        mass = total * jnp.exp2(m - lse * LOG2E)
        mass = jnp.where(total == 0, 1, mass)
        lse = lse.reshape(1, G_CHUNK * R, Q_CHUNK)
        mass = mass.reshape(1, G_CHUNK * R, Q_CHUNK)
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.transpose(2, 0, 1, 3)
        out = out.reshape(1, Q_CHUNK, G_CHUNK * R, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, 0, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (0, 0, q_start))
        mass_all = lax.dynamic_update_slice(mass_all, mass, (0, 0, q_start))
        return out_all, lse_all, mass_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    mass_all = jnp.ones_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, Q_CHUNKS, queries, (out_all, lse_all, mass_all))


@jax.custom_batching.sequential_vmap
def _backward(q, k, v, cu_seqlens_k, cu_seqlens_q, out, lse, mass, dout):
    """Tiles are made again, from lse -> dq, dk, dv."""

    def queries_of(i):
        """A chunk of queries -> rows, d_rows, lse_row, delta_row, mass_row."""
        q_start = i * Q_BLOCK
        at = (0, q_start, 0, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_BLOCK, G_BLOCK * R, D))
        rows = rows.reshape(Q_BLOCK, G_BLOCK, R, D)
        rows = rows.transpose(1, 2, 0, 3)
        rows = rows * SCALE_2
        d_rows = lax.dynamic_slice(dout, at, (1, Q_BLOCK, G_BLOCK * R, D))
        d_rows = d_rows.reshape(Q_BLOCK, G_BLOCK, R, D)
        d_rows = d_rows.transpose(1, 2, 0, 3)
        out_rows = lax.dynamic_slice(out, at, (1, Q_BLOCK, G_BLOCK * R, D))
        out_rows = out_rows.reshape(Q_BLOCK, G_BLOCK, R, D)
        out_rows = out_rows.transpose(1, 2, 0, 3)
        at = (0, 0, q_start)
        lse_row = lax.dynamic_slice(lse, at, (1, G_BLOCK * R, Q_BLOCK))
        lse_row = lse_row.reshape(G_BLOCK, R, Q_BLOCK)
        known = lse_row != -jnp.inf  # else the query sees no key
        lse_row = jnp.where(known, lse_row, jnp.inf)
        rows = jnp.where(known[..., None], rows, 0)
        d_rows = jnp.where(known[..., None], d_rows, 0)
        delta_row = (d_rows * out_rows).sum(-1)
        lse_row *= LOG2E
        mass_row = lax.dynamic_slice(mass, at, (1, G_BLOCK * R, Q_BLOCK))
        mass_row = mass_row.reshape(G_BLOCK, R, Q_BLOCK)
        delta_row = jnp.where(known, delta_row, 0)
        return rows, d_rows, lse_row, delta_row, mass_row

    def keys_of(c):
        """A chunk of keys, and their values."""
        k_start = c * K_BLOCK
        at = (0, k_start, 0, 0)
        kc = lax.dynamic_slice(k, at, (1, K_BLOCK, G_BLOCK, D))
        kc = kc.reshape(K_BLOCK, G_BLOCK, D)
        vc = lax.dynamic_slice(v, at, (1, K_BLOCK, G_BLOCK, D))
        vc = vc.reshape(K_BLOCK, G_BLOCK, D)
        return kc, vc

    def tile(i, c, of_queries, of_keys, masked):
        """A tile made again -> p, ds (the cotangent of scale q·k), and its keys."""
        q_start = i * Q_BLOCK
        k_start = c * K_BLOCK
        rows, d_rows, lse_row, delta_row, mass_row = of_queries
        kc, vc = of_keys
        q_index = q_start + jnp.arange(Q_BLOCK)[:, None]
        cu_seqlens_q_at_to_q = jnp.searchsorted(
            cu_seqlens_q,
            q_index,
            side="right",
            method="compare_all",
        )
        index_2 = jnp.maximum(jnp.minimum(cu_seqlens_q_at_to_q, 8) - 1, 0) + 1
        cu_seqlens_q_at_i1 = cu_seqlens_q.at[index_2].get(mode="promise_in_bounds")
        s = jnp.einsum("grqd,kgd->grqk", rows, kc)
        p = jnp.exp2(s - lse_row[..., None])
        p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded
        if masked:
            k_index = k_start + jnp.arange(K_BLOCK)
            cu_seqlens_k_at_to_k = jnp.searchsorted(
                cu_seqlens_k,
                k_index,
                side="right",
                method="compare_all",
            )
            index_1 = jnp.maximum(jnp.minimum(cu_seqlens_k_at_to_k, 8) - 1, 0) + 1
            cu_seqlens_k_at_i0 = cu_seqlens_k.at[index_1].get(mode="promise_in_bounds")
            part_2 = cu_seqlens_q_at_to_q == cu_seqlens_k_at_to_k
            part_1 = (cu_seqlens_q_at_to_q <= 8) & part_2
            part_3 = k_index - cu_seqlens_k_at_i0
            seen = part_1 & (part_3 <= q_index - cu_seqlens_q_at_i1)
            there = jnp.broadcast_to(seen, s.shape).any((1, 2))
            there = there.transpose(1, 0)[..., None]
            kc = jnp.where(there, kc, 0)  # else NaN, perhaps
            vc = jnp.where(there, vc, 0)
            p = jnp.where(seen, p, 0)
        p = lax.optimization_barrier(p)  # made once
        dp = jnp.einsum("grqd,kgd->grqk", d_rows, vc)
        ds = p * (dp - delta_row[..., None])
        return p, ds, kc

    def heads(step, carried):
        """All queries and keys of the heads that are computed together."""
        dq, dk, dv = carried

        def queries(i, carried):
            """One chunk of queries, and all keys that any of it sees."""
            dq, dk_here, dv_here = carried
            q_start = i * Q_BLOCK

            # What each key chunk holds, told by its ends.
            key = jnp.arange(K_BLOCKS) * K_BLOCK
            q_lo = q_start
            q_hi = q_start + Q_BLOCK
            k_lo = key
            k_hi = key + K_BLOCK
            cu_seqlens_q_at_ends_1 = jnp.searchsorted(
                cu_seqlens_q,
                q_lo,
                side="right",
                method="compare_all",
            )
            cu_seqlens_q_at_ends_2 = jnp.searchsorted(
                cu_seqlens_q,
                q_hi - 1,
                side="right",
                method="compare_all",
            )
            cu_seqlens_k_at_ends_3 = jnp.searchsorted(
                cu_seqlens_k,
                k_lo,
                side="right",
                method="compare_all",
            )
            cu_seqlens_k_at_ends_4 = jnp.searchsorted(
                cu_seqlens_k,
                k_hi - 1,
                side="right",
                method="compare_all",
            )
            limit_1 = jnp.maximum(jnp.minimum(cu_seqlens_k_at_ends_3, 8) - 1, 0)
            cu_seqlens_k_at_tile_1 = limit_1 + 1
            cu_seqlens_k_at_tile_1 = cu_seqlens_k[cu_seqlens_k_at_tile_1]
            limit_1 = jnp.maximum(jnp.minimum(cu_seqlens_q_at_ends_2, 8) - 1, 0)
            cu_seqlens_q_at_tile_4 = limit_1 + 1
            cu_seqlens_q_at_tile_4 = cu_seqlens_q[cu_seqlens_q_at_tile_4]
            limit_4 = jnp.minimum(cu_seqlens_q_at_ends_2, cu_seqlens_k_at_ends_4)
            limit_3 = jnp.minimum(limit_4, 8)
            limit_2 = limit_3 - 1
            limit_1 = jnp.maximum(limit_2, 0)
            cu_seqlens_k_at_tile_6 = limit_1 + 1
            cu_seqlens_k_at_tile_6 = cu_seqlens_k[cu_seqlens_k_at_tile_6]
            limit_4 = jnp.maximum(cu_seqlens_q_at_ends_1, cu_seqlens_k_at_ends_3)
            limit_3 = jnp.minimum(limit_4, 8)
            limit_2 = limit_3 - 1
            limit_1 = jnp.maximum(limit_2, 0)
            cu_seqlens_q_at_tile_7 = limit_1 + 1
            cu_seqlens_q_at_tile_7 = cu_seqlens_q[cu_seqlens_q_at_tile_7]
            some = jnp.maximum(cu_seqlens_q_at_ends_1, cu_seqlens_k_at_ends_3) <= 8
            some &= cu_seqlens_q_at_ends_1 <= cu_seqlens_k_at_ends_4
            some &= cu_seqlens_k_at_ends_3 <= cu_seqlens_q_at_ends_2
            some_part_1 = k_lo + cu_seqlens_q_at_tile_7
            some &= some_part_1 < cu_seqlens_k_at_tile_6 + q_hi
            every = cu_seqlens_q_at_ends_2 <= 8
            every &= cu_seqlens_k_at_ends_4 <= cu_seqlens_q_at_ends_1
            every &= cu_seqlens_q_at_ends_2 <= cu_seqlens_k_at_ends_3
            every_part_1 = q_lo + cu_seqlens_k_at_tile_1 + 1
            every &= cu_seqlens_q_at_tile_4 + k_hi <= every_part_1
            kind = jnp.where(every, 0, jnp.where(some, 1, 2))
            order = jnp.argsort(kind)  # the full ones first, the empty ones last
            full, visited = (kind == 0).sum(), (kind < 2).sum()
            of_queries = queries_of(i)
            rows, d_rows, *_ = of_queries
            rows = rows.transpose(0, 3, 1, 2)
            d_rows = d_rows.transpose(0, 3, 1, 2)
            # a barrier: else they are transposed for each tile
            rows, d_rows = lax.optimization_barrier((rows, d_rows))

            def add(n, carry, masked):
                dq_here, dk_here, dv_here = carry
                c = order[n]
                of_keys = keys_of(c)
                p, ds, kc = tile(i, c, of_queries, of_keys, masked)
                k_start = c * K_BLOCK
                part = jnp.einsum("gdrq,grqk->gdk", d_rows, p)
                dv_here = _add_at(dv_here, part, (0, 0, k_start))
                part = jnp.einsum("gdrq,grqk->gdk", rows, ds)
                dk_here = _add_at(dk_here, part, (0, 0, k_start))
                dq_here += jnp.einsum("grqk,kgd->grqd", ds, kc)
                return dq_here, dk_here, dv_here

            dq_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, R, Q_BLOCK, D))
            carry = dq_here, dk_here, dv_here
            carry = lax.fori_loop(0, full, partial(add, masked=False), carry)
            carry = lax.fori_loop(full, visited, partial(add, masked=True), carry)
            dq_here, dk_here, dv_here = carry
            dq_here *= SCALE
            at = (0, q_start, 0, 0)
            dq_here = dq_here.transpose(2, 0, 1, 3)
            dq_here = dq_here.reshape(1, Q_BLOCK, G_BLOCK * R, D)
            dq = lax.dynamic_update_slice(dq, dq_here, at)
            return dq, dk_here, dv_here

        dk_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, D, S))
        dv_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, D, S))
        carried = dq, dk_here, dv_here
        dq, dk_here, dv_here = lax.fori_loop(0, Q_BLOCKS, queries, carried)
        dk_here = dk_here / LOG2E
        at = (0, 0, 0, 0)
        dk_here = dk_here.transpose(2, 0, 1)
        dk_here = dk_here.reshape(1, S, G_BLOCK, D)
        dk = lax.dynamic_update_slice(dk, dk_here, at)
        dv_here = dv_here.transpose(2, 0, 1)
        dv_here = dv_here.reshape(1, S, G_BLOCK, D)
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
    pv = jnp.einsum("grqk,kgd->grqd", p, vc)
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
