"""Attention in chunks of 16 queries and 32 keys, with a running softmax.

made by   attngen 0.1.0 for mi355x; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where ((q // 64 + k // 64 + h) % 2 == 0) | (q == k)
          q       [1, 512, 2, 96]  float32
          k       [1, 512, 2, 96]  float32
          v       [1, 512, 2, 40]  float32
          out     [1, 512, 2, 40]  float32
plan      running · 16 queries × 32 keys · 1 warp · 3 stages · head dim in pieces
          tiles of head 0: 512; 256 full, 0 on an edge, 256 empty and never visited
cost      71.3 MFLOP (143 MFLOP without skipping), 109.0 KiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"q_heads": 2, "kv_heads": 2, "q_len": 512, "kv_len": 512, "qk_dim": 96,
          "v_dim": 40, "mask": {"expr": ["or", ["eq", ["mod", ["add", ["add",
          ["floordiv", "q", 64], ["floordiv", "k", 64]], "h"], 2], 0], ["eq", "q",
          "k"]]}}
choices   {"backend": "triton", "target": "mi355x", "algorithm": "running", "q_chunk":
          16, "k_chunk": 32, "num_warps": 1, "num_stages": 3, "order": "forward",
          "head_dim": "split", "loads": "pointers", "skip": "list"}
"""

import math
import os
import zlib
from pathlib import Path

import torch
import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(16)  # queries of a tile
K_BLOCK = tl.constexpr(32)  # keys of a tile
R = tl.constexpr(1)  # query heads that share a kv head
QK_DIM = tl.constexpr(96)
V_DIM = tl.constexpr(40)
# 0.10206207261596575, times log2(e): exp(s) is 2**(s * log2(e))
SCALE_LOG2 = tl.constexpr(0.14724444602590306)
OUT_DTYPE = torch.float32
NUM_WARPS, NUM_STAGES = 1, 3
# of this very text: an edited copy is another operation to torch
OPERATION = f"attngen::attention_{zlib.crc32(Path(__file__).read_bytes()):08x}"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly
# what changes between calls without another compilation
RUNTIME = [
    "q_len", "kv_len", "heads", "q_stride_b", "q_stride_t", "q_stride_h", "k_stride_b",
    "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t", "v_stride_h",
    "out_stride_b", "out_stride_t", "out_stride_h", "tiles_stride_0", "tiles_stride_1",
    "tiles_stride_2",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 8}  # of tensors that lie densely


