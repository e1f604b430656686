"""Attention in chunks of 256 queries and 256 keys, with a running softmax.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where k <= q
          with exp(sink[h]) added to each denominator (not in lse)
          and the gradients of q, k, v, sink, once, in reverse mode
          q       [1, 2048, 8, 64]  float32
          k       [1, 2048, 2, 64]  float32
          v       [1, 2048, 2, 64]  float32
          sink    [8]  float32
          out     [1, 2048, 8, 64]  float32
          lse     [1, 8, 2048]  float32
plan      running · 256 queries × 256 keys · 1 kv head a step · fori by 2 · diagonal
          128; backward: by_queries · 256 queries × 256 keys · 1 kv head a step · delta
          again
          tiles of a head: 64; 28 full, 8 on an edge, 28 empty and never visited
cost      16.6 GFLOP, 12.3 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 2, "q_len": 2048, "kv_len": 2048, "qk_dim": 64,
          "v_dim": 64, "mask": "causal", "sink": true, "outputs": ["out", "lse"],
          "derivatives": "vjp", "memory_budget": "16MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "running", "q_chunk": 256,
          "k_chunk": 256, "head_chunk": 1, "batch_chunk": 1, "loop": "fori", "exp":
          "polynomial", "product_dtype": "float32", "guard": false, "scale": "queries",
          "denominator": "sum", "qk": "once", "slices": "nd", "steps": "fori", "blank":
          "scores", "mask": "positions", "unroll": 2, "diagonal": 128, "backward":
          "by_queries", "backward_q_chunk": 256, "backward_k_chunk": 256,
          "backward_head_chunk": 1, "backward_batch_chunk": 1, "backward_exp": "exp2",
          "backward_product_dtype": "float32", "backward_guard": false,
          "backward_scale": "queries", "backward_mass": "kept", "backward_delta":
          "again", "backward_store": "p", "backward_ds": "once", "backward_slices":
          "nd"}
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 2048, 2048  # batch, queries, keys
H, G = 8, 2  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 256, 256  # of a tile
K_STEP = 128  # keys, along the diagonal
UNROLL = 2  # tiles of a step, without a mask
Q_BLOCK, K_BLOCK = 256, 256  # of a tile, backward
Q_BLOCKS = -(-T // Q_BLOCK)
K_BLOCKS = -(-S // K_BLOCK)
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125
SCALE_2 = SCALE * LOG2E
Q_CHUNKS = -(-T // Q_CHUNK)


def attention(q, k, v, *, sink):
    """Attention of the arrays that are checked first -> out, lse.

    out (B, T, H, D), 0 where a query sees no key
    lse (B, H, T): log of the sum of exp(s), -inf where a query sees no key
    """
    _check("q", q, (B, T, H, D), "float32")
    _check("k", k, (B, S, G, D), "float32")
    _check("v", v, (B, S, G, D), "float32")
    _check("sink", sink, (H,), "float32")
    q, k, v, sink = _alike(q, k, v, sink)

    return _attention(q, k, v, sink)


@jax.custom_vjp
def _attention(q, k, v, sink):
    out, lse, _ = _forward(q, k, v, sink)
    return out, lse


def _attention_fwd(q, k, v, sink):
    """The outputs, and what gradients are made of."""
    q, k, v, sink = _first_only((q, k, v, sink))
    out, lse, mass = _forward(q, k, v, sink)
    return (out, lse), (q, k, v, sink, out, lse, mass)


def _attention_bwd(kept, cotangents):
    """Of all arguments; None where they aren't floats."""
    kept, cotangents = _first_only((kept, cotangents))
    q, k, v, sink, out, lse, mass = kept
    dout, dlse = cotangents
    dq, dk, dv, d_sink = _backward(q, k, v, sink, out, lse, mass, dout, dlse)
    return dq, dk, dv, d_sink


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
def _forward(q, k, v, sink):
    """The outputs; under vmap, of one batch after another."""

    def queries(step, carried):
        """One chunk of queries of the heads that are computed together."""
        out_all, lse_all, mass_all = carried
        i = step % Q_CHUNKS
        g = step // Q_CHUNKS
        q_start = i * Q_CHUNK
        at = (0, q_start, g * R, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_CHUNK, R, D))
        rows = rows.reshape(Q_CHUNK, R, D)
        rows = rows.transpose(1, 0, 2)
        rows = rows * SCALE_2
        sink_at_h = lax.dynamic_slice(sink, (g * R,), (R,))
        sink_at_h = sink_at_h.reshape(R, 1).astype(jnp.float32) * LOG2E

        # Key chunks [0, full_last) hold only what every query here sees; each query
        # sees one key more than the one before it, the first of them one more.
        # q_lo: positions, half-open
        q_lo = q_start
        full_last = (q_lo + 1) // K_CHUNK

        def tile(k_start, keys, low):
            """Scores (R, Q_CHUNK - low, keys) and values."""
            at = (0, k_start, g, 0)
            kc = lax.dynamic_slice(k, at, (1, keys, 1, D))
            vc = lax.dynamic_slice(v, at, (1, keys, 1, D))
            kc = kc.reshape(keys, D)
            vc = vc.reshape(keys, D)
            s = jnp.einsum("rqd,kd->rqk", rows[:, low:], kc)
            return s, vc

        def interior(c, carry):
            return _add(carry, *tile(c * K_CHUNK, K_CHUNK, 0))

        def down(k_start, low, carry):
            """One step down the diagonal: K_STEP keys, and all queries that see any."""
            s, vc = tile(k_start, K_STEP, low)
            k_index = k_start + jnp.arange(K_STEP)
            q_index = q_start + low + jnp.arange(K_STEP)[:, None]
            seen = k_index <= q_index
            part = jnp.where(seen, s[:, :K_STEP], -jnp.inf)  # the others see all
            s = jnp.concatenate([part, s[:, K_STEP:]], 1)
            return _add(carry, s, vc, unseen=True)

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
        done = []
        for low in range(0, Q_CHUNK, K_STEP):
            carry = down(full_last * K_CHUNK + low, low, carry)
            # the first of these queries saw their last key: they are done
            done.append([each[:, :K_STEP] for each in carry])
            carry = [each[:, K_STEP:] for each in carry]
        done = zip(*done, strict=True)
        m, total, acc = (jnp.concatenate(each, 1) for each in done)
        lse = (m + jnp.log2(total)) / LOG2E
        # the sum of exp(s - lse): 1, but that lse is rounded
        mass = total * jnp.exp2(m - lse * LOG2E)
        mass = jnp.where(total == 0, 1, mass)
        lse = lse.reshape(1, R, Q_CHUNK)
        mass = mass.reshape(1, R, Q_CHUNK)
        m_sink = jnp.maximum(m, sink_at_h)
        m_sink = jnp.where(m_sink == -jnp.inf, 0, m_sink)
        rescale = jnp.exp2(m - m_sink)
        total = total * rescale + jnp.exp2(sink_at_h - m_sink)
        acc = acc * rescale[..., None]
        total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
        out = acc / total[..., None]
        out = out.transpose(1, 0, 2)
        out = out.reshape(1, Q_CHUNK, R, D)
        out_all = lax.dynamic_update_slice(out_all, out, (0, q_start, g * R, 0))
        lse_all = lax.dynamic_update_slice(lse_all, lse, (0, g * R, q_start))
        mass_all = lax.dynamic_update_slice(mass_all, mass, (0, g * R, q_start))
        return out_all, lse_all, mass_all

    out_all = jnp.zeros_like(q, jnp.float32, (B, T, H, D))
    lse_all = jnp.zeros_like(q, jnp.float32, (B, H, T))
    mass_all = jnp.ones_like(q, jnp.float32, (B, H, T))
    return lax.fori_loop(0, G * Q_CHUNKS, queries, (out_all, lse_all, mass_all))


