"""TPUs: their limits, and what one device does in a cycle.

Sources, by the letter that a device's lines name:

C   Google Cloud's pages of each version ("TPU v3", "TPU v6e", "TPU7x", …): peak of a chip,
    cores of a chip, HBM and its bandwidth
J   jax.experimental.pallas.tpu, its table of chips: on-chip memory, matrix units
L   libtpu's own words when a program is too large for a device: the HBM that it may use
P   derived: the sheet's peak / what the matrix units do in a cycle

What a unit does in a cycle was held against the compiler's own estimate of a product of two
matrices of 4096²: that is 87 to 98 % of it on each version (v7x: 83 %).

A device is what JAX calls one: a chip, or on v2, v3 and v7x each of its two cores.
"""

from __future__ import annotations

from dataclasses import dataclass

LANES, SUBLANES = 128, 8  # of a vector register: [8, 128] numbers of 32 bits


@dataclass(frozen=True)
class Tpu:
    """Limits of a device.

    Args:
        generation: "v5e".
        topology: as the compiler knows the smallest slice of such devices.
        chip_config: how its chips are used, where there is a choice.
        kind: what JAX calls a device of it.
        cores: of a device, that the compiler uses as one.
        peak_flop_s: bfloat16 products, summed in float32.
        matrix_side: a matrix unit multiplies by so many rows and columns.
        flop_per_cycle: of all matrix units.
        memory_bytes: of HBM, that a program may use.
        bandwidth_bytes_s: of HBM.
        vmem_bytes: on-chip memory of the vector units, of all cores.
        cmem_bytes: more of it, that v4's cores share.
    """

    generation: str
    topology: str
    kind: str
    cores: int
    peak_flop_s: float
    matrix_side: int
    flop_per_cycle: int
    memory_bytes: int
    bandwidth_bytes_s: float
    vmem_bytes: int
    cmem_bytes: int = 0
    chip_config: str | None = None

    @property
    def clock_hz(self) -> float:
        """P."""
        return self.peak_flop_s / self.flop_per_cycle

    @property
    def on_chip_bytes(self) -> int:
        """All that arrays can lie in beside HBM."""
        return self.vmem_bytes + self.cmem_bytes

    @property
    def bytes_per_cycle(self) -> float:
        """To and from HBM."""
        return self.bandwidth_bytes_s / self.clock_hz


def _tpu(
    generation: str,
    topology: str,
    kind: str,
    *,
    cores: int,
    teraflop_s: float,  # C: the peak of a device
    units: int,  # J: matrix units of a core; v6e and v7x do twice as much in a cycle
    side: int = 128,  # J
    memory_gib: float,  # L
    bandwidth_gb_s: float,  # C
    vmem_mib: int,  # J: of a core
    cmem_mib: int = 0,  # J: of a chip
    chip_config: str | None = None,
) -> Tpu:
    return Tpu(
        generation=generation,
        topology=topology,
        chip_config=chip_config,
        kind=kind,
        cores=cores,
        peak_flop_s=teraflop_s * 1e12,
        matrix_side=side,
        flop_per_cycle=2 * side * side * units * cores,
        memory_bytes=int(memory_gib * 2**30),
        bandwidth_bytes_s=bandwidth_gb_s * 1e9,
        vmem_bytes=vmem_mib * 2**20 * cores,
        cmem_bytes=cmem_mib * 2**20,
    )


TPUS: dict[str, Tpu] = {
    f"tpu-{t.generation}": t
    for t in (
        _tpu(
            "v2",
            "v2:2x2",
            "TPU v2",
            cores=1,
            teraflop_s=23,
            units=1,
            memory_gib=7.48,
            bandwidth_gb_s=358,
            vmem_mib=16,
        ),
        _tpu(
            "v3",
            "v3:2x2",
            "TPU v3",
            cores=1,
            teraflop_s=61.5,
            units=2,
            memory_gib=15.48,
            bandwidth_gb_s=450,
            vmem_mib=16,
        ),
        _tpu(
            "v4",
            "v4:2x2x1",
            "TPU v4",
            cores=2,
            teraflop_s=275,
            units=4,
            memory_gib=30.75,
            bandwidth_gb_s=1228,
            vmem_mib=16,
            cmem_mib=128,
            chip_config="megacore",
        ),
        _tpu(
            "v5e",
            "v5e:2x2",
            "TPU v5 lite",
            cores=1,
            teraflop_s=197,
            units=4,
            memory_gib=15.75,
            bandwidth_gb_s=819,
            vmem_mib=128,
        ),
        _tpu(
            "v5p",
            "v5p:2x2x1",
            "TPU v5",
            cores=2,
            teraflop_s=459,
            units=4,
            memory_gib=95.74,
            bandwidth_gb_s=2765,
            vmem_mib=64,
        ),
        _tpu(
            "v6e",
            "v6e:2x2",
            "TPU v6 lite",
            cores=1,
            teraflop_s=918,
            units=4,
            side=256,
            memory_gib=31.25,
            bandwidth_gb_s=1640,
            vmem_mib=128,
        ),
        _tpu(
            "v7x",
            "tpu7x:2x2x1",
            "TPU7x",
            cores=1,
            teraflop_s=1153.5,
            units=4,
            side=256,
            memory_gib=94.75,
            bandwidth_gb_s=3690,
            vmem_mib=64,
        ),
    )
}