def attention(q, k, v):
    """Attention of torch tensors -> out.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, at addresses that aren't multiples of 16
    bytes, or of more than 2 GiB.

    q       (B, T, H, 96) float32
    k       (B, S, G, 96) float32
    v       (B, S, G, 40) float32
    out     (B, T, H, 40) float32
    out is 0 where a query sees no key
    """
    _check(q, k, v)
    return _attention(q, k, v)


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Allocate the outputs and launch the kernel: one operation to torch.compile."""
    B, T, H, _ = q.shape
    out = _empty_out(q)
    tiles = _tiles(q, k)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, Q_BLOCK.value) * H * B,)](
            q,
            k,
            v,
            out,
            tiles,
            T,
            k.shape[1],
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *tiles.stride()[:3],
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out


def _tiles(q, k):
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
    h_lo = torch.arange(H, device=q.device)[:, None, None]
    h_hi = h_lo + 1
    some_part_1 = ((q_hi - 1) // 64 + (k_hi - 1) // 64 + h_hi - 1) // 2
    some = (q_lo // 64 + k_lo // 64 + h_lo + 1) // 2 <= some_part_1
    some = some | ((q_lo < k_hi) & (k_lo < q_hi))
    every_part_3 = (q_hi - 1) // 64 + (k_hi - 1) // 64 + h_hi
    every_part_2 = every_part_3 <= q_lo // 64 + k_lo // 64 + h_lo + 1
    every_part_1 = every_part_2 & ((q_lo // 64 + k_lo // 64 + h_lo) % 2 == 0)
    every = (k_hi <= q_lo + 1) | every_part_1
    every_part_6 = (q_hi - 1) // 64 + (k_hi - 1) // 64 + h_hi
    every_part_5 = every_part_6 <= q_lo // 64 + k_lo // 64 + h_lo + 1
    every_part_4 = every_part_5 & ((q_lo // 64 + k_lo // 64 + h_lo) % 2 == 0)
    every = every & ((q_hi <= k_lo + 1) | every_part_4)
    every = every & (key + K_BLOCK.value <= S)
    # 0 full, 1 partial, 2 empty
    kind = 2 - some.to(torch.int8) - every.to(torch.int8)
    shape = torch.broadcast_shapes(kind.shape, (1, 1, query.shape[0], key.shape[0]))
    kind = kind.expand(shape)
    order = kind.argsort(dim=-1, stable=True).to(torch.int32)
    counts = [(kind < n).sum(-1, keepdim=True).to(torch.int32) for n in (1, 2)]
    return torch.cat([*counts, order], -1).expand(B, H, -1, -1)


@_attention.register_fake
def _fake(q, k, v):
    return _empty_out(q)


def _empty_out(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H, 40), dtype=OUT_DTYPE)


def _check(q, k, v):
    """Refuse what the kernel doesn't take, before it is launched."""
    given = {"q": q, "k": k, "v": v}
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
    needed = {
        "q": ((B, T, H, 96), torch.float32),
        "k": ((B, S, G, 96), torch.float32),
        "v": ((B, S, G, 40), torch.float32),
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
    tiles_stride_0,
    tiles_stride_1,
    tiles_stride_2,
    ALIGN: tl.constexpr,
):
    """Q_BLOCK queries of one head, over the key blocks that any of them sees."""
    blocks = tl.cdiv(q_len, Q_BLOCK)
    program = tl.program_id(0)
    q_start = program % blocks * Q_BLOCK
    h_index = (program // blocks % heads).to(tl.int64)
    b_index = (program // blocks // heads).to(tl.int64)
    g_index = h_index // R  # of the keys and values
    rows = tl.arange(0, Q_BLOCK)
    cols = tl.arange(0, K_BLOCK)
    d_0 = tl.arange(0, 64)
    d_1 = 64 + tl.arange(0, 32)
    e_0 = tl.arange(0, 32)
    e_1 = 32 + tl.arange(0, 16)
    e_1_there = e_1 < V_DIM
    q_there = q_start + rows < q_len
    q_index = q_start + rows[:, None]

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    out_step = out_stride_t // ALIGN * ALIGN
    q_head = _head(q_ptr, b_index, h_index, q_stride_b, q_stride_h, ALIGN)
    k_head = _head(k_ptr, b_index, g_index, k_stride_b, k_stride_h, ALIGN)
    v_head = _head(v_ptr, b_index, g_index, v_stride_b, v_stride_h, ALIGN)
    q_head += q_start.to(tl.int64) * q_step
    q_0 = tl.load(
        q_head + rows[:, None] * q_step + d_0[None, :] * q_stride_d,
        mask=q_there[:, None],
        other=0.0,
    )
    q_1 = tl.load(
        q_head + rows[:, None] * q_step + d_1[None, :] * q_stride_d,
        mask=q_there[:, None],
        other=0.0,
    )
    k_0_at = cols[None, :] * k_step + d_0[:, None] * k_stride_d
    k_1_at = cols[None, :] * k_step + d_1[:, None] * k_stride_d
    k_block = k_step.to(tl.int64) * K_BLOCK  # from one block to the next
    v_0_at = cols[:, None] * v_step + e_0[None, :] * v_stride_d
    v_1_at = cols[:, None] * v_step + e_1[None, :] * v_stride_d
    v_block = v_step.to(tl.int64) * K_BLOCK

    # A row of the list of tiles: how many key blocks only hold what every query
    # here sees, how many hold what any does, and which these are.
    tiles = tiles_ptr + b_index * tiles_stride_0 + h_index * tiles_stride_1
    tiles += (q_start // Q_BLOCK).to(tl.int64) * tiles_stride_2
    full = tl.load(tiles)
    visited = tl.load(tiles + 1)
    m = tl.full((Q_BLOCK,), float("-inf"), tl.float32)  # in units of log 2
    total = tl.zeros((Q_BLOCK,), tl.float32)
    acc_0 = tl.zeros((Q_BLOCK, 32), tl.float32)
    acc_1 = tl.zeros((Q_BLOCK, 16), tl.float32)
    for i in range(full):
        c = tl.load(tiles + 2 + i)
        k_0 = tl.load(k_head + c * k_block + k_0_at)
        k_1 = tl.load(k_head + c * k_block + k_1_at)
        s = tl.dot(q_0, k_0, input_precision="ieee")
        s = tl.dot(q_1, k_1, s, input_precision="ieee")
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v_0 = tl.load(v_head + c * v_block + v_0_at)
        acc_0 *= rescale[:, None]
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0, input_precision="ieee")
        v_1 = tl.load(
            v_head + c * v_block + v_1_at,
            mask=e_1_there[None, :],
            other=0.0,
        )
        acc_1 *= rescale[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")
    for i in range(full, visited):
        c = tl.load(tiles + 2 + i)
        k_index = c * K_BLOCK + cols[None, :]
        k_0 = tl.load(
            k_head + c * k_block + k_0_at,
            mask=k_index < kv_len,
            other=0.0,
        )
        k_1 = tl.load(
            k_head + c * k_block + k_1_at,
            mask=k_index < kv_len,
            other=0.0,
        )
        s = tl.dot(q_0, k_0, input_precision="ieee")
        s = tl.dot(q_1, k_1, s, input_precision="ieee")
        part_1 = (q_index // 64 + k_index // 64 + h_index) % 2 == 0
        seen = part_1 | (q_index == k_index)
        seen &= k_index < kv_len
        s = tl.where(seen, s, float("-inf"))
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=True)
        seen = tl.broadcast_to(seen, (Q_BLOCK, K_BLOCK)) & q_there[:, None]
        there = tl.max(seen.to(tl.int32), 0) > 0  # else a NaN no query sees
        v_0 = tl.load(
            v_head + c * v_block + v_0_at,
            mask=there[:, None],
            other=0.0,
        )
        acc_0 *= rescale[:, None]
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0, input_precision="ieee")
        v_1 = tl.load(
            v_head + c * v_block + v_1_at,
            mask=there[:, None] & e_1_there[None, :],
            other=0.0,
        )
        acc_1 *= rescale[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")

    share = 1.0 / tl.where(total == 0, 1.0, total)  # a row that saw no key is 0
    out_head = _head(out_ptr, b_index, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_start.to(tl.int64) * out_step
    tl.store(
        out_head + rows[:, None] * out_step + e_0[None, :] * out_stride_d,
        (acc_0 * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )
    tl.store(
        out_head + rows[:, None] * out_step + e_1[None, :] * out_stride_d,
        (acc_1 * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None] & e_1_there[None, :],
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
