"""The model of XLA's temporaries and time, from which candidates are ranked.

Temporaries: fitted to XLA:CPU's own figures (with what library fusions hide, see
scratch.py) as an upper bound; benchmarks/model_cpu.py measures how well it holds.
Time: a sum over tiles of what each costs, with the constants measured on the machine that
benchmarks/results names; a guide for ranking, not a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attngen.cost import Cost, tile_flop
from attngen.dtypes import BYTES
from attngen.expr import Expr, walk
from attngen.intervals import examine
from attngen.plans import Choice
from attngen.regions import Tiles
from attngen.spec import AttentionSpec
from attngen.targets import Target

OVERHEAD_BYTES = 4096  # loop counters, starts of slices, XLA's alignment


@dataclass(frozen=True)
class Shape:
    """What one tile holds, in elements of the statistics' dtype."""

    batches: int  # matrices that are multiplied at once: batches × kv heads
    rows: int  # of all of them: queries × query heads of a group
    keys: int  # of one of them

    @property
    def scores(self) -> int:
        return self.rows * self.keys


def shape(spec: AttentionSpec, choice: Choice) -> Shape:
    batches = int(choice["batch_chunk"]) * int(choice["head_chunk"])
    rows = batches * spec.repeats * int(choice["q_chunk"])
    return Shape(batches, rows, int(choice["k_chunk"]))


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    """Modelled bytes and seconds of a candidate."""
    return Cost(temp_bytes(spec, choice), time_s(spec, choice, tiles))


def temp_bytes(spec: AttentionSpec, choice: Choice) -> int:
    """Tiles of scores that live at once, the rows' state, the slices of keys and values."""
    tile = shape(spec, choice)
    size = BYTES[spec.stats_dtype]
    scores = tile.scores * size * _live_tiles(spec, choice)
    if choice["algorithm"] == "running":
        # rows, and the weighted sum twice: as carried and as added
        rows = tile.rows * size * (1.1 * spec.qk_dim + 2.15 * spec.v_dim + 4)
    else:
        rows = tile.rows * size * (spec.qk_dim + spec.v_dim + 4)
    cast = spec.dtype != choice["product_dtype"]
    one = 1.02 * tile.batches * tile.keys * size  # an element of each key
    keys = one * (spec.qk_dim + spec.v_dim)
    chunks = -(-spec.kv_len // tile.keys)
    unroll = int(choice["unroll"])  # steps in one body, each with buffers of its own
    scores, rows = scores * unroll, rows * (0.8 + 0.2 * unroll)
    keys *= unroll * (2 if unroll > 1 and cast else 1)
    if choice["loop"] == "unrolled":
        keys *= chunks * (1.5 if cast else 1.0)
    if chunks > 1 and spec.kv_len % tile.keys:  # the last chunk has buffers of its own
        rows, keys = (2.4 if unroll == 1 else 3.0) * rows, 1.6 * keys
        rows *= 1.2 if choice["loop"] == "unrolled" else 1.0
    elif chunks == 1:  # values that no query sees are blanked in a copy
        read = 0.2 if spec.qk_dim % 64 == 0 else 1.0  # other keys are packed anew
        keys = 1.7 * keys if cast else one * (read * spec.qk_dim + 1.1 * spec.v_dim)
    bound = (1.0 if tile.batches == 1 else 1.02) * (scores + rows + keys)
    bound += OVERHEAD_BYTES
    if (
        choice["algorithm"] == "running"
        and not choice["guard"]
        and spec.dtype != spec.stats_dtype
    ):
        bound += (BYTES[spec.stats_dtype]) * _elements(spec)  # converted as a whole
    return int(bound)


def _elements(spec: AttentionSpec) -> int:
    """Of q, k and v together."""
    queries = spec.q_heads * spec.q_len * spec.qk_dim
    keys = spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    return spec.batch * (queries + keys)


def _live_tiles(spec: AttentionSpec, choice: Choice) -> float:
    """How many tiles of scores XLA:CPU keeps at once, as fitted."""
    tile = shape(spec, choice)
    chunks = -(-spec.kv_len // tile.keys)
    ragged = spec.kv_len % tile.keys != 0
    edges = spec.mask is not None or ragged or spec.kv_lengths or spec.q_lengths
    edges = edges or examine(spec).drops_keys
    matrix = (
        tile.batches == 1 and spec.repeats == 1
    )  # XLA shares buffers of plain matrices
    dense = sum({"q", "k"} <= set(o.axes) for o in spec.operands)
    if chunks == 1:  # one library fusion, with everything inside it
        return 3.45 + dense
    if choice["loop"] == "unrolled":  # what one chunk frees isn't taken by the next
        return chunks * (1.8 if ragged or edges else 1.3) + chunks * dense
    live = 1.0 + dense
    if edges:
        live += 0.25 if matrix else 1.25
    if ragged:
        live = max(live + 1.25, 3.3 + dense)
    return live


# Seconds of a CPU of two cores, fitted with benchmarks/model_cpu.py.
FLOP_S = 155e9  # of the products, where nothing else holds them up
STEP_S = 20e-6  # of a step of the key loop
# of an element's maximum, exponential and sum
SCORE_S = {"exp": 0.45e-9, "exp2": 0.47e-9, "polynomial": 0.35e-9}
LARGE_S = 0.1e-9  # of an element, more with each doubling of a tile beyond the caches
CACHE_BYTES = 2**22
SCORES_S = {"exp": 2e-9, "tanh": 3e-9, "log": 2e-9, "load": 0.5e-9}  # in a score, each
MASK_S = 0.4e-9  # of an element of an edge tile
ROW_S = 0.15e-9  # of an element of the weighted sum, rescaled in each step
SLICE_S = (1e-9, 2e-9)  # of an element of keys or values: of one matrix, of several
FAULT_S = 0.25e-9  # of a byte of temporaries: its page is fresh in every call
SMALL = 2**15  # a tile of so many elements occupies one core half of the time


def time_s(spec: AttentionSpec, choice: Choice, tiles: Tiles) -> float:
    """Modelled seconds: what a tile costs, times the tiles that are visited."""
    tile = shape(spec, choice)
    groups = spec.batch * spec.kv_heads / tile.batches
    element = SCORE_S[str(choice["exp"])] + sum(_score_s(s.expr) for s in spec.score)
    large = tile.scores * BYTES[spec.stats_dtype] / CACHE_BYTES
    element += LARGE_S * max(0.0, math.log2(large))
    work = tile_flop(spec, tile.rows, tile.keys) / FLOP_S + tile.scores * element
    work *= 1 + SMALL / (SMALL + tile.scores)
    keys = tile.batches * tile.keys * (spec.qk_dim + spec.v_dim)
    whole = tile.keys == spec.kv_len  # read where they lie, by a library fusion
    slices = 0.5e-9 if whole else SLICE_S[tile.batches > 1]
    carried = 1 / int(choice["unroll"])
    moved = keys * slices + tile.rows * spec.v_dim * ROW_S * carried
    edges = tiles.edge * tile.scores * MASK_S
    fresh = temp_bytes(spec, choice) * FAULT_S
    return float(groups * (tiles.visited * (STEP_S + work + moved) + edges) + fresh)


def _score_s(node: Expr) -> float:
    return sum(
        SCORES_S.get(n.op, 0.1e-9) for n in walk(node) if n.op not in ("var", "const")
    )
