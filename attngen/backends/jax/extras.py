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
    steps = at.unroll + at.outside if at.unroll else at.chunks
    more = 0 if at.unroll else at.rows + at.scores // 4
    return (at.scores + at.rows) * steps + more


def _scaled(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Scores that are scaled are another buffer, where no mask makes one anyway."""
    if choice.get("scale", "queries") == "queries" or facts(spec).edges:
        return 0
    return at.scores * (at.unroll + at.outside if at.unroll else at.chunks)


def _diagonal(spec: AttentionSpec, choice: Choice, at: Tile) -> int:
    """Static steps down the diagonal: their scores, made and masked early (a bound)."""
    width = int(choice.get("diagonal", 0))
    if not width:
        return 0
    steps = int(choice["q_chunk"]) // width
    return 9 * at.row * width * (steps + 1) // 8  # of a triangle, 2¼ times


EXTRAS = (_small, _unguarded, _narrow, _scaled, _diagonal)