@jax.custom_batching.sequential_vmap
def _backward(q, k, v, sink, out, lse, mass, dout, dlse):
    """Tiles are made again, from lse -> dq, dk, dv, d_sink."""
    delta = (out * dout).sum(-1).transpose(0, 2, 1)
    beside = jax.nn.sigmoid(sink[:, None] - lse)  # what the sink has of each row
    d_sink = -jnp.where(lse == -jnp.inf, 0, beside * delta).sum((0, 2))

    def queries_of(g, i):
        """A chunk of queries -> rows, d_rows, lse_row, delta_row, mass_row."""
        q_start = i * Q_BLOCK
        at = (0, q_start, g * R, 0)
        rows = lax.dynamic_slice(q, at, (1, Q_BLOCK, R, D))
        rows = rows.reshape(Q_BLOCK, R, D)
        rows = rows.transpose(1, 0, 2)
        rows = rows * SCALE_2
        d_rows = lax.dynamic_slice(dout, at, (1, Q_BLOCK, R, D))
        d_rows = d_rows.reshape(Q_BLOCK, R, D)
        d_rows = d_rows.transpose(1, 0, 2)
        out_rows = lax.dynamic_slice(out, at, (1, Q_BLOCK, R, D))
        out_rows = out_rows.reshape(Q_BLOCK, R, D)
        out_rows = out_rows.transpose(1, 0, 2)
        at = (0, g * R, q_start)
        lse_row = lax.dynamic_slice(lse, at, (1, R, Q_BLOCK)).reshape(R, Q_BLOCK)
        known = lse_row != -jnp.inf  # else the query sees no key
        lse_row = jnp.where(known, lse_row, jnp.inf)
        rows = jnp.where(known[..., None], rows, 0)
        d_rows = jnp.where(known[..., None], d_rows, 0)
        delta_row = (d_rows * out_rows).sum(-1)
        sink_at_h = lax.dynamic_slice(sink, (g * R,), (R,)).reshape(R, 1)
        share = 1 / (1 + jnp.exp(sink_at_h - lse_row))  # of keys, beside the sink
        d_rows *= share[..., None]
        lse_row *= LOG2E
        mass_row = lax.dynamic_slice(mass, at, (1, R, Q_BLOCK)).reshape(R, Q_BLOCK)
        dlse_row = lax.dynamic_slice(dlse, at, (1, R, Q_BLOCK)).reshape(R, Q_BLOCK)
        delta_row = jnp.where(known, delta_row, 0)
        dlse_row = jnp.where(known, dlse_row, 0)
        delta_row *= share
        delta_row -= dlse_row
        return rows, d_rows, lse_row, delta_row, mass_row

    def keys_of(g, c):
        """A chunk of keys, and their values."""
        k_start = c * K_BLOCK
        at = (0, k_start, g, 0)
        kc = lax.dynamic_slice(k, at, (1, K_BLOCK, 1, D)).reshape(K_BLOCK, D)
        vc = lax.dynamic_slice(v, at, (1, K_BLOCK, 1, D)).reshape(K_BLOCK, D)
        return kc, vc

    def tile(g, i, c, of_queries, of_keys, masked):
        """A tile made again -> p, ds (the cotangent of scale q·k), and its keys."""
        q_start = i * Q_BLOCK
        k_start = c * K_BLOCK
        rows, d_rows, lse_row, delta_row, mass_row = of_queries
        kc, vc = of_keys
        q_index = q_start + jnp.arange(Q_BLOCK)[:, None]
        s = jnp.einsum("rqd,kd->rqk", rows, kc)
        p = jnp.exp2(s - lse_row[..., None])
        p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded
        if masked:
            k_index = k_start + jnp.arange(K_BLOCK)
            seen = k_index <= q_index
            there = jnp.broadcast_to(seen, s.shape).any((0, 1))[..., None]
            kc = jnp.where(there, kc, 0)  # else NaN, perhaps
            vc = jnp.where(there, vc, 0)
            p = jnp.where(seen, p, 0)
        p = lax.optimization_barrier(p)  # made once
        dp = jnp.einsum("rqd,kd->rqk", d_rows, vc)
        ds = p * (dp - delta_row[..., None])
        return p, ds, kc

    def heads(step, carried):
        """All queries and keys of the heads that are computed together."""
        dq, dk, dv = carried
        g = step

        def queries(i, carried):
            """One chunk of queries, and all keys that any of it sees."""
            dq, dk_here, dv_here = carried
            q_start = i * Q_BLOCK

            # Key chunks [0, last) hold what any query here sees, and
            # [0, full_last) only what every one of them sees.
            # q_lo and q_hi: positions, half-open
            q_lo = q_start
            q_hi = q_start + Q_BLOCK
            last = -(-q_hi // K_BLOCK)
            full_last = jnp.clip((q_lo + 1) // K_BLOCK, 0, last)
            of_queries = queries_of(g, i)
            rows, d_rows, *_ = of_queries
            rows = rows.transpose(2, 0, 1)
            d_rows = d_rows.transpose(2, 0, 1)
            # a barrier: else they are transposed for each tile
            rows, d_rows = lax.optimization_barrier((rows, d_rows))

            def add(c, carry, masked):
                dq_here, dk_here, dv_here = carry
                of_keys = keys_of(g, c)
                p, ds, kc = tile(g, i, c, of_queries, of_keys, masked)
                k_start = c * K_BLOCK
                part = jnp.einsum("drq,rqk->dk", d_rows, p)
                dv_here = _add_at(dv_here, part, (0, k_start))
                part = jnp.einsum("drq,rqk->dk", rows, ds)
                dk_here = _add_at(dk_here, part, (0, k_start))
                dq_here += jnp.einsum("rqk,kd->rqd", ds, kc)
                return dq_here, dk_here, dv_here

            dq_here = jnp.zeros_like(q, jnp.float32, (R, Q_BLOCK, D))
            carry = dq_here, dk_here, dv_here
            carry = lax.fori_loop(0, full_last, partial(add, masked=False), carry)
            carry = lax.fori_loop(full_last, last, partial(add, masked=True), carry)
            dq_here, dk_here, dv_here = carry
            dq_here *= SCALE
            at = (0, q_start, g * R, 0)
            dq_here = dq_here.transpose(1, 0, 2)
            dq_here = dq_here.reshape(1, Q_BLOCK, R, D)
            dq = lax.dynamic_update_slice(dq, dq_here, at)
            return dq, dk_here, dv_here

        dk_here = jnp.zeros_like(q, jnp.float32, (D, S))
        dv_here = jnp.zeros_like(q, jnp.float32, (D, S))
        carried = dq, dk_here, dv_here
        dq, dk_here, dv_here = lax.fori_loop(0, Q_BLOCKS, queries, carried)
        dk_here = dk_here / LOG2E
        at = (0, 0, g, 0)
        dk_here = dk_here.transpose(1, 0)
        dk_here = dk_here.reshape(1, S, 1, D)
        dk = lax.dynamic_update_slice(dk, dk_here, at)
        dv_here = dv_here.transpose(1, 0)
        dv_here = dv_here.reshape(1, S, 1, D)
        dv = lax.dynamic_update_slice(dv, dv_here, at)
        return dq, dk, dv

    # written whole, whatever it begins with: of arrays that begin alike XLA makes one
    dq = jnp.full_like(q, 1, jnp.float32, (B, T, H, D))
    dk = jnp.full_like(q, 2, jnp.float32, (B, S, G, D))
    dv = jnp.full_like(q, 3, jnp.float32, (B, S, G, D))
    carried = dq, dk, dv
    dq, dk, dv = lax.fori_loop(0, G, heads, carried)
    return dq, dk, dv, d_sink


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
    pv = jnp.einsum("rqk,kd->rqd", p, vc)
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
