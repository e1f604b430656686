"""XLA:CPU's temporaries of an emitted program, buffer by buffer.

A program needs at once what is alive at its worst moment. The buffers of each moment are
those that XLA:CPU's buffer assignment shows there; their bytes are summed, and the worst
moment counts. What library fusions hold inside (scratch.py) is added. The sums are upper
bounds: benchmarks/model_cpu.py compares them with the compiler's.

Three kinds of program: one tile of all keys; a loop over key chunks, beside steps that
don't lie in it; and steps in a row, where a loop of one round counts as steps in a row too.
XLA prepares steps outside loops early: it slices, multiplies and even masks them before
the loop begins, and keeps that meanwhile.
"""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile, facts, tile
from attngen.backends.jax.extras import EXTRAS
from attngen.backends.jax.splits import parts
from attngen.plans import Choice
from attngen.regions import Tiles
from attngen.spec import AttentionSpec

# What is left to chance: where XLA packs buffers with gaps.
GAPS = 1.021
SLACK, SLACK_BYTES = 1 / 8, 2**16  # of a small program, at most
Moments = tuple[int, ...]  # bytes at each


def temp_bytes(spec: AttentionSpec, choice: Choice, tiles: Tiles | None = None) -> int:
    """An upper bound of what XLA:CPU allocates beyond inputs and outputs, in bytes.

    Args:
        tiles: of a head, which tell whether any needs no mask; without them, some do.
    """
    know = facts(spec)
    at = tile(spec, choice, know)
    interior = _interior(at, know, tiles)
    if at.unroll > 1 and know.interior and not interior:
        at = at._replace(unroll=1)
    if at.parts > 1:
        moments, library = parts(at, know), 0
    elif at.fixed and choice.get("diagonal"):
        moments, library = (at.rows + at.acc + at.keys + at.values,), 0
    elif at.chunks == 1:
        moments, library = _single(at, know)
    elif at.unroll:
        moments, library = _loop(at, know, interior)
    else:
        moments, library = _steps(at, know)
    more = sum([extra(spec, choice, at) for extra in EXTRAS])
    worst = max(moments)
    slack = min(worst * SLACK, SLACK_BYTES)
    return int(worst * GAPS + slack) + library + more


def _interior(at: Tile, know: Facts, tiles: Tiles | None) -> bool:
    """Whether there are steps where every key is seen."""
    gone = at.fixed and tiles is not None and not tiles.full  # XLA removes their loop
    return know.interior and not gone


# A loop over key chunks, of at.unroll steps, beside at.rest + at.tail steps before it.


def _loop(at: Tile, know: Facts, interior: bool) -> tuple[Moments, int]:
    kept = at.rows + at.acc + _early(at, know)
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
    early = at.rest * at.scores
    if at.tail:
        early += 2 * at.scores + at.seen if at.many else at.scores
    if at.cast:
        early += at.outside * (at.keys + at.values)
    elif know.static_edge:
        early += at.tail * (at.keys + at.values)
    else:
        early += (at.outside if at.lone else at.rest) * at.keys
    if at.fixed and know.two_edges and at.chunks > 2:  # one edge's loop has one round
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
    worst += 2 * at.rows if at.lone else 0
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
    raised = 2 if at.poly else 1
    lies = scores if at.many and not at.outside and scores <= at.lent else 0
    if interior and at.grouped:
        worst = unroll * at.values + (unroll * raised + 1) * scores - lies
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
        worst = max(worst, masked - lies)
    return worst


def _weighted(at: Tile, know: Facts) -> int:
    """What scores were raised to, and the weighted sums of one step beside the carried."""
    if at.width == 1:
        return 0  # no product: multiplied and added in one go
    unroll, scores, values = at.unroll, at.scores, at.values
    worst = unroll * at.acc + scores + values
    worst += (unroll - 1) * min(at.acc, scores + values)
    if at.outside and at.many and unroll > 1:
        worst += 0 if at.looped and not _chained(at, know) else at.rows
    if at.acc <= at.lent:
        worst -= at.acc
    elif scores <= at.lent:
        worst -= scores
    if unroll > 1:
        sliced = unroll * values if know.interior else values
        worst = max(worst, (unroll - 1) * at.acc + unroll * scores + sliced)
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


# Steps in a row.


