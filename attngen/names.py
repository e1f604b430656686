"""The names that emitted files use themselves, which no operand may take.

tests/test_names.py reads emitted files and fails when one is missing here.
"""

from __future__ import annotations

import builtins
import keyword
import re

# of the language and the contract
_OWN = "attention b h q k s v sink seed kv_lengths q_lengths q_offset"
# of the JAX templates
_JAX = """
    jax jnp lax
    B T S H G R D QK_DIM V_DIM SCALE LOG2E Q_OFFSET K_OFFSET
    B_SHARDS B_PART B_EACH H_SHARDS H_PART G_PART G_EACH size k_size v_size
    B_CHUNK G_CHUNK Q_CHUNK K_CHUNK Q_CHUNKS K_CHUNKS K_STEP UNROLL PARTS
    queries tile masked interior interiors edge step steps carried carry c i g
    keys low down first_c rest part parts done each ones together summaries
    q_start k_start at q_here k_here v_here rows kc vc
    b_index h_index q_index k_index q_pos k_pos kv_length q_length
    kv_count q_count offset q_lo q_hi first last full_first full_last
    key k_lo k_hi b_lo b_hi h_lo h_hi some every kind order full visited
    seen there m m_safe m_sink p acc total rescale kept DROPOUT
    SEQUENCES PAGES PAGE_SIZE SCALE_BLOCK
    out lse out_all lse_all
"""
# of their backward passes
_BACKWARD = """
    partial SCALE_2 Q_BLOCK K_BLOCK Q_BLOCKS K_BLOCKS B_BLOCK G_BLOCK
    kept cotangents dout dlse dq dk dv delta deltas weighted beside
    queries_of keys_of of_queries of_keys summing sums heads add
    known share scored dropped ds dp again same ds_of dq_part
    new here whole made outs given n
    VISITS begin chunk chunks inside nought scores skipped live
    norm align programs span ctx inputs output GRADIENTS LARGEST_BLOCK BACKWARD
"""
# of the Triton templates
_TRITON = """
    torch triton tl math os forward strides
    Q_BLOCK K_BLOCK SCALE_LOG2 LN2
    NUM_WARPS NUM_STAGES INTERPRETED RUNTIME CONSTEXPRS ALIGN
    tiles query counts shape kv_end q_end
    KV_SPLITS COLUMNS COMBINE_WARPS combine programs part_m part_total part_acc
    BLOCK_SHAPES TensorDescriptor OUT_DTYPE OPERATION zlib operator Path tame
"""
_TAKEN = (*_OWN.split(), *_JAX.split(), *_TRITON.split())
RESERVED = frozenset((*_TAKEN, *dir(builtins)))
# steps of long expressions, slices of operands
_PATTERN = re.compile(
    r"(part|some_part|every_part|index|indices|limit|score\d*)(_\d+)+|(full_)?(first|last)_\d"
    r"|.*_at_.*|_.*"
)
# of files with derivatives: scores as they were, their slopes, rows and gradients
_OF_BACKWARD = re.compile(
    "|".join(_BACKWARD.split())
    + r"|BACKWARD_\w+|backward_\w+"
    + r"|s_\d+|slope\d+_\d+|(lse|dlse|delta|mass|d|out)_rows?|mass(_all)?"
    r"|d[qkv]_(here|before)|(dout|out)_here|d_.*|.*_part"
)


def is_free(name: str) -> bool:
    """Whether an operand may be called so: Python and emitted files don't use the name."""
    return not (
        keyword.iskeyword(name)
        or keyword.issoftkeyword(name)
        or name in RESERVED
        or _PATTERN.fullmatch(name)
    )


def is_free_of_backward(name: str) -> bool:
    """Whether an operand may be called so where there are derivatives, too."""
    return not _OF_BACKWARD.fullmatch(name)
