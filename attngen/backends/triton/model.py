"""What a Triton kernel costs on a GPU, modelled: a guide for ranking, not a clock.

Each multiprocessor works at the slowest of its pipes (matrix products, exponentials, other
arithmetic, memory); programs are dealt out over multiprocessors in waves.
"""

from __future__ import annotations

from attngen.backends.triton.candidates import pieces, registers, shared_bytes
from attngen.cost import Cost
from attngen.dtypes import BYTES
from attngen.errors import InternalError
from attngen.plans import Choice
from attngen.regions import Tiles
from attngen.spec import AttentionSpec
from attngen.targets import Target

OPERATIONS = 6.0  # of an element of the scores: scale, subtract, compare, add, convert
MASKED = 6.0  # more of them where it is masked
SLOTS = 120.0  # instructions of a warp in an iteration that no pipe accounts for
WAIT_CYCLES = 1500.0  # of an iteration of one program alone: for memory, for each other
ISSUE = 4  # instructions that a multiprocessor issues in a cycle
GROUPED = ("sm90", "sm100")
GROUP = 4  # warps that issue Hopper's and Blackwell's products together
ROWS = 16  # queries that a warp multiplies at once: fewer leave it idle


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    gpu = target.gpu
    if gpu is None:
        raise InternalError(f"{target.name} is no GPU.")
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    qk = sum(width for _, width in pieces(spec.qk_dim, choice["head_dim"]))
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    products = q * k * (qk + v)
    rate = gpu.fma_per_cycle if spec.dtype == "float32" else gpu.matrix_fma_per_cycle
    elements = q * k
    arithmetic = elements * OPERATIONS + 2 * q * v
    warps = int(choice["num_warps"])
    readers = warps if gpu.architecture not in GROUPED else -(-warps // GROUP)
    loaded = k * (qk + v) * BYTES[spec.dtype]
    pipes = (
        products / rate,
        elements / gpu.exp_per_cycle,
        arithmetic / gpu.fma_per_cycle,
        (readers + 1) * loaded / gpu.shared_bytes_per_cycle,  # each reads all of it
        loaded / gpu.global_bytes_per_cycle,
    )
    programs = spec.batch * spec.q_heads * -(-spec.q_len // q)
    fitting = _resident(spec, target, choice)
    resident = min(fitting, -(-programs // gpu.multiprocessors))
    hidden = min(1.0, resident * warps / 8)  # enough warps to fill waiting with work
    full = max(pipes) + (sum(pipes) - max(pipes)) * (1 - hidden / 2)
    full *= max(1.0, ROWS * warps / q)
    if gpu.architecture in GROUPED and (warps < GROUP or q < ROWS * GROUP):
        full += products / rate  # the older instructions, at half the rate
    full += SLOTS * warps / ISSUE
    full += WAIT_CYCLES / resident / min(3, int(choice["num_stages"]))
    edge = full + elements * MASKED / gpu.fma_per_cycle
    heads = spec.batch * spec.q_heads
    cycles = heads * (tiles.full * full + tiles.edge * edge)
    at_once = gpu.multiprocessors * resident
    waves = -(-programs // at_once) * at_once / programs
    compute = cycles * waves / gpu.multiprocessors / gpu.clock_hz
    memory = spec.bytes_of("q", "k", "v", *spec.outputs) / gpu.bandwidth_bytes_s
    return Cost(temp_bytes=0, time_s=max(compute, memory))


def _resident(spec: AttentionSpec, target: Target, choice: Choice) -> int:
    """Programs that share a multiprocessor, by registers and shared memory."""
    gpu = target.gpu
    assert gpu is not None
    warps = int(choice["num_warps"])
    threads = warps * gpu.warp_size
    by_registers = gpu.registers // (registers(spec, choice, gpu) * threads)
    by_shared = gpu.shared_per_multiprocessor // max(1, shared_bytes(spec, choice))
    by_warps = gpu.max_warps // warps
    return max(1, min(by_registers, by_shared, by_warps, gpu.max_blocks))
