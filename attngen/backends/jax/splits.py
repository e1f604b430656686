"""Bytes of programs of several chains of steps, which are combined at the end."""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile

# What XLA leaves between many buffers of two or three sizes: one part in so many.
GAPS, MANY_GAPS = 12, 8


def parts(at: Tile, know: Facts) -> tuple[tuple[int, ...], int]:
    """Moments of at.parts chains in one loop body, and at the end; and the library.

    Every chain has slices, scores and weighted sums of its own at once.

    at.unroll: how many of them the loop's body has: 1 where that loop has no round.
    """
    count, chains, acc, scores = at.parts, at.unroll, at.acc, at.scores
    rounds = (at.chunks - at.tail) // count
    if not rounds and not know.bounded:
        chains = 1
    kept = _kept(at, know, chains, rounds)
    sliced, ready = _slices(at, know, chains, rounds)
    raised = _raised(at, know, chains, rounds)
    lent = acc if acc <= at.lent else 0
    main = kept + ready + raised + (acc if at.grouped else max(acc, at.keys)) - lent
    combined = 2 * count * (acc + 6 * at.row)  # as carried, and stacked
    if at.fixed:  # stacked in place
        combined = (count + 1) * (acc + at.row)
    if at.grouped and count > 2:
        main += main // (GAPS if count < 16 else MANY_GAPS)
        sliced += sliced // 32
        combined += combined // GAPS if count > 8 else 0
    moments = (
        2 * at.rows + acc,
        kept + sliced + scores + min(scores, at.keys // 4),
        main,
        kept + (chains - (at.width == 1)) * acc + 2 * scores + at.values,
        kept + acc + _edge(at, know, chains) + at.keys - lent,
        combined + (max(at.rows, acc) if at.width > 1 or at.rest else 0) - lent,
    )
    return moments, _combined(at, know)


def _kept(at: Tile, know: Facts, chains: int, rounds: int) -> int:
    """What all chains carry, and what steps outside the loop made before it."""
    idle = at.fixed and know.interior and chains == 1  # all but one stay at nothing
    kept = at.rows + (1 if idle else at.parts) * (at.acc + 2 * at.row)
    if at.tail:
        masked = at.many or not at.poly  # in another buffer
        kept += (1 + masked + at.scaled) * at.scores + at.seen * masked
        kept += at.keys + (1 + at.ones) * at.values
    if at.outside > at.tail and rounds:
        kept += at.keys + (at.scores if at.poly else 0)
        kept += at.values * (at.ones + at.scaled)
    return kept


def _slices(at: Tile, know: Facts, chains: int, rounds: int) -> tuple[int, int]:
    """Slices before the first product, and those that are left after the last."""
    keys, values = chains * at.keys, chains * at.values
    sliced, ready = keys + (values if know.interior else 0), values
    if rounds == 1 and not know.bounded:  # a loop of one round is none
        if know.interior or (at.moved and at.all_heads):
            sliced = keys + values
        ready += keys if at.cast and know.interior else 0
        if at.moved and at.all_heads:  # sliced, and transposed
            sliced += keys + at.tail * at.keys
            sliced += values if know.interior and at.poly else 0
            ready += (2 if at.tail else 1) * values
    if at.twice_made and (rounds > 1 or know.bounded):  # for the maximum, and again
        sliced += 0 if at.all_heads and not at.cast else keys
        ready += at.keys
    return sliced, ready


def _raised(at: Tile, know: Facts, chains: int, rounds: int) -> int:
    """All chains' scores, and what they are raised to where that is another buffer."""
    scores = chains * at.scores
    if at.grouped and at.poly and (at.scaled or not at.ones):
        scores = (2 * chains + (chains < 16)) * at.scores
    elif at.grouped:
        more = 1 + at.ones + at.twice_made
        if chains > 12 and at.scores <= at.acc:
            more += 4
        scores = (chains + more) * at.scores
    elif know.edges and not know.interior:
        apart = at.apart and (at.scaled or rounds == 1)
        scores *= 2 if at.twice_made or apart else 1
        scores += 2 * at.scores if at.twice_made else 0
    elif at.twice_made:
        scores += scores + at.scores if rounds == 1 else (1 + at.scaled) * at.scores
    elif at.scaled:
        scores *= 2
    masks = know.masked and know.interior and not at.grouped
    return scores + (min(4, chains) * at.seen if masks else 0)


def _edge(at: Tile, know: Facts, chains: int) -> int:
    """Scores as they are masked: of one chain, or of all where no step is without."""
    if not know.edges:
        return 0
    raised = 2 if at.poly else 1
    if at.grouped:
        own = at.scores if at.apart else raised * at.scores
        masked = at.scores + at.seen + own
        return max(masked, at.values + (raised + 1) * at.scores)
    masked = at.scores + at.seen + (at.scores if at.apart else 0)
    if know.masked and not know.interior:
        every = chains * (2 * at.scores + at.seen) - at.acc - at.keys
        return max(masked, every)
    return masked


def _combined(at: Tile, know: Facts) -> int:
    """What the library holds as it weighs all parts, adds, and divides them."""
    if at.ones:
        return at.parts * (at.acc + 6 * at.row)
    own = not (at.grouped or at.moved)  # one head: its output is divided there, too
    more = 2 if know.bhtd or own or not at.looped else 1
    held = (at.parts + more) * at.acc + 4 * at.parts * at.row
    return held + (3 * at.acc // 2 if at.cast and at.grouped else 0)
