"""Bytes of a loop over key chunks, of at.unroll steps, beside others before it.

at.rest + at.tail steps don't lie in the loop. XLA prepares them early: it slices, multiplies
and even masks them before the loop begins, and keeps that meanwhile.
"""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile

Moments = tuple[int, ...]  # bytes at each


def loop(at: Tile, know: Facts, interior: bool) -> tuple[Moments, int]:
    kept = at.rows + at.acc + _early(at, know)
    if at.fixed and interior and at.chunks - 1 <= at.unroll:
        kept += at.keys  # loops of one round are none: the edge's keys are sliced early
    moments = (
        _rows(at, know),
        kept + _scores(at, know),
        kept + _softmax(at, know, interior),
        kept + _weighted(at, know),
        kept + _tail(at) if at.tail else 0,
    )
    return moments, _loop_library(at, know)


def _early(at: Tile, know: Facts) -> int:
    """What the steps outside the loop hold before it begins."""
    early = at.rest * at.scores * (2 if at.scaled else 1)
    if at.tail:
        early += 2 * at.scores + at.seen if at.many else at.scores
    if at.cast:
        early += at.outside * (at.keys + at.values)
    elif know.static_edge:
        early += at.tail * (at.keys + at.values)
    else:
        early += (at.outside if at.lone else at.rest) * at.keys
    if at.fixed and at.chunks > 2 and at.width >= know.window > 0:
        # one edge's loop has one round
        early += 2 * at.scores + at.seen
    if at.tail and know.gathers:
        early += at.scores + 4 * at.pairs
    return early


def _rows(at: Tile, know: Facts) -> int:
    """Queries as sliced and as transposed, for the loop and for the steps before it."""
    if not at.many or know.bhtd:
        return 0
    if not at.outside:
        return at.rows + at.acc + (0 if at.rows <= at.lent else at.rows)
    joined = _chained(at, know) and at.lent > 0 and not at.cast  # the fusion's own
    return 3 * at.rows + (0 if joined else at.acc) + at.keys


def _scores(at: Tile, know: Facts) -> int:
    """Slices of keys and values, and the first product."""
    unroll, scores, keys, values = at.unroll, at.scores, at.keys, at.values
    ahead = values if know.interior else 0  # else values are blanked later
    worst = unroll * (keys + ahead) + scores + min(2 * scores, keys // 8)
    if at.twice_made:  # keys are sliced for the maximum, and again
        worst += unroll * keys if at.cast or not at.all_heads else 0
    worst += 2 * at.rows if at.lone else 0
    if at.grouped and at.batched and unroll > 1 and keys > 4 * scores:
        worst += keys // 2  # a gap
    if at.grouped and (at.poly or unroll > 1 or (know.bhtd and at.batched)):
        worst = max(worst, unroll * (keys + values) + scores + min(scores, keys // 4))
    if unroll > 1:
        made = keys + unroll * values if know.interior else unroll * keys + at.acc
        worst = max(worst, made + unroll * scores)
    return worst


def _softmax(at: Tile, know: Facts, interior: bool) -> int:
    """Scores, what they are raised to, and where they are masked."""
    unroll, scores = at.unroll, at.scores
    worst = 0
    once = at.ones and know.interior and not (at.scaled or know.score_ops)
    raised = 2 if at.poly and not once else 1  # a sum reads it, too
    lies = 0  # in the output
    if at.many and not at.outside and not at.twice_made and scores <= at.lent:
        lies = scores
    if interior and at.grouped:
        more = unroll > 1 and at.scaled and not at.poly
        few = at.poly and unroll > 2 and not at.scaled and not at.twice_made
        count = unroll * raised + (-1 if few else 1) + more
        worst = unroll * at.values + count * scores - lies
    elif interior and at.scaled:
        worst = unroll * (2 * scores + at.values)
    elif interior:
        worst = unroll * scores
    if know.edges:
        masked = at.edge_unroll * (scores + at.seen)
        if at.apart:
            masked += at.edge_unroll * scores
        elif at.grouped:
            masked += raised * scores
        if at.grouped:  # masked, and raised
            masked = max(masked, at.values + (raised + 1) * scores)
        elif at.twice_made:
            masked += scores if at.scaled or not at.apart else 0
        worst = max(worst, masked - lies)
    return worst


def _weighted(at: Tile, know: Facts) -> int:
    """What scores were raised to, and the weighted sums of one step beside the carried."""
    if at.width == 1:
        return 0  # no product: multiplied and added in one go
    unroll, scores, values = at.unroll, at.scores, at.values
    worst = unroll * at.acc + scores + values
    if at.outside or not (at.poly or at.grouped):
        worst += (unroll - 1) * min(at.acc, scores + values)
    if at.outside and at.many and unroll > 1:
        worst += 0 if at.looped and not _chained(at, know) else at.rows
    if at.acc <= at.lent:
        worst -= 0 if at.twice_made else at.acc
    elif scores <= at.lent:
        worst -= scores
    if unroll > 1:
        sliced = unroll * values if know.interior else values
        few = not (know.edges or at.outside or not at.poly)
        few = few or (at.grouped and (at.poly or scores < at.acc))
        sums = 1 if few else unroll - 1
        worst = max(worst, sums * at.acc + unroll * scores + sliced)
    return worst


def _tail(at: Tile) -> int:
    """The last, ragged chunk, whose scores (early) are masked and raised at last."""
    unroll, scores = at.unroll, at.scores
    sliced = at.values * unroll
    if at.grouped:
        return sliced + scores * (unroll * (2 if at.poly else 1) + 1)
    if at.many:
        return sliced + scores * unroll
    return sliced + at.seen + scores * (unroll if at.looped else unroll + 1)


def _chained(at: Tile, know: Facts) -> bool:
    """Whether the library takes chains of steps outside loops: what it needs is added."""
    return at.fused and at.outside > 0 and not know.edges and know.single


def _loop_library(at: Tile, know: Facts) -> int:
    row, acc, scores, outside = at.row, at.acc, at.scores, at.outside
    if not know.out and not at.poly:
        return 2 * scores
    if not at.fused:
        return 0
    if not _chained(at, know):
        return (3 * at.unroll - 1) * row
    last = 3 * acc // 2 if at.cast else 0  # converted, and once more
    held = outside * (3 * acc + 7 * row) + last
    if not at.tail:
        held += acc + 11 * row
    elif not at.poly:
        held += 2 * scores + row + (outside - 1) * (3 * scores + row)
    if at.unroll > 1 and not at.poly:
        held += last
    return held
