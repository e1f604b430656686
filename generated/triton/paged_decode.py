"""Attention in chunks of 16 queries and 16 keys, with a running softmax.

made by   attngen 0.1.0 for h100; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where k <= q
          and its index < kv_lengths[b]
          positions: query 0 is at bottom_right, key 0 at 0
          of paged k and v: key i of sequence b is token i%64 of page block_table[b,
          i//64]; entries behind its last key aren't followed
          of quantised k and v: each is its float8_e4m3 number times k_scale, or
          v_scale, of its kv head
          q       [32, 1, 32, 128]  bfloat16
          k       [16384, 64, 8, 128]  float8_e4m3
          v       [16384, 64, 8, 128]  float8_e4m3
          kv_lengths [32]  int32
          block_table [32, 512]  int32
          k_scale [8]  float32
          v_scale [8]  float32
          out     [32, 1, 32, 128]  bfloat16
plan      running · 16 queries × 16 keys · 1 warp · 3 stages · last queries first ·
          heads packed · 4 splits of the keys
          tiles of a kv head: 2048; 2048 full, 0 on an edge, 0 empty and never visited
cost      68.7 GFLOP, 2.0 MiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"batch": 32, "q_heads": 32, "kv_heads": 8, "q_len": 1, "kv_len": 32768,
          "qk_dim": 128, "v_dim": 128, "dtype": "bfloat16", "kv_dtype": "float8_e4m3",
          "q_offset": "bottom_right", "mask": "causal", "kv_lengths": true, "storage":
          "paged", "page_size": 64}
choices   {"backend": "triton", "target": "h100", "algorithm": "running", "q_chunk": 16,
          "k_chunk": 16, "num_warps": 1, "num_stages": 3, "order": "reverse",
          "head_dim": "padded", "loads": "pointers", "pack_gqa": true, "kv_splits": 4}
"""

import math
import os
import zlib
from pathlib import Path

import torch
import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(16)  # rows of a tile
K_BLOCK = tl.constexpr(16)  # keys of a tile
R = tl.constexpr(4)  # query heads that share a kv head
QK_DIM = tl.constexpr(128)
V_DIM = tl.constexpr(128)
KV_SPLITS = tl.constexpr(4)  # programs that share keys
COLUMNS = tl.constexpr(32)  # of out, of a program of `combine`
SCALE = tl.constexpr(0.08838834764831845)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(s) is 2**(s * LOG2E)
PAGE_SIZE = tl.constexpr(64)  # keys of a page
OUT_DTYPE = torch.bfloat16
NUM_WARPS, NUM_STAGES = 1, 3
COMBINE_WARPS = 1
# of this very text: an edited copy is another operation to torch
OPERATION = f"attngen::attention_{zlib.crc32(Path(__file__).read_bytes()):08x}"
CHECKED = os.environ.get("ATTNGEN_CHECK") == "1"  # pages and lengths of each call
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly
# what changes between calls without another compilation
RUNTIME = [
    "q_len", "kv_len", "heads", "q_stride_b", "q_stride_t", "q_stride_h", "k_stride_b",
    "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t", "v_stride_h",
    "kv_lengths_stride_0", "block_table_stride_0", "block_table_stride_1",
    "k_scale_stride_0", "out_stride_b", "out_stride_t", "out_stride_h",
    "v_scale_stride_0",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 16}  # of tensors that lie densely


