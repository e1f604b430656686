"""What a choice or a spec costs beside the tiles: each of a program as a whole."""

from __future__ import annotations

from attngen.backends.jax.buffers import Tile, facts
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec

SMALL_BYTES = 768
STEP_BYTES = 512  # of a step: eight buffers of less than 64 bytes take 64 each


def _small(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Statistics of rows and of keys, counters, alignment."""
    steps = at.unroll + at.outside if at.unroll else at.chunks
    counters = 8 * at.chunks if choice["loop"] == "scan" else 0
    stats = 8 * at.row + 2 * at.key
    return SMALL_BYTES + stats + steps * STEP_BYTES + counters


def _unguarded(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """XLA converts all of q, k and v outside the loops unless barriers keep it from that."""
    if at.dense or choice["guard"] or spec.dtype == spec.stats_dtype:
        return 0
    queries = spec.q_heads * spec.q_len * spec.qk_dim
    keys = spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    return BYTES[spec.stats_dtype] * spec.batch * (queries + keys)


def _narrow(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Products in a narrower dtype than the statistics': scores and rows once more."""
    if choice["product_dtype"] == spec.stats_dtype:
        return 0
    if at.parts > 1:
        return at.scores + at.rows
    steps = at.unroll + at.outside if at.unroll else at.chunks
    more = 0 if at.unroll else at.rows + at.scores // 4
    return (at.scores + at.rows) * steps + more


def _scaled(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Scores that are scaled are another buffer, where no mask makes one anyway."""
    if choice.get("scale", "queries") == "queries":
        return 0
    if facts(spec).edges and at.unroll <= 1:
        return 0
    if at.parts > 1 and at.grouped and at.poly:  # each of two or three buffers anyway
        return 0
    return at.scores * (at.unroll + at.outside if at.unroll else at.chunks)


def _diagonal(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Static steps down the diagonal: their scores, made and masked early (a bound)."""
    width = int(choice.get("diagonal", 0))
    if not width:
        return 0
    steps = int(choice["q_chunk"]) // width
    triangle = at.row * width * (steps + 1) // 2
    if at.fixed:  # the only tiles
        return 3 * triangle // 2 + 5 * at.acc
    return 9 * triangle // 4 + at.acc // 2


def _summaries(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """All chunks' statistics, as they are initialised and as they are filled.

    And once more where the last chunk of keys, or of queries, overlaps.
    """
    if choice["algorithm"] != "summaries":
        return 0
    overlaps = at.tail or spec.q_len % int(choice["q_chunk"])
    overlaps = overlaps or (choice["steps"] == "map" and _ordered(spec, choice))
    kept = at.chunks * (at.acc + 2 * at.row)
    return (3 if overlaps else 2) * kept * 65 // 64 + 2 * at.acc


def _transposed(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """All of k and v, transposed; and slices that XLA transposes back."""
    if choice.get("slices", "nd") == "nd":
        return 0
    keys = spec.batch * spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    return BYTES[spec.dtype] * keys + at.keys + (at.scores if at.cast else 0)


def _stacked(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Outputs as they are stacked by steps, where they aren't in order yet."""
    if choice.get("steps", "fori") == "fori":
        return 0
    rows = spec.batch * spec.q_heads * spec.q_len
    lse = BYTES[spec.stats_dtype] if "lse" in spec.outputs else 0
    if "out" not in spec.outputs or _ordered(spec, choice):
        return rows * lse
    return rows * (BYTES[spec.out_dtype_name] * spec.v_dim + lse)


def _ordered(spec: AttentionSpec, choice: Choice) -> bool:
    """Whether steps over batches, heads, queries in this order lie as the output does.

    With barriers XLA copies even these.
    """
    if choice["guard"]:
        return False
    some_heads = choice["head_chunk"] != spec.kv_heads
    some_queries = choice["q_chunk"] != spec.q_len
    if choice["batch_chunk"] != 1 and (some_heads or some_queries):
        return False
    if spec.layout == "bhtd":
        one = choice["head_chunk"] == 1 == spec.repeats
        return one or not some_queries
    return not some_heads or spec.q_len == 1


def _made_twice(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Scores, slices and queries behind the barrier between a tile and the same again."""
    if not at.twice_made or at.parts > 1:
        return 0
    return at.scores + at.rows + max(1, at.unroll) * at.keys


def _ones(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Slices of values as they were before they had a column of ones."""
    if choice.get("denominator", "sum") == "sum":
        return 0
    return at.values * (1 + 2 * at.outside if at.unroll else at.chunks)


def _one_round(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """A loop of one round is none: all its keys are sliced, and then transposed."""
    one = choice.get("unroll", 1) == at.chunks > 1 and not at.unroll
    return at.chunks * at.keys if one and at.moved and at.all_heads else 0


EXTRAS = (
    _one_round,
    _small,
    _unguarded,
    _narrow,
    _scaled,
    _diagonal,
    _summaries,
    _transposed,
    _stacked,
    _made_twice,
    _ones,
)
