"""Attention in chunks of 256 queries and 256 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          then    s = s + pair_bias[h, q, k]
          and the gradients of q, k, v, pair_bias, once, in reverse mode
          q       [8, 256, 4, 32]  float32
          k       [8, 256, 4, 32]  float32
          v       [8, 256, 4, 32]  float32
          pair_bias [4, 256, 256]  float32
          out     [8, 256, 4, 32]  float32
plan      running · 256 queries × 256 keys · 4 kv heads a step · fori; backward:
          by_queries · 256 queries × 256 keys · 4 kv heads a step · delta summed
          tiles of a head: 1; 1 full, 0 on an edge, 0 empty and never visited
cost      1.21 GFLOP, 5.7 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"batch": 8, "q_heads": 4, "kv_heads": 4, "q_len": 256, "kv_len": 256,
          "qk_dim": 32, "v_dim": 32, "score": [{"bias": {"name": "pair_bias", "axes":
          "hqk"}}], "derivatives": "vjp", "memory_budget": "64MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 256, "head_chunk": 4, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 1, "diagonal": 0, "backward":
          "by_queries", "backward_q_chunk": 256, "backward_k_chunk": 256,
          "backward_head_chunk": 4, "backward_batch_chunk": 1, "backward_exp": "exp",
          "backward_product_dtype": "float32", "backward_guard": false,
          "backward_scale": "queries", "backward_mass": "kept", "backward_delta":
          "summed", "backward_store": "p", "backward_ds": "once", "backward_slices":
          "nd"}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 8, 256, 256  # batch, queries, keys
H, G = 4, 4  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 32  # head dim
Q_CHUNK, K_CHUNK = 256, 256  # of a tile
G_CHUNK = 4  # kv heads of a tile
Q_BLOCK, K_BLOCK = 256, 256  # of a tile, backward
G_BLOCK = 4  # kv heads of a tile, backward
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.1767766952966369


def attention(q, k, v, *, pair_bias):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, D), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, D), "float32")
    _check("k", k, (B, S, G, D), "float32")
    _check("v", v, (B, S, G, D), "float32")
    _check("pair_bias", pair_bias, (H, T, S), "float32")
    q, k, v, pair_bias = _alike(q, k, v, pair_bias)

    return _attention(q, k, v, pair_bias)


@jax.custom_vjp
def _attention(q, k, v, pair_bias):
    out, _ = _forward(q, k, v, pair_bias)
    return out


def _attention_fwd(q, k, v, pair_bias):
    """The outputs, and what gradients are made of."""
    q, k, v, pair_bias = _first_only((q, k, v, pair_bias))
    out, lse = _forward(q, k, v, pair_bias)
    return out, (q, k, v, pair_bias, lse)


def _attention_bwd(kept, dout):
    """Of all arguments; None where they aren't floats."""
    kept, dout = _first_only((kept, dout))
    q, k, v, pair_bias, lse = kept
    dq, dk, dv, d_pair_bias = _backward(q, k, v, pair_bias, lse, dout)
    return dq, dk, dv, d_pair_bias


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
def _forward(q, k, v, pair_bias):
    """The outputs; under vmap, of one batch after another."""

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all = carried
        b = step
        at = (b, 0, 0, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_CHUNK, G_CHUNK, D))
        rows = rows.reshape(Q_CHUNK, G_CHUNK, D)
        rows = rows.transpose(1, 0, 2)
        rows = rows * SCALE

        def tile(c):
            """Scores (G_CHUNK, Q_CHUNK, K_CHUNK) and values."""
            k_start = c * K_CHUNK
            at = (b, k_start, 0, 0)
            kc = lax.dynamic_slice(k, at, (1, K_CHUNK, G_CHUNK, D))
            vc = lax.dynamic_slice(v, at, (1, K_CHUNK, G_CHUNK, D))
            kc = kc.reshape(K_CHUNK, G_CHUNK, D)
            vc = vc.reshape(K_CHUNK, G_CHUNK, D)
            s = jnp.einsum("gqd,kgd->gqk", rows, kc)
            pair_bias_at_hqk = lax.dynamic_slice(
                pair_bias,
                (0, 0, k_start),
                (G_CHUNK, Q_CHUNK, K_CHUNK),
            )
            pair_bias_at_hqk = pair_bias_at_hqk.reshape(G_CHUNK, Q_CHUNK, K_CHUNK)
            s = s + pair_bias_at_hqk
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
        lse = (m + jnp.log(total)).reshape(1, G_CHUNK, Q_CHUNK)
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.transpose(1, 0, 2)
        out = out.reshape(1, Q_CHUNK, G_CHUNK, D)
        out_all = lax.dynamic_update_slice(out_all, out, (b, 0, 0, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (b, 0, 0))
        return out_all, lse_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, B, queries, (out_all, lse_all))


