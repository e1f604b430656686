"""The devices that XLA compiles for, described to it where none is here. In a child process."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from attngen.backends.jax.shards import MESH
from attngen.errors import InternalError
from attngen.gpus import Gpu
from attngen.targets import Target
from attngen.tpus import Tpu

# Of XLA's GpuDeviceInfoProto; what gpus.py doesn't have is from NVIDIA's occupancy tables.
_GPU = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: {gpu.warp_size}
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_per_multiprocessor}
  shared_memory_per_block_optin: {gpu.shared_bytes}
  threads_per_core_limit: {threads}  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.fma_per_cycle}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {clock}  device_memory_size: {gpu.memory_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {gpu.registers}  registers_per_block_limit: {gpu.registers}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""


def quiet() -> None:
    """What has to be set before jax is imported: no device is looked for."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # else two compilers at once collide at a lock file
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def topology(target: Target, shape: str | None = None) -> Any:
    """The target as jax.experimental.topologies describes it.

    Args:
        shape: of a TPU slice, "4x4", or of GPUs, "1x1x8"; None: the smallest.
    """
    from jax.experimental import topologies

    if target.tpu is not None:
        tpu = target.tpu
        name = tpu.topology
        if shape is not None:
            name = f"{name.partition(':')[0]}:{shape}"
        more = {"chip_config_name": tpu.chip_config} if tpu.chip_config else {}
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    if target.gpu is None:
        raise InternalError(f"{target.name} isn't described, but here.")
    import jax

    jax.devices()  # finds the plug-ins
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.model,
        target_config=_described(target.model, target.gpu),
        topology=shape or "1x1x1",
    )


def _described(name: str, gpu: Gpu) -> str:
    capability = gpu.architecture.removeprefix("sm")
    return _GPU.format(
        gpu=gpu,
        name=name,
        threads=gpu.max_warps * gpu.warp_size,
        bandwidth=int(gpu.bandwidth_bytes_s),
        clock=gpu.clock_hz / 1e9,
        major=capability[:-1],
        minor=capability[-1],
    )


SIDES = {
    "v5e": 16,
    "v6e": 16,
}  # chips along a side of the largest slice, by Google Cloud


def _slice(tpu: Tpu, count: int) -> str:
    """The smallest slice of a TPU's topology that has so many devices: each side doubles.

    Raises:
        ValueError: no slice has: the compiler would abort.
    """
    sides = [int(n) for n in tpu.topology.partition(":")[2].split("x")]
    chip = 1 if tpu.cores == 2 or tpu.generation in ("v5e", "v6e") else 2
    while math.prod(sides) * chip < count:
        sides[sides.index(min(sides), 0)] *= 2
        sides.sort()
    if sides[-1] > SIDES.get(tpu.generation, sides[-1]):
        most = SIDES[tpu.generation]
        raise ValueError(
            f"{count} devices are more than the {most} x {most} of a slice of TPU "
            f"{tpu.generation}: shard into fewer parts"
        )
    return "x".join(map(str, sides))


def mesh(target: Target, sizes: Sequence[int]) -> Any:
    """A mesh of such devices, with the axes that shards.py names."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    count = math.prod(sizes)
    if target.kind == "cpu":
        found = jax.devices("cpu")
    elif target.tpu is not None:
        found = topology(target, _slice(target.tpu, count)).devices
    else:
        found = topology(target, f"1x1x{count}").devices
    return Mesh(np.array(found[:count]).reshape(sizes), MESH)


def one_device(target: Target) -> Any:
    """Where a program for one such device lies: a sharding over it alone."""
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = topology(target).devices
    return NamedSharding(Mesh(np.array(devices[:1]), ("x",)), PartitionSpec())
