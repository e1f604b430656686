"""XLA as the certifier: what it says that a program allocates. Runs in a child process."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attngen import compilers, targets
from attngen.backends.jax import devices
from attngen.backends.jax.cycles import estimated_cycles
from attngen.backends.jax.program import program
from attngen.backends.jax.scratch import scratch_bytes
from attngen.certifier import TOO_LARGE
from attngen.dtypes import ARRAYS
from attngen.machine import cuda_plugin
from attngen.targets import Target
from attngen.version import installed

PACKAGES = {
    "cpu": ("jax", "jaxlib"),
    "tpu": ("jax", "jaxlib", "libtpu"),
    "cuda": ("jax", "jaxlib", f"jax-{cuda_plugin()}-pjrt"),
}


def certify(job: dict[str, Any]) -> dict[str, Any]:
    """Compile a job's program for its target and report the compiler's figures.

    Args:
        job: "target", "shapes"; "source" or "exported", as a path; "x64"; "turns" of its
            loops (see cycles.py); "gradients", "cotangents" (see program.py).
    """
    target = targets.get(job["target"])
    if target.kind != "cpu":
        devices.quiet()
    start = time.perf_counter()
    compiled = _compile(job, target)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    own = compilers.of(target, "jax")
    assert own is not None
    found: dict[str, Any] = {
        "compiler": own.name,
        "temp_bytes": int(memory.temp_size_in_bytes),
        "argument_bytes": int(memory.argument_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes),
        "compile_s": round(seconds, 3),
        "versions": installed(PACKAGES[target.kind]),
    }
    _check_fits(memory, target)
    text = compiled.as_text()
    if "mesh" in job:
        count = math.prod(job["mesh"])
        found |= {"devices": count, "collectives": _collectives(text)}
    if target.kind == "cpu":
        scratch = scratch_bytes(text)
        found |= {"temp_bytes": found["temp_bytes"] + scratch, "scratch_bytes": scratch}
    if target.tpu is not None:
        found |= {
            "on_chip_bytes": _on_chip(memory),
            "estimated_cycles": estimated_cycles(
                text, target.tpu.bytes_per_cycle, job.get("turns")
            ),
        }
    return found


COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast",
    "collective-permute", "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip


def _collectives(hlo: str) -> dict[str, int]:
    """How often a module has each operation by which devices exchange something."""
    counts = {c: len(re.findall(rf" {c}(?:-start)?\(", hlo)) for c in COLLECTIVES}
    return {name: count for name, count in counts.items() if count}


def _check_fits(memory: Any, target: Target) -> None:
    """Refuse what doesn't fit a device that isn't here, as XLA:TPU mostly does itself.

    XLA:GPU asks for any number of bytes, and XLA:TPU for some more than there are.
    """
    need = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    need += memory.output_size_in_bytes - memory.alias_size_in_bytes
    has = target.memory_bytes
    if target.kind != "cpu" and has is not None and need > has:
        raise RuntimeError(
            f"{TOO_LARGE}: memory required ({need}) exceeds available HBM ({has})"
        )


def _on_chip(memory: Any) -> int:
    """What is alive at the worst moment beside HBM's temporaries, inputs and outputs."""
    peak = int(getattr(memory, "peak_memory_in_bytes", 0))
    known = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    return max(0, peak - int(known + memory.output_size_in_bytes))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Certify, then run on normal random arrays: seconds of each of `rounds` calls."""
    import jax
    import jax.numpy as jnp

    figures = certify(job)
    compiled = _compile(job, targets.get(job["target"]))
    arrays = []
    for i, (_, shape, dtype) in enumerate(_shapes(job)):
        arrays.append(
            jax.random.normal(jax.random.key(i), shape, jnp.float32).astype(dtype)
        )
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(job["rounds"]):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return figures | {"times_s": times, "peak_rss_bytes": _peak_rss_bytes()}


def _peak_rss_bytes() -> int:
    """Of this process alone: on Linux ru_maxrss begins at its parent's."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(n.split(":", 1) for n in status.read_text().splitlines())
        return int(fields["VmHWM"].removesuffix("kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _shapes(job: dict[str, Any]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of each array, the dtype as JAX calls it."""
    return [(n, tuple(s), ARRAYS.get(d, d)) for n, s, d in job["shapes"]]


def _compile(job: dict[str, Any], target: Target) -> Any:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", bool(job.get("x64")))
    if "mesh" in job:
        return _compile_sharded(job, target)
    where = None if target.kind == "cpu" else devices.one_device(target)

    def placed(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    if "exported" in job:
        import jax.export

        exported = jax.export.deserialize(bytearray(Path(job["exported"]).read_bytes()))
        function, given = exported.call, [placed(x) for x in exported.in_avals]
        named = {}
    else:
        shapes = {n: placed(jax.ShapeDtypeStruct(s, d)) for n, s, d in _shapes(job)}
        function, given = _function(job), [shapes.pop(n) for n in "qkv"]
        named = shapes
    jitted = jax.jit(function, out_shardings=where) if where else jax.jit(function)
    return jitted.lower(*given, **named).compile()


def _compile_sharded(job: dict[str, Any], target: Target) -> Any:
    """A program under automatic partitioning, its arrays sharded as shards.mesh says."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    if target.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", math.prod(job["mesh"]))
    mesh, arrays = devices.mesh(target, job["mesh"]), job["arrays"]

    def where(name: str) -> Any:
        return NamedSharding(mesh, PartitionSpec(*arrays[name]))

    pulled = job.get("cotangents", {})
    shapes = {
        n: jax.ShapeDtypeStruct(s, d, sharding=where(pulled.get(n, n)))
        for n, s, d in _shapes(job)
    }
    given = [shapes.pop(n) for n in "qkv"]
    names = [*job["outputs"], *job.get("gradients", {}).values()]
    outputs = [where(name) for name in names]
    given_out = tuple(outputs) if len(outputs) > 1 else outputs[0]
    jitted = jax.jit(_function(job), out_shardings=given_out)
    return jitted.lower(*given, **shapes).compile()


def _function(job: dict[str, Any]) -> Callable[..., Any]:
    from attngen.backends.jax.loader import load_function

    function = load_function(Path(job["source"]))
    return program(function, job.get("gradients", {}), job.get("cotangents", {}))
