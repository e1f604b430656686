"""Attention in chunks of 64 queries and 64 keys, with a running softmax.

made by   attngen 0.1.0 for mi300x; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where (k <= q) & (document_ids[b, q] ==
          document_ids[b, k])
          q       [2, 2048, 4, 64]  bfloat16
          k       [2, 2048, 4, 64]  bfloat16
          v       [2, 2048, 4, 64]  bfloat16
          document_ids [2, 2048]  int32
          out     [2, 2048, 4, 64]  bfloat16
plan      running · 64 queries × 64 keys · 2 warps · 1 stage · last queries first
          tiles of a head: 1024; 496 always empty, at most 528 visited: document_ids
          says which at run time
cost      4.43 GFLOP (8.59 GFLOP without skipping), 277.0 KiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"batch": 2, "q_heads": 4, "kv_heads": 4, "q_len": 2048, "kv_len": 2048,
          "qk_dim": 64, "v_dim": 64, "dtype": "bfloat16", "mask": {"and": ["causal",
          "documents"]}}
choices   {"backend": "triton", "target": "mi300x", "algorithm": "running", "q_chunk":
          64, "k_chunk": 64, "num_warps": 2, "num_stages": 1, "order": "reverse",
          "head_dim": "padded", "loads": "pointers", "skip": "list"}
"""

import math
import os
import zlib
from pathlib import Path

import torch
import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(64)  # queries of a tile
K_BLOCK = tl.constexpr(64)  # keys of a tile
R = tl.constexpr(1)  # query heads that share a kv head
QK_DIM = tl.constexpr(64)
V_DIM = tl.constexpr(64)
# 0.125, times log2(e): exp(s) is 2**(s * log2(e))
SCALE_LOG2 = tl.constexpr(0.18033688011112042)
OUT_DTYPE = torch.bfloat16
NUM_WARPS, NUM_STAGES = 2, 1
# of this very text: an edited copy is another operation to torch
OPERATION = f"attngen::attention_{zlib.crc32(Path(__file__).read_bytes()):08x}"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly
# what changes between calls without another compilation
RUNTIME = [
    "q_len", "kv_len", "heads", "q_stride_b", "q_stride_t", "q_stride_h", "k_stride_b",
    "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t", "v_stride_h",
    "out_stride_b", "out_stride_t", "out_stride_h", "document_ids_stride_0",
    "document_ids_stride_1", "tiles_stride_0", "tiles_stride_1", "tiles_stride_2",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 16}  # of tensors that lie densely


def attention(q, k, v, *, document_ids):
    """Attention of torch tensors -> out.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, at addresses that aren't multiples of 16
    bytes, or of more than 2 GiB.

    q       (B, T, H, 64) bfloat16
    k       (B, S, G, 64) bfloat16
    v       (B, S, G, 64) bfloat16
    document_ids (B, S) int32
    out     (B, T, H, 64) bfloat16
    out is 0 where a query sees no key
    """
    _check(q, k, v, document_ids=document_ids)
    return _attention(q, k, v, document_ids)


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    document_ids: torch.Tensor,
) -> torch.Tensor:
    """Allocate the outputs and launch the kernel: one operation to torch.compile."""
    B, T, H, _ = q.shape
    out = _empty_out(q)
    tiles = _tiles(q, k, document_ids)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, Q_BLOCK.value) * H * B,)](
            q,
            k,
            v,
            out,
            document_ids,
            tiles,
            T,
            k.shape[1],
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *document_ids.stride(),
            *tiles.stride()[:3],
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


def _tiles(q, k, document_ids):
    """For each chunk of queries the key blocks that it visits [B, H, chunks, 2 + blocks].

    How many are full, how many visited, then the blocks, the full ones first.
    """
    B, T, H, _ = q.shape
    S = k.shape[1]
    key = torch.arange(0, S, K_BLOCK.value, device=q.device)
    query = torch.arange(0, T, Q_BLOCK.value, device=q.device)[:, None]
    q_lo = query
    q_hi = (query + Q_BLOCK.value).clamp(max=T)
    k_lo = key
    k_hi = (key + K_BLOCK.value).clamp(max=S)
    document_ids_at_bq_min, document_ids_at_bq_max = _extremes(
        document_ids[..., :T], Q_BLOCK.value
    )
    document_ids_at_bq_min = document_ids_at_bq_min[:, None, :, None]
    document_ids_at_bq_max = document_ids_at_bq_max[:, None, :, None]
    document_ids_at_bk_min, document_ids_at_bk_max = _extremes(
        document_ids[..., :S], K_BLOCK.value
    )
    document_ids_at_bk_min = document_ids_at_bk_min[:, None, None, :]
    document_ids_at_bk_max = document_ids_at_bk_max[:, None, None, :]
    some = k_lo < q_hi
    some = some & (document_ids_at_bq_min <= document_ids_at_bk_max)
    some = some & (document_ids_at_bk_min <= document_ids_at_bq_max)
    every = k_hi <= q_lo + 1
    every = every & (document_ids_at_bk_max <= document_ids_at_bq_min)
    every = every & (document_ids_at_bq_max <= document_ids_at_bk_min)
    every = every & (key + K_BLOCK.value <= S)
    # 0 full, 1 partial, 2 empty
    kind = 2 - some.to(torch.int8) - every.to(torch.int8)
    shape = torch.broadcast_shapes(kind.shape, (1, 1, query.shape[0], key.shape[0]))
    kind = kind.expand(shape)
    order = kind.argsort(dim=-1, stable=True).to(torch.int32)
    counts = [(kind < n).sum(-1, keepdim=True).to(torch.int32) for n in (1, 2)]
    return torch.cat([*counts, order], -1).expand(B, H, -1, -1)


def _extremes(x, block):
    """The least and the greatest value in each block of the last axis."""
    tail = x[..., -1:].expand(*x.shape[:-1], -x.shape[-1] % block)
    x = torch.cat([x, tail], -1).unflatten(-1, (-1, block))
    return x.amin(-1), x.amax(-1)


@_attention.register_fake
def _fake(q, k, v, document_ids):
    return _empty_out(q)


def _empty_out(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H, 64), dtype=OUT_DTYPE)


