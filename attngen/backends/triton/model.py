"""What a Triton kernel costs on a GPU, modelled: a guide for ranking, not a clock.

Each multiprocessor works at the slowest of its pipes (matrix products, exponentials, other
arithmetic, memory); programs are dealt out over multiprocessors in waves.
"""

from __future__ import annotations

from attngen.backends.triton.candidates import (
    GROUP_ROWS,
    GROUPED,
    crowding,
    in_groups,
    pieces,
    registers,
    shared_bytes,
)
from attngen.cost import Cost
from attngen.dtypes import BYTES
from attngen.errors import InternalError
from attngen.expr import axes, operands
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

# instructions of an element of the scores: scale, subtract, compare, add, convert
OPERATIONS = {"cuda": 6.0, "hip": 4.0}  # AMD does some of them in pairs
RESCALE = {"cuda": 2.0, "hip": 1.0}  # of an element of the weighted sums
MASKED = 6.0  # more of them where it is masked
SLOTS = 120.0  # instructions of a warp in an iteration that no pipe accounts for
WAIT_CYCLES = 1500.0  # of an iteration of one program alone: for memory, for each other
SPILLING = 4.0  # times as long, as a guess: such a plan isn't returned in the end
ROWS = {"cuda": 16, "hip": 32}  # that a warp multiplies at once: fewer leave it idle


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    gpu = target.gpu
    if gpu is None:
        raise InternalError(f"{target.name} is no GPU.")
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    qk = sum(width for _, width in pieces(spec.qk_dim, choice["head_dim"]))
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    products = q * k * (qk + v)
    rate = gpu.matrix_fma_per_cycle
    if spec.dtype == "float32":
        rate = gpu.matrix_float32_fma_per_cycle or gpu.fma_per_cycle
    elements = q * k
    arithmetic = elements * (OPERATIONS[gpu.backend] + gpu.exp_slots)
    arithmetic += RESCALE[gpu.backend] * q * v
    warps = int(choice["num_warps"])
    loaded = k * (qk + v) * BYTES[spec.dtype]
    read = warps * loaded  # each of them reads all of it
    if gpu.architecture in GROUPED:
        read = -(-q // GROUP_ROWS) * loaded + q * qk * BYTES[spec.dtype]
    pipes = (
        products / rate,
        elements / gpu.exp_per_cycle,
        arithmetic / gpu.fma_per_cycle,
        (read + loaded) / gpu.shared_bytes_per_cycle,
        loaded / gpu.global_bytes_per_cycle,
    )
    programs = spec.batch * spec.q_heads * -(-spec.q_len // q)
    fitting = gpu.resident(
        registers=min(registers(spec, choice, gpu), gpu.max_registers),
        warps=warps,
        shared_bytes=shared_bytes(spec, choice, gpu),
    )
    resident = max(1, min(fitting, -(-programs // gpu.multiprocessors)))
    hidden = min(1.0, resident * warps / 8)  # enough warps to fill waiting with work
    full = max(pipes) + (sum(pipes) - max(pipes)) * (1 - hidden / 2)
    full *= max(1.0, ROWS[gpu.backend] * warps / q)
    if gpu.architecture in GROUPED and not in_groups(choice, gpu):
        full += products / rate  # the older instructions, at half the rate
    if (held := crowding(spec, choice, gpu)) >= 1:
        full *= SPILLING * held
    full += SLOTS * warps / gpu.issue_per_cycle
    full += WAIT_CYCLES / resident / min(3, int(choice["num_stages"]))
    edge = full + elements * MASKED / gpu.fma_per_cycle
    heads = spec.batch * spec.q_heads
    cycles = heads * (tiles.full * full + tiles.edge * edge)
    at_once = gpu.multiprocessors * resident
    waves = -(-programs // at_once) * at_once / programs
    compute = cycles * waves / gpu.multiprocessors / gpu.clock_hz
    memory = spec.bytes_of("q", "k", "v", *spec.outputs) / gpu.bandwidth_bytes_s
    return Cost(temp_bytes=listed_bytes(spec, choice), time_s=max(compute, memory))


TILE_BYTES = (
    40  # of a tile in the launcher's list, as it is made: indices of 64 bits, twice
)
LIST_BYTES = 2**16  # of small tensors


def listed_bytes(spec: AttentionSpec, choice: Choice) -> int:
    """What the launcher allocates at most for the list of tiles, at the spec's own lengths."""
    if choice.get("skip") != "list":
        return 0
    assert spec.mask is not None
    chunks = -(-spec.q_len // int(choice["q_chunk"]))
    blocks = -(-spec.kv_len // int(choice["k_chunk"]))
    found = axes(spec.mask.expr)
    apart = spec.batch if "b" in found or spec.static_q_offset is None else 1
    apart = spec.batch if spec.kv_lengths or spec.q_lengths else apart
    apart *= spec.q_heads if "h" in found else 1
    entries = sum(spec.bytes_of(o.name) for o in operands(spec.mask.expr))
    return LIST_BYTES + TILE_BYTES * apart * chunks * (blocks + 2) + 8 * entries