@jax.custom_batching.sequential_vmap
def _backward(q, k, v, pair_bias, lse, dout):
    """Tiles are made again, from lse -> dq, dk, dv, d_pair_bias."""

    def queries_of(b, summing=False):
        """A chunk of queries -> rows, d_rows, lse_row, delta_row, mass_row."""
        at = (b, 0, 0, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_BLOCK, G_BLOCK, D))
        rows = rows.reshape(Q_BLOCK, G_BLOCK, D)
        rows = rows.transpose(1, 0, 2)
        rows = rows * SCALE
        d_rows = lax.dynamic_slice(dout, at, (1, Q_BLOCK, G_BLOCK, D))
        d_rows = d_rows.reshape(Q_BLOCK, G_BLOCK, D)
        d_rows = d_rows.transpose(1, 0, 2)
        at = (b, 0, 0)
        lse_row = lax.dynamic_slice(lse, at, (1, G_BLOCK, Q_BLOCK))
        lse_row = lse_row.reshape(G_BLOCK, Q_BLOCK)
        known = lse_row != -jnp.inf  # else the query sees no key
        lse_row = jnp.where(known, lse_row, jnp.inf)
        rows = jnp.where(known[..., None], rows, 0)
        d_rows = jnp.where(known[..., None], d_rows, 0)
        if summing:  # delta, and the sum of p, are still to be made
            return rows, d_rows, lse_row, None, None
        mass_row = lax.dynamic_slice(mass, at, (1, G_BLOCK, Q_BLOCK))
        mass_row = mass_row.reshape(G_BLOCK, Q_BLOCK)
        delta_row = lax.dynamic_slice(delta, at, (1, G_BLOCK, Q_BLOCK))
        delta_row = delta_row.reshape(G_BLOCK, Q_BLOCK)
        delta_row = jnp.where(known, delta_row, 0)
        return rows, d_rows, lse_row, delta_row, mass_row

    def keys_of(b):
        """A chunk of keys, and their values."""
        at = (b, 0, 0, 0)
        kc = lax.dynamic_slice(k, at, (1, K_BLOCK, G_BLOCK, D))
        kc = kc.reshape(K_BLOCK, G_BLOCK, D)
        vc = lax.dynamic_slice(v, at, (1, K_BLOCK, G_BLOCK, D))
        vc = vc.reshape(K_BLOCK, G_BLOCK, D)
        return kc, vc

    def tile(b, of_queries, of_keys, sums=None):
        """A tile made again -> p, ds (the cotangent of scale q·k), and its keys."""
        rows, d_rows, lse_row, delta_row, mass_row = of_queries
        kc, vc = of_keys
        pair_bias_at_hqk = lax.dynamic_slice(
            pair_bias,
            (0, 0, 0),
            (G_BLOCK, Q_BLOCK, K_BLOCK),
        )
        pair_bias_at_hqk = pair_bias_at_hqk.reshape(G_BLOCK, Q_BLOCK, K_BLOCK)
        s = jnp.einsum("gqd,kgd->gqk", rows, kc)
        s = s + pair_bias_at_hqk
        p = jnp.exp(s - lse_row[..., None])
        if mass_row is not None:
            p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded
        scored = s != -jnp.inf
        there = jnp.broadcast_to(scored, s.shape).any(1).transpose(1, 0)[..., None]
        kc = jnp.where(there, kc, 0)  # else NaN, perhaps
        vc = jnp.where(there, vc, 0)
        p = jnp.where(scored, p, 0)
        p = lax.optimization_barrier(p)  # made once
        dp = jnp.einsum("gqd,kgd->gqk", d_rows, vc)
        if delta_row is None:  # it is what is summed here
            return p.sum(-1), (p * dp).sum(-1)
        ds = p * (dp - delta_row[..., None])
        if sums is not None:
            (d_pair_bias,) = sums
            part = ds.reshape(G_BLOCK, Q_BLOCK, K_BLOCK)
            d_pair_bias = _add_at(d_pair_bias, part, (0, 0, 0))
            sums = (d_pair_bias,)
        return p, ds, kc, sums

    def deltas(step, carried):
        """One chunk of queries: the sum of p, and delta, the mean of dp."""
        b = step
        of_queries = queries_of(b, summing=True)

        def add(c, carry):
            of_keys = keys_of(b)
            total, weighted = tile(b, of_queries, of_keys)
            return carry[0] + total, carry[1] + weighted

        carry = (jnp.zeros_like(q, jnp.float32, (G_BLOCK, Q_BLOCK)),) * 2
        carry = add(0, carry)
        total, weighted = carry
        total = jnp.where(total == 0, 1, total)  # a row that saw no key
        at = (b, 0, 0)
        made = []
        for whole, here in zip(carried, (total, weighted / total), strict=True):
            here = here.reshape(1, G_BLOCK, Q_BLOCK)
            made.append(lax.dynamic_update_slice(whole, here, at))
        return tuple(made)

    mass = jnp.full_like(q, 4, jnp.float32, (B, H, T))
    delta = jnp.full_like(q, 5, jnp.float32, (B, H, T))
    carried = mass, delta
    mass, delta = lax.fori_loop(0, B, deltas, carried)

    def heads(step, carried):
        """All queries and keys of the heads that are computed together."""
        dq, dk, dv, sums = carried
        b = step

        def queries(i, carried):
            """One chunk of queries, and all keys that any of it sees."""
            dq, dk_here, dv_here, sums = carried
            of_queries = queries_of(b)
            rows, d_rows, *_ = of_queries
            rows = rows.transpose(0, 2, 1)
            d_rows = d_rows.transpose(0, 2, 1)
            # a barrier: else they are transposed for each tile
            rows, d_rows = lax.optimization_barrier((rows, d_rows))

            def add(c, carry):
                dq_here, dk_here, dv_here, sums = carry
                of_keys = keys_of(b)
                p, ds, kc, sums = tile(b, of_queries, of_keys, sums)
                part = jnp.einsum("gdq,gqk->gdk", d_rows, p)
                dv_here = _add_at(dv_here, part, (0, 0, 0))
                part = jnp.einsum("gdq,gqk->gdk", rows, ds)
                dk_here = _add_at(dk_here, part, (0, 0, 0))
                dq_here += jnp.einsum("gqk,kgd->gqd", ds, kc)
                return dq_here, dk_here, dv_here, sums

            dq_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, Q_BLOCK, D))
            carry = dq_here, dk_here, dv_here, sums
            carry = add(0, carry)
            dq_here, dk_here, dv_here, sums = carry
            dq_here *= SCALE
            at = (b, 0, 0, 0)
            dq_here = dq_here.transpose(1, 0, 2)
            dq_here = dq_here.reshape(1, Q_BLOCK, G_BLOCK, D)
            dq = lax.dynamic_update_slice(dq, dq_here, at)
            return dq, dk_here, dv_here, sums

        dk_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, D, S))
        dv_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, D, S))
        carried = dq, dk_here, dv_here, sums
        dq, dk_here, dv_here, sums = queries(0, carried)
        at = (b, 0, 0, 0)
        dk_here = dk_here.transpose(2, 0, 1)
        dk_here = dk_here.reshape(1, S, G_BLOCK, D)
        dk = lax.dynamic_update_slice(dk, dk_here, at)
        dv_here = dv_here.transpose(2, 0, 1)
        dv_here = dv_here.reshape(1, S, G_BLOCK, D)
        dv = lax.dynamic_update_slice(dv, dv_here, at)
        return dq, dk, dv, sums

    # written whole, whatever it begins with: of arrays that begin alike XLA makes one
    dq = jnp.full_like(q, 1, jnp.float32, (B, T, H, D))
    dk = jnp.full_like(q, 2, jnp.float32, (B, S, G, D))
    dv = jnp.full_like(q, 3, jnp.float32, (B, S, G, D))
    sums = (jnp.zeros_like(pair_bias, jnp.float32),)
    carried = dq, dk, dv, sums
    dq, dk, dv, sums = lax.fori_loop(0, B, heads, carried)
    (d_pair_bias,) = sums
    return dq, dk, dv, d_pair_bias


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
