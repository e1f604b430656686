"""Attention in chunks of 128 queries and 128 keys, differentiable to any order.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          then    s = 30.0 * tanh(s / 30.0)
          key k is there for query q where (k <= q) & (k > q - 200)
          and derivatives of any order, forward and in reverse
          q       [1, 1000, 4, 64]  bfloat16
          k       [1, 1000, 2, 64]  bfloat16
          v       [1, 1000, 2, 64]  bfloat16
          out     [1, 1000, 4, 64]  bfloat16
          lse     [1, 4, 1000]  float32
plan      scanned · 128 queries × 128 keys · 2 kv heads a step · scan
          tiles of a head: 64; 0 full, 21 on an edge, 43 empty and never visited
cost      352 MFLOP (1.02 GFLOP without skipping), 9.7 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 4, "kv_heads": 2, "q_len": 1000, "kv_len": 1000, "qk_dim": 64,
          "v_dim": 64, "dtype": "bfloat16", "mask": {"and": ["causal",
          {"sliding_window": {"left": 200}}]}, "score": [{"softcap": {"cap": 30.0}}],
          "outputs": ["out", "lse"], "derivatives": "any", "memory_budget": "16MiB"}
choices   {"backend": "jax", "target": "cpu", "algorithm": "scanned", "q_chunk": 128,
          "k_chunk": 128, "head_chunk": 2, "batch_chunk": 1, "scale": "queries", "exp":
          "polynomial", "product_dtype": "float32", "guard": true, "loop": "scan"}
"""

import jax
import jax.numpy as jnp
from jax import lax

B, T, S = 1, 1000, 1000  # batch, queries, keys
H, G = 4, 2  # query heads, kv heads
R = H // G  # query heads that share a kv head
D = 64  # head dim
Q_CHUNK, K_CHUNK = 128, 128  # of a tile
G_CHUNK = 2  # kv heads of a tile
LOG2E = 1.4426950408889634  # exp(s) is 2**(s * LOG2E)
SCALE = 0.125
Q_CHUNKS, K_CHUNKS = -(-T // Q_CHUNK), -(-S // K_CHUNK)
VISITS = 3  # key chunks from the first to the last that some query sees, at most


def attention(q, k, v):
    """Attention of the arrays that are checked first -> out, lse.

    out (B, T, H, D), 0 where a query sees no key
    lse (B, H, T): log of the sum of exp(s), -inf where a query sees no key
    """
    _check("q", q, (B, T, H, D), "bfloat16")
    _check("k", k, (B, S, G, D), "bfloat16")
    _check("v", v, (B, S, G, D), "bfloat16")
    given = q, k, v
    # adds nothing; in a shard_map all arguments vary over the same devices by it
    given = _coupled(given, _nought(given))
    return _attention(given)


def _check(name, x, shape, dtype):
    if x.shape != shape or x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}{x.shape}, not {dtype}{shape}")


@jax.custom_jvp
def _attention(given):
    """The outputs, which have derivatives of all orders in what is given.

    They are those of `_scanned`, computed anew from what is given: nothing else is
    kept, whatever the policy of a jax.checkpoint around this function says.
    """
    return _scanned(given)


@_attention.defjvp
def _tangents(primals, tangents):
    (given,), (moved,) = primals, tangents
    outputs = _attention(given)

    def of(*given):
        return _scanned(given)

    def push(moved):
        return jax.jvp(of, given, moved)[1]

    def pull(cotangents):
        return jax.vjp(of, *given)[1](cotangents)

    # y = push(x) as the solution of x = moved, y - push(x) = 0: a linear system is what
    # JAX differentiates, transposes and batches without looking inside
    def system(at):
        x, y = at
        sides = x, jax.tree.map(jnp.subtract, y, push(x))
        return _coupled(sides, _nought(given) * _nought(at))

    def solve(_, sides):
        x, y = sides
        return x, jax.tree.map(jnp.add, y, push(x))

    def solve_transposed(_, sides):
        x, y = sides
        return jax.tree.map(jnp.add, x, pull(y)), y

    sides = _coupled((moved, jax.tree.map(jnp.zeros_like, outputs)), _nought(moved))
    found = lax.custom_linear_solve(system, sides, solve, solve_transposed)
    return outputs, _coupled(found[1], _nought(found))


def _coupled(arrays, nought):
    """The arrays, each of them depending on what `nought` does.

    JAX transposes a linear system only if all of its sides depend on what is moved.
    """
    return jax.tree.map(lambda x: x + nought.astype(x.dtype), arrays)


def _nought(arrays):
    """0, and linear in every array."""
    firsts = (x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(arrays))
    return sum(jnp.where(False, x, 0) for x in firsts)


