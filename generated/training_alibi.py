"""Attention in chunks of 256 queries and 256 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          then    s = 30.0 * tanh(s / 30.0)
          then    s = s + slopes[h] * (k - q)
          key k is there for query q where k <= q
          and the gradients of q, k, v, slopes, once, in reverse mode
          q       [1, 8, 1000, 72]  float32
          k       [1, 8, 1000, 72]  float32
          v       [1, 8, 1000, 72]  float32
          slopes  [8]  float32
          out     [1, 8, 1000, 72]  float32
plan      running · 256 queries × 256 keys · 4 kv heads a step · fori by 2; backward:
          by_keys · 128 queries × 128 keys · 8 kv heads a step · delta summed
          tiles of a head: 16; 5 full, 5 on an edge, 6 empty and never visited
cost      6.27 GFLOP, 5.7 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 8, "q_len": 1000, "kv_len": 1000, "qk_dim": 72,
          "v_dim": 72, "layout": "bhtd", "mask": "causal", "score": [{"softcap": {"cap":
          30.0}}, "alibi"], "derivatives": "vjp", "memory_budget": "8MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 256, "head_chunk": 4, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 2, "diagonal": 0, "backward":
          "by_keys", "backward_q_chunk": 128, "backward_k_chunk": 128,
          "backward_head_chunk": 8, "backward_batch_chunk": 1, "backward_exp": "exp",
          "backward_product_dtype": "float32", "backward_guard": false,
          "backward_scale": "queries", "backward_mass": "kept", "backward_delta":
          "summed", "backward_store": "p", "backward_ds": "once", "backward_slices":
          "nd"}
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 1000, 1000  # batch, queries, keys
H, G = 8, 8  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 72  # head dim
Q_CHUNK, K_CHUNK = 256, 256  # of a tile
UNROLL = 2  # tiles of a step, without a mask
G_CHUNK = 4  # kv heads of a tile
Q_BLOCK, K_BLOCK = 128, 128  # of a tile, backward
Q_BLOCKS = -(-T // Q_BLOCK)
K_BLOCKS = -(-S // K_BLOCK)
G_BLOCK = 8  # kv heads of a tile, backward
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.11785113019775792
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v, *, slopes):
    """Attention of the arrays that are checked first -> out.

    out (B, H, T, D), 0 where a query sees no key
    """
    _check("q", q, (B, H, T, D), "float32")
    _check("k", k, (B, G, S, D), "float32")
    _check("v", v, (B, G, S, D), "float32")
    _check("slopes", slopes, (H,), "float32")
    q, k, v, slopes = _alike(q, k, v, slopes)

    return _attention(q, k, v, slopes)


@jax.custom_vjp
def _attention(q, k, v, slopes):
    out, _ = _forward(q, k, v, slopes)
    return out


def _attention_fwd(q, k, v, slopes):
    """The outputs, and what gradients are made of."""
    q, k, v, slopes = _first_only((q, k, v, slopes))
    out, lse = _forward(q, k, v, slopes)
    return out, (q, k, v, slopes, lse)


def _attention_bwd(kept, dout):
    """Of all arguments; None where they aren't floats."""
    kept, dout = _first_only((kept, dout))
    q, k, v, slopes, lse = kept
    dq, dk, dv, d_slopes = _backward(q, k, v, slopes, lse, dout)
    return dq, dk, dv, d_slopes


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
def _forward(q, k, v, slopes):
    """The outputs; under vmap, of one batch after another."""

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all = carried
        i = step % Q_CHUNKS
        g = step // Q_CHUNKS * G_CHUNK
        q_start = jnp.minimum(i * Q_CHUNK, T - Q_CHUNK)  # the last overlaps
        at = (0, g, q_start, 0)
        rows = lax.dynamic_slice(q, at, (1, G_CHUNK, Q_CHUNK, D))
        rows = rows.reshape(G_CHUNK, Q_CHUNK, D)
        rows = rows * SCALE
        slopes_at_h = lax.dynamic_slice(slopes, (g,), (G_CHUNK,))
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
            at = (0, g, k_start, 0)
            kc = lax.dynamic_slice(k, at, (1, G_CHUNK, K_CHUNK, D))
            vc = lax.dynamic_slice(v, at, (1, G_CHUNK, K_CHUNK, D))
            kc = kc.reshape(G_CHUNK, K_CHUNK, D)
            vc = vc.reshape(G_CHUNK, K_CHUNK, D)
            s = jnp.einsum("gqd,gkd->gqk", rows, kc)
            k_index = k_start + jnp.arange(K_CHUNK)
            s = 30.0 * jnp.tanh(s / 30.0)
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
        out_all = lax.dynamic_update_slice(out_all, out, (0, g, q_start, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (0, g, q_start))
        return out_all, lse_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, H, T, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, (G // G_CHUNK) * Q_CHUNKS, queries, (out_all, lse_all))


@jax.custom_batching.sequential_vmap
def _backward(q, k, v, slopes, lse, dout):
    """Tiles are made again, from lse -> dq, dk, dv, d_slopes."""

    def queries_of(i, summing=False):
        """A chunk of queries -> rows, d_rows, lse_row, delta_row, mass_row."""
        q_start = jnp.minimum(i * Q_BLOCK, T - Q_BLOCK)  # the last overlaps
        at = (0, 0, q_start, 0)
        rows = lax.dynamic_slice(q, at, (1, G_BLOCK, Q_BLOCK, D))
        rows = rows.reshape(G_BLOCK, Q_BLOCK, D)
        rows = rows * SCALE
        d_rows = lax.dynamic_slice(dout, at, (1, G_BLOCK, Q_BLOCK, D))
        d_rows = d_rows.reshape(G_BLOCK, Q_BLOCK, D)
        at = (0, 0, q_start)
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

    def keys_of(c):
        """A chunk of keys, and their values."""
        k_start = jnp.minimum(c * K_BLOCK, S - K_BLOCK)  # the last overlaps
        at = (0, 0, k_start, 0)
        kc = lax.dynamic_slice(k, at, (1, G_BLOCK, K_BLOCK, D))
        kc = kc.reshape(G_BLOCK, K_BLOCK, D)
        vc = lax.dynamic_slice(v, at, (1, G_BLOCK, K_BLOCK, D))
        vc = vc.reshape(G_BLOCK, K_BLOCK, D)
        return kc, vc

    def tile(i, c, of_queries, of_keys, masked, sums=None):
        """A tile made again -> p, ds (the cotangent of scale q·k), and its keys."""
        q_start = jnp.minimum(i * Q_BLOCK, T - Q_BLOCK)  # the last overlaps
        k_start = jnp.minimum(c * K_BLOCK, S - K_BLOCK)  # the last overlaps
        rows, d_rows, lse_row, delta_row, mass_row = of_queries
        kc, vc = of_keys
        slopes_at_h = lax.dynamic_slice(slopes, (0,), (G_BLOCK,)).reshape(G_BLOCK, 1, 1)
        q_index = q_start + jnp.arange(Q_BLOCK)[:, None]
        k_index = k_start + jnp.arange(K_BLOCK)
        s = jnp.einsum("gqd,gkd->gqk", rows, kc)
        s_0 = s
        s = 30.0 * jnp.tanh(s / 30.0)
        s = s + slopes_at_h * jnp.float32(k_index - q_index)
        p = jnp.exp(s - lse_row[..., None])
        if mass_row is not None:
            p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded
        scored = s != -jnp.inf
        if masked:
            seen = k_index <= q_index
            seen &= k_index >= c * K_BLOCK
            seen &= q_index >= i * Q_BLOCK
            scored &= seen
        there = jnp.broadcast_to(scored, s.shape).any(1)[..., None]
        kc = jnp.where(there, kc, 0)  # else NaN, perhaps
        vc = jnp.where(there, vc, 0)
        p = jnp.where(scored, p, 0)
        p = lax.optimization_barrier(p)  # made once
        dp = jnp.einsum("gqd,gkd->gqk", d_rows, vc)
        if delta_row is None:  # it is what is summed here
            return p.sum(-1), (p * dp).sum(-1)
        ds = p * (dp - delta_row[..., None])
        if sums is not None:
            (d_slopes,) = sums
            slopes_part = ds * jnp.float32(k_index - q_index)
            part = slopes_part.sum((1, 2)).reshape(G_BLOCK)
            d_slopes = _add_at(d_slopes, part, (0,))
        slope0_1 = s_0 / 30.0
        slope0_2 = jnp.tanh(slope0_1)
        ds = ds * (1.0 - slope0_2 * slope0_2)
        ds = jnp.where(scored, ds, 0)
        if sums is not None:
            sums = (d_slopes,)
        return p, ds, kc, sums

    def deltas(step, carried):
        """One chunk of queries: the sum of p, and delta, the mean of dp."""
        i = step
        q_start = jnp.minimum(i * Q_BLOCK, T - Q_BLOCK)  # the last overlaps

        # Key chunks [0, last) hold what any query here sees, and
        # [0, full_last) only what every one of them sees.
        # q_lo and q_hi: positions, half-open
        q_lo = q_start
        q_hi = q_start + Q_BLOCK
        last = -(-q_hi // K_BLOCK)
        full_last = jnp.clip((q_lo + 1) // K_BLOCK, 0, last)
        full_last = jnp.where(q_start == i * Q_BLOCK, full_last, 0)
        of_queries = queries_of(i, summing=True)

        def add(c, carry, masked):
            of_keys = keys_of(c)
            total, weighted = tile(i, c, of_queries, of_keys, masked)
            return carry[0] + total, carry[1] + weighted

        carry = (jnp.zeros_like(q, jnp.float32, (G_BLOCK, Q_BLOCK)),) * 2
        carry = lax.fori_loop(0, full_last, partial(add, masked=False), carry)
        carry = lax.fori_loop(full_last, last, partial(add, masked=True), carry)
        total, weighted = carry
        total = jnp.where(total == 0, 1, total)  # a row that saw no key
        at = (0, 0, q_start)
        new = q_start + jnp.arange(Q_BLOCK) >= i * Q_BLOCK
        made = []
        for whole, here in zip(carried, (total, weighted / total), strict=True):
            here = here.reshape(1, G_BLOCK, Q_BLOCK)
            here = jnp.where(new, here, lax.dynamic_slice(whole, at, here.shape))
            made.append(lax.dynamic_update_slice(whole, here, at))
        return tuple(made)

    mass = jnp.full_like(q, 4, jnp.float32, (B, H, T))
    delta = jnp.full_like(q, 5, jnp.float32, (B, H, T))
    carried = mass, delta
    mass, delta = lax.fori_loop(0, Q_BLOCKS, deltas, carried)

    def keys(step, carried):
        """One chunk of keys, and all queries that see any of it."""
        dq, dk, dv, sums = carried
        c = step
        k_start = jnp.minimum(c * K_BLOCK, S - K_BLOCK)  # the last overlaps

        # Query chunks [first, 8) hold what sees any key here, and
        # [full_first, full_last) only what sees every one of them.
        # k_lo and k_hi: positions, half-open
        k_lo = k_start
        k_hi = k_start + K_BLOCK
        first = k_lo // Q_BLOCK
        full_first = jnp.clip(-(-(k_hi - 1) // Q_BLOCK), first, 8)
        full_last = jnp.clip(7, full_first, 8)
        full_last = jnp.where(k_start == c * K_BLOCK, full_last, full_first)
        of_keys = keys_of(c)

        def add(i, carry, masked):
            dq, dk_here, dv_here, sums = carry
            of_queries = queries_of(i)
            rows, d_rows, *_ = of_queries
            p, ds, kc, sums = tile(i, c, of_queries, of_keys, masked, sums)
            dv_here += jnp.einsum("gqd,gqk->gdk", d_rows, p)
            dk_here += jnp.einsum("gqd,gqk->gdk", rows, ds)
            part = jnp.einsum("gqk,gkd->gqd", ds, kc) * SCALE
            part = part.reshape(1, G_BLOCK, Q_BLOCK, D)
            q_start = jnp.minimum(i * Q_BLOCK, T - Q_BLOCK)  # the last overlaps
            dq = _add_at(dq, part, (0, 0, q_start, 0))
            return dq, dk_here, dv_here, sums

        dk_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, D, K_BLOCK))
        dv_here = jnp.zeros_like(q, jnp.float32, (G_BLOCK, D, K_BLOCK))
        carry = dq, dk_here, dv_here, sums
        carry = lax.fori_loop(first, full_first, partial(add, masked=True), carry)
        carry = lax.fori_loop(full_first, full_last, partial(add, masked=False), carry)
        carry = lax.fori_loop(full_last, 8, partial(add, masked=True), carry)
        dq, dk_here, dv_here, sums = carry
        at = (0, 0, k_start, 0)
        new = (k_start + jnp.arange(K_BLOCK) >= c * K_BLOCK)[:, None]
        dk_here = dk_here.transpose(0, 2, 1)
        dk_here = dk_here.reshape(1, G_BLOCK, K_BLOCK, D)
        dk_before = lax.dynamic_slice(dk, at, (1, G_BLOCK, K_BLOCK, D))
        dk_here = jnp.where(new, dk_here, dk_before)
        dk = lax.dynamic_update_slice(dk, dk_here, at)
        dv_here = dv_here.transpose(0, 2, 1)
        dv_here = dv_here.reshape(1, G_BLOCK, K_BLOCK, D)
        dv_before = lax.dynamic_slice(dv, at, (1, G_BLOCK, K_BLOCK, D))
        dv_here = jnp.where(new, dv_here, dv_before)
        dv = lax.dynamic_update_slice(dv, dv_here, at)
        return dq, dk, dv, sums

    # written whole, whatever it begins with: of arrays that begin alike XLA makes one
    dq = jnp.zeros_like(q, jnp.float32, (B, H, T, D))
    dk = jnp.full_like(q, 2, jnp.float32, (B, G, S, D))
    dv = jnp.full_like(q, 3, jnp.float32, (B, G, S, D))
    sums = (jnp.zeros_like(slopes, jnp.float32),)
    carried = dq, dk, dv, sums
    dq, dk, dv, sums = lax.fori_loop(0, K_BLOCKS, keys, carried)
    (d_slopes,) = sums
    return dq, dk, dv, d_slopes


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
