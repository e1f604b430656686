"""XLA as the certifier: what it says that a program allocates. Runs in a child process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attngen.backends.jax.scratch import scratch_bytes


def certify(job: dict[str, Any]) -> dict[str, Any]:
    """Compile a job's program for its target and report the compiler's figures."""
    import importlib.metadata

    import jax

    start = time.perf_counter()
    compiled = _compile(job)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    scratch = scratch_bytes(compiled.as_text())
    return {
        "compiler": f"XLA:{jax.default_backend().upper()}",
        "temp_bytes": int(memory.temp_size_in_bytes) + scratch,
        "scratch_bytes": scratch,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "output_bytes": int(memory.output_size_in_bytes),
        "compile_s": round(seconds, 3),
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib")
        },
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Certify, then run on normal random arrays: seconds of each of `rounds` calls."""
    import jax
    import jax.numpy as jnp

    figures = certify(job)
    compiled = _compile(job)
    arrays = []
    for i, (_, shape, dtype) in enumerate(job["shapes"]):
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


def _compile(job: dict[str, Any]) -> Any:
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", bool(job.get("x64")))
    if "exported" in job:
        import jax.export

        exported = jax.export.deserialize(bytearray(Path(job["exported"]).read_bytes()))
        return jax.jit(exported.call).lower(*exported.in_avals).compile()
    shapes = {n: jax.ShapeDtypeStruct(tuple(s), d) for n, s, d in job["shapes"]}
    named = {n: x for n, x in shapes.items() if n not in ("q", "k", "v")}
    function = _function(job)
    return jax.jit(function).lower(*(shapes[n] for n in "qkv"), **named).compile()


def _function(job: dict[str, Any]) -> Callable[..., Any]:
    from attngen.backends.jax.loader import load_function

    return load_function(Path(job["source"]))
