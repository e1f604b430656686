"""GPUs: their limits, and what each multiprocessor does in a cycle.

Sources, by the letter that a device's lines name:

D   the maker's data sheet: NVIDIA A100, L4, H100, H200, HGX B200; AMD MI300X, MI355X
W   the maker's white paper: NVIDIA A100, GA102, Ada, H100, Blackwell (GeForce); AMD CDNA 3,
    CDNA 4
G   CUDA C++ Programming Guide: "Compute Capabilities" (warps, blocks, registers, shared
    memory); CUDA C++ Best Practices Guide: "Throughput of Native Arithmetic Instructions"
    (results a cycle); cuda_occupancy.h (what is allocated in steps of what)
I   AMD CDNA 3 and CDNA 4 Instruction Set Architecture, LLVM's AMDGPU usage guide, ROCm's
    "Accelerator and GPU hardware specifications"
P   derived: the sheet's peak / (multiprocessors x clock x 2)

A warp is 32 lanes on NVIDIA; on AMD a wavefront of 64 is called one here, a compute unit a
multiprocessor, LDS shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Limits of a device. Rates are results of one multiprocessor in one cycle.

    Args:
        architecture: "sm90", "gfx942".
        backend: of Triton: "cuda" or "hip".
        clock_hz: at which the data sheet's matrix peak holds.
        memory_bytes: the sheet's GB, as 10^9: about what the driver leaves of them.
        shared_bytes: the most that one block can have, after opting in.
        reserved_bytes: of shared memory that each block loses to the system.
        shared_step: a block's shared memory is a multiple of it.
        registers: 32-bit, of a multiprocessor.
        max_registers: of a thread; on AMD with accumulation registers.
        register_step: a thread's registers are a multiple of it.
        partitions: of a multiprocessor, each with its share of registers and pipes.
        matrix_fma_per_cycle: float16 or bfloat16 products, summed in float32.
        matrix_tf32_fma_per_cycle: tf32 (xf32 on AMD); None where there is none.
        matrix_float32_fma_per_cycle: whole float32; None: the FMA pipe multiplies them.
        fma_per_cycle: float32 multiply-adds, adds and products; those that AMD
            packs in pairs count once.
        alu_per_cycle: compares, minima, logic, integer adds, selections. None: the FMA
            pipe takes them.
        exp_per_cycle: exponentials, logarithms, reciprocals.
        exp_slots: how long one of them also holds the FMA pipe, in its own instructions.
        issue_per_cycle: warp instructions of any kind.
        shared_bytes_per_cycle: to and from shared memory; writes may take longer.
        global_bytes_per_cycle: from L2, at most: what all multiprocessors get at once is
            less on NVIDIA's.
        copies_to_shared: from global memory, past the registers.
        tensor_descriptors: blocks of a tensor are copied to shared memory as one.
        tensor_columns: of tensor memory, shared out among blocks; None: there is none.
    """

    architecture: str
    backend: str
    multiprocessors: int
    clock_hz: float
    memory_bytes: int
    bandwidth_bytes_s: float
    l2_bytes: int
    warp_size: int
    shared_bytes: int
    shared_per_multiprocessor: int
    reserved_bytes: int
    shared_step: int
    registers: int
    max_registers: int
    register_step: int
    partitions: int
    max_warps: int
    max_blocks: int
    matrix_fma_per_cycle: int
    matrix_tf32_fma_per_cycle: int | None
    matrix_float32_fma_per_cycle: int | None
    fma_per_cycle: int
    alu_per_cycle: int | None
    exp_per_cycle: int
    exp_slots: int
    issue_per_cycle: int
    shared_bytes_per_cycle: int
    global_bytes_per_cycle: int
    copies_to_shared: bool = True
    tensor_descriptors: bool = False
    tensor_columns: int | None = None

    def resident(
        self,
        *,
        registers: int,
        warps: int,
        shared_bytes: int,
        tensor_columns: int = 0,
    ) -> int:
        """Blocks that a multiprocessor runs at once; 0 where not even one can run.

        Args:
            registers: of a thread.
            warps, shared_bytes, tensor_columns: of a block.
        """
        each = -(-max(registers, 1) // self.register_step) * self.register_step
        of_partition = self.registers // self.partitions // (each * self.warp_size)
        slots = min(of_partition * self.partitions, self.max_warps)
        most = self.max_blocks
        if self.backend == "hip" and warps == 1:
            most = self.max_warps  # they need no barrier
        blocks = min(slots // warps, most)
        if shared_bytes > self.shared_bytes:
            return 0
        held = -(-shared_bytes // self.shared_step) * self.shared_step
        if held := held + self.reserved_bytes:
            blocks = min(blocks, self.shared_per_multiprocessor // held)
        if tensor_columns and self.tensor_columns:
            blocks = min(blocks, self.tensor_columns // tensor_columns)
        return blocks


@dataclass(frozen=True)
class _Architecture:
    """What the devices of one architecture have in common."""

    architecture: str
    shared_kib: int  # of a multiprocessor
    max_warps: int
    max_blocks: int
    fma: int
    tensor_descriptors: bool = False
    tensor_columns: int | None = None


# G: shared memory, warps and blocks of a multiprocessor, float32 multiply-adds a cycle;
# tensor descriptors are of compute capability 9.0 and later
SM80 = _Architecture("sm80", 164, 64, 32, 64)
SM86 = _Architecture("sm86", 100, 48, 16, 128)
SM89 = _Architecture("sm89", 100, 48, 24, 128)
SM90 = _Architecture("sm90", 228, 64, 32, 128, True)
SM100 = _Architecture("sm100", 228, 64, 32, 128, True, tensor_columns=512)
SM120 = _Architecture("sm120", 100, 48, 24, 128, True)


def _nvidia(
    of: _Architecture,
    *,
    multiprocessors: int,
    clock_mhz: int,
    memory_gb: int,
    bandwidth_gb_s: int,
    l2_mb: int,
    matrix_fma: int,
    l2_bytes_per_cycle: int = 64,
) -> Gpu:
    """An NVIDIA device: G unless said otherwise.

    Compares, minima and logic 64 a cycle on all (sm100's minima and sm120's integer sums
    may be twice as fast: they are counted as 64); exponentials 16 (4 a partition); 4
    schedulers issue one warp instruction each; shared memory has 32 banks of 4 bytes. A
    block loses 1 KiB of shared memory to the system and may have all but that. tf32 is half
    of float16 (W). 64 bytes a cycle from L2 are a multiprocessor's port (W, A100: 5120 a
    cycle for all of them).
    """
    shared = of.shared_kib * 1024
    return Gpu(
        architecture=of.architecture,
        backend="cuda",
        multiprocessors=multiprocessors,
        clock_hz=clock_mhz * 1e6,
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_s=bandwidth_gb_s * 1e9,
        l2_bytes=l2_mb * 2**20,
        warp_size=32,
        shared_bytes=shared - 1024,
        shared_per_multiprocessor=shared,
        reserved_bytes=1024,
        shared_step=128,
        registers=65536,
        max_registers=255,
        register_step=8,
        partitions=4,
        max_warps=of.max_warps,
        max_blocks=of.max_blocks,
        matrix_fma_per_cycle=matrix_fma,
        matrix_tf32_fma_per_cycle=matrix_fma // 2,
        matrix_float32_fma_per_cycle=None,
        fma_per_cycle=of.fma,
        alu_per_cycle=64,
        exp_per_cycle=16,
        exp_slots=0,
        issue_per_cycle=4,
        shared_bytes_per_cycle=128,
        global_bytes_per_cycle=l2_bytes_per_cycle,
        tensor_descriptors=of.tensor_descriptors,
        tensor_columns=of.tensor_columns,
    )


def _amd(
    architecture: str,
    *,
    multiprocessors: int,
    clock_mhz: int,
    memory_gb: int,
    bandwidth_gb_s: int,
    matrix_fma: int,
    xf32_fma: int | None,
    shared_kib: int,
    shared_bytes_per_cycle: int,
    exp: int,
    copies_to_shared: bool,
    shared_step: int,
    l2_bytes_per_cycle: int,
) -> Gpu:
    """An AMD device: I unless said otherwise.

    Four SIMDs of 16 lanes, each with 512 registers of 64 lanes, half of them for
    accumulation; 8 wavefronts a SIMD; 16 work groups a compute unit have barriers, which
    those of one wavefront don't need. One vector pipe takes float32 and integers alike, 64
    lanes a cycle (packed float32: two results a lane, W), and exponentials hold it for
    longer. A SIMD issues up to five instructions of different kinds every fourth cycle. 2048
    bytes a cycle leave an XCD's L2 (W): for 38 compute units of the MI300X, 32 of the MI355X.
    """
    return Gpu(
        architecture=architecture,
        backend="hip",
        multiprocessors=multiprocessors,
        clock_hz=clock_mhz * 1e6,
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_s=bandwidth_gb_s * 1e9,
        l2_bytes=8 * 4 * 2**20,  # W: 4 MiB of each XCD
        warp_size=64,
        shared_bytes=shared_kib * 1024,
        shared_per_multiprocessor=shared_kib * 1024,
        reserved_bytes=0,
        shared_step=shared_step,
        registers=4 * 512 * 64,
        max_registers=512,
        register_step=8,
        partitions=4,
        max_warps=32,
        max_blocks=16,
        matrix_fma_per_cycle=matrix_fma,
        matrix_tf32_fma_per_cycle=xf32_fma,
        matrix_float32_fma_per_cycle=128,  # D, P: 163.4 TFLOP/s of the MI300X
        fma_per_cycle=64,
        alu_per_cycle=None,
        exp_per_cycle=exp,
        exp_slots=64 // exp,
        issue_per_cycle=5,
        shared_bytes_per_cycle=shared_bytes_per_cycle,
        global_bytes_per_cycle=l2_bytes_per_cycle,
        copies_to_shared=copies_to_shared,
    )


GPUS = {
    # D: SXM, 80 GB; P: 312 TFLOP/s; W: 5120 bytes a cycle from L2 for 108
    "a100": _nvidia(
        SM80, multiprocessors=108, clock_mhz=1410, memory_gb=80, bandwidth_gb_s=2039,
        l2_mb=40, matrix_fma=1024, l2_bytes_per_cycle=47,
    ),
    # W (GA102); P: 71 TFLOP/s when summed in float32, half of what float16 sums give
    "rtx3090": _nvidia(
        SM86, multiprocessors=82, clock_mhz=1695, memory_gb=24, bandwidth_gb_s=936,
        l2_mb=6, matrix_fma=256,
    ),
    # W (Ada); P: 165.2 TFLOP/s when summed in float32
    "rtx4090": _nvidia(
        SM89, multiprocessors=128, clock_mhz=2520, memory_gb=24, bandwidth_gb_s=1008,
        l2_mb=72, matrix_fma=256,
    ),
    # D; P: 121 TFLOP/s, float32 sums at full rate
    "l4": _nvidia(
        SM89, multiprocessors=58, clock_mhz=2040, memory_gb=24, bandwidth_gb_s=300,
        l2_mb=48, matrix_fma=512,
    ),
    # D: SXM5; W: 1830 MHz is the clock of the matrix peak; P: 989.4 TFLOP/s
    "h100": _nvidia(
        SM90, multiprocessors=132, clock_mhz=1830, memory_gb=80, bandwidth_gb_s=3350,
        l2_mb=50, matrix_fma=2048,
    ),
    # D: the H100's multiprocessors with more memory
    "h200": _nvidia(
        SM90, multiprocessors=132, clock_mhz=1830, memory_gb=141, bandwidth_gb_s=4800,
        l2_mb=50, matrix_fma=2048,
    ),
    # D: of an HGX board's eight; P: 2.25 PFLOP/s at 1850 MHz
    "b200": _nvidia(
        SM100, multiprocessors=148, clock_mhz=1850, memory_gb=180, bandwidth_gb_s=7700,
        l2_mb=126, matrix_fma=4096,
    ),
    # W (Blackwell); P: 209.5 TFLOP/s when summed in float32
    "rtx5090": _nvidia(
        SM120, multiprocessors=170, clock_mhz=2407, memory_gb=32, bandwidth_gb_s=1792,
        l2_mb=96, matrix_fma=256,
    ),
    # D; P: 1307.4 TFLOP/s; xf32 653.7; W: exponentials at a quarter of the rate
    "mi300x": _amd(
        "gfx942", multiprocessors=304, clock_mhz=2100, memory_gb=192,
        bandwidth_gb_s=5300, matrix_fma=1024, xf32_fma=512, shared_kib=64,
        shared_bytes_per_cycle=128, exp=16, copies_to_shared=False,
        shared_step=512, l2_bytes_per_cycle=53,
    ),
    # D; P: 2516.6 TFLOP/s; W: LDS reads and exponentials twice as fast; no xf32; loads of
    # 16 bytes a lane go straight to LDS
    "mi355x": _amd(
        "gfx950", multiprocessors=256, clock_mhz=2400, memory_gb=288,
        bandwidth_gb_s=8000, matrix_fma=2048, xf32_fma=None, shared_kib=160,
        shared_bytes_per_cycle=256, exp=32, copies_to_shared=True,
        shared_step=1280, l2_bytes_per_cycle=64,
    ),
}  # fmt: skip

# an architecture's name → the device that stands for it
REPRESENTATIVES = {
    "cuda-sm80": "a100",
    "cuda-sm86": "rtx3090",
    "cuda-sm89": "rtx4090",
    "cuda-sm90": "h100",
    "cuda-sm100": "b200",
    "cuda-sm120": "rtx5090",
}

# Triton's for NVIDIA begin here: for sm70 and sm75 its compiler (3.9) makes multiply-adds of
# products, not matrix instructions, and they spill from tiles of 64 x 32 on
FIRST = 80
OLDER = {"v100": 70, "t4": 75}
