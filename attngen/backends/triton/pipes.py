"""How long each pipe of a multiprocessor is busy with one tile: a bound, not a clock.

Counted from the assembly of the main loop: instructions of a warp, times the warps of a
block, over what the multiprocessor does in a cycle (see attngen/gpus.py for the sources).
Waiting, conflicts of banks and imbalance of partitions come on top of the bound.

matrix   matrix products; whole float32 ones are the FMA pipe's on NVIDIA
exp      exponentials, reciprocals, and what else the special function unit does
fma      float32 arithmetic, integer products; on AMD all vector instructions
alu      compares, minima, selections, logic, conversions
shared   bytes to and from shared memory, with those that matrix instructions read there
global   bytes from L2
issue    one slot for each instruction
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from attngen.backends.triton.assembly import Instruction
from attngen.gpus import Gpu


@dataclass(frozen=True)
class Tile:
    """Of queries and keys: a kernel's constants; item_bytes are of q, k and v.

    Args:
        qk_products, v_products: that a tile takes over either head dim.
    """

    q_block: int
    k_block: int
    qk_dim: int
    v_dim: int
    item_bytes: int = 2
    qk_products: int = 1
    v_products: int = 1

    @property
    def flops(self) -> int:
        """Useful ones: head dims without padding."""
        dims = self.qk_products * self.qk_dim + self.v_products * self.v_dim
        return 2 * self.q_block * self.k_block * dims


Work = defaultdict[str, float]  # of one warp in one turn of a loop


@dataclass(frozen=True)
class Pipes:
    """Cycles of each pipe for a tile, and the bound that they set."""

    tiles_per_turn: int
    cycles: dict[str, float]
    bound_cycles: float
    bound_pipe: str
    flops_per_cycle: float


def pipes(loop: Sequence[Instruction], gpu: Gpu, tile: Tile, warps: int) -> Pipes:
    """The bound of a main loop (see assembly.main_loops) of a block of so many warps."""
    work = _sass(loop, gpu, tile) if gpu.backend == "cuda" else _amdgcn(loop, gpu)
    turns = _tiles(loop, work, gpu, tile, warps)
    if any(x.opcode.startswith(("UTMALDG", "UBLKCP")) for x in loop):
        moved = tile.k_block * (tile.qk_dim + tile.v_dim) * tile.item_bytes / warps
        work["global"] += moved * turns
        work["shared"] += moved * turns
    if any(x.opcode.startswith("UTC") for x in loop):
        _tensor_memory(work, gpu, tile, turns, warps)
    rates = {
        "exp": gpu.exp_per_cycle / gpu.warp_size,
        "fma": gpu.fma_per_cycle / gpu.warp_size,
        "alu": (gpu.alu_per_cycle or gpu.fma_per_cycle) / gpu.warp_size,
        "shared": gpu.shared_bytes_per_cycle,
        "global": gpu.global_bytes_per_cycle,
        "issue": gpu.issue_per_cycle,
        "matrix": 1.0,  # counted in cycles already
    }
    cycles = {
        name: round(work[name] * warps / rates[name] / turns, 2)
        for name in ("matrix", "exp", "fma", "alu", "shared", "global", "issue")
        if work[name]
    }
    worst = max(cycles, key=lambda name: cycles[name])
    return Pipes(
        tiles_per_turn=turns,
        cycles=cycles,
        bound_cycles=cycles[worst],
        bound_pipe=worst,
        flops_per_cycle=round(tile.flops / cycles[worst], 2),
    )


_SHAPE = re.compile(r"[HIQO]MMA\.168(\d+)")
_GROUP = re.compile(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)")
_MFMA = re.compile(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_([a-z]+\d+)")
_WARPGROUP = 4


def matrix_fma(instruction: Instruction) -> float:
    """Multiply-adds of a warp's matrix instruction; 0 where its name doesn't tell.

    A warp's share of what a warpgroup does together is a quarter.
    """
    opcode = instruction.opcode
    if shape := _SHAPE.match(opcode):
        return 16 * 8 * int(shape[1])
    if shape := _GROUP.match(opcode):
        return int(shape[1]) * int(shape[2]) * int(shape[3]) / _WARPGROUP
    if shape := _MFMA.match(opcode):
        m, n, k = (int(shape[i]) for i in (1, 2, 3))
        return m * n * k * int(shape[4] or 1)
    return 0


def _rate(opcode: str, gpu: Gpu) -> float:
    """Multiply-adds a cycle of a matrix instruction, by the dtype that it multiplies."""
    if "TF32" in opcode or "xf32" in opcode:
        return gpu.matrix_tf32_fma_per_cycle or gpu.matrix_fma_per_cycle
    found = _MFMA.match(opcode)
    if found and found[5] == "f32" and gpu.matrix_float32_fma_per_cycle:
        return gpu.matrix_float32_fma_per_cycle
    return gpu.matrix_fma_per_cycle


def _tiles(
    loop: Sequence[Instruction],
    work: Work,
    gpu: Gpu,
    tile: Tile,
    warps: int,
) -> int:
    """How many tiles one turn of the loop does: a compiler may unroll it.

    As often as it multiplies a tile, padding left aside, and takes its exponentials.
    """
    scores = tile.q_block * tile.k_block
    found = [work["powers"] * warps * gpu.warp_size / scores]
    if tensor := sum(x.opcode.startswith("UTC") for x in loop):
        found.append(tensor / _tensor_instructions(tile))
    elif work["products"]:
        found.append(work["products"] * warps / (tile.flops / 2))
    return max(1, int(min(found) + 1e-6))


def _tensor_instructions(tile: Tile) -> int:
    """tcgen05 multiplies 128 rows, 256 columns and 32 bytes of depth at once."""
    depth = 32 // tile.item_bytes
    scores = -(-tile.qk_dim // depth) * -(-tile.k_block // 256)
    sums = -(-tile.k_block // depth) * -(-tile.v_dim // 256)
    several = (tile.qk_products + tile.v_products) / 2
    return -(-tile.q_block // 128) * int((scores + sums) * several)


def _tensor_memory(work: Work, gpu: Gpu, tile: Tile, turns: int, warps: int) -> None:
    """What UTC instructions do isn't in their names: a tile's products and operands.

    Keys and values come from shared memory, and queries, which stay there; weights and sums
    are in tensor memory.
    """
    qk, v = _padded(tile.qk_dim), _padded(tile.v_dim)
    products = tile.q_block * tile.k_block * (qk + v)
    rate = gpu.matrix_fma_per_cycle / (2 if tile.item_bytes == 4 else 1)
    work["matrix"] += products / rate * turns / warps
    read = -(-tile.q_block // 128) * tile.k_block * (qk + v) + tile.q_block * qk
    work["shared"] += read * tile.item_bytes * turns / warps


def _padded(dim: int) -> int:
    return -(-dim // 16) * 16


# results of one lane, by the instruction's name; what isn't here takes a slot and no more
_FMA = frozenset({
    "FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2", "FSWZADD", "FFMA32I", "FMUL32I",
})  # fmt: skip
_TWICE = frozenset({"FFMA2", "FMUL2", "FADD2"})
_PRODUCT = frozenset({"IMAD", "IMUL", "IDP", "IMAD32I"})
_ALU = frozenset({
    "FMNMX", "FMNMX3", "FSETP", "FSET", "FSEL", "FCHK", "ISETP", "IADD", "IADD3",
    "IADD32I", "VIADD", "IMNMX", "VIMNMX", "VIADDMNMX", "VIMNMX3", "LOP", "LOP3",
    "LOP32I", "PLOP3", "SHF", "SHL", "SHR", "LEA", "PRMT", "SEL", "MOV", "MOV32I",
    "F2FP", "IABS", "BMSK", "SGXT", "P2R", "R2P", "CS2R", "HMNMX2", "HSETP2", "HSET2",
    "I2FP", "F2IP", "VHMNMX", "ISCADD",
})  # fmt: skip
_TILES = frozenset("124")  # of 8 × 8 × 2 bytes, in LDSM and STSM
_SPECIAL = frozenset({"MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO", "BREV"})
_SHARED = frozenset({"LDS", "STS", "ATOMS", "LDL", "STL"})
_GLOBAL = frozenset({"LDG", "STG", "LD", "ST", "RED", "ATOMG", "ATOM"})


def _sass(loop: Sequence[Instruction], gpu: Gpu, tile: Tile) -> Work:
    """Of one warp and turn: instructions of each pipe, bytes, and cycles of products."""
    work: Work = defaultdict(float)
    lanes = gpu.warp_size
    for x in loop:
        name, *suffixes = x.opcode.split(".")
        work["issue"] += 1
        work["powers"] += x.opcode.startswith("MUFU.EX2")
        if products := matrix_fma(x):
            work["products"] += products
            work["matrix"] += products / _rate(x.opcode, gpu)
            if shape := _GROUP.match(x.opcode):
                work["shared"] += _operand_bytes(x, shape)
        elif name in _FMA:
            work["fma"] += 1
        elif name in _TWICE:
            work["fma"] += 2
        elif name in _PRODUCT:
            work["fma"] += gpu.fma_per_cycle // 64  # 64 a cycle on all
        elif name in _ALU:
            work["alu"] += 1
        elif name in _SPECIAL:
            work["exp"] += 1
        elif name == "SHFL":
            work["shared"] += 4 * lanes
        elif name in ("LDSM", "STSM"):
            work["shared"] += 128 * max(int(s) for s in ("1", *suffixes) if s in _TILES)
        elif name in _SHARED:
            work["shared"] += _width(suffixes) * lanes
        elif name in _GLOBAL or name == "LDGSTS":
            work["global"] += _width(suffixes) * lanes
            work["shared"] += _width(suffixes) * lanes * (name == "LDGSTS")
    if not work["products"] and tile.item_bytes == 4:
        work["products"] = sum(x.opcode.startswith("FFMA") for x in loop) * lanes
    return work


def _operand_bytes(x: Instruction, shape: re.Match[str]) -> int:
    """What a warpgroup's product reads of shared memory, a warp's share of it.

    One descriptor in the first place tells of both operands, else of the second alone.
    """
    m, n, k = (int(shape[i]) for i in (1, 2, 3))
    size = 32 // k  # an operand is 32 bytes deep
    first = x.operands.split(",")[1].strip() if "," in x.operands else ""
    return (n + (m if first.startswith("gdesc") else 0)) * k * size // _WARPGROUP


def _width(suffixes: Sequence[str]) -> int:
    """Bytes of a lane's load or store."""
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[s] for s in suffixes if s in widths), 4)


