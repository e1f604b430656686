"""Attention in chunks of 64 queries and 64 keys, with a running softmax.

made by   attngen 0.1.0 for a100; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          then    s = 30.0 * tanh(s / 30.0)
          then    s = s + slopes[h] * (k - q)
          key k is there for query q where k <= q
          and the gradients of q, k, v, slopes, once, in reverse mode
          q       [1, 8, 1000, 72]  bfloat16
          k       [1, 8, 1000, 72]  bfloat16
          v       [1, 8, 1000, 72]  bfloat16
          slopes  [8]  float32
          out     [1, 8, 1000, 72]  bfloat16
plan      running · 64 queries × 64 keys · 4 warps · 2 stages · last queries first ·
          head dim in pieces; backward: 64 held × 16 · 4 warps · 2 stages · head dim in
          pieces
          tiles of a head: 256; 119 full, 17 on an edge, 120 empty and never visited
cost      5.77 GFLOP, 93.8 KiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 8, "q_len": 1000, "kv_len": 1000, "qk_dim": 72,
          "v_dim": 72, "dtype": "bfloat16", "layout": "bhtd", "mask": "causal", "score":
          [{"softcap": {"cap": 30.0}}, "alibi"], "derivatives": "vjp"}
choices   {"backend": "triton", "target": "a100", "algorithm": "running", "q_chunk": 64,
          "k_chunk": 64, "num_warps": 4, "num_stages": 2, "order": "reverse",
          "head_dim": "split", "loads": "pointers", "backward": "two_passes",
          "backward_q_chunk": 64, "backward_k_chunk": 16, "backward_num_warps": 4,
          "backward_num_stages": 2, "backward_head_dim": "split"}
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
QK_DIM = tl.constexpr(72)
V_DIM = tl.constexpr(72)
SCALE = tl.constexpr(0.11785113019775792)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(s) is 2**(s * LOG2E)
OUT_DTYPE = torch.bfloat16
NUM_WARPS, NUM_STAGES = 4, 2
# of the backward pass: tokens that a program holds, and of the other kind at a time
BACKWARD_BLOCK, BACKWARD_STEP = 64, 16
BACKWARD_WARPS, BACKWARD_STAGES = 4, 2
BACKWARD = {
    "backward_queries": {"Q_BLOCK": BACKWARD_BLOCK, "K_BLOCK": BACKWARD_STEP},
    "backward_keys": {"Q_BLOCK": BACKWARD_STEP, "K_BLOCK": BACKWARD_BLOCK},
}
LARGEST_BLOCK = max(Q_BLOCK.value, K_BLOCK.value, BACKWARD_BLOCK, BACKWARD_STEP)
# of this very text: an edited copy is another operation to torch
OPERATION = f"attngen::attention_{zlib.crc32(Path(__file__).read_bytes()):08x}"
GRADIENTS = OPERATION.replace("attention", "gradients")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly
# what changes between calls without another compilation
RUNTIME = [
    "q_len", "kv_len", "heads", "q_stride_b", "q_stride_h", "q_stride_t", "k_stride_b",
    "k_stride_h", "k_stride_t", "v_stride_b", "v_stride_h", "v_stride_t",
    "out_stride_b", "out_stride_h", "out_stride_t", "slopes_stride_0", "dout_stride_b",
    "dout_stride_h", "dout_stride_t", "dq_stride_b", "dq_stride_h", "dq_stride_t",
    "dk_stride_b", "dk_stride_h", "dk_stride_t", "dv_stride_b", "dv_stride_h",
    "dv_stride_t",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 8}  # of tensors that lie densely


def attention(q, k, v, *, slopes):
    """Attention of torch tensors -> out.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, or at addresses that aren't multiples of 16 bytes.

    q       (B, H, T, 72) bfloat16
    k       (B, G, S, 72) bfloat16
    v       (B, G, S, 72) bfloat16
    slopes  (H,) float32
    out     (B, H, T, 72) bfloat16
    out is 0 where a query sees no key
    """
    _check(q, k, v, slopes=slopes)
    return _attention(q, k, v, slopes)[0]


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
    norm = _empty_rows(q)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, Q_BLOCK.value) * H * B,)](
            q,
            k,
            v,
            out,
            norm,
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
    return out, norm


@_attention.register_fake
def _fake(q, k, v, slopes):
    return _empty_out(q), _empty_rows(q)


def _empty_out(q):
    B, H, T, _ = q.shape
    return q.new_empty((B, H, T, 72), dtype=OUT_DTYPE)


def _empty_rows(q):
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
        "q": ((B, H, T, 72), torch.bfloat16),
        "k": ((B, G, S, 72), torch.bfloat16),
        "v": ((B, G, S, 72), torch.bfloat16),
        "slopes": ((H,), torch.float32),
    }
    for name, (shape, dtype) in needed.items():
        x = given[name]
        if tuple(x.shape) != shape or x.dtype != dtype:
            got = f"{x.dtype}{list(x.shape)}"
            raise TypeError(f"{name} is {got}, not {dtype}{list(shape)}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    for name in ("q", "k", "v"):  # within a block offsets have 32 bits
        x = given[name]
        span = (LARGEST_BLOCK - 1) * x.stride(2)
        if span + x.shape[3] * x.stride(3) >= 2**31:
            raise ValueError(f"{name} has strides {x.stride()}: too large for a block")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"q is on {q.device}; this kernel needs a GPU")


@torch.library.custom_op(GRADIENTS, mutates_args=())
def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    norm: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels of the backward pass: dq, dk, dv, d_slopes."""
    B, H, T, _ = q.shape
    _, G, S, _ = k.shape
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    span = (LARGEST_BLOCK - 1) * dout.stride(2)
    if span + dout.shape[3] * dout.stride(3) >= 2**31:  # as in _check
        dout = dout.contiguous()
    delta = norm.new_empty(norm.shape)
    d_slopes_at_h = norm.new_empty((B, H, T))
    strides = [s for x in (q, k, v, dout, dq, dk, dv) for s in x.stride()[:3]]
    align = math.gcd(16, *strides)
    with torch.cuda.device_of(q):
        programs = triton.cdiv(T, BACKWARD_BLOCK) * H * B
        backward_queries[(programs,)](
            q,
            k,
            v,
            dout,
            dq,
            norm,
            delta,
            d_slopes_at_h,
            slopes,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *dq.stride(),
            *slopes.stride(),
            ALIGN=align,
            **BACKWARD["backward_queries"],
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
        programs = triton.cdiv(S, BACKWARD_BLOCK) * G * B
        backward_keys[(programs,)](
            q,
            k,
            v,
            dout,
            dk,
            dv,
            norm,
            delta,
            slopes,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *dk.stride(),
            *dv.stride(),
            *slopes.stride(),
            ALIGN=align,
            **BACKWARD["backward_keys"],
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
    d_slopes = d_slopes_at_h.sum((0, 2)).to(slopes.dtype)
    return dq, dk, dv, d_slopes


@_gradients.register_fake
def _fake_gradients(q, k, v, slopes, norm, dout):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        slopes.new_empty(slopes.shape),
    )


def _save(ctx, inputs, output):
    """For the backward pass: what was given, and norm."""
    _out, norm = output
    ctx.save_for_backward(*inputs, norm)


def _pull(ctx, dout, *_):
    """Gradients of what was given, from those of the outputs."""
    q, k, v, slopes, norm = ctx.saved_tensors
    dq, dk, dv, d_slopes = _gradients(q, k, v, slopes, norm, dout)
    return dq, dk, dv, d_slopes


_attention.register_autograd(_pull, setup_context=_save)


def _refuse(ctx, *_):
    raise RuntimeError(
        "this file has gradients of first order: attngen emits others with "
        'derivatives="any" and backend="jax"'
    )


_gradients.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


@triton.jit(do_not_specialize=RUNTIME)
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    norm_ptr,
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
        s = tl.dot(q_0, k_0)
        s = tl.dot(q_1, k_1, s)
        s *= SCALE
        s = 30.0 * _tanh(s / 30.0)
        s = s + slopes_at_h * (k_index - q_index).to(tl.float32)
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v_0 = tl.load(v_head + c * v_block + v_0_at)
        acc_0 *= rescale[:, None]
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0)
        v_1 = tl.load(
            v_head + c * v_block + v_1_at,
            mask=d_1_there[None, :],
            other=0.0,
        )
        acc_1 *= rescale[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1)
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
        s = tl.dot(q_0, k_0)
        s = tl.dot(q_1, k_1, s)
        s *= SCALE
        s = 30.0 * _tanh(s / 30.0)
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
        acc_0 = tl.dot(p.to(v_0.dtype), v_0, acc_0)
        v_1 = tl.load(
            v_head + c * v_block + v_1_at,
            mask=there[:, None] & d_1_there[None, :],
            other=0.0,
        )
        acc_1 *= rescale[:, None]
        acc_1 = tl.dot(p.to(v_1.dtype), v_1, acc_1)

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
    row = (b_index * heads + h_index) * q_len + q_start + rows
    norm = m + tl.log2(total)
    saw = total != 0  # a key; NaN is one that it saw
    tl.store(norm_ptr + row, tl.where(saw, norm, float("inf")), mask=q_there)


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
def backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dq_ptr,
    norm_ptr,
    delta_ptr,
    d_slopes_at_h_ptr,
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
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
    dout_stride_d,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    dq_stride_d,
    slopes_stride_0,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dq of Q_BLOCK queries of one head, over the key blocks that any of them sees."""
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

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    dout_step = dout_stride_t // ALIGN * ALIGN
    dq_step = dq_stride_t // ALIGN * ALIGN
    q_head = _head(q_ptr, b_index, h_index, q_stride_b, q_stride_h, ALIGN)
    k_head = _head(k_ptr, b_index, g_index, k_stride_b, k_stride_h, ALIGN)
    v_head = _head(v_ptr, b_index, g_index, v_stride_b, v_stride_h, ALIGN)
    dout_head = _head(dout_ptr, b_index, h_index, dout_stride_b, dout_stride_h, ALIGN)
    dq_head = _head(dq_ptr, b_index, h_index, dq_stride_b, dq_stride_h, ALIGN)
    row = (b_index * heads + h_index) * q_len + q_start + rows
    q_there = q_start + rows < q_len
    norm = tl.load(norm_ptr + row, mask=q_there, other=float("inf"))
    alive = norm != float("inf")  # it sees a key
    q_0 = tl.load(
        q_head
        + tl.cast(q_start, tl.int64) * q_step
        + rows[:, None] * q_step
        + d_0[None, :] * q_stride_d,
        mask=alive[:, None],
        other=0.0,
    )
    q_1 = tl.load(
        q_head
        + tl.cast(q_start, tl.int64) * q_step
        + rows[:, None] * q_step
        + d_1[None, :] * q_stride_d,
        mask=alive[:, None] & d_1_there[None, :],
        other=0.0,
    )
    dout_0 = tl.load(
        dout_head
        + tl.cast(q_start, tl.int64) * dout_step
        + rows[:, None] * dout_step
        + d_0[None, :] * dout_stride_d,
        mask=alive[:, None],
        other=0.0,
    )
    dout_1 = tl.load(
        dout_head
        + tl.cast(q_start, tl.int64) * dout_step
        + rows[:, None] * dout_step
        + d_1[None, :] * dout_stride_d,
        mask=alive[:, None] & d_1_there[None, :],
        other=0.0,
    )
    k_0_at = cols[:, None] * k_step + d_0[None, :] * k_stride_d
    k_1_at = cols[:, None] * k_step + d_1[None, :] * k_stride_d
    v_0_at = cols[:, None] * v_step + d_0[None, :] * v_stride_d
    v_1_at = cols[:, None] * v_step + d_1[None, :] * v_stride_d

    # Key blocks [0, last) hold what any query here sees.
    # q_hi: positions, half-open
    q_hi = tl.minimum(q_start + Q_BLOCK, q_len)
    high = tl.minimum(q_hi, kv_len)
    last = tl.cdiv(high, K_BLOCK)
    # delta: the mean of dp, by p, less what lse passes on
    delta = tl.zeros((Q_BLOCK,), tl.float32)
    for c in range(last):
        k_there = c * K_BLOCK + cols < kv_len
        k_start = tl.cast(c, tl.int64) * K_BLOCK
        k_0 = tl.load(
            k_head + k_start * k_step + k_0_at,
            mask=k_there[:, None],
            other=0.0,
        )
        k_1 = tl.load(
            k_head + k_start * k_step + k_1_at,
            mask=k_there[:, None] & d_1_there[None, :],
            other=0.0,
        )
        v_0 = tl.load(
            v_head + k_start * v_step + v_0_at,
            mask=k_there[:, None],
            other=0.0,
        )
        v_1 = tl.load(
            v_head + k_start * v_step + v_1_at,
            mask=k_there[:, None] & d_1_there[None, :],
            other=0.0,
        )
        p, _ds, dp, _k_0, _k_1, _d_slopes_at_h = _tile(
            q_0,
            q_1,
            k_0,
            k_1,
            v_0,
            v_1,
            dout_0,
            dout_1,
            norm,
            delta,
            q_start,
            c,
            kv_len,
            h_index,
            slopes_ptr,
            slopes_stride_0,
            MASKED=True,
            ROWS=0,
            Q_BLOCK=Q_BLOCK,
            K_BLOCK=K_BLOCK,
        )
        delta += tl.sum(p * dp, 1)
    tl.store(delta_ptr + row, delta, mask=q_there)
    dq_0 = tl.zeros((Q_BLOCK, 64), tl.float32)
    dq_1 = tl.zeros((Q_BLOCK, 16), tl.float32)
    sum_d_slopes_at_h = tl.zeros((Q_BLOCK,), tl.float32)
    for c in range(last):
        k_there = c * K_BLOCK + cols < kv_len
        k_start = tl.cast(c, tl.int64) * K_BLOCK
        k_0 = tl.load(
            k_head + k_start * k_step + k_0_at,
            mask=k_there[:, None],
            other=0.0,
        )
        k_1 = tl.load(
            k_head + k_start * k_step + k_1_at,
            mask=k_there[:, None] & d_1_there[None, :],
            other=0.0,
        )
        v_0 = tl.load(
            v_head + k_start * v_step + v_0_at,
            mask=k_there[:, None],
            other=0.0,
        )
        v_1 = tl.load(
            v_head + k_start * v_step + v_1_at,
            mask=k_there[:, None] & d_1_there[None, :],
            other=0.0,
        )
        _p, ds, _dp, k_0, k_1, d_slopes_at_h = _tile(
            q_0,
            q_1,
            k_0,
            k_1,
            v_0,
            v_1,
            dout_0,
            dout_1,
            norm,
            delta,
            q_start,
            c,
            kv_len,
            h_index,
            slopes_ptr,
            slopes_stride_0,
            MASKED=True,
            ROWS=0,
            Q_BLOCK=Q_BLOCK,
            K_BLOCK=K_BLOCK,
        )
        dq_0 = tl.dot(ds.to(k_0.dtype), k_0, dq_0)
        dq_1 = tl.dot(ds.to(k_1.dtype), k_1, dq_1)
        sum_d_slopes_at_h += d_slopes_at_h
    dq_0 *= SCALE
    dq_1 *= SCALE
    tl.store(
        dq_head
        + tl.cast(q_start, tl.int64) * dq_step
        + rows[:, None] * dq_step
        + d_0[None, :] * dq_stride_d,
        dq_0.to(dq_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )
    tl.store(
        dq_head
        + tl.cast(q_start, tl.int64) * dq_step
        + rows[:, None] * dq_step
        + d_1[None, :] * dq_stride_d,
        dq_1.to(dq_ptr.dtype.element_ty),
        mask=q_there[:, None] & d_1_there[None, :],
    )
    tl.store(d_slopes_at_h_ptr + row, sum_d_slopes_at_h, mask=q_there)


@triton.jit(do_not_specialize=RUNTIME)
def backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    norm_ptr,
    delta_ptr,
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
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
    dout_stride_d,
    dk_stride_b,
    dk_stride_h,
    dk_stride_t,
    dk_stride_d,
    dv_stride_b,
    dv_stride_h,
    dv_stride_t,
    dv_stride_d,
    slopes_stride_0,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dk and dv of K_BLOCK keys of one kv head, over the query blocks that see any of them."""
    kv_heads = heads // R
    blocks = tl.cdiv(kv_len, K_BLOCK)
    program = tl.program_id(0)
    c = program % blocks
    k_start = c * K_BLOCK
    g_index = (program // blocks % kv_heads).to(tl.int64)
    b_index = (program // blocks // kv_heads).to(tl.int64)
    rows = tl.arange(0, Q_BLOCK)
    cols = tl.arange(0, K_BLOCK)
    d_0 = tl.arange(0, 64)
    d_1 = 64 + tl.arange(0, 16)
    d_1_there = d_1 < QK_DIM

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    dout_step = dout_stride_t // ALIGN * ALIGN
    dk_step = dk_stride_t // ALIGN * ALIGN
    dv_step = dv_stride_t // ALIGN * ALIGN
    k_head = _head(k_ptr, b_index, g_index, k_stride_b, k_stride_h, ALIGN)
    dk_head = _head(dk_ptr, b_index, g_index, dk_stride_b, dk_stride_h, ALIGN)
    v_head = _head(v_ptr, b_index, g_index, v_stride_b, v_stride_h, ALIGN)
    dv_head = _head(dv_ptr, b_index, g_index, dv_stride_b, dv_stride_h, ALIGN)
    k_here = k_start + cols < kv_len
    k_0 = tl.load(
        k_head
        + tl.cast(k_start, tl.int64) * k_step
        + cols[:, None] * k_step
        + d_0[None, :] * k_stride_d,
        mask=k_here[:, None],
        other=0.0,
    )
    k_1 = tl.load(
        k_head
        + tl.cast(k_start, tl.int64) * k_step
        + cols[:, None] * k_step
        + d_1[None, :] * k_stride_d,
        mask=k_here[:, None] & d_1_there[None, :],
        other=0.0,
    )
    v_0 = tl.load(
        v_head
        + tl.cast(k_start, tl.int64) * v_step
        + cols[:, None] * v_step
        + d_0[None, :] * v_stride_d,
        mask=k_here[:, None],
        other=0.0,
    )
    v_1 = tl.load(
        v_head
        + tl.cast(k_start, tl.int64) * v_step
        + cols[:, None] * v_step
        + d_1[None, :] * v_stride_d,
        mask=k_here[:, None] & d_1_there[None, :],
        other=0.0,
    )
    q_0_at = rows[:, None] * q_step + d_0[None, :] * q_stride_d
    q_1_at = rows[:, None] * q_step + d_1[None, :] * q_stride_d
    dout_0_at = rows[:, None] * dout_step + d_0[None, :] * dout_stride_d
    dout_1_at = rows[:, None] * dout_step + d_1[None, :] * dout_stride_d

    # Query blocks [first, last) hold what any key here sees.
    # k_lo: positions, half-open
    k_lo = k_start
    low = k_lo
    first = low // Q_BLOCK
    last = tl.maximum(tl.cdiv(q_len, Q_BLOCK), first)
    dk_0 = tl.zeros((K_BLOCK, 64), tl.float32)
    dk_1 = tl.zeros((K_BLOCK, 16), tl.float32)
    dv_0 = tl.zeros((K_BLOCK, 64), tl.float32)
    dv_1 = tl.zeros((K_BLOCK, 16), tl.float32)
    for r in range(R):
        h_index = g_index * R + r
        q_head = _head(q_ptr, b_index, h_index, q_stride_b, q_stride_h, ALIGN)
        dout_head = _head(
            dout_ptr, b_index, h_index, dout_stride_b, dout_stride_h, ALIGN
        )
        for i in range(first, last):
            q_start = i * Q_BLOCK
            row = (b_index * heads + h_index) * q_len + q_start + rows
            q_there = q_start + rows < q_len
            norm = tl.load(norm_ptr + row, mask=q_there, other=float("inf"))
            alive = norm != float("inf")  # it sees a key
            delta = tl.load(delta_ptr + row, mask=alive, other=0.0)
            first_row = tl.cast(q_start, tl.int64)
            q_0 = tl.load(
                q_head + first_row * q_step + q_0_at,
                mask=alive[:, None],
                other=0.0,
            )
            q_1 = tl.load(
                q_head + first_row * q_step + q_1_at,
                mask=alive[:, None] & d_1_there[None, :],
                other=0.0,
            )
            dout_0 = tl.load(
                dout_head + first_row * dout_step + dout_0_at,
                mask=alive[:, None],
                other=0.0,
            )
            dout_1 = tl.load(
                dout_head + first_row * dout_step + dout_1_at,
                mask=alive[:, None] & d_1_there[None, :],
                other=0.0,
            )
            p, ds, _dp, _k_0, _k_1, _d_slopes_at_h = _tile(
                q_0,
                q_1,
                k_0,
                k_1,
                v_0,
                v_1,
                dout_0,
                dout_1,
                norm,
                delta,
                q_start,
                c,
                kv_len,
                h_index,
                slopes_ptr,
                slopes_stride_0,
                MASKED=True,
                ROWS=1,
                Q_BLOCK=Q_BLOCK,
                K_BLOCK=K_BLOCK,
            )
            dv_0 = tl.dot(p.to(dout_0.dtype), dout_0, dv_0)
            dv_1 = tl.dot(p.to(dout_1.dtype), dout_1, dv_1)
            dk_0 = tl.dot(ds.to(q_0.dtype), q_0, dk_0)
            dk_1 = tl.dot(ds.to(q_1.dtype), q_1, dk_1)
    dk_0 *= SCALE
    dk_1 *= SCALE
    tl.store(
        dk_head
        + tl.cast(k_start, tl.int64) * dk_step
        + cols[:, None] * dk_step
        + d_0[None, :] * dk_stride_d,
        dk_0.to(dk_ptr.dtype.element_ty),
        mask=k_here[:, None],
    )
    tl.store(
        dk_head
        + tl.cast(k_start, tl.int64) * dk_step
        + cols[:, None] * dk_step
        + d_1[None, :] * dk_stride_d,
        dk_1.to(dk_ptr.dtype.element_ty),
        mask=k_here[:, None] & d_1_there[None, :],
    )
    tl.store(
        dv_head
        + tl.cast(k_start, tl.int64) * dv_step
        + cols[:, None] * dv_step
        + d_0[None, :] * dv_stride_d,
        dv_0.to(dv_ptr.dtype.element_ty),
        mask=k_here[:, None],
    )
    tl.store(
        dv_head
        + tl.cast(k_start, tl.int64) * dv_step
        + cols[:, None] * dv_step
        + d_1[None, :] * dv_stride_d,
        dv_1.to(dv_ptr.dtype.element_ty),
        mask=k_here[:, None] & d_1_there[None, :],
    )


@triton.jit
def _tile(
    q_0,
    q_1,
    k_0,
    k_1,
    v_0,
    v_1,
    dout_0,
    dout_1,
    norm,
    delta,
    q_start,
    c,
    kv_len,
    h_index,
    slopes_ptr,
    slopes_stride_0,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """A tile made again: weights p, and ds, the gradient of what q.k is times SCALE.

    Also dp, the gradient of p; the keys, without those that no query here sees;
    what operands take of ds.
    ROWS: the axis of queries, 0 or 1; keys are the other
    """
    rows = tl.expand_dims(tl.arange(0, Q_BLOCK), 1 - ROWS)
    cols = tl.expand_dims(tl.arange(0, K_BLOCK), ROWS)
    norm = tl.expand_dims(norm, 1 - ROWS)
    delta = tl.expand_dims(delta, 1 - ROWS)
    slopes_at_h = tl.load(slopes_ptr + h_index * slopes_stride_0)
    q_index = q_start + rows
    k_index = c * K_BLOCK + cols
    s = _products(q_0, k_0, ROWS)
    s += _products(q_1, k_1, ROWS)
    s *= SCALE
    s_0 = s
    s = 30.0 * _tanh(s / 30.0)
    s = s + slopes_at_h * (k_index - q_index).to(tl.float32)
    p = tl.exp2(s * LOG2E - norm)
    if MASKED:
        seen = k_index <= q_index
        seen &= k_index < kv_len
        seen &= norm != float("inf")  # of a query that is there, and sees a key
        seen &= s != float("-inf")
        p = tl.where(seen, p, 0.0)
        there = tl.max(tl.broadcast_to(seen, p.shape).to(tl.int32), ROWS) > 0
        k_0 = tl.where(there[:, None], k_0, 0.0)  # else a NaN no query sees
        k_1 = tl.where(there[:, None], k_1, 0.0)  # else a NaN no query sees
    dp = _products(dout_0, v_0, ROWS)
    dp += _products(dout_1, v_1, ROWS)
    if MASKED:
        dp = tl.where(seen, dp, 0.0)
    ds = p * (dp - delta)
    slopes_part = ds * (k_index - q_index).to(tl.float32)
    d_slopes_at_h = tl.sum(slopes_part, 1 - ROWS)
    slope0_1 = s_0 / 30.0
    slope0_2 = _tanh(slope0_1)
    ds = ds * (1.0 - slope0_2 * slope0_2)
    if MASKED:
        ds = tl.where(seen, ds, 0.0)
    return p, ds, dp, k_0, k_1, d_slopes_at_h


@triton.jit
def _products(x, y, ROWS: tl.constexpr):
    """Of each row of x, the queries', with each of y: [x, y], or where ROWS is 1 [y, x]."""
    if ROWS == 0:
        return tl.dot(x, tl.trans(y))
    else:
        return tl.dot(y, tl.trans(x))


@triton.jit
def _tanh(x):
    """The hyperbolic tangent, to an error of 2e-7."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|)
    y = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    return y
