"""Bytes of programs that keep several sets of statistics: chains in parts, summaries."""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile


def parts(at: Tile, know: Facts) -> tuple[int, ...]:
    """Moments of at.parts chains in one loop body, combined at the end.

    Every chain has slices, scores and weighted sums of its own at once.

    at.unroll: how many of them the loop's body has: 1 where that loop has no round.
    """
    count, chains, acc, scores = at.parts, at.unroll, at.acc, at.scores
    slices = at.keys + at.values
    kept = at.rows + count * (acc + 2 * at.row)
    kept += at.outside * (2 * scores + at.seen + slices)
    more = 2 * scores if at.grouped or (know.edges and not know.interior) else 0
    more += at.keys if at.cast else 0
    if at.twice_made and at.grouped:
        more += chains * scores
    again = chains * at.keys if at.twice_made and at.looped else 0
    edge = 3 * scores + at.seen + slices + at.values if know.edges else 0
    return (
        kept + chains * slices + 2 * scores + again,
        kept + chains * (acc + scores + at.values) + 3 * acc + more,
        kept + 2 * acc + edge,
        3 * count * (acc + at.row) + 3 * acc + chains * at.keys,
    )
