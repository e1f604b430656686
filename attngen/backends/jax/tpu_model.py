"""The model of XLA:TPU's time, from which candidates for TPUs are ranked.

A sum over tiles, in cycles of the compiler's own estimates: what each element of a tile costs,
each key and row of it, each tile, and each step of the loops around. The rates were fitted to
the estimates of random plans with benchmarks/model_tpu.py; a guide for ranking, not a clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax.candidates import edge_share, option
from attngen.backends.jax.tpu_plan import padded
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import LANES, SUBLANES, Tpu


@dataclass(frozen=True)
class Rates:
    """Cycles of one version.

    Args:
        element: of a score: its products, its maximum, its exponential.
        sum: more, where a sum of its own makes every exponential twice.
        twice: more, where its product is made twice.
        score: more, for each score function.
        masked: more, in an edge tile.
        power: more, where 2**x is a polynomial.
        wide: of a cycle of the matrix units, more, where products are in float32.
        stored: of a cycle of the memory, where the tile doesn't fit the chip.
        key: of a number of a key or value, as it is sliced and laid out.
        row: of a number of the weighted sums, in each tile.
        rescaled: of a row, in each tile.
        tile, edge, step: of each.
        query: of a number of a query or of an output.
        once: of a cycle of the memory, for all inputs and outputs.
        strip: of a row, in each step down a diagonal.
    """

    element: float
    sum: float
    twice: float
    score: float
    masked: float
    power: float
    wide: float
    stored: float
    key: float
    row: float
    rescaled: float
    tile: float
    edge: float
    step: float
    query: float
    once: float
    strip: float


RATES = {
    "v2": Rates(
        element=0.0197,
        sum=0.0169,
        twice=0.00813,
        score=0.0167,
        masked=0.00145,
        power=0,
        wide=0.126,
        stored=0,
        key=0.00665,
        row=0.0139,
        rescaled=0,
        tile=3860,
        edge=11300,
        step=0,
        query=0.0687,
        once=0,
        strip=6.9,
    ),
    "v3": Rates(
        element=0.0204,
        sum=0.0144,
        twice=0,
        score=0.029,
        masked=0.00187,
        power=0.00672,
        wide=0.086,
        stored=0,
        key=0.00872,
        row=0.0185,
        rescaled=0.0453,
        tile=3210,
        edge=7200,
        step=2560,
        query=0.082,
        once=0,
        strip=8.25,
    ),
    "v4": Rates(
        element=0.00699,
        sum=0.00309,
        twice=0,
        score=0.0155,
        masked=1.38e-05,
        power=0.00694,
        wide=0.587,
        stored=1,
        key=0.00193,
        row=0.00895,
        rescaled=0,
        tile=4850,
        edge=0,
        step=4600,
        query=0.0177,
        once=0,
        strip=3.15,
    ),
    "v5e": Rates(
        element=0.00331,
        sum=0.011,
        twice=0.0103,
        score=0.0246,
        masked=9.28e-05,
        power=0.00415,
        wide=1.12,
        stored=2,
        key=0.00887,
        row=0,
        rescaled=0,
        tile=5030,
        edge=5270,
        step=3360,
        query=0.0612,
        once=0,
        strip=4.44,
    ),
    "v5p": Rates(
        element=0.00601,
        sum=0.00632,
        twice=0,
        score=0,
        masked=0.00956,
        power=0,
        wide=0.0827,
        stored=1,
        key=0.00559,
        row=0.00945,
        rescaled=0,
        tile=8790,
        edge=0,
        step=8420,
        query=0.0137,
        once=9.26,
        strip=10.1,
    ),
    "v6e": Rates(
        element=0.00252,
        sum=0.00524,
        twice=0.00116,
        score=0.00575,
        masked=0.00272,
        power=0.00479,
        wide=0.793,
        stored=0.7,
        key=0.0052,
        row=0.00247,
        rescaled=0,
        tile=3440,
        edge=19500,
        step=4670,
        query=0.0264,
        once=0,
        strip=4.12,
    ),
    "v7x": Rates(
        element=0.00257,
        sum=0.00581,
        twice=0.00406,
        score=0.00718,
        masked=0.00171,
        power=0,
        wide=2.2,
        stored=1,
        key=0,
        row=0.00355,
        rescaled=0,
        tile=3500,
        edge=22000,
        step=7080,
        query=0,
        once=13.5,
        strip=0,
    ),
}
FITS = 0.6  # of the on-chip memory, that a tile may take


def time_s(spec: AttentionSpec, choice: Choice, tiles: Tiles, tpu: Tpu) -> float:
    """Modelled seconds of a candidate."""
    return cycles(spec, choice, tiles, tpu) / tpu.clock_hz


def cycles(spec: AttentionSpec, choice: Choice, tiles: Tiles, tpu: Tpu) -> float:
    """Modelled cycles: what a tile costs, times the tiles that are visited."""
    rate = RATES[tpu.generation]
    matrices = int(choice["head_chunk"]) * int(choice["batch_chunk"])
    q, keys = int(choice["q_chunk"]), int(choice["k_chunk"])
    rows = spec.repeats * q
    elements = matrices * padded(rows, SUBLANES) * padded(keys, LANES)
    groups = spec.batch * spec.kv_heads / matrices
    strip = int(option(choice, "diagonal"))
    visited = groups * (tiles.full + tiles.edge * edge_share(choice))
    edges = groups * tiles.edge
    steps = groups * -(-spec.q_len // q)
    dims = spec.qk_dim + spec.v_dim
    of_tile = (
        rate.tile
        + elements * _element(spec, choice, rate)
        + _products(spec, choice, elements, tpu) * rate.wide
        + _stored(choice, elements, tpu) * rate.stored
        + matrices * keys * dims * rate.key
        + matrices * rows * ((spec.v_dim + 1) * rate.row + rate.rescaled)
    )
    of_step = rate.step + matrices * rows * dims * rate.query
    of_step += q / strip * matrices * rows * rate.strip if strip else 0.0
    moved = spec.bytes_of("q", "k", "v", *spec.outputs) / tpu.bytes_per_cycle
    return (
        visited * of_tile
        + edges * (rate.edge + elements * rate.masked)
        + steps * of_step
        + moved * rate.once
    )


def _element(spec: AttentionSpec, choice: Choice, rate: Rates) -> float:
    """Cycles of an element of a tile without a mask."""
    cost = rate.element + len(spec.score) * rate.score
    cost += rate.sum if option(choice, "denominator") == "sum" else 0.0
    cost += rate.twice if option(choice, "qk") == "twice" else 0.0
    return cost + (rate.power if choice["exp"] == "polynomial" else 0.0)


def _products(spec: AttentionSpec, choice: Choice, elements: int, tpu: Tpu) -> float:
    """Cycles of the matrix units for products in float32, which take several passes."""
    if BYTES[str(choice["product_dtype"])] <= 2:
        return 0.0
    side = tpu.matrix_side
    dims = padded(spec.qk_dim, side) + padded(spec.v_dim + 1, side)
    return 2 * elements * dims / tpu.flop_per_cycle


def _stored(choice: Choice, elements: int, tpu: Tpu) -> float:
    """Cycles of the memory for a tile that doesn't fit the chip; 0 where it does.

    v2 and v3 keep no array on the chip between operations: their rate of an element has it.
    """
    fused = option(choice, "qk") == "twice" and option(choice, "denominator") == "ones"
    if fused or 4 * elements <= FITS * tpu.on_chip_bytes:
        return 0.0
    return 4 * elements / tpu.bytes_per_cycle
