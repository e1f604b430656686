"""Bytes of programs that keep several sets of statistics: chains in parts, summaries."""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile


def parts(at: Tile, know: Facts) -> tuple[int, ...]:
    """Moments of at.parts chains in one loop body, combined at the end.

    Every chain has slices, scores and weighted sums of its own at once.
    """
    count, acc, scores = at.parts, at.acc, at.scores
    stats = 8 * count * at.row
    kept = 3 * at.rows + count * acc + stats
    raised = 2 if at.grouped or at.twice_made else 1
    slices = 2 * (at.keys + at.values)
    early = at.outside * (2 * scores + at.seen + slices) + (count + 3) * acc
    edge = (2 + raised) * scores + at.seen + slices if know.edges else 0
    return (
        kept + early + count * (slices + raised * scores),
        kept + early + edge,
        3 * at.rows + stats + (3 * count + 2) * acc,
    )
