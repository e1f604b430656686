"""Attention in chunks of 16 queries and 16 keys, with a running softmax.

made by   attngen 0.1.0 for a100; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          then    s = s + slopes[h] * (k - q)
          key k is there for query q where k <= q
          q       [1, 8, 1000, 72]  float32
          k       [1, 8, 1000, 72]  float32
          v       [1, 8, 1000, 72]  float32
          slopes  [8]  float32
          out     [1, 8, 1000, 72]  float32
          lse     [1, 8, 1000]  float32
plan      running · 16 queries × 16 keys · 1 warp · 1 stage · last queries first · head
          dim in pieces
          tiles of a head: 3969; 1952 full, 64 on an edge, 1953 empty and never visited
cost      1.19 GFLOP (2.3 GFLOP without skipping), 0 B of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 8, "q_len": 1000, "kv_len": 1000, "qk_dim": 72,
          "v_dim": 72, "layout": "bhtd", "mask": "causal", "score": ["alibi"],
          "outputs": ["out", "lse"]}
choices   {"backend": "triton", "target": "a100", "algorithm": "running", "q_chunk": 16,
          "k_chunk": 16, "num_warps": 1, "num_stages": 1, "order": "reverse",
          "head_dim": "split", "loads": "pointers"}
"""

import math
import os
import zlib
from pathlib import Path