_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_f")
_DS = re.compile(r"ds_(?:read|write|bpermute|permute|swizzle|add)(2?)\w*?_[bui](\d+)")
_LOAD = re.compile(r"(?:buffer|global|flat)_(?:load|store)_(\w+)")
_SIZES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _amdgcn(loop: Sequence[Instruction], gpu: Gpu) -> Work:
    """As `_sass`: of a wavefront."""
    work: Work = defaultdict(float)
    for x in loop:
        work["issue"] += 1
        if products := matrix_fma(x):
            work["products"] += products
            work["matrix"] += products / _rate(x.opcode, gpu)
        elif _TRANSCENDENTAL.match(x.opcode):
            work["exp"] += 1
            work["fma"] += gpu.exp_slots
            work["powers"] += x.opcode.startswith("v_exp")
        elif x.opcode.startswith("v_"):
            work["fma"] += 1
        elif found := _DS.match(x.opcode):
            each = int(found[2]) // 8 * (2 if found[1] else 1)
            work["shared"] += each * gpu.warp_size
        elif found := _LOAD.match(x.opcode):
            size = next((_SIZES[s] for s in _SIZES if s in found[1]), 2)
            work["global"] += size * gpu.warp_size
            work["shared"] += size * gpu.warp_size * _to_shared(x)
    return work


def _to_shared(x: Instruction) -> bool:
    """Whether a load goes to shared memory without passing through registers."""
    return "_lds" in x.opcode or "lds" in x.operands.split()
