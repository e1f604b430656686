"""float32 forward, 1 × 8 × 4096 × 64, on this machine's processor, beside jax.nn.

All contenders in one process, interleaved; the figures are medians of the ratios of each
round, with their quartiles. Writes benchmarks/results/forward_cpu.json.

    python benchmarks/forward_cpu.py [rounds]
"""

import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import attngen
from attngen import AttentionSpec, inputs, masks
from attngen.backends.jax.scratch import scratch_bytes
from attngen.units import show_bytes, show_time

RESULTS = Path(__file__).parent / "results"
SPEC = AttentionSpec(
    batch=1, q_heads=8, q_len=4096, qk_dim=64, dtype="float32", memory_budget="40MiB"
)
SAME = "attngen, in the causal plan's chunks"
CAUSAL = dataclasses.replace(SPEC, mask=masks.causal())


def contenders() -> dict[str, Any]:
    """Compiled functions of (q, k, v)."""
    arrays = _arrays()
    functions: dict[str, Callable[..., Any]] = {
        "jax.nn": jax.nn.dot_product_attention,
        "jax.nn causal": lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True
        ),
    }
    kernels = {"attngen": attngen.build(SPEC), "attngen causal": attngen.build(CAUSAL)}
    same = {n: kernels["attngen causal"].plan.choice[n] for n in ("q_chunk", "k_chunk")}
    kernels[SAME] = attngen.build(SPEC, fix=same)
    for name, kernel in kernels.items():
        print(f"{name:<46} {kernel.plan.choice}", file=sys.stderr)
        functions[name] = kernel.function
    return {n: jax.jit(f).lower(*arrays).compile() for n, f in functions.items()}


def _arrays() -> list[Any]:
    made = inputs.arrays(SPEC)
    return [jax.numpy.asarray(made[n]) for n in "qkv"]


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def main(rounds: int = 15) -> None:
    arrays = _arrays()
    compiled = contenders()
    times: dict[str, list[float]] = {name: [] for name in compiled}
    for name in compiled:
        jax.block_until_ready(compiled[name](*arrays))
    for i in range(rounds):
        print(f"\rround {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            times[name].append(time.perf_counter() - start)
    print(file=sys.stderr)

    def ratio(slow: str, fast: str) -> dict[str, float]:
        return quartiles([a / b for a, b in zip(times[slow], times[fast], strict=True)])

    ratios = {
        "attngen over jax.nn": ratio("jax.nn", "attngen"),
        "attngen causal over jax.nn causal": ratio("jax.nn causal", "attngen causal"),
        "attngen causal over attngen": ratio("attngen", "attngen causal"),
        "attngen causal over attngen in the same chunks": ratio(SAME, "attngen causal"),
    }
    result = {
        "benchmark": "float32 forward, 1 x 8 x 4096 x 64",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
        },
        "versions": {n: version(n) for n in ("attngen", "jax", "jaxlib", "numpy")},
        "rounds": rounds,
        "temp_bytes": {
            n: c.memory_analysis().temp_size_in_bytes + scratch_bytes(c.as_text())
            for n, c in compiled.items()
        },
        "times_s": times,
        "ratios": ratios,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "forward_cpu.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    for name, values in times.items():
        size = show_bytes(result["temp_bytes"][name])
        print(f"{name:<46}{show_time(statistics.median(values)):>10}{size:>12}")
    for name, r in ratios.items():
        print(f"{name:<46}{r['median']:>6.2f}×  [{r['low']:.2f} {r['high']:.2f}]")
    print(f"wrote {path.relative_to(Path.cwd())}", file=sys.stderr)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
