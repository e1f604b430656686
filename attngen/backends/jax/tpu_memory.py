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
- v2, v3 and v5p (of two cores) keep all of this in HBM; the others keep what fits in VMEM, or in
  v4's CMEM, which isn't counted.
"""

from __future__ import annotations

from attngen.backends.jax.tpu_arrays import Arrays, arrays
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import LANES, Tpu

SLACK = 220 * 2**10  # scalars, limits, row statistics: 1 KiB each, at least
SMALL = 105 * 2**10  # of these in a step: counted as room, and as not in use
LEAST = 80 * 2**10  # the same, where no small chunks are padded
UNROLLED = 100 * 2**10  # the same, of each further tile of a step, and of most parts
PADDING = 1.09  # what is left to chance: holes, orders that were guessed wrong
ALWAYS_HBM = ("v2", "v3", "v5p")
USED = {"v7x": 0.5}  # of the chip's memory, that arrays come to lie in
ON_CHIP = 240 * 2**10  # where nothing large is outside
OUTSIDE = 1.06  # the same as PADDING, of what lies beside the chip
FULL = 0.8  # of VMEM: a whole output that fills it to more stays in HBM
# Small arrays that stay in HBM all the same: of stacked outputs, of a score's slopes for one
# head, of each of several parts with few rows.
STACKED, SLOPES, PART = 450 * 2**10, 360 * 2**10, 120 * 2**10
SOME_PARTS = 4


def temp_bytes(
    spec: AttentionSpec, choice: Choice, tiles: Tiles | None, tpu: Tpu
) -> int:
    """An upper bound of what XLA:TPU allocates in HBM beyond inputs and outputs, in bytes.

    Args:
        tiles: of a head, which tell whether any needs no mask; without them, some do.
    """
    at = arrays(spec, choice, tiles)
    if tpu.generation not in ALWAYS_HBM:
        room = int(USED.get(tpu.generation, 1.0) * tpu.on_chip_bytes)
        return int(OUTSIDE * _outside(at, room)) + ON_CHIP + _odd(at)
    small = (SMALL if at.filled else LEAST) + (
        at.unroll - 1 + max(0, at.parts - 2)
    ) * UNROLLED
    if at.dense:
        held = at.tile + at.mask + at.bias + 2 * at.out
        return int(PADDING * held) + 2 * small + SLACK
    room, live = _room(at)
    room += small
    return int(PADDING * (room + max(0, room - live))) + SLACK


def _room(at: Arrays) -> tuple[int, int]:
    """Bytes of all buffers, and of those that count at the worst moment."""
    hoisted = {"k": at.k, "v": at.v, "q": at.q}
    step = {
        "sliced": at.sliced,
        "rows": at.rows,
        "sums": at.sums,
        "tile": at.tile,
        "keys": at.keys,
        "mask": at.mask,
        "bias": at.bias,
    }
    for name, size in _lent(at).items():
        own = hoisted if name in hoisted else step
        own[name] -= size
    whole = sum(hoisted.values())
    room = whole + sum(step.values()) + at.filled
    if 0 < step["tile"] + step["keys"] <= step["sliced"]:  # takes its room
        room -= step["tile"] + step["keys"]
    loop = hoisted["k"] + hoisted["v"] + at.filled + step["rows"]
    loop += max(step["sums"], step["tile"] + step["keys"] + step["mask"] + step["bias"])
    if at.filled:  # the output counts at the end only
        return room, max(at.filled + whole, loop - at.out)
    return room, loop + hoisted["q"]


def _lent(at: Arrays) -> dict[str, int]:
    """What lies in the output's memory until it is written: the largest buffer that fits.

    Queries as they are sliced are gone before a tile is made, so both may lie there.
    """
    if at.stacked or (at.looped and not at.filled):
        return {}
    in_loop = {"sums": at.one_sums, "tile": at.one_tile, "mask": at.mask}
    in_loop |= {"bias": at.bias}
    known = in_loop | {"k": at.k, "v": at.v, "q": at.q, "sliced": at.sliced}
    fit = {n: size for n, size in known.items() if 0 < size <= at.out}
    if not fit:
        return {}
    first = max(fit, key=lambda n: fit[n])
    if first in in_loop:
        names = {first, "sliced"}
    elif first == "sliced":
        names = {first, max(in_loop, key=lambda n: fit.get(n, 0))}
    else:
        names = {first}
    return {n: fit[n] for n in names if n in fit}


def _odd(at: Arrays) -> int:
    """What stays in HBM although it would fit on the chip."""
    found = STACKED if at.stacked else 0
    if at.scored and at.heads == 1:
        found += SLOPES
    if at.parts >= SOME_PARTS and at.heads * at.queries <= LANES:
        found += (SOME_PARTS + at.parts) * PART
    return found


def _outside(at: Arrays, chip: int) -> int:
    """Bytes of the buffers that don't fit on the chip: the largest, until the others do.

    Queries as sliced are gone before a tile is made.
    """
    tiles = round(at.tile / at.one_tile) if at.one_tile else 0
    sizes = [at.tile // tiles] * tiles if tiles > 1 else [at.tile]
    sizes += [at.k, at.v, at.q, at.rows, at.sums, at.keys, at.mask, at.bias]
    held = sum(sizes)
    outside = at.filled if held + at.filled >= FULL * chip else 0
    for size in sorted(sizes, reverse=True):
        if held < chip:
            break
        outside += size
        held -= size
    return outside
