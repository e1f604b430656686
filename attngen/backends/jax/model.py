"""The model of XLA's temporaries and time, from which candidates are ranked.

Temporaries: memory.py sums the buffers of the worst moment, as an upper bound; for TPUs
tpu_memory.py does.
Time: a sum over tiles of what each costs; a guide for ranking, not a clock. Here that of
processors, with the constants measured on the machine that benchmarks/results names; that of
TPUs and GPUs is in tpu_model.py and gpu_model.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from attngen.backends.jax import gpu_model, scan_model, tpu_memory, tpu_model
from attngen.backends.jax.candidates import edge_share, is_stored, option
from attngen.backends.jax.memory import temp_bytes as temp_bytes
from attngen.cost import Cost, tile_flop
from attngen.dtypes import BYTES
from attngen.expr import Expr, walk
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles


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
    if choice["algorithm"] == "scanned":
        return _scanned(spec, target, choice, tiles)
    share = edge_share(choice)
    if target.tpu is not None:
        temporaries = tpu_memory.temp_bytes(spec, choice, tiles, target.tpu)
        if spec.dropout:  # weights that are left, and which
            temporaries += 2 * BYTES[spec.stats_dtype] * shape(spec, choice).scores
        if is_stored(spec):
            temporaries += _beside(spec, choice)
        seconds = tpu_model.time_s(spec, choice, tiles, target.tpu)
        return Cost(temporaries, seconds, share)
    temporaries = temp_bytes(spec, choice, tiles)
    if target.gpu is not None:
        seconds = gpu_model.time_s(spec, choice, tiles, target.gpu)
    else:
        seconds = _time_s(spec, choice, tiles, temporaries)
    return Cost(temporaries, seconds, share)


SUBLANES = 8  # of a TPU's tile: fewer rows take as much


def _beside(spec: AttentionSpec, choice: Choice) -> int:
    """What a TPU keeps of chunks that are gathered or converted: as scores lie, twice."""
    own = shape(spec, choice)
    rows = own.batches * -(-own.rows // own.batches // SUBLANES) * SUBLANES
    return 2 * BYTES[spec.stats_dtype] * rows * own.keys


def _scanned(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    """Of forward and backward in one program, from the time of a forward pass alone."""
    lanes = 1 if target.tpu is None else scan_model.LANES
    temporaries = scan_model.temp_bytes(spec, choice, lanes)
    alone = dataclasses.replace(spec, derivatives=None)
    once = cost(alone, target, scan_model.forward(choice), tiles)
    return Cost(temporaries, scan_model.time_s(spec, choice, once.time_s))


# Seconds of a CPU of two cores, fitted with benchmarks/model_cpu.py.
FLOP_S = 155e9  # of the products, where nothing else holds them up
STEP_S = 7e-6  # of a step of the key loop
# of an element's maximum, exponential and sum
SCORE_S = {"exp": 0.6e-9, "exp2": 0.62e-9, "polynomial": 0.5e-9}
SCALE_S = 0.1e-9  # of an element that is scaled
DROPOUT_S = 1.5e-9  # of an element, whose word of dropout's generator is made
LARGE_S = 0.1e-9  # of an element, more with each doubling of a tile beyond the caches
CACHE_BYTES = 2**22
PACKED_S = 0.04e-9  # the same, of keys and values of a tile beyond a core's own cache
CORE_BYTES = 2**18
SCORES_S = {"exp": 2e-9, "tanh": 3e-9, "log": 2e-9, "load": 0.5e-9}  # in a score, each
MASK_S = 0.5e-9  # of an element of an edge tile
ROW_S = 0.15e-9  # of an element of the weighted sum, rescaled in each step
SLICE_S = (1e-9, 1.6e-9)  # of an element of keys or values: of one matrix, of several
READ_S = 0.5e-9  # of one, where so few rows use it that it isn't packed
FEW = 16
LIST_S = (60e-9, 30e-6)  # of a list: of each key chunk in it, and of all
WHOLE_S = (0.9e-9, 1.5e-9)  # of one, where all keys are read at once
MOVED_S = 1e-9  # of an element that is transposed, or put in order at the end
NARROW = 1.5  # times the products' time, in a narrower dtype than the statistics'
ACROSS = 1.25  # times the products' time, with keys last
FAULT_S = 0.29e-9  # of a byte of temporaries: its page is fresh in every call
ALONE = 0.4  # of what isn't a product, that several tiles of a step don't overlap
SMALL = 90_000  # elements of a tile: of many fewer, one core does all of it


def time_s(spec: AttentionSpec, choice: Choice, tiles: Tiles) -> float:
    """Modelled seconds: what a tile costs, times the tiles that are visited."""
    if choice["algorithm"] == "scanned":
        choice = scan_model.forward(choice)
    return _time_s(spec, choice, tiles, temp_bytes(spec, choice, tiles))


def _time_s(
    spec: AttentionSpec, choice: Choice, tiles: Tiles, temporaries: int
) -> float:
    tile = shape(spec, choice)
    groups = spec.batch * spec.kv_heads / tile.batches
    visited = tiles.full + tiles.edge * edge_share(choice)
    steps = tiles.visited * _tile_s(spec, choice, tile)
    masked = min(tile.keys, int(option(choice, "diagonal")) or tile.keys)
    edges = tiles.edge * tile.rows * masked * MASK_S
    if spec.kv_lengths:
        seen, masked_share = _lengths(spec, tile, int(choice["batch_chunk"]))
        steps *= seen
        edges += tiles.visited * masked_share * tile.rows * tile.keys * MASK_S
    once = temporaries * FAULT_S + _moved_s(spec, choice)
    if option(choice, "skip") == "list":
        chunks = tiles.total  # of keys, for each chunk of queries
        edges += LIST_S[0] * chunks + LIST_S[1] * -(
            -spec.q_len // int(choice["q_chunk"])
        )
    return float(groups * (steps * visited / max(1, tiles.visited) + edges) + once)


def _lengths(spec: AttentionSpec, tile: Shape, batches: int) -> tuple[float, float]:
    """The shares of a chunk's tiles that are visited, and that are masked.

    Lengths are taken to lie anywhere. Batches that are computed together go on to the
    longest, and are masked from the shortest on.
    """
    half = tile.keys / spec.kv_len / 2  # of a tile
    visited = min(1.0, batches / (batches + 1) + half)
    return visited, visited - max(0.0, 1 / (batches + 1) - half)


def _tile_s(spec: AttentionSpec, choice: Choice, tile: Shape) -> float:
    """Seconds of a tile without a mask."""
    element = SCORE_S[str(choice["exp"])] + sum(score_s(s.expr) for s in spec.score)
    element += DROPOUT_S if spec.dropout else 0
    element += SCALE_S if option(choice, "scale") == "scores" else 0
    at_once = tile.scores * int(option(choice, "parts"))
    large = at_once * BYTES[spec.stats_dtype] / CACHE_BYTES
    element += LARGE_S * max(0.0, math.log2(large))
    sliced = tile.keys * (spec.qk_dim + spec.v_dim) * BYTES[spec.stats_dtype]
    element += PACKED_S * max(0.0, math.log2(sliced / CORE_BYTES))
    products = tile_flop(spec, tile.rows, tile.keys) / FLOP_S
    if choice["product_dtype"] != spec.stats_dtype:
        products *= NARROW
    if option(choice, "qk") == "twice":
        products *= 1 + spec.qk_dim / (spec.qk_dim + spec.v_dim)
    if option(choice, "slices") == "dn":
        products *= ACROSS
    work = products + tile.scores * element
    work *= 1 + 1 / (1 + (tile.scores / SMALL) ** 3)
    keys = tile.batches * tile.keys * (spec.qk_dim + spec.v_dim)
    whole = tile.keys == spec.kv_len  # read where they lie, by a library fusion
    slices = (WHOLE_S if whole else SLICE_S)[tile.batches > 1]
    if tile.rows < FEW and tile.batches == 1 and not whole:
        slices = READ_S
    serial = STEP_S + keys * slices + tile.rows * spec.v_dim * ROW_S
    return work + serial * (ALONE + (1 - ALONE) / int(option(choice, "unroll")))


def _moved_s(spec: AttentionSpec, choice: Choice) -> float:
    """Seconds of what is done to whole arrays."""
    moved = 0
    if option(choice, "slices") == "dn":
        moved += spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    if option(choice, "steps") == "map":
        moved += spec.q_heads * spec.q_len * spec.v_dim
    return spec.batch * moved * MOVED_S


def score_s(node: Expr) -> float:
    return sum(
        SCORES_S.get(n.op, 0.1e-9) for n in walk(node) if n.op not in ("var", "const")
    )