def _steps(at: Tile, know: Facts) -> tuple[Moments, int]:
    """All steps' scores, and what they were made of, are alive before the first is added.

    Keys are freed as scores are made, but not where they are converted.
    """
    library = 0
    if at.fused and know.single and not know.edges:
        library = _chain_library(at)
        if at.many:
            return _chain(at), library
    steps, scores, rows = at.chunks, at.scores, at.rows
    keys, values, tail = _slices(at, know)
    few = scores * (1 + min(3, steps // 2) + at.twice)
    if steps == 2 and not at.twice:
        few = scores + min(scores, at.keys // 4)
    read = 2 * steps * at.keys if at.twice else steps * at.keys
    copied = at.twice or (at.apart and not at.batched)
    blanked = steps * at.values if copied else 0
    later = max(values, steps * at.values) + (keys if at.eager else 0)
    last = at.values * at.tail if steps > 2 else 0
    moments = [
        rows + few + read + (blanked if know.edges else values),
        rows + steps * scores + keys + (0 if know.edges else values + last),
        steps * scores + tail + (0 if know.edges else later),
    ]
    if at.grouped:
        moments += _raised(at, keys if at.eager else 0, values)
    if know.edges:
        made = keys + values if at.twice else at.keys + at.values
        blanked = at.values * (1 if at.batched else steps)
        masked = (steps + at.tail) * scores + at.seen + at.keys + blanked
        if at.apart:
            masked = steps * (2 * scores + at.seen) + made
        moments.append(rows + at.acc + masked + 2 * steps * at.key)
    if at.width == 1 or scores < at.acc:
        added = (steps - 1) * at.acc + 3 * steps * at.row
        moments.append(rows + scores + at.keys + added)
    return tuple(moments), library


def _slices(at: Tile, know: Facts) -> tuple[int, int, int]:
    """Keys, values and the ragged step's scores and mask, of all steps together."""
    steps, tail = at.chunks, at.tail
    keys = at.keys * (steps if at.eager else 1 + steps // 4)
    more = tail if at.cast and not (steps == 2 and at.batched) else -tail
    values = at.values * (steps + more)
    if at.twice:  # as sliced and as transposed
        keys, values = keys + at.keys, values + at.values * steps
    return keys, values, tail * (at.scores + at.seen)


def _raised(at: Tile, keys: int, values: int) -> list[int]:
    """Scores that are raised in buffers of their own, as query heads share keys."""
    steps, tail, scores = at.chunks, at.tail, at.scores
    count = 2 * steps + 1 - tail if at.poly else steps + 1
    sliced = max(values, at.values * steps)
    moments = [count * scores + sliced + keys + tail * at.seen + at.rows]
    if not at.poly and 2 * at.values > scores:  # with few rows, all are raised at first
        many = int(1.7 * steps + 0.5) * scores + tail * at.seen
        moments.append(at.rows + at.acc + many + values + keys)
    return moments


def _chain(at: Tile) -> Moments:
    """Steps that the library takes as a chain, up to seven."""
    steps, scores, acc = at.chunks, at.scores, at.acc
    last = acc if at.cast and at.lent else 0
    beyond = max(0, steps - 7) * acc
    count = steps + at.tail
    if at.grouped:
        count += steps if at.poly else 1
    if at.grouped and at.poly and steps > 7:
        count = int(1.4 * steps + 1)
        beyond += 2 * acc
    sliced = at.keys + steps * at.values
    return (count * scores + beyond + at.rows + last + at.tail * at.seen + sliced,)


def _chain_library(at: Tile) -> int:
    steps = at.chunks
    raised = 0 if at.poly else 2 * steps * at.scores
    if at.many:
        raised = min(raised, 10 * at.scores)
    last = at.acc if at.cast and at.lent else 0
    held = min(3 * steps - 1, 21) * at.acc + min(6 * steps + 1, 58) * at.row
    if not at.many:
        held += at.acc + (0 if at.poly else 3 * at.rows)
    return held + raised + last


# One tile of all keys.


def _single(at: Tile, know: Facts) -> tuple[Moments, int]:
    if know.edges:
        return _single_edge(at, know), 0 if know.out or at.poly else 2 * at.scores
    if whole := _whole(at, know):
        return whole
    rows, scores, acc = at.rows, at.scores, at.acc
    keys, values, converted = _read(at)
    moments = [
        rows + scores + keys + values + converted,
        scores + acc + values + converted,
    ]
    if know.score_ops and not at.dense:
        moments.append(2 * scores + values + converted)
    if at.grouped and at.poly:
        moments.append(2 * scores + keys + values + converted)
    if at.grouped:
        raised = 2 if at.fused or not at.poly else 3
        raised += 1 if know.score_ops and at.poly else 0
        rest = values + converted + (0 if at.fused else rows)
        moments.append(raised * scores + rest)
    library = 0
    if at.fused and at.many and not at.dense:
        library = (3 if at.cast else 2) * acc + 7 * at.row
        library += 2 * acc + 7 * at.row if know.sink else 0
    return tuple(moments), library


def _read(at: Tile) -> tuple[int, int, int]:
    """Bytes of keys and of values where they aren't read in place; of both, converted."""
    copied = at.sliced or (at.cast and at.dense)
    keys, values = (at.keys, at.values) if copied else (0, 0)
    whole = at.cast and not at.dense and at.all_heads
    return keys, values, at.keys + at.values if whole else 0


def _single_edge(at: Tile, know: Facts) -> Moments:
    scores = at.scores
    keys, _, converted = _read(at)
    converted += at.hoisted
    masked = scores + (scores if at.apart or at.grouped else 0)
    masked += at.seen if at.apart or not at.grouped else 0
    raised = (3 if at.poly else 2) * scores + at.values if at.grouped else 0
    return (
        at.rows + scores + keys + converted,
        scores + at.acc + at.values + converted,
        masked + converted,
        raised + converted,
    )


def _whole(at: Tile, know: Facts) -> tuple[Moments, int] | None:
    """Attention, or its softmax, as one library fusion; None where neither is."""
    if not know.single or at.poly:
        return None
    rows, row, acc = at.rows, at.row, at.acc
    keys, values, converted = _read(at)
    exponents = (2 + know.score_ops) * at.scores
    if at.fused and not know.out:
        return (rows + keys + converted // 2,), exponents + at.scores + 9 * row
    if at.fused:
        held = exponents + at.scores + 2 * acc + 7 * row
        held += acc + 3 * row if know.sink else 0
        held += acc if at.cast else 0
        held += rows + acc if know.bhtd else 0
        if not at.many:
            held += rows + 3 * acc
        if at.dense:
            held -= acc
            held += keys + values + rows if at.cast and not at.moved else 0
        beside = 0 if at.dense and rows <= at.lent else acc
        return (rows + beside + keys + values + converted,), held
    if know.out and (know.sink or not at.dense):
        return None
    more = keys + values if at.cast and not at.moved else 0
    moment = rows + at.scores + acc + keys + values + converted + more
    return (moment,), exponents + row
