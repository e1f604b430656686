"""Attention in chunks of 64 queries and 32 keys, with a running softmax.

made by   attngen 0.1.0 for rtx4090; `attngen emit --check` compares this file
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
plan      running · 64 queries × 32 keys · 8 warps · 3 stages · last queries first;
          backward: 32 held × 16 · 4 warps · 2 stages
          tiles of a head: 2048; 992 full, 64 on an edge, 992 empty and never visited
cost      19.7 GFLOP, 320.1 KiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"q_heads": 8, "kv_heads": 2, "q_len": 2048, "kv_len": 2048, "qk_dim": 64,
          "v_dim": 64, "mask": "causal", "sink": true, "outputs": ["out", "lse"],
          "derivatives": "vjp"}
choices   {"backend": "triton", "target": "rtx4090", "algorithm": "running", "q_chunk":
          64, "k_chunk": 32, "num_warps": 8, "num_stages": 3, "order": "reverse",
          "head_dim": "padded", "loads": "pointers", "backward": "two_passes",
          "backward_q_chunk": 32, "backward_k_chunk": 16, "backward_num_warps": 4,
          "backward_num_stages": 2}
"""

import math
import os
import zlib
from pathlib import Path

import torch
import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(64)  # queries of a tile
K_BLOCK = tl.constexpr(32)  # keys of a tile
R = tl.constexpr(4)  # query heads that share a kv head
QK_DIM = tl.constexpr(64)
V_DIM = tl.constexpr(64)
# 0.125, times log2(e): exp(s) is 2**(s * log2(e))
SCALE_LOG2 = tl.constexpr(0.18033688011112042)
SCALE = tl.constexpr(0.125)
LOG2E = tl.constexpr(1.4426950408889634)  # exp(s) is 2**(s * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
OUT_DTYPE = torch.float32
NUM_WARPS, NUM_STAGES = 8, 3
# of the backward pass: tokens that a program holds, and of the other kind at a time
BACKWARD_BLOCK, BACKWARD_STEP = 32, 16
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
    "q_len", "kv_len", "heads", "q_stride_b", "q_stride_t", "q_stride_h", "k_stride_b",
    "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t", "v_stride_h",
    "out_stride_b", "out_stride_t", "out_stride_h", "sink_stride_0", "dout_stride_b",
    "dout_stride_t", "dout_stride_h", "dq_stride_b", "dq_stride_t", "dq_stride_h",
    "dk_stride_b", "dk_stride_t", "dk_stride_h", "dv_stride_b", "dv_stride_t",
    "dv_stride_h",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 16}  # of tensors that lie densely


def attention(q, k, v, *, sink):
    """Attention of torch tensors -> out, lse.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, or at addresses that aren't multiples of 16 bytes.

    q       (B, T, H, 64) float32
    k       (B, S, G, 64) float32
    v       (B, S, G, 64) float32
    sink    (H,) float32
    out     (B, T, H, 64) float32
    lse     (B, H, T) float32: log of the sum of exp(s)
    out is 0 where a query sees no key, lse -inf
    """
    _check(q, k, v, sink=sink)
    return _attention(q, k, v, sink)[:2]


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate the outputs and launch the kernel: one operation to torch.compile."""
    B, T, H, _ = q.shape
    out = _empty_out(q)
    lse = _empty_rows(q)
    norm = _empty_rows(q)
    mass = _empty_rows(q)
    lse_mass = _empty_rows(q)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, Q_BLOCK.value) * H * B,)](
            q,
            k,
            v,
            out,
            lse,
            norm,
            mass,
            lse_mass,
            sink,
            T,
            k.shape[1],
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *sink.stride(),
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out, lse, norm, mass, lse_mass


@_attention.register_fake
def _fake(q, k, v, sink):
    return _empty_out(q), _empty_rows(q), _empty_rows(q), _empty_rows(q), _empty_rows(q)


def _empty_out(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H, 64), dtype=OUT_DTYPE)


def _empty_rows(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, H, T), dtype=torch.float32)


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
    needed = {
        "q": ((B, T, H, 64), torch.float32),
        "k": ((B, S, G, 64), torch.float32),
        "v": ((B, S, G, 64), torch.float32),
        "sink": ((H,), torch.float32),
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
        span = (LARGEST_BLOCK - 1) * x.stride(1)
        if span + x.shape[3] * x.stride(3) >= 2**31:
            raise ValueError(f"{name} has strides {x.stride()}: too large for a block")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"q is on {q.device}; this kernel needs a GPU")


@torch.library.custom_op(GRADIENTS, mutates_args=())
def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sink: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    norm: torch.Tensor,
    mass: torch.Tensor,
    lse_mass: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels of the backward pass: dq, dk, dv, d_sink."""
    B, T, H, _ = q.shape
    _, S, G, _ = k.shape
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    dlse = dlse.contiguous()
    span = (LARGEST_BLOCK - 1) * dout.stride(1)
    if span + dout.shape[3] * dout.stride(3) >= 2**31:  # as in _check
        dout = dout.contiguous()
    delta = norm.new_empty(norm.shape)
    d_sink = norm.new_empty((B, H, T))
    strides = [s for x in (q, k, v, dout, out, dq, dk, dv) for s in x.stride()[:3]]
    align = math.gcd(16, *strides)
    with torch.cuda.device_of(q):
        programs = triton.cdiv(T, BACKWARD_BLOCK) * H * B
        backward_queries[(programs,)](
            q,
            k,
            v,
            dout,
            out,
            dq,
            lse,
            dlse,
            norm,
            mass,
            lse_mass,
            delta,
            d_sink,
            sink,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *out.stride(),
            *dq.stride(),
            *sink.stride(),
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
            lse,
            dlse,
            norm,
            mass,
            lse_mass,
            delta,
            sink,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *dk.stride(),
            *dv.stride(),
            *sink.stride(),
            ALIGN=align,
            **BACKWARD["backward_keys"],
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
    d_sink = d_sink.sum((0, 2)).to(sink.dtype)
    return dq, dk, dv, d_sink


@_gradients.register_fake
def _fake_gradients(q, k, v, sink, out, lse, norm, mass, lse_mass, dout, dlse):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        sink.new_empty(sink.shape),
    )


