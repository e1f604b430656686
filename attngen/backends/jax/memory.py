"""XLA:CPU's temporaries of an emitted program, buffer by buffer.

A program needs at once what is alive at its worst moment. The buffers of each moment are
those that XLA:CPU's buffer assignment shows there; their bytes are summed, and the worst
moment counts. What library fusions hold inside (scratch.py) is added. The sums are upper
bounds: benchmarks/model_cpu.py compares them with the compiler's.

Four kinds of program: a loop over key chunks (keyloops.py); steps in a row, where a loop
of one round counts too, and one tile of all keys (unrolled.py); several chains of steps
that are combined at the end (splits.py). What lives beside all of these is in extras.py.
"""

from __future__ import annotations

from attngen.backends.jax.buffers import Facts, Tile, facts, tile
from attngen.backends.jax.candidates import option
from attngen.backends.jax.extras import EXTRAS
from attngen.backends.jax.keyloops import loop
from attngen.backends.jax.splits import parts
from attngen.backends.jax.unrolled import single, steps
from attngen.lists import finds_full
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles

# What is left to chance: where XLA packs buffers with gaps.
GAPS = 1.021
LOOP_GAPS = (20, 12)  # one part in so many, of several steps at once: of few, of eight
LIBRARY_GAPS = 32
SCORE_GAPS = (4, 8)  # of a diagonal's steps, of parts: a share of the buffers
SLACK, SLACK_BYTES = 1 / 5, 2**16  # of a small program, at most
SMALL = 5 * 2**18  # of less in all, more is left to chance


def temp_bytes(spec: AttentionSpec, choice: Choice, tiles: Tiles | None = None) -> int:
    """An upper bound of what XLA:CPU allocates beyond inputs and outputs, in bytes.

    Args:
        tiles: of a head, which tell whether any needs no mask; without them, some do.
    """
    know = facts(spec)
    if option(choice, "skip") == "list":
        know = know._replace(bounded=True, interior=finds_full(spec))
    at = tile(spec, choice, know)
    interior = _interior(at, know, tiles)
    if at.unroll > 1 and know.interior and not interior:
        at = at._replace(unroll=1)
    if at.parts > 1:
        moments, library = parts(at, know)
    elif at.fixed and at.strip:
        moments, library = (_diagonal(at),), 0
    elif at.chunks == 1:
        moments, library = single(at, know)
    elif at.unroll:
        moments, library = loop(at, know, interior)
    else:
        moments, library = steps(at, know)
    if at.strip and not at.fixed:  # made early, and masked, and kept
        kept = 2 * at.strip if _apart(at) and _steps(at) == 1 else 4 * at.triangle // 3
        moments = (_diagonal(at), max(moments) + kept)
    more = sum([extra(spec, choice, at) for extra in EXTRAS])
    worst = max(moments)
    slack = min(worst * SLACK, SLACK_BYTES)
    if know.score_ops and (at.strip or (at.parts > 1 and not at.poly)):
        worst += worst // SCORE_GAPS[at.parts > 1]
    if at.parts == 1:
        if at.grouped and at.unroll > 1:
            worst += worst // LOOP_GAPS[at.unroll > 4]
        chained = interior and not (at.chunks == 1 and know.bounded)
        if at.twice_made and (chained or not know.masked):
            library = max(library, _greatest(at, know))
        library += library // LIBRARY_GAPS
    total = int(worst * GAPS + slack) + library + more
    return total + max(0, min(total // 12, (SMALL - total) // 20))


def _greatest(at: Tile, know: Facts) -> int:
    """What the library makes of scores as it finds their maximum, which isn't kept."""
    scaled = at.scaled * (2 if at.fused else 1)
    keys = at.keys if know.edges else 0
    whole = at.scores // 4 if at.chunks > 1 and not at.unroll else 0
    return at.scores * (1 + know.score_ops + scaled) + 4 * at.row + keys + whole


def _interior(at: Tile, know: Facts, tiles: Tiles | None) -> bool:
    """Whether there are steps where every key is seen."""
    gone = at.fixed and tiles is not None and not tiles.full  # XLA removes their loop
    return know.interior and not gone


def _steps(at: Tile) -> int:
    return 2 * at.triangle // at.strip - 1


def _apart(at: Tile) -> bool:
    """Whether what scores are raised to is kept twice: to be summed, to be multiplied."""
    return at.grouped and at.poly and not at.ones


def _diagonal(at: Tile) -> int:
    """Static steps down the diagonal: all are scored before the first is raised."""
    steps = _steps(at)
    raised = (2 if at.poly and steps > 1 else 1) * at.strip
    masked = 3 * at.triangle // 8 if steps == 1 else 0
    sums = 2 if at.fixed or steps == 2 else 3 + at.ones if steps < 8 else 5
    worst = sums * at.acc + at.triangle + raised + masked
    if _apart(at) and steps < 3:
        worst = max(worst, 3 * at.triangle + at.acc)
    if _apart(at) and at.fixed and at.looped:
        worst = max(worst, 2 * at.triangle + at.acc)
    return at.rows + worst
