"""XLA:TPU's temporaries where VMEM, or v4's CMEM, takes what fits: all but v2, v3 and v5p.

What is on the chip isn't counted. What was seen of the compiler's choices there (jax 0.10.2,
libtpu 0.0.42): an array of nearly the chip's size stays in HBM, and others in its wake, for
what streams through VMEM needs room; of the rest, the largest is the first to go.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax.tpu_arrays import Arrays
from attngen.tpus import Tpu

KIB = 2**10
LEAST = 16 * KIB  # scalars
OUTSIDE = 310 * KIB  # the same, where something is outside
PADDING = 1.05  # what is left to chance, of what lies in HBM
PADDING_HALF = 1.1  # the same, on v7x
BIG = 0.8  # of the chip: such arrays aren't put there
# Small arrays that stay in HBM all the same, as they were found beside these choices:
# outputs of steps are stacked; several tiles are in a step and some are edges; a score
STACKED, STACKED_EDGES, STACKED_SCORED = 400 * KIB, 310 * KIB, 110 * KIB
# a score for one head; each further part; several tiles in a step
SLOPES, SLOPES_PART, SLOPES_TILES = 570 * KIB, 216 * KIB, 210 * KIB
# a single query of one head; each further tile
ROW, ROW_TILE = 320 * KIB, 90 * KIB
# more than so many parts, whose products are made twice
MANY_PARTS, TWICE_PARTS = 4, 1600 * KIB
# v7x: what a scan carries; the keys of all heads for one query, each further tile
SCANNED, DECODED, DECODED_TILE = 390 * KIB, 390 * KIB, 210 * KIB


@dataclass(frozen=True)
class Room:
    """Shares of a chip that arrays come to lie in.

    Args:
        all: where all fit.
        rest: beside what stays in HBM.
    """

    all: float
    rest: float


# Shares by which most of the measured plans are modelled within the tolerance, and few below.
ROOM = {"v4": Room(0.9, 0.1), "v5e": Room(0.9, 0.7), "v6e": Room(0.7, 0.3)}
FEW = 3 * 2**19  # bytes of an array that is laid anew in VMEM anyway
HALF = 0.39  # v7x: the share, less the tile that is worked on


def temp_bytes(at: Arrays, tpu: Tpu) -> int:
    """An upper bound of bytes in HBM, of the arrays of a plan."""
    chip = tpu.cmem_bytes or tpu.vmem_bytes
    known = ROOM.get(tpu.generation)
    if known is None:
        outside = _outside_half(at, chip)
    else:
        outside = _outside(_arrays(at), _tiles(at), chip, known)
    least = OUTSIDE if outside else LEAST
    padding = PADDING if known else PADDING_HALF
    return int(padding * outside) + least + _odd(at, tpu)


def _odd(at: Arrays, tpu: Tpu) -> int:
    """What stays in HBM although it would fit on the chip."""
    found = 0
    if at.scored and at.heads == 1:
        found = SLOPES + (at.parts - 1) * SLOPES_PART
        found += SLOPES_TILES if at.unroll > 1 else 0
    elif at.stacked:
        found = STACKED + (STACKED_EDGES if at.unroll > 1 and at.masked else 0)
        found += STACKED_SCORED if at.scored else 0
    if at.heads * at.queries == 1 and not at.wide:
        found += ROW + (at.unroll - 1) * ROW_TILE
    if at.twice and at.parts > MANY_PARTS:
        found += TWICE_PARTS
    if tpu.generation in ROOM:
        return found
    found += SCANNED if at.scanned else 0
    if at.decoded and not at.dense:
        found += DECODED + (at.unroll - 1) * DECODED_TILE
    return found


def _tiles(at: Arrays) -> list[int]:
    """Whole, also where narrow weights are stored; of parts, at least two are at work."""
    if not at.tile or not at.one_tile:
        return []
    count = max(1, round(at.tile / at.one_tile), min(at.parts, 2))
    return [at.one_tile] * count


def _arrays(at: Arrays, relaid: int = 0) -> list[int]:
    """Of all but scores.

    Args:
        relaid: keys and values have at least so many bytes, laid anew.
    """
    if at.dense:
        return [at.bias, at.mask]
    whole = [max(at.k, relaid), max(at.v, relaid), at.q]
    lent = max((n for n in whole if n <= at.out and at.filled), default=0)
    if lent:  # the output's own memory takes one
        whole.remove(lent)
    sums = [at.sums // at.parts] * at.parts
    return [*whole, at.filled, at.rows, *sums, at.partial, at.finish, at.keys, at.mask]


def _spilled(sizes: list[int], room: float) -> int:
    """Bytes of those that don't fit together, the largest first."""
    held, spilled = sum(sizes), 0
    for size in sorted(sizes, reverse=True):
        if held < room:
            break
        spilled, held = spilled + size, held - size
    return spilled


def _outside(others: list[int], tiles: list[int], chip: int, room: Room) -> int:
    sizes = others + tiles
    big = sum(n for n in sizes if n >= BIG * chip)
    rest = [n for n in sizes if n < BIG * chip]
    return big + _spilled(rest, chip * (room.rest if big else room.all))


def _outside_half(at: Arrays, chip: int) -> int:
    """v7x: keys are laid anew, and a tile of half the chip leaves no room for others."""
    count = 1 if at.twice else at.unroll
    worked_on = count * (at.rows_made if at.twice else at.made)
    left = max(0, int(HALF * chip) - worked_on)
    tiles, others = _tiles(at), _arrays(at)
    if not at.wide and not at.dense and at.relaid > max(FEW, left // 2):
        others = _arrays(at, at.relaid)
        if not at.ones or at.k > at.relaid:
            others.append(at.relaid)  # queries, of as many heads
    inside = [n for n in tiles if n <= chip // 2]
    outside = sum(tiles) - sum(inside) + _spilled(inside, chip)
    if outside < sum(tiles) and sum(inside) + sum(others) > chip and not left:
        outside = sum(tiles)
    outside += sum(n for n in others if n > left)
    return outside + _fitted([n for n in others if n <= left], left)


def _fitted(sizes: list[int], room: int) -> int:
    """Bytes of those that don't fit: the smallest that leaves room for the others, if any."""
    over = sum(sizes) - room
    enough = [n for n in sizes if n >= over]
    if over <= 0 or not sizes:
        return 0
    return min(enough) if enough else _spilled(sizes, room + 1)
