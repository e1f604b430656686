"""Attention in chunks of 64 queries and 64 keys, with a running softmax.

made by   attngen 0.1.0 for b200; `attngen emit --check` compares this file
          with what would be emitted now. It is yours: attngen claims no rights in it.
computes  out = softmax(s) v over the keys, with s = q.k * 1/sqrt(qk_dim)
          key k is there for query q where (k <= q) & (document_ids[b, q] ==
          document_ids[b, k])
          with dropout: a weight is 0 with probability 0.1, else divided by 1 less that,
          by Philox 4x32-10 of seed, b, h and positions; not in lse
          and the gradients of q, k, v, once, in reverse mode
          q       [2, 2048, 4, 64]  bfloat16
          k       [2, 2048, 4, 64]  bfloat16
          v       [2, 2048, 4, 64]  bfloat16
          seed    [2]  uint32
          document_ids [2, 2048]  int32
          out     [2, 2048, 4, 64]  bfloat16
plan      running · 64 queries × 64 keys · 8 warps · 3 stages · last queries first;
          backward: 64 held × 32 · 8 warps · 2 stages
          tiles of a head: 1024; 496 always empty, at most 528 visited: document_ids
          says which at run time
cost      19.9 GFLOP, 341.0 KiB of temporaries (modelled)
needs     torch >= 2.6, triton >= 3.5; nothing of attngen
spec      {"batch": 2, "q_heads": 4, "kv_heads": 4, "q_len": 2048, "kv_len": 2048,
          "qk_dim": 64, "v_dim": 64, "dtype": "bfloat16", "mask": {"and": ["causal",
          "documents"]}, "dropout": 0.1, "derivatives": "vjp"}
choices   {"backend": "triton", "target": "b200", "algorithm": "running", "q_chunk": 64,
          "k_chunk": 64, "num_warps": 8, "num_stages": 3, "order": "reverse",
          "head_dim": "padded", "loads": "pointers", "skip": "list", "backward":
          "two_passes", "backward_q_chunk": 64, "backward_k_chunk": 32,
          "backward_num_warps": 8, "backward_num_stages": 2}
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
SCALE = tl.constexpr(0.125)
DROPOUT = tl.constexpr(0.1)  # share of weights that are 0
OUT_DTYPE = torch.bfloat16
NUM_WARPS, NUM_STAGES = 8, 3
# of the backward pass: tokens that a program holds, and of the other kind at a time
BACKWARD_BLOCK, BACKWARD_STEP = 64, 32
BACKWARD_WARPS, BACKWARD_STAGES = 8, 2
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
    "out_stride_b", "out_stride_t", "out_stride_h", "seed_stride_0",
    "document_ids_stride_0", "document_ids_stride_1", "tiles_stride_0",
    "tiles_stride_1", "tiles_stride_2", "dout_stride_b", "dout_stride_t",
    "dout_stride_h", "dq_stride_b", "dq_stride_t", "dq_stride_h", "dk_stride_b",
    "dk_stride_t", "dk_stride_h", "dv_stride_b", "dv_stride_t", "dv_stride_h",
]  # fmt: skip
CONSTEXPRS = {"ALIGN": 16}  # of tensors that lie densely


def attention(q, k, v, *, seed, document_ids):
    """Attention of torch tensors -> out.

    Any batch, lengths and strides: a new batch or length compiles nothing.
    Compiled once for tensors that lie densely, and anew for the first ones with
    another ALIGN (what divides all strides: 1, 2, 4, 8 or 16), with another step than
    1 within a head, or at addresses that aren't multiples of 16 bytes.

    q       (B, T, H, 64) bfloat16
    k       (B, S, G, 64) bfloat16
    v       (B, S, G, 64) bfloat16
    seed    (2,) uint32
    document_ids (B, S) int32
    out     (B, T, H, 64) bfloat16
    out is 0 where a query sees no key
    """
    if isinstance(seed, int):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}, not a number of 64 bits")
        seed = torch.tensor([seed >> 32, seed % 2**32], dtype=torch.uint32)
        seed = seed.to(q.device)
    _check(q, k, v, seed=seed, document_ids=document_ids)
    return _attention(q, k, v, seed, document_ids)[0]


@torch.library.custom_op(OPERATION, mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seed: torch.Tensor,
    document_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocate the outputs and launch the kernel: one operation to torch.compile."""
    B, T, H, _ = q.shape
    out = _empty_out(q)
    norm = _empty_rows(q)
    tiles = _tiles(q, k, document_ids)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    with torch.cuda.device_of(q):
        forward[(triton.cdiv(T, Q_BLOCK.value) * H * B,)](
            q,
            k,
            v,
            out,
            norm,
            seed,
            document_ids,
            tiles,
            T,
            k.shape[1],
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride(),
            *seed.stride(),
            *document_ids.stride(),
            *tiles.stride()[:3],
            ALIGN=math.gcd(16, *strides),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
    return out, norm


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
def _fake(q, k, v, seed, document_ids):
    return _empty_out(q), _empty_rows(q)


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
    if not (T <= S):  # an operand would be read outside
        raise ValueError(f"B, H, T, S are {(B, H, T, S)}, not T <= S")
    needed = {
        "q": ((B, T, H, 64), torch.bfloat16),
        "k": ((B, S, G, 64), torch.bfloat16),
        "v": ((B, S, G, 64), torch.bfloat16),
        "seed": ((2,), torch.uint32),
        "document_ids": ((B, S), torch.int32),
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
    seed: torch.Tensor,
    document_ids: torch.Tensor,
    out: torch.Tensor,
    norm: torch.Tensor,
    dout: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the kernels of the backward pass: dq, dk, dv."""
    B, T, H, _ = q.shape
    _, S, G, _ = k.shape
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
        programs = triton.cdiv(T, BACKWARD_BLOCK) * H * B
        backward_queries[(programs,)](
            q,
            k,
            v,
            dout,
            out,
            dq,
            norm,
            delta,
            seed,
            document_ids,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *out.stride(),
            *dq.stride(),
            *seed.stride(),
            *document_ids.stride(),
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
            seed,
            document_ids,
            T,
            S,
            H,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *dout.stride(),
            *dk.stride(),
            *dv.stride(),
            *seed.stride(),
            *document_ids.stride(),
            ALIGN=align,
            **BACKWARD["backward_keys"],
            num_warps=BACKWARD_WARPS,
            num_stages=BACKWARD_STAGES,
        )
    return dq, dk, dv


@_gradients.register_fake
def _fake_gradients(q, k, v, seed, document_ids, out, norm, dout):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    """For the backward pass: what was given, and out, norm."""
    out, norm = output
    ctx.save_for_backward(*inputs, out, norm)


def _pull(ctx, dout, *_):
    """Gradients of what was given, from those of the outputs."""
    q, k, v, seed, document_ids, out, norm = ctx.saved_tensors
    dq, dk, dv = _gradients(q, k, v, seed, document_ids, out, norm, dout)
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
    seed_ptr,
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
    seed_stride_0,
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
    seed = _seed(seed_ptr, seed_stride_0)
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
        kept = _dropout(seed, b_index, h_index, q_index, c * K_BLOCK, K_BLOCK, 0)
        p *= kept  # total is of all
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
        kept = _dropout(seed, b_index, h_index, q_index, c * K_BLOCK, K_BLOCK, 0)
        p *= kept  # total is of all
        v = tl.load(
            v_head + c * v_block + v_at,
            mask=there[:, None],
            other=0.0,
        )
        acc *= rescale[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)

    share = 1.0 / tl.where(total == 0, 1.0, total)  # a row that saw no key is 0
    share *= 1.0 / (1.0 - DROPOUT)
    out_head = _head(out_ptr, b_index, h_index, out_stride_b, out_stride_h, ALIGN)
    out_head += q_start.to(tl.int64) * out_step
    tl.store(
        out_head + rows[:, None] * out_step + d[None, :] * out_stride_d,
        (acc * share[:, None]).to(out_ptr.dtype.element_ty),
        mask=q_there[:, None],
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
    seed_ptr,
    document_ids_ptr,
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
    seed_stride_0,
    document_ids_stride_0,
    document_ids_stride_1,
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

    # Key blocks [0, last) hold what any query here sees.
    # q_hi: positions, half-open
    q_hi = tl.minimum(q_start + Q_BLOCK, q_len)
    high = tl.minimum(q_hi, kv_len)
    last = tl.cdiv(high, K_BLOCK)
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
    tl.store(delta_ptr + row, delta, mask=q_there)
    dq = tl.zeros((Q_BLOCK, 64), tl.float32)
    for c in range(last):
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
            q_len,
            kv_len,
            b_index,
            h_index,
            seed_ptr,
            document_ids_ptr,
            seed_stride_0,
            document_ids_stride_0,
            document_ids_stride_1,
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
    seed_ptr,
    document_ids_ptr,
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
    seed_stride_0,
    document_ids_stride_0,
    document_ids_stride_1,
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

    # Query blocks [first, last) hold what any key here sees.
    # k_lo: positions, half-open
    k_lo = k_start
    low = k_lo
    first = low // Q_BLOCK
    last = tl.maximum(tl.cdiv(q_len, Q_BLOCK), first)
    dk = tl.zeros((K_BLOCK, 64), tl.float32)
    dv = tl.zeros((K_BLOCK, 64), tl.float32)
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
                q_len,
                kv_len,
                b_index,
                h_index,
                seed_ptr,
                document_ids_ptr,
                seed_stride_0,
                document_ids_stride_0,
                document_ids_stride_1,
                MASKED=True,
                ROWS=1,
                Q_BLOCK=Q_BLOCK,
                K_BLOCK=K_BLOCK,
            )
            dv = tl.dot(p.to(dout.dtype), dout, dv)
            dk = tl.dot(ds.to(q.dtype), q, dk)
    dk *= SCALE
    dv *= 1.0 / (1.0 - DROPOUT)
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
    q_len,
    kv_len,
    b_index,
    h_index,
    seed_ptr,
    document_ids_ptr,
    seed_stride_0,
    document_ids_stride_0,
    document_ids_stride_1,
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
    seed = _seed(seed_ptr, seed_stride_0)
    q_index = q_start + rows
    document_ids_at_bq = document_ids_ptr + b_index * document_ids_stride_0
    document_ids_at_bq += q_index.to(tl.int64) * document_ids_stride_1
    document_ids_at_bq = tl.load(document_ids_at_bq, mask=q_index < q_len, other=0)
    k_index = c * K_BLOCK + cols
    s = _products(q, k, ROWS)
    p = tl.exp2(s * SCALE_LOG2 - norm)
    if MASKED:
        document_ids_at_bk = document_ids_ptr + b_index * document_ids_stride_0
        document_ids_at_bk += k_index.to(tl.int64) * document_ids_stride_1
        document_ids_at_bk = tl.load(document_ids_at_bk, mask=k_index < kv_len, other=0)
        seen = (k_index <= q_index) & (document_ids_at_bq == document_ids_at_bk)
        seen &= k_index < kv_len
        seen &= norm != float("inf")  # of a query that is there, and sees a key
        p = tl.where(seen, p, 0.0)
        there = tl.max(tl.broadcast_to(seen, p.shape).to(tl.int32), ROWS) > 0
        k = tl.where(there[:, None], k, 0.0)  # else a NaN no query sees
    dp = _products(dout, v, ROWS)
    if MASKED:
        dp = tl.where(seen, dp, 0.0)
    kept = _dropout(seed, b_index, h_index, q_index, c * K_BLOCK, K_BLOCK, ROWS)
    dp = dp * kept * (1.0 / (1.0 - DROPOUT))
    ds = p * (dp - delta)
    p *= kept  # to be divided by 1 - DROPOUT
    return p, ds, dp, k


@triton.jit
def _products(x, y, ROWS: tl.constexpr):
    """Of each row of x, the queries', with each of y: [x, y], or where ROWS is 1 [y, x]."""
    if ROWS == 0:
        return tl.dot(x, tl.trans(y))
    else:
        return tl.dot(y, tl.trans(x))


@triton.jit
def _seed(seed_ptr, stride):
    """Both words of the seed as one number."""
    low, high = tl.load(seed_ptr), tl.load(seed_ptr + stride)
    return high.to(tl.uint64) << 32 | low.to(tl.uint64)


@triton.jit
def _dropout(seed, b, h, q, k_start, K_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """1 where a weight is kept, else 0: by Philox 4x32-10, of positions, whatever the tile.

    The key is the seed, the counter (k // 4, q, h, b), and k % 4 tells which of four
    words is compared with DROPOUT. k_start, of K_BLOCK keys, is a multiple of four.
    ROWS: the axis of queries, 0 or 1; keys are the other
    """
    fours = tl.expand_dims(tl.arange(0, K_BLOCK // 4) + (k_start >> 2), ROWS)
    q, fours = tl.broadcast(q.to(tl.int32), fours.to(tl.int32))
    x0, x1, x2, x3 = tl.philox(seed, fours, q, h.to(tl.int32), b.to(tl.int32))
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    if ROWS == 0:
        words = tl.reshape(words, (words.shape[0], K_BLOCK))
    else:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), (K_BLOCK, words.shape[1]))
    kept = words >= 429496730  # DROPOUT * 2**32
    # as numbers: Triton can't move bits to where a product takes its weights
    return tl.where(kept, 1.0, 0.0).to(tl.float16)
