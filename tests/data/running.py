"""A small kernel by the conventions of emitted files: causal, an interior and an edge."""

import triton
import triton.language as tl

Q_BLOCK = tl.constexpr(64)
K_BLOCK = tl.constexpr(64)
QK_DIM = tl.constexpr(64)
V_DIM = tl.constexpr(64)
NUM_WARPS = 4
NUM_STAGES = 2
CONSTEXPRS = {"ALIGN": 16}
LENGTHS = ["q_len", "kv_len", "q_stride_t", "k_stride_t", "v_stride_t"]


def attention(q, k, v):
    raise NotImplementedError("nothing runs: it is compiled")


@triton.jit(do_not_specialize=LENGTHS)
def forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_len,
    kv_len,
    q_stride_t,
    q_stride_d,
    k_stride_t,
    k_stride_d,
    v_stride_t,
    v_stride_d,
    ALIGN: tl.constexpr,
):
    rows = tl.program_id(0) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    cols, d = tl.arange(0, K_BLOCK), tl.arange(0, QK_DIM)
    q_step = q_stride_t // ALIGN * ALIGN
    k_step = k_stride_t // ALIGN * ALIGN
    v_step = v_stride_t // ALIGN * ALIGN
    q_at = q_ptr + rows[:, None] * q_step + d[None, :] * q_stride_d
    q = tl.load(q_at, mask=rows[:, None] < q_len, other=0.0)
    k_at = k_ptr + cols[None, :] * k_step + d[:, None] * k_stride_d
    v_at = v_ptr + cols[:, None] * v_step + d[None, :] * v_stride_d
    m = tl.full((Q_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((Q_BLOCK,), tl.float32)
    acc = tl.zeros((Q_BLOCK, V_DIM), tl.float32)
    full = tl.minimum(tl.program_id(0) * Q_BLOCK, kv_len) // K_BLOCK
    last = tl.cdiv(tl.minimum((tl.program_id(0) + 1) * Q_BLOCK, kv_len), K_BLOCK)
    for c in range(full):
        s = tl.dot(q, tl.load(k_at + c * K_BLOCK * k_step), input_precision="ieee")
        m, total, p, alpha = _softmax(s, m, total)
        v = tl.load(v_at + c * K_BLOCK * v_step)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    for c in range(full, last):
        k_pos = c * K_BLOCK + cols
        k = tl.load(k_at + c * K_BLOCK * k_step, mask=k_pos[None, :] < kv_len, other=0)
        s = tl.dot(q, k, input_precision="ieee")
        seen = (k_pos[None, :] <= rows[:, None]) & (k_pos[None, :] < kv_len)
        m, total, p, alpha = _softmax(tl.where(seen, s, -1e30), m, total)
        v = tl.load(v_at + c * K_BLOCK * v_step, mask=k_pos[:, None] < kv_len, other=0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    out_at = out_ptr + rows[:, None] * V_DIM + d[None, :]
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=rows[:, None] < q_len)
    tl.store(lse_ptr + rows, (m + tl.log2(total)) * 0.6931, mask=rows < q_len)


@triton.jit
def _softmax(s, m, total):
    m_new = tl.maximum(m, tl.max(s, 1) * 0.18)
    p = tl.exp2(s * 0.18 - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    return m_new, total * alpha + tl.sum(p, 1), p, alpha
