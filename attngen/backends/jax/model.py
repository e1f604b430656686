"""The model of XLA's temporaries and time, from which candidates are ranked.

Temporaries: memory.py sums the buffers of the worst moment, as an upper bound.
Time: a sum over tiles of what each costs, with the constants measured on the machine that
benchmarks/results names; a guide for ranking, not a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from attngen.backends.jax.memory import temp_bytes as temp_bytes
from attngen.cost import Cost, tile_flop
from attngen.dtypes import BYTES
from attngen.expr import Expr, walk
from attngen.plans import Choice
from attngen.regions import Tiles
from attngen.spec import AttentionSpec
from attngen.targets import Target


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
    temporaries = temp_bytes(spec, choice, tiles)
    return Cost(temporaries, _time_s(spec, choice, tiles, temporaries))


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
    return _time_s(spec, choice, tiles, temp_bytes(spec, choice, tiles))


def _time_s(
    spec: AttentionSpec, choice: Choice, tiles: Tiles, temporaries: int
) -> float:
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
    carried = 1 / int(choice.get("unroll", 1))
    moved = keys * slices + tile.rows * spec.v_dim * ROW_S * carried
    edges = tiles.edge * tile.scores * MASK_S
    fresh = temporaries * FAULT_S
    return float(groups * (tiles.visited * (STEP_S + work + moved) + edges) + fresh)


def _score_s(node: Expr) -> float:
    return sum(
        SCORES_S.get(n.op, 0.1e-9) for n in walk(node) if n.op not in ("var", "const")
    )