import torch
import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(16)  # queries of a tile
K_BLOCK = tl.constexpr(16)  # keys of a tile
R = tl.constexpr(1)  # query heads that share a kv head
QK_DIM = tl.constexpr(72)
V_DIM = tl.constexpr(72)
SCALE = tl.constexpr(0.11785113019775792)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(s) is 2**(s * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
OUT_DTYPE = torch.float32
NUM_WARPS, NUM_STAGES = 1, 1
# of this very text: an edited copy is another operation to torch
OPERATION = f"attngen::attention_{zlib.crc32(Path(__file__).read_bytes()):08x}"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly
# what changes between calls without another compilation
RUNTIME = [
    "q_len", "kv_len", "heads", "q_stride_b", "q_stride_h", "q_stride_t", "k_stride_b",
    "k_stride_h", "k_stride_t", "v_stride_b", "v_stride_h", "v_stride_t",
    "out_stride_b", "out_stride_h", "out_stride_t", "slopes_stride_0",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 8}  # of tensors that lie densely


def attention(q, k, v, *, slopes):
    """Attention of torch tensors -> out, lse.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, or at addresses that aren't multiples of 16 bytes.

    q       (B, H, T, 72) float32
    k       (B, G, S, 72) float32
    v       (B, G, S, 72) float32
    slopes  (H,) float32
    out     (B, H, T, 72) float32
    lse     (B, H, T) float32: log of the sum of exp(s)
    out is 0 where a query sees no key, lse -inf
    """
    _check(q, k, v, slopes=slopes)
    return _attention(q, k, v, slopes)


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the outputs and launch the kernel: one operation to torch.compile."""
    B, H, T, _ = q.shape
    out = _empty_out(q)
    lse = _empty_lse(q)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, Q_BLOCK.value) * H * B,)](
            q,
            k,
            v,
            out,
            lse,
            slopes,
            T,
            k.shape[2],
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *slopes.stride(),
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out, lse


@_attention.register_fake
def _fake(q, k, v, slopes):
    return _empty_out(q), _empty_lse(q)


def _empty_out(q):
    B, H, T, _ = q.shape
    return q.new_empty((B, H, T, 72), dtype=OUT_DTYPE)


def _empty_lse(q):
    B, H, T, _ = q.shape
    return q.new_empty((B, H, T), dtype=torch.float32)


def _check(q, k, v, **operands):
    """Refuse what the kernel doesn't take, before it is launched."""
    given = {"q": q, "k": k, "v": v, **operands}
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError("q, k and v have four dimensions: [b, h, t, d]")
    B, H, T, _ = q.shape
    _, G, S, _ = k.shape
    if G * R.value != H:
        raise ValueError(f"{H} query heads share {G} kv heads, not {R.value} each")
    if T != S:
        raise ValueError(f"{T} queries, {S} keys: no offset is known for them")
    if max(T, S) > 2**24:  # for which indices are proven
        raise ValueError(f"{T} queries, {S} keys: at most 2**24")
    needed = {
        "q": ((B, H, T, 72), torch.float32),
        "k": ((B, G, S, 72), torch.float32),
        "v": ((B, G, S, 72), torch.float32),
        "slopes": ((H,), torch.float32),
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
        if (block - 1) * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31:
            raise ValueError(f"{name} has strides {x.stride()}: too large for a block")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"q is on {q.device}; this kernel needs a GPU")


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    slopes_ptr,
    q_len,
    kv_len,
    heads,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    v_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    out_stride_d,
    slopes_stride_0,
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
    d_0 = tl.arange(0, 64)
    d_1 = 64 + tl.arange(0, 16)
    d_1_there = d_1 < QK_DIM
    q_there = q_start + rows < q_len
    slopes_at_h = tl.load(slopes_ptr + h_index * slopes_stride_0)
    q_index = q_start + rows[:, None]
    # whether no score can be -inf: what could make one so is finite
    tame = tl.abs(slopes_at_h) <= 1e6

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
        mask=q_there[:, None] & d_1_there[None, :],
        other=0.0,
    )
    k_0_at = cols[None, :] * k_step + d_0[:, None] * k_stride_d
    k_1_at = cols[None, :] * k_step + d_1[:, None] * k_stride_d
    k_block = k_step.to(tl.int64) * K_BLOCK  # from one block to the next
    v_0_at = cols[:, None] * v_step + d_0[None, :] * v_stride_d
    v_1_at = cols[:, None] * v_step + d_1[None, :] * v_stride_d
    v_block = v_step.to(tl.int64) * K_BLOCK

    # Key blocks [0, last) hold what any query here sees, and
    # [0, full_last) only what every one of them sees.
    # q_lo and q_hi: positions, half-open
    q_lo = q_start
    q_hi = tl.minimum(q_start + Q_BLOCK, q_len)
    high = tl.minimum(q_hi, kv_len)
    last = tl.cdiv(high, K_BLOCK)
    full_last = tl.minimum(q_lo + 1, kv_len) // K_BLOCK
    full_last = tl.minimum(full_last, last)
    full_last = tl.where(tame, full_last, 0)
    m = tl.full((Q_BLOCK,), float("-inf"), tl.float32)  # in units of log 2
    total = tl.zeros((Q_BLOCK,), tl.float32)
    acc_0 = tl.zeros((Q_BLOCK, 64), tl.float32)
    acc_1 = tl.zeros((Q_BLOCK, 16), tl.float32)
    for c in range(full_last):
        k_index = c * K_BLOCK + cols[None, :]
        k_0 = tl.load(k_head + c * k_block + k_0_at)
        k_1 = tl.load(
            k_head + c * k_block + k_1_at,
            mask=d_1_there[:, None],
            other=0.0,
        )
        s = tl.dot(q_0, k_0, input_precision="ieee")
        s = tl.dot(q_1, k_1, s, input_precision="ieee")
        s *= SCALE
        s = s + slopes_at_h * (k_index - q_index).to(tl.float32)
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v_0 = tl.load(v_head + c * v_block + v_0_at)
        acc_0 *= rescale[:, None]
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0, input_precision="ieee")
        v_1 = tl.load(
            v_head + c * v_block + v_1_at,
            mask=d_1_there[None, :],
            other=0.0,
        )
        acc_1 *= rescale[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")
    for c in range(full_last, last):
        k_index = c * K_BLOCK + cols[None, :]
        k_0 = tl.load(
            k_head + c * k_block + k_0_at,
            mask=k_index < kv_len,
            other=0.0,
        )
        k_1 = tl.load(
            k_head + c * k_block + k_1_at,
            mask=(k_index < kv_len) & d_1_there[:, None],
            other=0.0,
        )
        s = tl.dot(q_0, k_0, input_precision="ieee")
        s = tl.dot(q_1, k_1, s, input_precision="ieee")
        s *= SCALE
        s = s + slopes_at_h * (k_index - q_index).to(tl.float32)
        seen = k_index <= q_index
        seen &= k_index < kv_len
        s = tl.where(seen, s, float("-inf"))
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=True)
        seen = s != float("-inf")
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
            mask=there[:, None] & d_1_there[None, :],
            other=0.0,
        )
        acc_1 *= rescale[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1, input_precision="ieee")

    share = 1.0 / tl.where(total == 0, 1.0, total)  # a row that saw no key is 0
    out_head = _head(out_ptr, b_index, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_start.to(tl.int64) * out_step
    tl.store(
        out_head + rows[:, None] * out_step + d_0[None, :] * out_stride_d,
        (acc_0 * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )
    tl.store(
        out_head + rows[:, None] * out_step + d_1[None, :] * out_stride_d,
        (acc_1 * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None] & d_1_there[None, :],
    )
    lse_head = lse_ptr + (b_index * heads + h_index) * q_len + q_start
    tl.store(lse_head + rows, (m + tl.log2(total)) * LN2, mask=q_there)


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