def attention(q, k, v, *, kv_lengths, block_table, k_scale, v_scale):
    """Attention of torch tensors -> out.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, or at addresses that aren't multiples of 16 bytes.

    q       (B, T, H, 128) bfloat16
    k       (P, 64, G, 128) float8_e4m3fn
    v       (P, 64, G, 128) float8_e4m3fn
    kv_lengths (B,) int32
    block_table (B, N) int32
    k_scale (G,) float32
    v_scale (G,) float32
    out     (B, T, H, 128) bfloat16
    out is 0 where a query sees no key
    """
    _check(
        q,
        k,
        v,
        kv_lengths=kv_lengths,
        block_table=block_table,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return _attention(q, k, v, kv_lengths, block_table, k_scale, v_scale)


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_lengths: torch.Tensor,
    block_table: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> torch.Tensor:
    """Allocate the outputs and launch the kernels: one operation to torch.compile."""
    B, T, H, _ = q.shape
    if CHECKED or INTERPRETED:
        _check_values(k, block_table, kv_lengths)
    out = _empty_out(q)
    part_m = q.new_empty((B, H, T, KV_SPLITS.value), dtype=torch.float32)
    part_total = q.new_empty((B, H, T, KV_SPLITS.value), dtype=torch.float32)
    part_acc = q.new_empty((B, H, T, KV_SPLITS.value, 128), dtype=torch.float32)
    S = block_table.shape[1] * PAGE_SIZE.value
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        programs = triton.cdiv(T * R.value, Q_BLOCK.value) * (H // R.value) * B
        forward[(programs, KV_SPLITS.value)](
            q,
            k,
            v,
            part_m,
            part_total,
            part_acc,
            kv_lengths,
            block_table,
            k_scale,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *kv_lengths.stride(),
            *block_table.stride(),
            *k_scale.stride(),
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
        combine[(B * H * T, triton.cdiv(V_DIM.value, COLUMNS.value))](
            part_m,
            part_total,
            part_acc,
            out,
            v_scale,
            T,
            H,
            *out.stride(),
            *v_scale.stride(),
            num_warps=COMBINE_WARPS,
        )
    return out


@_attention.register_fake
def _fake(q, k, v, kv_lengths, block_table, k_scale, v_scale):
    return _empty_out(q)


def _empty_out(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H, 128), dtype=OUT_DTYPE)


def _check(q, k, v, **operands):
    """Refuse what the kernel doesn't take, before it is launched."""
    given = {"q": q, "k": k, "v": v, **operands}
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, not a tensor")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError("q, k and v have four dimensions: [b, t, h, d]")
    B, T, H, _ = q.shape
    P, _, G, _ = k.shape
    block_table = operands["block_table"]
    if block_table.dim() != 2:
        raise ValueError(f"block_table has {block_table.dim()} dimensions, not 2")
    S = block_table.shape[1] * PAGE_SIZE.value
    if G * R.value != H:
        raise ValueError(f"{H} query heads share {G} kv heads, not {R.value} each")
    if max(T, S) > 2**24:  # for which indices are proven
        raise ValueError(f"{T} queries, {S} keys: at most 2**24")
    needed = {
        "q": ((B, T, H, 128), torch.bfloat16),
        "k": ((P, PAGE_SIZE.value, G, 128), torch.float8_e4m3fn),
        "v": ((P, PAGE_SIZE.value, G, 128), torch.float8_e4m3fn),
        "kv_lengths": ((B,), torch.int32),
        "block_table": ((B, -(-S // PAGE_SIZE.value)), torch.int32),
        "k_scale": ((G,), torch.float32),
        "v_scale": ((G,), torch.float32),
    }
    for name, (shape, dtype) in needed.items():
        x = given[name]
        if tuple(x.shape) != shape or x.dtype != dtype:
            got = f"{x.dtype}{list(x.shape)}"
            raise TypeError(f"{name} is {got}, not {dtype}{list(shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    blocks = {"q": Q_BLOCK.value, "k": PAGE_SIZE.value, "v": PAGE_SIZE.value}
    for name, block in blocks.items():  # within a block offsets have 32 bits
        x = given[name]
        if (block - 1) * x.stride(1) + x.shape[3] * x.stride(3) >= 2**31:
            raise ValueError(f"{name} has strides {x.stride()}: too large for a block")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"q is on {q.device}; this kernel needs a GPU")


def _check_values(k, block_table, kv_lengths):
    """Refuse what would be read outside of tensors. Waits for the GPU."""
    columns = torch.arange(block_table.shape[1], device=block_table.device)
    most = block_table.shape[1] * PAGE_SIZE.value
    if (kv_lengths > most).any():
        raise ValueError(f"kv_lengths are {kv_lengths.tolist()}: pages hold {most}")
    needed = columns * PAGE_SIZE.value < kv_lengths[:, None]
    outside = (block_table < 0) | (block_table >= k.shape[0])
    for b, i in (outside & needed).nonzero().tolist()[:1]:
        page = block_table[b, i].item()
        raise ValueError(
            f"block_table[{b}, {i}] is {page}, not one of {k.shape[0]} pages"
        )


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    part_m_ptr,
    part_total_ptr,
    part_acc_ptr,
    kv_lengths_ptr,
    block_table_ptr,
    k_scale_ptr,
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
    kv_lengths_stride_0,
    block_table_stride_0,
    block_table_stride_1,
    k_scale_stride_0,
    ALIGN: tl.constexpr,
):
    """Q_BLOCK rows of one kv head, over the key blocks that any of them sees.

    Row i is query i // R of the query head i % R, of those that share the kv head.
    """
    blocks = tl.cdiv(q_len * R, Q_BLOCK)
    program = tl.program_id(0)
    start = (blocks - 1 - program % blocks) * Q_BLOCK  # those that see most go first
    g_index = (program // blocks % (heads // R)).to(tl.int64)  # the kv head
    b_index = (program // blocks // (heads // R)).to(tl.int64)
    rows = start + tl.arange(0, Q_BLOCK)
    token = rows // R
    h_index = g_index * R + rows % R  # of each row
    q_start = start // R
    q_stop = tl.minimum(tl.cdiv(start + Q_BLOCK, R), q_len)
    split = tl.program_id(1)  # of the key blocks that these rows visit
    cols = tl.arange(0, K_BLOCK)
    d = tl.arange(0, 128)
    q_there = token < q_len
    kv_end = tl.load(kv_lengths_ptr + b_index * kv_lengths_stride_0)
    offset = kv_end - q_len  # the last query stands at the last key that is there
    kv_end = tl.minimum(kv_end, kv_len)
    q_index = token[:, None]
    q_pos = q_index + offset

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    q_head = _head(q_ptr, b_index, h_index, q_stride_b, q_stride_h, ALIGN)
    k_head = _head(k_ptr, 0, g_index, k_stride_b, k_stride_h, ALIGN)
    v_head = _head(v_ptr, 0, g_index, v_stride_b, v_stride_h, ALIGN)
    q_head += token.to(tl.int64) * q_step
    q = tl.load(
        q_head[:, None] + d[None, :] * q_stride_d,
        mask=q_there[:, None],
        other=0.0,
    )
    k_at = cols[None, :] * k_step + d[:, None] * k_stride_d
    k_page = k_stride_b // ALIGN * ALIGN
    v_at = cols[:, None] * v_step + d[None, :] * v_stride_d
    v_page = v_stride_b // ALIGN * ALIGN
    table = block_table_ptr + b_index * block_table_stride_0
    k_factor = tl.load(k_scale_ptr + g_index * k_scale_stride_0) * SCALE

    # Key blocks [0, last) hold what any query here sees, and
    # [0, full_last) only what every one of them sees.
    # q_lo and q_hi: positions, half-open
    q_lo = q_start + offset
    q_hi = q_stop + offset
    high = tl.minimum(q_hi, kv_end)
    last = tl.maximum(tl.cdiv(high, K_BLOCK), 0)
    full_last = tl.minimum(q_lo + 1, kv_end) // K_BLOCK
    full_last = tl.minimum(tl.maximum(full_last, 0), last)
    # this split's share of them: blocks [lo, hi)
    lo = last * split // KV_SPLITS
    hi = last * (split + 1) // KV_SPLITS
    full_last = tl.minimum(tl.maximum(full_last, lo), hi)
    m = tl.full((Q_BLOCK,), float("-inf"), tl.float32)  # in units of log 2
    total = tl.zeros((Q_BLOCK,), tl.float32)
    acc = tl.zeros((Q_BLOCK, 128), tl.float32)
    for c in range(lo, full_last):
        at = table + c * K_BLOCK // PAGE_SIZE * block_table_stride_1
        page = tl.load(at).to(tl.int64)
        place = c * K_BLOCK % PAGE_SIZE
        k = tl.load(k_head + page * k_page + place * k_step + k_at)
        k = k.to(q_ptr.dtype.element_ty)
        s = tl.dot(q, k)
        s *= k_factor
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v = tl.load(v_head + page * v_page + place * v_step + v_at)
        v = v.to(q_ptr.dtype.element_ty)
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
    for c in range(full_last, hi):
        k_index = c * K_BLOCK + cols[None, :]
        at = table + c * K_BLOCK // PAGE_SIZE * block_table_stride_1
        page = tl.load(at).to(tl.int64)
        place = c * K_BLOCK % PAGE_SIZE
        k = tl.load(
            k_head + page * k_page + place * k_step + k_at,
            mask=k_index < kv_end,
            other=0.0,
        )
        k = k.to(q_ptr.dtype.element_ty)
        s = tl.dot(q, k)
        s *= k_factor
        seen = k_index <= q_pos
        seen &= k_index < kv_end
        s = tl.where(seen, s, float("-inf"))
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=True)
        key = c * K_BLOCK + cols
        there = key < high  # else a NaN no query sees
        v = tl.load(
            v_head + page * v_page + place * v_step + v_at,
            mask=there[:, None],
            other=0.0,
        )
        v = v.to(q_ptr.dtype.element_ty)
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)

    # what this split comes to, for `combine`
    part = (b_index * heads + h_index) * q_len + token
    part = part * KV_SPLITS + split
    tl.store(part_m_ptr + part, m, mask=q_there)
    tl.store(part_total_ptr + part, total, mask=q_there)
    tl.store(
        part_acc_ptr + part[:, None] * V_DIM + d[None, :],
        acc,
        mask=q_there[:, None],
    )


@triton.jit
def _softmax(s, m, total, UNSEEN: tl.constexpr):
    """The running maximum and sum with one more tile; its weights; what rescales sums.

    UNSEEN: a score can be -inf, that of a key which its query doesn't see
    """
    m_new = tl.maximum(m, tl.max(s, 1) * LOG2E)
    m_safe = m_new
    if UNSEEN:
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # saw no key yet
    p = tl.exp2(s * LOG2E - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    return m_new, total * rescale + tl.sum(p, 1), p, rescale


@triton.jit
def _head(ptr, b, h, stride_b, stride_h, ALIGN: tl.constexpr):
    """Where a head begins; strides are multiples of ALIGN."""
    return ptr + (b * (stride_b // ALIGN) + h * (stride_h // ALIGN)) * ALIGN


@triton.jit(do_not_specialize=RUNTIME)
def combine(
    part_m_ptr,
    part_total_ptr,
    part_acc_ptr,
    out_ptr,
    v_scale_ptr,
    q_len,
    heads,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    v_scale_stride_0,
):
    """What the splits of a row of queries come to together, in COLUMNS of its output."""
    row = tl.program_id(0).to(tl.int64)  # of batch, head, query
    h_index = row // q_len % heads
    at = row * KV_SPLITS + tl.arange(0, KV_SPLITS)
    m_split = tl.load(part_m_ptr + at)
    m = tl.max(m_split, 0)
    m_safe = tl.where(m == float("-inf"), 0.0, m)  # no split saw a key
    rescale = tl.exp2(m_split - m_safe)
    total = tl.sum(tl.load(part_total_ptr + at) * rescale, 0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.load(part_acc_ptr + at[:, None] * V_DIM + columns[None, :])
    acc = tl.sum(acc * rescale[:, None], 0)
    share = 1.0 / tl.where(total == 0, 1.0, total)  # a row that saw no key is 0
    v_factor = tl.load(v_scale_ptr + (h_index // R) * v_scale_stride_0)
    share = tl.where(total == 0, 0.0, share * v_factor)
    out_row = out_ptr + row // q_len // heads * out_stride_b + h_index * out_stride_h
    out_row += row % q_len * out_stride_t
    value = (acc * share).to(out_ptr.dtype.element_ty)
    tl.store(out_row + columns * out_stride_d, value)
