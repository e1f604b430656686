"""What a Triton kernel costs on a GPU, modelled: a guide for ranking, not a clock.

Each multiprocessor works at the slowest of its pipes (matrix products, exponentials, other
arithmetic, memory); programs are dealt out over multiprocessors in waves.
"""

from __future__ import annotations

from attngen import storage
from attngen.backends.triton import decode
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
from attngen.plans import Choice, grouped
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

# instructions of an element of the scores: scale, subtract, compare, add, convert
OPERATIONS = {"cuda": 6.0, "hip": 4.0}  # AMD does some of them in pairs
RESCALE = {"cuda": 2.0, "hip": 1.0}  # of an element of the weighted sums
CONVERTED = 2.0  # of an element of K or V in a narrower dtype
MASKED = 6.0  # more of them where it is masked
SLOTS = 120.0  # instructions of a warp in an iteration that no pipe accounts for
WAIT_CYCLES = 1500.0  # of an iteration of one program alone: for memory, for each other
SPILLING = 4.0  # times as long, as a guess: such a plan isn't returned in the end
START_CYCLES = 3000.0  # of a program beside its tiles: queries come, sums go
DRIFT = 0.1  # of what heads read again, the part that has left L2: a guess
LATENCY_S = 8e-7  # until what is asked of memory comes
OVERLAP = 0.1  # of the shorter of computing and reading that isn't hidden: a guess
ROWS = {"cuda": 16, "hip": 32}  # that a warp multiplies at once: fewer leave it idle


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    gpu, bytes_ = target.gpu, spec.bytes_of("q", *spec.outputs)
    scratch = decode.scratch_bytes(spec, choice)
    spec = storage.typical(spec)
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
    loaded = k * (qk + v) * BYTES[spec.dtype_of("k")]
    multiplied = k * (qk + v) * BYTES[spec.dtype]
    if spec.is_narrow:
        arithmetic += CONVERTED * k * (qk + v)
    read = warps * multiplied  # each of them reads all of it
    if gpu.architecture in GROUPED:
        read = -(-q // GROUP_ROWS) * multiplied + q * qk * BYTES[spec.dtype]
    pipes = (
        products / rate,
        elements / gpu.exp_per_cycle,
        arithmetic / gpu.fma_per_cycle,
        (read + multiplied) / gpu.shared_bytes_per_cycle,
        loaded / gpu.global_bytes_per_cycle,
    )
    splits, programs = decode.splits(choice), decode.programs(spec, choice)
    visited = tiles.visited / -(-spec.q_len * grouped(spec, choice) // q)
    programs *= splits
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
    heads = spec.batch * spec.q_heads // grouped(spec, choice)
    cycles = heads * (tiles.full * full + tiles.edge * edge)
    if splits > 1:  # the longest share, and what a program does beside its tiles
        cycles *= -(-visited // splits) * splits / max(visited, 1)
        cycles += programs * START_CYCLES
    at_once = gpu.multiprocessors * resident
    waves = -(-programs // at_once) * at_once / programs
    compute = cycles * waves / gpu.multiprocessors / gpu.clock_hz
    moved = bytes_ + _kv_bytes(spec, choice, tiles)
    memory = (moved + 2 * scratch) / gpu.bandwidth_bytes_s
    ahead = loaded * max(1, int(choice["num_stages"]) - 1)  # of a program
    late = moved / (min(programs, at_once) * ahead) * LATENCY_S
    time_s = max(compute, memory, late) + OVERLAP * min(compute, memory)
    time_s += decode.COMBINE_S * (splits > 1)
    return Cost(temp_bytes=listed_bytes(spec, choice) + scratch, time_s=time_s)


def _kv_bytes(spec: AttentionSpec, choice: Choice, tiles: Tiles) -> float:
    """Of keys and values that are read from memory: what is visited, at most all of them.

    Query heads that share a kv head read it one beside the other, mostly from L2.
    """
    heads = grouped(spec, choice)
    tile = (
        int(choice["k_chunk"]) * (spec.qk_dim + spec.v_dim) * BYTES[spec.dtype_of("k")]
    )
    visited = spec.batch * spec.kv_heads * tiles.visited * tile
    once = min(visited, spec.bytes_of("k", "v"))
    return once * (1 + DRIFT * (spec.repeats // heads - 1))


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
