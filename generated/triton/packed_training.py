"""Attention in chunks of 128 queries and 128 keys, with a running softmax.

made by   attngen 0.1.0 for h100; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where k <= q
          of 16 packed sequences: b has the queries cu_seqlens_q[b] to
          cu_seqlens_q[b+1]-1, and keys by cu_seqlens_k; q and k are positions in it;
          other tokens see nothing
          and the gradients of q, k, v, once, in reverse mode
          q       [65536, 32, 128]  bfloat16
          k       [65536, 8, 128]  bfloat16
          v       [65536, 8, 128]  bfloat16
          cu_seqlens_q [17]  int32
          cu_seqlens_k [17]  int32
          out     [65536, 32, 128]  bfloat16
plan      running · 128 queries × 128 keys · 8 warps · 1 stage · last queries first;
          backward: 128 held × 16 · 8 warps · 2 stages
          tiles of a head of a sequence of the mean length (4096 queries): 1024; 496
          full, 32 on an edge, 496 empty and never visited
cost      10.2 TFLOP, 16.0 MiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"batch": 16, "q_heads": 32, "kv_heads": 8, "q_len": 65536, "kv_len": 65536,
          "qk_dim": 128, "v_dim": 128, "dtype": "bfloat16", "q_offset": 0, "mask":
          "causal", "storage": "packed", "derivatives": "vjp"}
choices   {"backend": "triton", "target": "h100", "algorithm": "running", "q_chunk":
          128, "k_chunk": 128, "num_warps": 8, "num_stages": 1, "order": "reverse",
          "head_dim": "padded", "loads": "pointers", "backward": "two_passes",
          "backward_q_chunk": 128, "backward_k_chunk": 16, "backward_num_warps": 8,
          "backward_num_stages": 2}
"""

import itertools
import math
import os
import zlib
from pathlib import Path

import torch
import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(128)  # queries of a tile
K_BLOCK = tl.constexpr(128)  # keys of a tile
R = tl.constexpr(4)  # query heads that share a kv head
QK_DIM = tl.constexpr(128)
V_DIM = tl.constexpr(128)
# 0.08838834764831845, times log2(e): exp(s) is 2**(s * log2(e))
SCALE_LOG2 = tl.constexpr(0.12751743082459868)
SCALE = tl.constexpr(0.08838834764831845)
OUT_DTYPE = torch.bfloat16
NUM_WARPS, NUM_STAGES = 8, 1
# of the backward pass: tokens that a program holds, and of the other kind at a time
BACKWARD_BLOCK, BACKWARD_STEP = 128, 16
BACKWARD_WARPS, BACKWARD_STAGES = 8, 2
BACKWARD = {
    "backward_queries": {"Q_BLOCK": BACKWARD_BLOCK, "K_BLOCK": BACKWARD_STEP},
    "backward_keys": {"Q_BLOCK": BACKWARD_STEP, "K_BLOCK": BACKWARD_BLOCK},
}
LARGEST_BLOCK = max(Q_BLOCK.value, K_BLOCK.value, BACKWARD_BLOCK, BACKWARD_STEP)
# of this very text: an edited copy is another operation to torch
OPERATION = f"attngen::attention_{zlib.crc32(Path(__file__).read_bytes()):08x}"
GRADIENTS = OPERATION.replace("attention", "gradients")
CHECKED = os.environ.get("ATTNGEN_CHECK") == "1"  # offsets of each call
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, slowly
# what changes between calls without another compilation
RUNTIME = [
    "q_tokens", "kv_tokens", "heads", "sequences", "q_stride_b", "q_stride_t",
    "q_stride_h", "k_stride_b", "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t",
    "v_stride_h", "out_stride_b", "out_stride_t", "out_stride_h",
    "cu_seqlens_q_stride_0", "cu_seqlens_k_stride_0", "dout_stride_b", "dout_stride_t",
    "dout_stride_h", "dq_stride_b", "dq_stride_t", "dq_stride_h", "dk_stride_b",
    "dk_stride_t", "dk_stride_h", "dv_stride_b", "dv_stride_t", "dv_stride_h",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 16}  # of tensors that lie densely


def attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k):
    """Attention of torch tensors -> out.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, or at addresses that aren't multiples of 16 bytes.

    q       (T, H, 128) bfloat16
    k       (S, G, 128) bfloat16
    v       (S, G, 128) bfloat16
    cu_seqlens_q (B + 1,) int32
    cu_seqlens_k (B + 1,) int32
    out     (T, H, 128) bfloat16
    out is 0 where a query sees no key
    """
    _check(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    q, k, v = q[None], k[None], v[None]  # one batch of all sequences
    packed = _attention(q, k, v, cu_seqlens_q, cu_seqlens_k)
    return packed[0].squeeze(0)


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the outputs and launch the kernel: one operation to torch.compile."""
    _, T, H, _ = q.shape
    if CHECKED or INTERPRETED:
        _check_values(q, k, cu_seqlens_q, cu_seqlens_k)
    out = _empty_out(q)
    norm = _empty_rows(q)
    sequences = cu_seqlens_q.shape[0] - 1
    programs = (T // Q_BLOCK.value + sequences + 1) * H
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(programs,)](
            q,
            k,
            v,
            out,
            norm,
            cu_seqlens_q,
            cu_seqlens_k,
            T,
            k.shape[1],
            H,
            sequences,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *cu_seqlens_q.stride(),
            *cu_seqlens_k.stride(),
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out, norm


@_attention.register_fake
def _fake(q, k, v, cu_seqlens_q, cu_seqlens_k):
    return _empty_out(q), _empty_rows(q)


def _empty_out(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, T, H, 128), dtype=OUT_DTYPE)


def _empty_rows(q):
    B, T, H, _ = q.shape
    return q.new_empty((B, H, T), dtype=torch.float32)


def _check(q, k, v, **operands):
    """Refuse what the kernel doesn't take, before it is launched."""
    given = {"q": q, "k": k, "v": v, **operands}
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, not a tensor")
    if not q.dim() == k.dim() == v.dim() == 3:
        raise ValueError("q, k and v have three dimensions: [t, h, d]")
    T, H, _ = q.shape
    S, G, _ = k.shape
    offsets = operands["cu_seqlens_q"]
    if offsets.dim() != 1:
        raise ValueError(f"cu_seqlens_q has {offsets.dim()} dimensions, not 1")
    B = offsets.numel() - 1
    if B < 1:
        raise ValueError("cu_seqlens_q has no sequence: two offsets are one")
    if G * R.value != H:
        raise ValueError(f"{H} query heads share {G} kv heads, not {R.value} each")
    if max(T, S) > 2**24:  # for which indices are proven
        raise ValueError(f"{T} queries, {S} keys: at most 2**24")
    needed = {
        "q": ((T, H, 128), torch.bfloat16),
        "k": ((S, G, 128), torch.bfloat16),
        "v": ((S, G, 128), torch.bfloat16),
        "cu_seqlens_q": ((B + 1,), torch.int32),
        "cu_seqlens_k": ((B + 1,), torch.int32),
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
        span = (LARGEST_BLOCK - 1) * x.stride(0)
        if span + x.shape[2] * x.stride(2) >= 2**31:
            raise ValueError(f"{name} has strides {x.stride()}: too large for a block")
    if q.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"q is on {q.device}; this kernel needs a GPU")


def _check_values(q, k, cu_seqlens_q, cu_seqlens_k):
    """Refuse what would be read outside of tensors. Waits for the GPU."""
    for name, offsets, x in (("q", cu_seqlens_q, q), ("k", cu_seqlens_k, k)):
        tokens, listed = x.shape[1], offsets.tolist()
        rises = all(n <= m for n, m in itertools.pairwise(listed))
        if listed[0] != 0 or listed[-1] > tokens or not rises:
            raise ValueError(
                f"cu_seqlens_{name} is {listed}: it begins at 0, never falls, and "
                f"ends at {tokens} at most"
            )


@torch.library.custom_op(GRADIENTS, mutates_args=())
def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels of the backward pass: dq, dk, dv."""
    _, T, H, _ = q.shape
    _, S, G, _ = k.shape
    sequences = cu_seqlens_q.shape[0] - 1
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    span = (LARGEST_BLOCK - 1) * dout.stride(1)
    if span + dout.shape[3] * dout.stride(3) >= 2**31:  # as in _check
        dout = dout.contiguous()
    delta = norm.new_empty(norm.shape)
    strides = [s for x in (q, k, v, dout, out, dq, dk, dv) for s in x.stride()[:3]]
    align = math.gcd(16, *strides)
    with torch.cuda.device_of(q):
        programs = (T // BACKWARD_BLOCK + sequences + 1) * H
        backward_queries[(programs,)](
            q,
            k,
            v,
            dout,
            out,
            dq,
            norm,
            delta,
            cu_seqlens_q,
            cu_seqlens_k,
            T,
            S,
            H,
            sequences,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *out.stride(),
            *dq.stride(),
            *cu_seqlens_q.stride(),
            *cu_seqlens_k.stride(),
            ALIGN=align,
            **BACKWARD["backward_queries"],
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
        programs = (S // BACKWARD_BLOCK + sequences + 1) * G
        backward_keys[(programs,)](
            q,
            k,
            v,
            dout,
            dk,
            dv,
            norm,
            delta,
            cu_seqlens_q,
            cu_seqlens_k,
            T,
            S,
            H,
            sequences,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *dk.stride(),
            *dv.stride(),
            *cu_seqlens_q.stride(),
            *cu_seqlens_k.stride(),
            ALIGN=align,
            **BACKWARD["backward_keys"],
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
    return dq, dk, dv


@_gradients.register_fake
def _fake_gradients(q, k, v, cu_seqlens_q, cu_seqlens_k, out, norm, dout):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    """For the backward pass: what was given, and out, norm."""
    out, norm = output
    ctx.save_for_backward(*inputs, out, norm)


def _pull(ctx, dout, *_):
    """Gradients of what was given, from those of the outputs."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, norm = ctx.saved_tensors
    dq, dk, dv = _gradients(q, k, v, cu_seqlens_q, cu_seqlens_k, out, norm, dout)
    return dq, dk, dv, None, None


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
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_tokens,
    kv_tokens,
    heads,
    sequences,
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
    cu_seqlens_q_stride_0,
    cu_seqlens_k_stride_0,
    ALIGN: tl.constexpr,
):
    """Q_BLOCK queries of one head, over the key blocks that any of them sees."""
    blocks = q_tokens // Q_BLOCK + sequences + 1  # that a head can have
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks  # of a sequence those that see most go first
    h_index = (program // blocks).to(tl.int64)
    b_index, q_first, q_len, q_start = _sequence(
        cu_seqlens_q_ptr, cu_seqlens_q_stride_0, sequences, q_tokens, block, Q_BLOCK
    )
    if q_start >= q_len:
        return  # the sequence has no such block
    k_first, kv_len = _tokens(
        cu_seqlens_k_ptr, cu_seqlens_k_stride_0, sequences, b_index
    )
    b_index = tl.minimum(b_index, sequences - 1).to(tl.int64)
    g_index = h_index // R  # of the keys and values
    rows = tl.arange(0, Q_BLOCK)
    cols = tl.arange(0, K_BLOCK)
    d = tl.arange(0, 128)
    q_there = q_start + rows < q_len
    q_index = q_start + rows[:, None]

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    out_step = out_stride_t // ALIGN * ALIGN
    q_head = _head(q_ptr, 0, h_index, q_stride_b, q_stride_h, ALIGN)
    q_head += q_first.to(tl.int64) * q_step
    k_head = _head(k_ptr, 0, g_index, k_stride_b, k_stride_h, ALIGN)
    k_head += k_first.to(tl.int64) * k_step
    v_head = _head(v_ptr, 0, g_index, v_stride_b, v_stride_h, ALIGN)
    v_head += k_first.to(tl.int64) * v_step
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
    acc = tl.zeros((Q_BLOCK, 128), tl.float32)
    for c in range(full_last):
        k = tl.load(k_head + c * k_block + k_at)
        s = tl.dot(q, k)
        m, total, p, rescale = _softmax(s, m, total, UNSEEN=False)
        v = tl.load(v_head + c * v_block + v_at)
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
    for c in range(full_last, last):
        k_index = c * K_BLOCK + cols[None, :]
        k = tl.load(
            k_head + c * k_block + k_at,
            mask=k_index < kv_len,
            other=0.0,
        )
        s = tl.dot(q, k)
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
        acc = tl.dot(p.to(v.dtype), v, acc)

    share = 1.0 / tl.where(total == 0, 1.0, total)  # a row that saw no key is 0
    out_head = _head(out_ptr, 0, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_first.to(tl.int64) * out_step
    out_head += q_start.to(tl.int64) * out_step
    tl.store(
        out_head + rows[:, None] * out_step + d[None, :] * out_stride_d,
        (acc * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None],
    )
    row = h_index * q_tokens + q_first + q_start + rows
    norm = m + tl.log2(total)
    saw = total != 0  # a key; NaN is one that it saw
    tl.store(norm_ptr + row, tl.where(saw, norm, float("inf")), mask=q_there)


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
    norm_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_tokens,
    kv_tokens,
    heads,
    sequences,
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
    cu_seqlens_q_stride_0,
    cu_seqlens_k_stride_0,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dq of Q_BLOCK queries of one head, over the key blocks that any of them sees."""
    blocks = q_tokens // Q_BLOCK + sequences + 1  # that a head can have
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks  # of a sequence those that see most go first
    h_index = (program // blocks).to(tl.int64)
    b_index, q_first, q_len, q_start = _sequence(
        cu_seqlens_q_ptr, cu_seqlens_q_stride_0, sequences, q_tokens, block, Q_BLOCK
    )
    if q_start >= q_len:
        return  # the sequence has no such block
    k_first, kv_len = _tokens(
        cu_seqlens_k_ptr, cu_seqlens_k_stride_0, sequences, b_index
    )
    b_index = tl.minimum(b_index, sequences - 1).to(tl.int64)
    g_index = h_index // R  # of the keys and values
    rows = tl.arange(0, Q_BLOCK)
    cols = tl.arange(0, K_BLOCK)
    d = tl.arange(0, 128)

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    dout_step = dout_stride_t // ALIGN * ALIGN
    out_step = out_stride_t // ALIGN * ALIGN
    dq_step = dq_stride_t // ALIGN * ALIGN
    q_head = _head(q_ptr, 0, h_index, q_stride_b, q_stride_h, ALIGN)
    q_head += q_first.to(tl.int64) * q_step
    k_head = _head(k_ptr, 0, g_index, k_stride_b, k_stride_h, ALIGN)
    k_head += k_first.to(tl.int64) * k_step
    v_head = _head(v_ptr, 0, g_index, v_stride_b, v_stride_h, ALIGN)
    v_head += k_first.to(tl.int64) * v_step
    dout_head = _head(dout_ptr, 0, h_index, dout_stride_b, dout_stride_h, ALIGN)
    dout_head += q_first.to(tl.int64) * dout_step
    dq_head = _head(dq_ptr, 0, h_index, dq_stride_b, dq_stride_h, ALIGN)
    dq_head += q_first.to(tl.int64) * dq_step
    row = h_index * q_tokens + q_first + q_start + rows
    q_there = q_start + rows < q_len
    norm = tl.load(norm_ptr + row, mask=q_there, other=float("inf"))
    alive = norm != float("inf")  # it sees a key
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
    out_head = _head(out_ptr, 0, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_first.to(tl.int64) * out_step
    out = tl.load(
        out_head
        + tl.cast(q_start, tl.int64) * out_step
        + rows[:, None] * out_step
        + d[None, :] * out_stride_d,
        mask=alive[:, None],
        other=0.0,
    )
    delta += tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=q_there)
    dq = tl.zeros((Q_BLOCK, 128), tl.float32)
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
            delta,
            q_start,
            c,
            kv_len,
            MASKED=False,
            ROWS=0,
            Q_BLOCK=Q_BLOCK,
            K_BLOCK=K_BLOCK,
        )
        dq = tl.dot(ds.to(k.dtype), k, dq)
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
            delta,
            q_start,
            c,
            kv_len,
            MASKED=True,
            ROWS=0,
            Q_BLOCK=Q_BLOCK,
            K_BLOCK=K_BLOCK,
        )
        dq = tl.dot(ds.to(k.dtype), k, dq)
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
    norm_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_tokens,
    kv_tokens,
    heads,
    sequences,
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
    cu_seqlens_q_stride_0,
    cu_seqlens_k_stride_0,
    Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """dk and dv of K_BLOCK keys of one kv head, over the query blocks that see any of them."""
    blocks = kv_tokens // K_BLOCK + sequences + 1  # that a head can have
    program = tl.program_id(0)
    block = program % blocks
    g_index = (program // blocks).to(tl.int64)
    b_index, k_first, kv_len, k_start = _sequence(
        cu_seqlens_k_ptr, cu_seqlens_k_stride_0, sequences, kv_tokens, block, K_BLOCK
    )
    if k_start >= kv_len:
        return  # the sequence has no such block
    q_first, q_len = _tokens(
        cu_seqlens_q_ptr, cu_seqlens_q_stride_0, sequences, b_index
    )
    b_index = tl.minimum(b_index, sequences - 1).to(tl.int64)
    c = k_start // K_BLOCK
    rows = tl.arange(0, Q_BLOCK)
    cols = tl.arange(0, K_BLOCK)
    d = tl.arange(0, 128)

    # strides between tokens: ALIGN divides them, and saying so makes loads wide
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    dout_step = dout_stride_t // ALIGN * ALIGN
    dk_step = dk_stride_t // ALIGN * ALIGN
    dv_step = dv_stride_t // ALIGN * ALIGN
    k_head = _head(k_ptr, 0, g_index, k_stride_b, k_stride_h, ALIGN)
    k_head += k_first.to(tl.int64) * k_step
    dk_head = _head(dk_ptr, 0, g_index, dk_stride_b, dk_stride_h, ALIGN)
    dk_head += k_first.to(tl.int64) * dk_step
    v_head = _head(v_ptr, 0, g_index, v_stride_b, v_stride_h, ALIGN)
    v_head += k_first.to(tl.int64) * v_step
    dv_head = _head(dv_ptr, 0, g_index, dv_stride_b, dv_stride_h, ALIGN)
    dv_head += k_first.to(tl.int64) * dv_step
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
    dk = tl.zeros((K_BLOCK, 128), tl.float32)
    dv = tl.zeros((K_BLOCK, 128), tl.float32)
    for r in range(R):
        h_index = g_index * R + r
        q_head = _head(q_ptr, 0, h_index, q_stride_b, q_stride_h, ALIGN)
        q_head += q_first.to(tl.int64) * q_step
        dout_head = _head(dout_ptr, 0, h_index, dout_stride_b, dout_stride_h, ALIGN)
        dout_head += q_first.to(tl.int64) * dout_step
        for i in range(full_first, full_last):
            q_start = i * Q_BLOCK
            row = h_index * q_tokens + q_first + q_start + rows
            norm = tl.load(norm_ptr + row)
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
                delta,
                q_start,
                c,
                kv_len,
                MASKED=False,
                ROWS=1,
                Q_BLOCK=Q_BLOCK,
                K_BLOCK=K_BLOCK,
            )
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            dk = tl.dot(ds.to(q.dtype), q, dk)
        low_edges = full_first - first
        for n in range(low_edges + last - full_last):  # on both sides of the interior
            i = n + tl.where(n < low_edges, first, full_last - low_edges)
            q_start = i * Q_BLOCK
            row = h_index * q_tokens + q_first + q_start + rows
            q_there = q_start + rows < q_len
            norm = tl.load(norm_ptr + row, mask=q_there, other=float("inf"))
            alive = norm != float("inf")  # it sees a key
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
                delta,
                q_start,
                c,
                kv_len,
                MASKED=True,
                ROWS=1,
                Q_BLOCK=Q_BLOCK,
                K_BLOCK=K_BLOCK,
            )
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            dk = tl.dot(ds.to(q.dtype), q, dk)
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
    delta,
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
    delta = tl.expand_dims(delta, 1 - ROWS)
    q_index = q_start + rows
    k_index = c * K_BLOCK + cols
    s = _products(q, k, ROWS)
    p = tl.exp2(s * SCALE_LOG2 - norm)
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
    return p, ds, dp, k


@triton.jit
def _products(x, y, ROWS: tl.constexpr):
    """Of each row of x, the queries', with each of y: [x, y], or where ROWS is 1 [y, x]."""
    if ROWS == 0:
        return tl.dot(x, tl.trans(y))
    else:
        return tl.dot(y, tl.trans(x))


@triton.jit
def _sequence(offsets_ptr, stride, sequences, tokens, block, BLOCK: tl.constexpr):
    """Of a block: its sequence, the first of its tokens, how many, and where it starts.

    A sequence has its blocks from number offsets[b] // BLOCK + b on, and enough of them.
    Tokens behind the last offset count as one sequence more.
    """
    low, high = 0, sequences
    while low < high:
        middle = (low + high + 1) // 2
        begun = tl.load(offsets_ptr + middle * stride) // BLOCK + middle <= block
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    first = tl.load(offsets_ptr + low * stride)
    last = tl.load(offsets_ptr + (low + 1) * stride, mask=low < sequences, other=tokens)
    return low, first, last - first, (block - first // BLOCK - low) * BLOCK


@triton.jit
def _tokens(offsets_ptr, stride, sequences, b):
    """The first token of a sequence, and how many it has; none behind the last one."""
    first = tl.load(offsets_ptr + b * stride, mask=b < sequences, other=0)
    last = tl.load(offsets_ptr + (b + 1) * stride, mask=b < sequences, other=0)
    return first, last - first