def _save(ctx, inputs, output):
    """For the backward pass: what was given, and out, lse, norm, mass, lse_mass."""
    out, lse, norm, mass, lse_mass = output
    ctx.save_for_backward(*inputs, out, lse, norm, mass, lse_mass)


def _pull(ctx, dout, dlse, *_):
    """Gradients of what was given, from those of the outputs."""
    q, k, v, sink, out, lse, norm, mass, lse_mass = ctx.saved_tensors
    dq, dk, dv, d_sink = _gradients(
        q, k, v, sink, out, lse, norm, mass, lse_mass, dout, dlse
    )
    return dq, dk, dv, d_sink


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
    lse_ptr,
    norm_ptr,
    mass_ptr,
    lse_mass_ptr,
    sink_ptr,
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
    sink_stride_0,
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

    # Key blocks [0, last) hold what any query here sees, and
    # [0, full_last) only what every one of them sees.
    # q_lo and q_hi: positions, half-open
    q_lo = q_start
    q_hi = tl.minimum(q_start + Q_BLOCK, q_len)
    high = tl.minimum(q_hi, kv_len)
    last = tl.cdiv(high, K_BLOCK)
    full_last = tl.minimum(q_lo + 1, kv_len) // K_BLOCK
    full_last = tl.minimum(full_last, last)
    m = tl.full((Q_BLOCK,), float("-inf"), tl.float32)  # in units of log 2
    total = tl.zeros((Q_BLOCK,), tl.float32)
    acc = tl.zeros((Q_BLOCK, 64), tl.float32)
    for c in range(full_last):
        k = tl.load(k_head + c * k_block + k_at)
        s = tl.dot(q, k, input_precision="ieee")
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v = tl.load(v_head + c * v_block + v_at)
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    for c in range(full_last, last):
        k_index = c * K_BLOCK + cols[None, :]
        k = tl.load(
            k_head + c * k_block + k_at,
            mask=k_index < kv_len,
            other=0.0,
        )
        s = tl.dot(q, k, input_precision="ieee")
        seen = k_index <= q_index
        seen &= k_index < kv_len
        s = tl.where(seen, s, float("-inf"))
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=True)
        key = c * K_BLOCK + cols
        there = key < high  # else a NaN no query sees
        v = tl.load(
            v_head + c * v_block + v_at,
            mask=there[:, None],
            other=0.0,
        )
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

    sink = tl.load(sink_ptr + h_index * sink_stride_0) * LOG2E
    m_sink = tl.maximum(m, sink)
    m_sink = tl.where(m_sink == float("-inf"), 0.0, m_sink)
    whole = total * tl.exp2(m - m_sink) + tl.exp2(sink - m_sink)
    share = tl.exp2(m - m_sink) / tl.where(whole == 0, 1.0, whole)
    out_head = _head(out_ptr, b_index, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_start.to(tl.int64) * out_step
    tl.store(
        out_head + rows[:, None] * out_step + d[None, :] * out_stride_d,
        (acc * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )
    row = (b_index * heads + h_index) * q_len + q_start + rows
    norm = m_sink + tl.log2(whole)
    saw = total != 0  # a key; NaN is one that it saw
    tl.store(norm_ptr + row, tl.where(saw, norm, float("inf")), mask=q_there)
    mass = whole * tl.exp2(m_sink - norm)
    tl.store(mass_ptr + row, tl.where(saw, mass, 1.0), mask=q_there)
    lse = (m + tl.log2(total)) * LN2
    lse_mass = total * tl.exp2(m - lse * LOG2E)
    tl.store(lse_mass_ptr + row, tl.where(saw, lse_mass, 1.0), mask=q_there)
    lse_head = lse_ptr + (b_index * heads + h_index) * q_len + q_start
    tl.store(lse_head + rows, lse, mask=q_there)


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


@triton.jit(do_not_specialize=RUNTIME)
def backward_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    out_ptr,
    dq_ptr,
    lse_ptr,
    dlse_ptr,
    norm_ptr,
    mass_ptr,
    lse_mass_ptr,
    delta_ptr,
    d_sink_ptr,
    sink_ptr,
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
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    dout_stride_d,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    out_stride_d,
    dq_stride_b,
    dq_stride_t,
    dq_stride_h,
    dq_stride_d,
    sink_stride_0,
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
    d = tl.arange(0, 64)

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    dout_step = dout_stride_t // ALIGN * ALIGN
    out_step = out_stride_t // ALIGN * ALIGN
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
    mass = tl.load(mass_ptr + row, mask=q_there, other=1.0)
    lse = tl.load(lse_ptr + row, mask=alive, other=0.0)
    dlse = tl.load(dlse_ptr + row, mask=alive, other=0.0)
    # of weights that add up to 1: lse is rounded
    dlse /= tl.load(lse_mass_ptr + row, mask=q_there, other=1.0)
    q = tl.load(
        q_head
        + tl.cast(q_start, tl.int64) * q_step
        + rows[:, None] * q_step
        + d[None, :] * q_stride_d,
        mask=alive[:, None],
        other=0.0,
    )
    dout = tl.load(
        dout_head
        + tl.cast(q_start, tl.int64) * dout_step
        + rows[:, None] * dout_step
        + d[None, :] * dout_stride_d,
        mask=alive[:, None],
        other=0.0,
    )
    k_at = cols[:, None] * k_step + d[None, :] * k_stride_d
    v_at = cols[:, None] * v_step + d[None, :] * v_stride_d

    # Key blocks [0, last) hold what any query here sees, and
    # [0, full_last) only what every one of them sees.
    # q_lo and q_hi: positions, half-open
    q_lo = q_start
    q_hi = tl.minimum(q_start + Q_BLOCK, q_len)
    high = tl.minimum(q_hi, kv_len)
    last = tl.cdiv(high, K_BLOCK)
    full_last = tl.minimum(q_lo + 1, kv_len) // K_BLOCK
    full_last = tl.minimum(full_last, last)
    # delta: the mean of dp, by p, less what lse passes on
    delta = tl.zeros((Q_BLOCK,), tl.float32)
    out_head = _head(out_ptr, b_index, h_index, out_stride_b, out_stride_h, ALIGN)
    out = tl.load(
        out_head
        + tl.cast(q_start, tl.int64) * out_step
        + rows[:, None] * out_step
        + d[None, :] * out_stride_d,
        mask=alive[:, None],
        other=0.0,
    )
    delta += tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    sink = tl.load(sink_ptr + h_index * sink_stride_0)
    p_sink = tl.exp2(sink * LOG2E - norm) / mass
    tl.store(d_sink_ptr + row, tl.where(alive, -p_sink * delta, 0.0), mask=q_there)
    tl.store(delta_ptr + row, delta, mask=q_there)
    dq = tl.zeros((Q_BLOCK, 64), tl.float32)
    for c in range(full_last):
        k_start = tl.cast(c, tl.int64) * K_BLOCK
        k = tl.load(k_head + k_start * k_step + k_at)
        v = tl.load(v_head + k_start * v_step + v_at)
        _p, ds, _dp, k = _tile(
            q,
            k,
            v,
            dout,
            norm,
            mass,
            delta,
            lse,
            dlse,
            q_start,
            c,
            kv_len,
            MASKED=False,
            ROWS=0,
            Q_BLOCK=Q_BLOCK,
            K_BLOCK=K_BLOCK,
        )
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    for c in range(full_last, last):
        k_there = c * K_BLOCK + cols < kv_len
        k_start = tl.cast(c, tl.int64) * K_BLOCK
        k = tl.load(
            k_head + k_start * k_step + k_at,
            mask=k_there[:, None],
            other=0.0,
        )
        v = tl.load(
            v_head + k_start * v_step + v_at,
            mask=k_there[:, None],
            other=0.0,
        )
        _p, ds, _dp, k = _tile(
            q,
            k,
            v,
            dout,
            norm,
            mass,
            delta,
            lse,
            dlse,
            q_start,
            c,
            kv_len,
            MASKED=True,
            ROWS=0,
            Q_BLOCK=Q_BLOCK,
            K_BLOCK=K_BLOCK,
        )
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= SCALE
    tl.store(
        dq_head
        + tl.cast(q_start, tl.int64) * dq_step
        + rows[:, None] * dq_step
        + d[None, :] * dq_stride_d,
        dq.to(dq_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )


@triton.jit(do_not_specialize=RUNTIME)
def backward_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    dlse_ptr,
    norm_ptr,
    mass_ptr,
    lse_mass_ptr,
    delta_ptr,
    sink_ptr,
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
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    dout_stride_d,
    dk_stride_b,
    dk_stride_t,
    dk_stride_h,
    dk_stride_d,
    dv_stride_b,
    dv_stride_t,
    dv_stride_h,
    dv_stride_d,
    sink_stride_0,
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
    d = tl.arange(0, 64)

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
    k = tl.load(
        k_head
        + tl.cast(k_start, tl.int64) * k_step
        + cols[:, None] * k_step
        + d[None, :] * k_stride_d,
        mask=k_here[:, None],
        other=0.0,
    )
    v = tl.load(
        v_head
        + tl.cast(k_start, tl.int64) * v_step
        + cols[:, None] * v_step
        + d[None, :] * v_stride_d,
        mask=k_here[:, None],
        other=0.0,
    )
    q_at = rows[:, None] * q_step + d[None, :] * q_stride_d
    dout_at = rows[:, None] * dout_step + d[None, :] * dout_stride_d

    # Query blocks [first, last) hold what any key here sees, and
    # [full_first, full_last) only what every one of them sees.
    # k_lo and k_hi: positions, half-open
    k_lo = k_start
    k_hi = tl.minimum(k_start + K_BLOCK, kv_len)
    low = k_lo
    first = low // Q_BLOCK
    last = tl.maximum(tl.cdiv(q_len, Q_BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(k_hi - 1, Q_BLOCK), first), last)
    full_last = q_len // Q_BLOCK
    full_last = tl.maximum(full_last, full_first)
    dk = tl.zeros((K_BLOCK, 64), tl.float32)
    dv = tl.zeros((K_BLOCK, 64), tl.float32)
    for r in range(R):
        h_index = g_index * R + r
        q_head = _head(q_ptr, b_index, h_index, q_stride_b, q_stride_h, ALIGN)
        dout_head = _head(
            dout_ptr, b_index, h_index, dout_stride_b, dout_stride_h, ALIGN
        )
        for i in range(full_first, full_last):
            q_start = i * Q_BLOCK
            row = (b_index * heads + h_index) * q_len + q_start + rows
            norm = tl.load(norm_ptr + row)
            mass = tl.load(mass_ptr + row)
            lse = tl.load(lse_ptr + row)
            dlse = tl.load(dlse_ptr + row)
            # of weights that add up to 1: lse is rounded
            dlse /= tl.load(lse_mass_ptr + row)
            delta = tl.load(delta_ptr + row)
            first_row = tl.cast(q_start, tl.int64)
            q = tl.load(q_head + first_row * q_step + q_at)
            dout = tl.load(dout_head + first_row * dout_step + dout_at)
            p, ds, _dp, _k = _tile(
                q,
                k,
                v,
                dout,
                norm,
                mass,
                delta,
                lse,
                dlse,
                q_start,
                c,
                kv_len,
                MASKED=False,
                ROWS=1,
                Q_BLOCK=Q_BLOCK,
                K_BLOCK=K_BLOCK,
            )
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        low_edges = full_first - first
        for n in range(low_edges + last - full_last):  # on both sides of the interior
            i = n + tl.where(n < low_edges, first, full_last - low_edges)
            q_start = i * Q_BLOCK
            row = (b_index * heads + h_index) * q_len + q_start + rows
            q_there = q_start + rows < q_len
            norm = tl.load(norm_ptr + row, mask=q_there, other=float("inf"))
            alive = norm != float("inf")  # it sees a key
            mass = tl.load(mass_ptr + row, mask=q_there, other=1.0)
            lse = tl.load(lse_ptr + row, mask=alive, other=0.0)
            dlse = tl.load(dlse_ptr + row, mask=alive, other=0.0)
            # of weights that add up to 1: lse is rounded
            dlse /= tl.load(lse_mass_ptr + row, mask=q_there, other=1.0)
            delta = tl.load(delta_ptr + row, mask=alive, other=0.0)
            first_row = tl.cast(q_start, tl.int64)
            q = tl.load(
                q_head + first_row * q_step + q_at,
                mask=alive[:, None],
                other=0.0,
            )
            dout = tl.load(
                dout_head + first_row * dout_step + dout_at,
                mask=alive[:, None],
                other=0.0,
            )
            p, ds, _dp, _k = _tile(
                q,
                k,
                v,
                dout,
                norm,
                mass,
                delta,
                lse,
                dlse,
                q_start,
                c,
                kv_len,
                MASKED=True,
                ROWS=1,
                Q_BLOCK=Q_BLOCK,
                K_BLOCK=K_BLOCK,
            )
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= SCALE
    tl.store(
        dk_head
        + tl.cast(k_start, tl.int64) * dk_step
        + cols[:, None] * dk_step
        + d[None, :] * dk_stride_d,
        dk.to(dk_ptr.dtype.element_ty),
        mask=k_here[:, None],
    )
    tl.store(
        dv_head
        + tl.cast(k_start, tl.int64) * dv_step
        + cols[:, None] * dv_step
        + d[None, :] * dv_stride_d,
        dv.to(dv_ptr.dtype.element_ty),
        mask=k_here[:, None],
    )


@triton.jit
def _tile(
    q,
    k,
    v,
    dout,
    norm,
    mass,
    delta,
    lse,
    dlse,
    q_start,
    c,
    kv_len,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
):
    """A tile made again: weights p, and ds, the gradient of what q.k is times SCALE.

    Also dp, the gradient of p; the keys, without those that no query here sees.
    ROWS: the axis of queries, 0 or 1; keys are the other
    """
    rows = tl.expand_dims(tl.arange(0, Q_BLOCK), 1 - ROWS)
    cols = tl.expand_dims(tl.arange(0, K_BLOCK), ROWS)
    norm = tl.expand_dims(norm, 1 - ROWS)
    mass = tl.expand_dims(mass, 1 - ROWS)
    delta = tl.expand_dims(delta, 1 - ROWS)
    lse = tl.expand_dims(lse, 1 - ROWS)
    dlse = tl.expand_dims(dlse, 1 - ROWS)
    q_index = q_start + rows
    k_index = c * K_BLOCK + cols
    s = _products(q, k, ROWS)
    p = tl.exp2(s * SCALE_LOG2 - norm)
    p *= 1.0 / mass  # they add up to 1: norm is rounded
    if MASKED:
        seen = k_index <= q_index
        seen &= k_index < kv_len
        seen &= norm != float("inf")  # of a query that is there, and sees a key
        p = tl.where(seen, p, 0.0)
        there = tl.max(tl.broadcast_to(seen, p.shape).to(tl.int32), ROWS) > 0
        k = tl.where(there[:, None], k, 0.0)  # else a NaN no query sees
    dp = _products(dout, v, ROWS)
    if MASKED:
        dp = tl.where(seen, dp, 0.0)
    ds = p * (dp - delta)
    # what lse passes on: its weights are of keys alone, and may be large beside a sink's
    p_lse = tl.exp2(s * SCALE_LOG2 - lse * LOG2E)
    if MASKED:
        p_lse = tl.where(seen, p_lse, 0.0)
    ds += p_lse * dlse
    return p, ds, dp, k


@triton.jit
def _products(x, y, ROWS: tl.constexpr):
    """Of each row of x, the queries', with each of y: [x, y], or where ROWS is 1 [y, x]."""
    if ROWS == 0:
        return tl.dot(x, tl.trans(y), input_precision="ieee")
    else:
        return tl.dot(y, tl.trans(x), input_precision="ieee")
