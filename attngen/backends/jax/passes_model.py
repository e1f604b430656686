"""What a backward pass costs: temporaries and time, from which its candidates are ranked.

Temporaries are in passes_memory.py, TPUs in passes_tpu.py. Here is the time of processors,
with the constants of the forward pass (model.py), and a roofline for GPUs.
"""

from __future__ import annotations

import math

from attngen.backends.jax import passes_memory, passes_tpu
from attngen.backends.jax.gpu_model import LAUNCH_S, REACHED
from attngen.backends.jax.model import (
    CACHE_BYTES,
    FAULT_S,
    FLOP_S,
    MASK_S,
    NARROW,
    SCALE_S,
    SCORE_S,
    SMALL,
    STEP_S,
    score_s,
)
from attngen.cost import Cost
from attngen.dtypes import BYTES
from attngen.gpus import Gpu
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

DS_S = 0.3e-9  # of an element: p · (dp - delta), and what that is stored in
SLOPES = 2  # times a score's own time: its slope, and operands' gradients
CHUNK_S = 0.5e-9  # of a number of a chunk: sliced, transposed, added
# chunks of queries, of keys in each tile: sliced, or summed in place
MOVED = {"by_queries": (3, 4), "by_keys": (5, 3), "two_passes": (2, 3)}
EDGE = 2  # of a mask, which blanks p, keys and values
BEST_BYTES = CACHE_BYTES // 4  # a tile of more, and its like, leave the caches
BEYOND_S = 0.15e-9  # of an element, more with each doubling beyond that
KERNELS, PASSES = (
    12,
    9,
)  # of a tile on a GPU: launches, times that it is written or read


DROPOUT_S = 1.5e-9  # of an element: its word of dropout's generator


def dropout_bytes(spec: AttentionSpec, choice: Choice) -> int:
    """Of a tile: which weights are kept, and the weights that are left."""
    _, rows, _ = _sizes(spec, choice)
    scores = rows * int(choice["k_chunk"]) * BYTES[spec.stats_dtype]
    return 2 * scores if spec.dropout else 0


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    """Modelled bytes and seconds of a backward pass; tiles: of one head, of one pass."""
    if target.tpu is not None:
        temporaries = passes_tpu.temp_bytes(spec, choice, target.tpu)
        temporaries += dropout_bytes(spec, choice)
        return Cost(temporaries, passes_tpu.time_s(spec, choice, tiles, target.tpu))
    temporaries, library = passes_memory.temp_bytes(spec, choice)
    temporaries += dropout_bytes(spec, choice)
    if target.gpu is not None:
        seconds = _gpu_s(spec, choice, tiles, target.gpu)
        return Cost(temporaries - library, seconds)
    seconds = _processor_s(spec, choice, tiles, temporaries)
    return Cost(temporaries, seconds, library_bytes=library)


def _sizes(spec: AttentionSpec, choice: Choice) -> tuple[int, int, int]:
    """Matrices of a tile; rows and keys of all of them."""
    matrices = int(choice["head_chunk"]) * int(choice["batch_chunk"])
    rows = matrices * spec.repeats * int(choice["q_chunk"])
    return matrices, rows, matrices * int(choice["k_chunk"])


def _products(spec: AttentionSpec, choice: Choice) -> int:
    """Numbers that are multiplied for an element of a tile, in all passes."""
    again = (choice["algorithm"] == "two_passes") + (choice["delta"] == "summed")
    return (3 + again) * spec.qk_dim + (2 + again) * spec.v_dim


def _raised(choice: Choice) -> int:
    """How often p is made."""
    return 1 + (choice["algorithm"] == "two_passes") + (choice["delta"] == "summed")


def _processor_s(
    spec: AttentionSpec, choice: Choice, tiles: Tiles, temporaries: int
) -> float:
    matrices, rows, keys = _sizes(spec, choice)
    scores = rows * int(choice["k_chunk"])
    raised = _raised(choice)
    element = SCORE_S[str(choice["exp"])] + DS_S
    element += SCALE_S if choice["scale"] == "scores" else 0
    element += DROPOUT_S if spec.dropout else 0
    element += sum((1 + SLOPES) * score_s(s.expr) for s in spec.score)
    large = scores * BYTES[spec.stats_dtype] / BEST_BYTES
    element += BEYOND_S * max(0.0, math.log2(large))
    products = 2 * scores * _products(spec, choice) / FLOP_S
    if choice["product_dtype"] != spec.stats_dtype:
        products *= NARROW
    work = products + scores * raised * element
    work *= 1 + 1 / (1 + (scores / SMALL) ** 3)
    of_queries, of_keys = MOVED[str(choice["algorithm"])]
    if choice["delta"] == "again" and choice["algorithm"] != "by_queries":
        of_queries += 1
    dims = (spec.qk_dim + spec.v_dim) / 2
    moved = dims * (rows * of_queries + keys * of_keys) * CHUNK_S
    of_tile = work + raised * STEP_S + moved
    groups = spec.batch * spec.kv_heads / matrices
    edges = tiles.edge * scores * raised * EDGE * MASK_S
    once = temporaries * FAULT_S
    return float(groups * (tiles.visited * of_tile + edges) + once)


def _gpu_s(spec: AttentionSpec, choice: Choice, tiles: Tiles, gpu: Gpu) -> float:
    """As for the forward pass: products at a rate, tiles written and read, launches."""
    matrices, rows, keys = _sizes(spec, choice)
    scores, raised = rows * int(choice["k_chunk"]), _raised(choice)
    narrow = BYTES[str(choice["product_dtype"])] <= 2
    fma = gpu.matrix_fma_per_cycle
    if not narrow:
        fma = gpu.matrix_tf32_fma_per_cycle or gpu.fma_per_cycle
    peak = 2 * fma * gpu.multiprocessors * gpu.clock_hz * REACHED
    of_queries, of_keys = MOVED[str(choice["algorithm"])]
    dims = (spec.qk_dim + spec.v_dim) / 2
    moved: float = 4 * PASSES * raised * scores
    moved += 8 * dims * (rows * of_queries + keys * of_keys)
    of_tile = raised * KERNELS * LAUNCH_S + 2 * scores * _products(spec, choice) / peak
    of_tile += moved / gpu.bandwidth_bytes_s
    groups = spec.batch * spec.kv_heads / matrices
    return float(groups * tiles.visited * of_tile)
