"""XLA:TPU's temporaries of an emitted program, as an upper bound.

What was seen in the compiler's buffer assignments (jax 0.10.2, libtpu 0.0.42):

- Arrays are tiled: the last dimension takes whole 128 lanes, the one before it whole 8 rows.
  Where head dims leave lanes empty, arguments and outputs lie with the sequence along the lanes.
- Buffers are placed in the program's order; the room that one leaves is seldom taken by a
  larger one. What the compiler reports is the room, and once more what of it isn't in use at
  the worst moment: there it counts neither sums that a key loop carries beside the tile, nor
  queries as they were sliced.
- Copies of whole k and v in another order are made before the loops (tpu_arrays.py). Where the
  output is filled in another order than it is returned in, its own memory is free until then,
  and lends itself to the largest buffer that fits.
- A buffer begins at a multiple of 16 KiB, also a scalar's: of these, each place in the program
  that makes a tile has half a dozen.
- v2, v3 and v5p (of two cores) keep all of this in HBM, though v5p makes what is sliced in VMEM;
  the others keep what fits on the chip, which isn't counted (tpu_chip.py).
"""

from __future__ import annotations

from attngen.backends.jax import tpu_chip
from attngen.backends.jax.tpu_arrays import Arrays, arrays
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import Tpu

KIB = 2**10
ALIGNMENT = 16 * KIB  # of buffers
# Of small buffers, as room and as not in use: most of what was found is below.
SMALL = 360 * KIB  # of any program
SMALL_SINGLE = 195 * KIB  # of one without a key loop, for one head
BODY, BODY_NEAR = 150 * KIB, 170 * KIB  # of each further place that makes a tile
FILLED = 130 * KIB  # where the output is put in order
SCORED = 350 * KIB  # of a score's operands
STATISTICS = 2  # of rows, in each such place
STACKED = 700 * KIB  # v5p: of stacked outputs
PADDING = 1.055  # what is left to chance: holes, orders that were guessed wrong
PADDING_NEAR = 1.045  # the same, where more is
FAR = ("v2", "v3")  # nothing but a fusion's own scratch lies in VMEM
ALWAYS_HBM = (*FAR, "v5p")
BROUGHT = 2**23  # bytes of queries that go to VMEM for the time of a tile
IN_LOOP = ("tile", "keys", "mask", "bias", "partial")


def temp_bytes(
    spec: AttentionSpec, choice: Choice, tiles: Tiles | None, tpu: Tpu
) -> int:
    """An upper bound of what XLA:TPU allocates in HBM beyond inputs and outputs, in bytes.

    Args:
        tiles: of a head, which tell whether any needs no mask; without them, some do.
    """
    at = arrays(spec, choice, tiles, near=tpu.generation not in FAR)
    if tpu.generation not in ALWAYS_HBM:
        return tpu_chip.temp_bytes(at, tpu)
    padding = PADDING_NEAR if at.near else PADDING
    if at.dense:
        held = at.tile + at.mask + at.bias + (0 if at.near or at.heads == 1 else at.out)
        return int(padding * held) + _small(at)
    room, live = _room(at)
    return int(padding * (room + max(0, room - live))) + _small(at)


def _small(at: Arrays) -> int:
    """Scalars, limits of loops, statistics of rows."""
    rows = max(0, 4 * at.heads * at.queries - ALIGNMENT)
    body = BODY_NEAR if at.near else BODY
    alone = at.single and at.heads == 1 and not at.near
    first = SMALL_SINGLE if alone else SMALL
    found = first + at.bodies * body + (1 + at.bodies) * STATISTICS * rows
    found += (FILLED if at.filled else 0) + (SCORED if at.scored else 0)
    return found + (STACKED if at.stacked and at.near else 0)


def _room(at: Arrays) -> tuple[int, int]:
    """Bytes of all buffers, and of those that count at the worst moment."""
    held = {"k": at.k, "v": at.v, "q": at.q}
    step = {"rows": at.rows, "sums": at.sums}
    loop = {name: getattr(at, name) for name in IN_LOOP}
    for name, size in _lent(at).items():
        own = held if name in held else step if name in step else loop
        own[name] -= size
    whole = sum(held.values())
    turn = sum(loop.values())
    hole = at.sliced if at.rows and at.sums else 0
    for size in sorted(loop.values(), reverse=True):  # takes the room of what is gone
        if size <= hole:
            turn, hole = turn - size, hole - size
    room = whole + at.filled + at.sliced + sum(step.values())
    room += max(turn, at.finish if at.finish > hole else 0)
    room = max(room, whole + at.brought)
    used = step["rows"] or at.sliced
    turn = sum(loop.values())
    if at.near:  # much is brought to VMEM before it counts
        live = max(turn - at.partial, step["sums"])
        live += used if used < BROUGHT else 0
    elif at.single:
        live = used + turn
    elif at.decoded:
        live = used + at.keys if at.unroll == 1 else used
    elif at.unroll > 1:  # sums of a tile, and of the one before
        live = used + max(step["sums"] + at.partial, turn)
    else:
        live = max(used + max(step["sums"], turn - at.partial), turn)
    return room, whole + max(live, at.filled, at.finish, at.brought)


def _lent(at: Arrays) -> dict[str, int]:
    """What lies in the output's memory until it is written: the largest buffer that fits."""
    if at.looped and not at.filled:
        return {}
    known = {"sums": at.one_sums, "tile": at.one_tile, "mask": at.mask, "bias": at.bias}
    known |= {"k": at.k, "v": at.v, "q": at.q, "rows": at.rows}
    fit = {n: size for n, size in known.items() if 0 < size <= at.out}
    if not fit:
        return {}
    first = max(fit, key=lambda n: fit[n])
    return {first: fit[first]}
