"""The model of XLA:GPU's time on NVIDIA's devices, from which candidates are ranked there.

XLA makes a kernel of each product and of what lies between: a tile of scores is written and
read from the device's memory several times, and every kernel is launched. Nothing was measured:
a guide for ranking, from the data sheets' rates (gpus.py).
"""

from __future__ import annotations

from attngen.cost import tile_flop
from attngen.dtypes import BYTES
from attngen.gpus import Gpu
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles

LAUNCH_S = 4e-6  # of a kernel, in a loop that XLA runs from the host
KERNELS = 7  # of a tile: slices, two products, a maximum, weights, a sum, a rescaling
PASSES = 5  # over a tile of scores, each of its elements written or read
REACHED = 0.6  # of the matrix units' peak, by a product of such a size


def time_s(spec: AttentionSpec, choice: Choice, tiles: Tiles, gpu: Gpu) -> float:
    """Modelled seconds of a candidate."""
    matrices = int(choice["head_chunk"]) * int(choice["batch_chunk"])
    rows = matrices * spec.repeats * int(choice["q_chunk"])
    keys = int(choice["k_chunk"])
    groups = spec.batch * spec.kv_heads / matrices
    narrow = BYTES[str(choice["product_dtype"])] <= 2
    fma = gpu.matrix_fma_per_cycle
    if not narrow:
        fma = gpu.matrix_tf32_fma_per_cycle or gpu.fma_per_cycle
    peak = 2 * fma * gpu.multiprocessors * gpu.clock_hz * REACHED
    moved = 4 * PASSES * rows * keys
    moved += matrices * keys * (spec.qk_dim + spec.v_dim) * BYTES[spec.dtype]
    moved += 8 * rows * spec.v_dim
    of_tile = KERNELS * LAUNCH_S + tile_flop(spec, rows, keys) / peak
    of_tile += moved / gpu.bandwidth_bytes_s
    return float(groups * tiles.visited * of_tile)