def _scanned(given):
    """The outputs, by scans that JAX differentiates."""
    q, k, v = given

    nought = lax.stop_gradient(_nought(given))  # scans carry what varies as these do

    def heads(q, k, v):
        """All queries of the heads that are computed together."""
        # gradients of keys and values are summed in the dtype that these have here
        k, v = k.astype(jnp.float32), v.astype(jnp.float32)
        k = _chunks(k, 1, K_CHUNK).reshape(K_CHUNKS, K_CHUNK, G_CHUNK, D)
        v = _chunks(v, 1, K_CHUNK).reshape(K_CHUNKS, K_CHUNK, G_CHUNK, D)

        @jax.checkpoint
        def queries(chunk):
            """One chunk of queries."""
            i, rows = chunk
            q_start = jnp.minimum(i * Q_CHUNK, T - Q_CHUNK)  # the last overlaps
            rows = rows.reshape(Q_CHUNK, G_CHUNK, R, D)
            rows = rows.transpose(1, 2, 0, 3)
            rows = rows.astype(jnp.float32) * SCALE
            q_index = q_start + jnp.arange(Q_CHUNK)[:, None]

            # Key chunks [first, last) hold what any query here sees, and
            # [full_first, full_last) only what every one of them sees.
            # q_lo and q_hi: positions, half-open
            q_lo = q_start
            q_hi = q_start + Q_CHUNK
            first = jnp.maximum(q_lo - 199, 0) // K_CHUNK
            last = -(-q_hi // K_CHUNK)
            full_first = jnp.clip(-(-(q_hi - 200) // K_CHUNK), first, last)
            full_last = jnp.clip((q_lo + 1) // K_CHUNK, full_first, last)

            def scores(c, kc):
                """Scores (G_CHUNK, R, Q_CHUNK, K_CHUNK) of a chunk of keys."""
                s = jnp.einsum("grqd,kgd->grqk", rows, kc)
                s = 30.0 * jnp.tanh(s / 30.0)
                return s

            def interior(carry, c, kc, vc):
                return _add(carry, scores(c, kc), vc)

            def edge(carry, c, kc, vc):
                """A chunk of keys, of which some queries don't see some."""
                k_start = jnp.minimum(c * K_CHUNK, S - K_CHUNK)  # the last overlaps
                k_index = k_start + jnp.arange(K_CHUNK)
                seen = (k_index <= q_index) & (k_index > q_index - 200)
                seen &= k_index >= c * K_CHUNK
                seen = jnp.broadcast_to(seen, (G_CHUNK, R, Q_CHUNK, K_CHUNK))
                there = seen.any((1, 2)).transpose(1, 0)
                kc = jnp.where(there[..., None], kc, 0)  # a NaN that no query sees
                vc = jnp.where(there[..., None], vc, 0)
                s = jnp.where(seen, scores(c, kc), -jnp.inf)
                return _add(carry, s, vc)

            def skipped(carry, c, kc, vc):
                return carry

            @jax.checkpoint
            def add(carry, chunk):
                c, kc, vc = chunk
                inside = (full_first <= c) & (c < full_last)
                visited = (first <= c) & (c < last)
                kind = jnp.where(inside, 0, jnp.where(visited, 1, 2))
                tiles = interior, edge, skipped
                return lax.switch(kind, tiles, carry, c, kc, vc), None

            m = jnp.full((G_CHUNK, R, Q_CHUNK), nought - jnp.inf)
            total = jnp.full((G_CHUNK, R, Q_CHUNK), nought)
            acc = jnp.full((G_CHUNK, R, Q_CHUNK, D), nought)
            begin = jnp.minimum(first, K_CHUNKS - VISITS)
            chunks = begin + jnp.arange(VISITS)
            k_here = lax.dynamic_slice_in_dim(k, begin, VISITS)
            v_here = lax.dynamic_slice_in_dim(v, begin, VISITS)
            chunks = chunks, k_here, v_here
            (m, total, acc), _ = lax.scan(add, (m, total, acc), chunks)
            total = jnp.where(total == 0, 1, total)  # a row that saw no key
            lse = m + jnp.log(total)
            lse = lse.reshape(1, G_CHUNK * R, Q_CHUNK)
            out = acc / total[..., None]
            out = out.transpose(2, 0, 1, 3)
            out = out.reshape(1, Q_CHUNK, G_CHUNK * R, D).astype(jnp.bfloat16)
            return out, lse

        chunks = jnp.arange(Q_CHUNKS), _chunks(q, 1, Q_CHUNK)
        out, lse = lax.map(queries, chunks)
        out = _joined(out, 1, T)
        lse = _joined(lse, 2, T)
        return out, lse

    return heads(q, k, v)


def _chunks(x, axis, size):
    """[.., n, ..] -> [chunks, .., size, ..]; the last overlaps the one before it."""
    n = x.shape[axis]
    if n % size:
        whole = lax.slice_in_dim(x, 0, n - n % size, axis=axis)
        last = lax.slice_in_dim(x, n - size, n, axis=axis)
        x = jnp.concatenate([whole, last], axis)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x, axis, n):
    """[chunks, .., size, ..] -> [.., n, ..]: `_chunks` undone."""
    size = x.shape[axis + 1]
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    if n % size:
        whole = lax.slice_in_dim(x, 0, n - n % size, axis=axis)
        last = lax.slice_in_dim(x, x.shape[axis] - n % size, x.shape[axis], axis=axis)
        x = jnp.concatenate([whole, last], axis)
    return x


def _add(carry, s, vc):
    """The running maximum, sum, and weighted sum of values, with more keys."""
    m, total, acc = carry
    # the maximum cancels out: it needs no derivative
    m_new = jnp.maximum(m, lax.stop_gradient(s).max(-1))
    m_safe = jnp.where(m_new == -jnp.inf, 0, m_new)  # a row that saw no key yet
    p = _exp2((s - m_safe[..., None]) * LOG2E)
    rescale = jnp.exp(m - m_safe)
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
