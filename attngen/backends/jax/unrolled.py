"""Bytes of programs without a loop over key chunks: steps in a row, or one tile."""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile

Moments = tuple[int, ...]  # bytes at each


def steps(at: Tile, know: Facts) -> tuple[Moments, int]:
    """All steps' scores, and what they were made of, are alive before the first is added.

    Keys are freed as scores are made, but not where they are converted.
    """
    library = 0 if know.out or at.poly else 2 * at.scores
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
        masked = (steps + at.tail) * scores + at.keys + blanked
        masked += at.seen * (1 if at.batched else 2 * steps)
        if at.twice_made and at.scaled and not at.batched:
            masked += steps * scores
        if at.moved and at.all_heads:
            moments.append(rows + steps * (scores + at.values) + at.keys)
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
    count = 2 * steps + 1 if at.poly else steps + 1
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


def single(at: Tile, know: Facts) -> tuple[Moments, int]:
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
    summed = at.many or (know.single and not at.ones)  # with the sums in one fusion
    if at.fused and summed and not at.dense:
        library = (3 if at.cast == at.many else 2) * acc + 7 * at.row
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
    raised = (3 if at.poly else 2) * scores if at.grouped else 0
    if know.bhtd and at.poly:  # values are sliced later
        raised = max(raised, at.values + 2 * scores + 4 * at.seen)
    elif at.grouped:
        raised += at.values
    return (
        at.rows + scores * (1 + at.twice_made) + keys + converted,
        scores + at.acc + at.values + converted,
        masked + converted,
        raised + converted,
    )


def _whole(at: Tile, know: Facts) -> tuple[Moments, int] | None:
    """Attention, or its softmax, as one library fusion; None where neither is."""
    if not know.single or at.poly or (at.ones and not at.dense):
        return None
    rows, row, acc = at.rows, at.row, at.acc
    keys, values, converted = _read(at)
    exponents = (2 + know.score_ops) * at.scores
    if at.fused and not know.out:
        return (rows + keys + converted // 2,), exponents + at.scores + 9 * row
    if at.fused:
        held = exponents + (1 if at.dense else 2) * at.scores + 2 * acc + 7 * row
        held += acc + 3 * row if know.sink else 0
        held += acc if at.cast else 0
        held += rows + acc if know.bhtd else 0
        if not at.many:
            held += rows + 3 * acc
        if at.dense:
            held -= min(acc, rows)
            held += keys + values + rows if at.cast and not at.moved else 0
        beside = 0 if at.dense and rows <= at.lent else acc
        return (rows + beside + keys + values + converted,), held
    if know.out and (know.sink or not at.dense):
        return None
    more = keys + values if at.cast and not at.moved else 0
    moment = rows + at.scores + acc + keys + values + converted + more
    return (moment,), exponents + row
