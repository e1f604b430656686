"""What a choice or a spec costs beside the tiles: each of a program as a whole."""

from __future__ import annotations

import math

from attngen.backends.jax.buffers import LENT_BYTES, Tile, facts
from attngen.backends.jax.candidates import option
from attngen.dtypes import BYTES
from attngen.lists import Blocks, Search, listed
from attngen.operands import Operand
from attngen.plans import Choice
from attngen.spec import AttentionSpec

SMALL_BYTES = 768
STACK_BYTES = 2**15
STEP_BYTES = 512  # of a step: eight buffers of less than 64 bytes take 64 each


def _small(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Statistics of rows and of keys, counters, alignment."""
    steps = at.unroll + at.outside if at.unroll else at.chunks
    counters = 8 * at.chunks if choice["loop"] == "scan" else 0
    stats = 8 * at.row + 2 * at.key
    return SMALL_BYTES + stats + steps * STEP_BYTES + counters


def _unguarded(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """XLA converts all of q, k and v outside the loops unless barriers keep it from that.

    float16 it converts slice by slice.
    """
    if choice["guard"] or spec.dtype != "bfloat16":
        return 0
    queries = spec.q_heads * spec.q_len * spec.qk_dim
    keys = spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    return BYTES[spec.stats_dtype] * spec.batch * (queries + keys)


def _narrow(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Products in a narrower dtype than the statistics': scores and rows in it, too."""
    if choice["product_dtype"] == spec.stats_dtype:
        return 0
    steps = at.unroll + at.outside if at.unroll else at.chunks
    sliced = at.keys + at.values
    if at.unroll:
        sliced = sliced if at.moved and at.all_heads else 0
    else:
        sliced *= steps
    again = at.scores // 4 if at.twice_made else 0
    return (at.scores * steps + at.rows) // 2 + sliced + again


def _scaled(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Scores that are scaled are another buffer, where no mask makes one anyway."""
    if not at.scaled or facts(spec).edges or at.unroll or at.parts > 1:
        return 0
    if at.grouped:  # raised in a buffer of their own anyway
        return at.scores if at.dense or not (at.poly or at.chunks == 1) else 0
    return at.scores * max(1, at.chunks - at.tail)


def _summaries(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """All chunks' statistics, as they are initialised and as they are filled.

    And once more where a loop fills many of them, unless their number is a power of two.
    """
    if choice["algorithm"] != "summaries":
        return 0
    copied = at.chunks > 24 and at.chunks & (at.chunks - 1)
    copied = copied and at.looped and choice["loop"] == "fori"
    kept = at.chunks * (at.acc + 2 * at.row)
    more = at.acc if "out" in spec.outputs else 2 * at.chunks * at.row
    return (3 if copied else 2) * kept * 33 // 32 + more


def _transposed(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """All of k and v, transposed; and slices that are transposed back."""
    if choice.get("slices", "nd") == "nd":
        return 0
    keys = spec.batch * spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    back = 4 if not at.unroll else 1 if at.parts > 1 else 0
    return BYTES[spec.dtype] * keys + back * at.keys


def _stacked(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Outputs as they are stacked by steps, where they aren't in order yet.

    The output itself is empty until then: the largest buffer that fits lies there,
    but for some bytes beside it.
    """
    if choice.get("steps", "fori") == "fori":
        return 0
    rows = spec.batch * spec.q_heads * spec.q_len
    lse = BYTES[spec.stats_dtype] * rows if "lse" in spec.outputs else 0
    if "out" not in spec.outputs or _ordered(spec, choice):
        return lse
    out = BYTES[spec.out_dtype_name] * spec.v_dim * rows
    if at.unroll > 1 and at.parts == 1:
        return out + lse
    buffers = (at.scores, at.acc, at.keys) if out >= LENT_BYTES else ()
    lent = max([n for n in buffers if n <= out], default=0)
    if choice.get("slices", "nd") != "nd":  # all of k, or of v
        sizes = [spec.kv_len * d * spec.kv_heads for d in (spec.qk_dim, spec.v_dim)]
        whole = [n * spec.batch * BYTES[spec.dtype] for n in sizes]
        lent = max([n for n in (*whole, lent) if n <= out], default=0)
    return out + lse - max(0, lent - STACK_BYTES)


def _ordered(spec: AttentionSpec, choice: Choice) -> bool:
    """Whether steps over batches, heads, queries in this order lie as the output does.

    With barriers XLA copies even these where there is one head.
    """
    if spec.q_heads == 1 and (choice["guard"] or choice.get("qk") == "twice"):
        return False
    some_heads = choice["head_chunk"] != spec.kv_heads
    some_queries = choice["q_chunk"] != spec.q_len
    if choice["batch_chunk"] != 1 and (some_heads or some_queries):
        return False
    if spec.layout == "bhtd":
        one = choice["head_chunk"] == 1 == spec.repeats
        return one or not some_queries
    return not some_heads or spec.q_len == 1


def _ones(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Slices of values as they were before they had a column of ones."""
    if not at.ones or not at.moved or not at.all_heads or at.parts > 1:
        return 0
    if at.unroll:
        return at.values * (2 * at.outside + (at.chunks == 1))
    return at.values * at.chunks


def _one_round(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """A loop of one round is none: all its keys are sliced, and then transposed."""
    one = choice.get("unroll", 1) == at.chunks > 1 and not at.unroll
    return at.chunks * at.keys if one and at.moved and at.all_heads else 0


LISTED_BYTES = 64  # of a key chunk, as all are told, and put in order
EXTREMES_BYTES = 8  # of a key chunk, and the padded copy of a batch's numbers beside it


def _listed(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """What all key chunks hold, their order, and what operands' values lie between."""
    if option(choice, "skip") != "list":
        return 0
    assert spec.mask is not None
    count = -(-spec.kv_len // int(choice["k_chunk"]))
    bytes_ = LISTED_BYTES * count + STACK_BYTES // 4
    for x in listed(spec.mask.expr).told:
        assert isinstance(x.node.value, Operand)
        axes = x.node.value.axes
        own = math.prod(spec.lengths[str(a)] for a in axes if a in ("b", "h"))
        if isinstance(x, Blocks):  # counted along rows, then along columns
            rows, columns = axes[-2:]
            bytes_ += own * 12 * (int(rows) + 1) * (int(columns) + 1)
        elif isinstance(x, Search):
            bytes_ += 16 * (count + int(axes[0]))
        elif x.of_keys:
            bytes_ += own * count * (EXTREMES_BYTES + 8 * int(choice["k_chunk"]))
    return bytes_


def _dropped(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Weights that dropout leaves, beside all: in each step of a loop, along a diagonal.

    Words are made as they are compared; those of rows alone are kept.
    """
    if not spec.dropout:
        return 0
    steps = max(1, at.unroll, at.parts)
    return steps * (at.scores + 8 * at.row) + 3 * at.strip


EXTRAS = (
    _dropped,
    _listed,
    _one_round,
    _small,
    _unguarded,
    _narrow,
    _scaled,
    _summaries,
    _transposed,
    _stacked,
    _ones,
)
