"""Attention, the whole square of scores at once.

made by   attngen 0.1.0 for cpu; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where ((q // 64 + k // 64 + h) % 2 == 0) | (q == k)
          q       [1, 512, 2, 96]  float32
          k       [1, 512, 2, 96]  float32
          v       [1, 512, 2, 40]  float32
          out     [1, 512, 2, 40]  float32
plan      dense
          tiles of a head: 1; 0 full, 1 on an edge, 0 empty and never visited
cost      143 MFLOP, 2.9 MiB of temporaries (modelled)
needs     jax >= 0.10; nothing of attngen
spec      {"q_heads": 2, "kv_heads": 2, "q_len": 512, "kv_len": 512, "qk_dim": 96,
          "v_dim": 40, "mask": {"expr": ["or", ["eq", ["mod", ["add", ["add",
          ["floordiv", "q", 64], ["floordiv", "k", 64]], "h"], 2], 0], ["eq", "q",
          "k"]]}}
choices   {"backend": "jax", "target": "cpu", "algorithm": "dense", "q_chunk": 512,
          "k_chunk": 512, "head_chunk": 2, "batch_chunk": 1, "loop": "unrolled", "exp":
          "exp", "product_dtype": "float32", "guard": false, "scale": "queries"}
"""

import jax.numpy as jnp

B, T, S = 1, 512, 512  # batch, queries, keys
H, G = 2, 2  # query heads, kv heads
R = H // G  # query heads that share a kv head
QK_DIM, V_DIM = 96, 40  # head dims
SCALE = 0.10206207261596575


def attention(q, k, v):
    """Attention of the arrays that are checked first -> out.

    out (B, T, H, V_DIM), 0 where a query sees no key
    """
    _check("q", q, (B, T, H, QK_DIM), "float32")
    _check("k", k, (B, S, G, QK_DIM), "float32")
    _check("v", v, (B, S, G, V_DIM), "float32")

    rows = q.reshape(T, G, QK_DIM)
    rows = rows.transpose(1, 0, 2)
    rows = rows * SCALE
    q_index = jnp.arange(T)[:, None]
    h_index = jnp.arange(G)[:, None, None]
    kc, vc = k, v
    kc = kc.reshape(S, G, QK_DIM)
    vc = vc.reshape(S, G, V_DIM)
    s = jnp.einsum("gqd,kgd->gqk", rows, kc)
    k_index = jnp.arange(S)
    seen = ((q_index // 64 + k_index // 64 + h_index) % 2 == 0) | (q_index == k_index)
    s = jnp.where(seen, s, -jnp.inf)
    there = (s != -jnp.inf).any(1).transpose(1, 0)
    vc = jnp.where(there[..., None], vc, 0)  # a NaN that no query sees
    m = s.max(-1)
    m_safe = jnp.where(m == -jnp.inf, 0, m)  # a row that sees no key
    p = jnp.exp(s - m_safe[..., None])
    total = p.sum(-1)
    acc = jnp.einsum("gqk,kgd->gqd", p, vc)
    total = jnp.where(total == 0, 1, total)  # a row that saw no key is 0
    out = acc / total[..., None]
    out = out.transpose(1, 0, 2)
    out = out.reshape(B, T, H, V_DIM)
    return out


def _check(name, x, shape, dtype):
    if x.shape != shape or x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}{x.shape}, not {dtype}{shape}")
