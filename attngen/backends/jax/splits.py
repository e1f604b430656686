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
    sliced = chains * slices
    if (at.chunks - at.tail) // count == 1 and not know.edges:  # a loop of one round
        sliced += (chains + at.tail) * slices if at.moved and at.all_heads else 0
    many = chains if at.keys > scores else 0  # all scores before the first is raised
    kept = at.rows + count * (acc + 2 * at.row)
    kept += at.outside * (2 * scores + at.seen + slices)
    more = 2 * scores if at.grouped or (know.edges and not know.interior) else 0
    more += at.keys if at.cast else 0
    if at.grouped and not at.poly:
        more += count * acc // 2
    raised, again = 1, 0
    if at.grouped and at.poly:
        raised = 3 if scores <= acc else 2
        more = scores
    if at.twice_made:
        more += 4 * scores + (chains * scores if at.grouped and not at.poly else 0)
        again = chains * at.keys * (1 if at.grouped else 3) if at.looped else 0
    copies = 2 if at.fixed and at.grouped and acc > 4 * slices else 3
    edge = 3 * scores + at.seen + slices + at.values if know.edges else 0
    return (
        kept + sliced + many * scores + 2 * (scores + acc) + again,
        kept + chains * (acc + raised * scores + at.values) + 4 * acc + more,
        kept + 2 * acc + edge,
        copies * count * (acc + at.row) + 3 * acc + chains * at.keys,
    )