def _check(q, k, v, **operands):
    """Refuse what the kernel doesn't take, before it is launched."""
    given = {"q": q, "k": k, "v": v, **operands}
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError("q, k and v have four dimensions: [b, t, h, d]")
    B, T, H, _ = q.shape
    _, S, G, _ = k.shape
    if G * R.value != H:
        raise ValueError(f"{H} query heads share {G} kv heads, not {R.value} each")
    if T != S:
        raise ValueError(f"{T} queries, {S} keys: no offset is known for them")
    if max(T, S) > 2**24:  # for which indices are proven
        raise ValueError(f"{T} queries, {S} keys: at most 2**24")
    if not (T <= S):  # an operand would be read outside
        raise ValueError(f"B, H, T, S are {(B, H, T, S)}, not T <= S")
    needed = {
        "q": ((B, T, H, 64), torch.bfloat16),
        "k": ((B, S, G, 64), torch.bfloat16),
        "v": ((B, S, G, 64), torch.bfloat16),
        "document_ids": ((B, S), torch.int32),
    }
    for name, (shape, dtype) in needed.items():
        x = given[name]
        if tuple(x.shape) != shape or x.dtype != dtype:
            got = f"{x.dtype}{list(x.shape)}"
            raise TypeError(f"{name} is {got}, not {dtype}{list(shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    blocks = {"q": Q_BLOCK.value, "k": K_BLOCK.value, "v": K_BLOCK.value}
    for name, block in blocks.items():  # within a block offsets have 32 bits
        x = given[name]
        if (block - 1) * x.stride(1) + x.shape[3] * x.stride(3) >= 2**31:
            raise ValueError(f"{name} has strides {x.stride()}: too large for a block")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"q is on {q.device}; this kernel needs a GPU")


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    document_ids_ptr,
    tiles_ptr,
    q_len,
    kv_len,
    heads,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    v_stride_d,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    document_ids_stride_0,
    document_ids_stride_1,
    tiles_stride_0,
    tiles_stride_1,
    tiles_stride_2,
    ALIGN: tl.constexpr,
):
    """Q_BLOCK queries of one head, over the key blocks that any of them sees."""
    blocks = tl.cdiv(q_len, Q_BLOCK)
    program = tl.program_id(0)
    q_start = (blocks - 1 - program % blocks) * Q_BLOCK  # those that see most go first
    h_index = (program // blocks % heads).to(tl.int64)
    b_index = (program // blocks // heads).to(tl.int64)
    g_index = h_index // R  # of the keys and values
    rows = tl.arange(0, Q_BLOCK)
    cols = tl.arange(0, K_BLOCK)
    d = tl.arange(0, 64)
    q_there = q_start + rows < q_len
    q_index = q_start + rows[:, None]
    document_ids_at_bq = document_ids_ptr + b_index * document_ids_stride_0
    document_ids_at_bq += q_index.to(tl.int64) * document_ids_stride_1
    document_ids_at_bq = tl.load(document_ids_at_bq, mask=q_index < q_len, other=0)

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    out_step = out_stride_t // ALIGN * ALIGN
    q_head = _head(q_ptr, b_index, h_index, q_stride_b, q_stride_h, ALIGN)
    k_head = _head(k_ptr, b_index, g_index, k_stride_b, k_stride_h, ALIGN)
    v_head = _head(v_ptr, b_index, g_index, v_stride_b, v_stride_h, ALIGN)
    q_head += q_start.to(tl.int64) * q_step
    q = tl.load(
        q_head + rows[:, None] * q_step + d[None, :] * q_stride_d,
        mask=q_there[:, None],
        other=0.0,
    )
    k_at = cols[None, :] * k_step + d[:, None] * k_stride_d
    k_block = k_step.to(tl.int64) * K_BLOCK  # from one block to the next
    v_at = cols[:, None] * v_step + d[None, :] * v_stride_d
    v_block = v_step.to(tl.int64) * K_BLOCK

    # A row of the list of tiles: how many key blocks only hold what every query
    # here sees, how many hold what any does, and which these are.
    tiles = tiles_ptr + b_index * tiles_stride_0 + h_index * tiles_stride_1
    tiles += (q_start // Q_BLOCK).to(tl.int64) * tiles_stride_2
    full = tl.load(tiles)
    visited = tl.load(tiles + 1)
    m = tl.full((Q_BLOCK,), float("-inf"), tl.float32)  # in units of log 2
    total = tl.zeros((Q_BLOCK,), tl.float32)
    acc = tl.zeros((Q_BLOCK, 64), tl.float32)
    for i in range(full):
        c = tl.load(tiles + 2 + i)
        k = tl.load(k_head + c * k_block + k_at)
        s = tl.dot(q, k)
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v = tl.load(v_head + c * v_block + v_at)
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
    for i in range(full, visited):
        c = tl.load(tiles + 2 + i)
        k_index = c * K_BLOCK + cols[None, :]
        k = tl.load(
            k_head + c * k_block + k_at,
            mask=k_index < kv_len,
            other=0.0,
        )
        s = tl.dot(q, k)
        document_ids_at_bk = document_ids_ptr + b_index * document_ids_stride_0
        document_ids_at_bk += k_index.to(tl.int64) * document_ids_stride_1
        document_ids_at_bk = tl.load(document_ids_at_bk, mask=k_index < kv_len, other=0)
        seen = (k_index <= q_index) & (document_ids_at_bq == document_ids_at_bk)
        seen &= k_index < kv_len
        s = tl.where(seen, s, float("-inf"))
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=True)
        seen = tl.broadcast_to(seen, (Q_BLOCK, K_BLOCK)) & q_there[:, None]
        there = tl.max(seen.to(tl.int32), 0) > 0  # else a NaN no query sees
        v = tl.load(
            v_head + c * v_block + v_at,
            mask=there[:, None],
            other=0.0,
        )
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)

    share = 1.0 / tl.where(total == 0, 1.0, total)  # a row that saw no key is 0
    out_head = _head(out_ptr, b_index, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_start.to(tl.int64) * out_step
    tl.store(
        out_head + rows[:, None] * out_step + d[None, :] * out_stride_d,
        (acc * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )


@triton.jit
def _softmax(s, m, total, UNSEEN: tl.constexpr):
    """The running maximum and sum with one more tile; its weights; what rescales sums.

    UNSEEN: a score can be -inf, that of a key which its query doesn't see
    """
    m_new = tl.maximum(m, tl.max(s, 1) * SCALE_LOG2)
    m_safe = m_new
    if UNSEEN:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # saw no key yet
    p = tl.exp2(s * SCALE_LOG2 - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    return m_new, total * rescale + tl.sum(p, 1), p, rescale


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where a head begins; strides are multiples of ALIGN."""
    return ptr + (b * (stride_b // ALIGN) + h * (stride_h // ALIGN)) * ALIGN
