"""What a built kernel's eager call costs beyond the jitted function that it calls.

A tiny attention, so that dispatch is what is timed; interleaved, medians. Prints
microseconds and writes benchmarks/results/overhead_cpu.json.

    python benchmarks/overhead_cpu.py
"""

import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import attngen
from attngen import AttentionSpec, masks

RESULTS = Path(__file__).parent / "results"
CALLS, ROUNDS = 200, 15


def seconds_a_call(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        out = function()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    spec = AttentionSpec(q_heads=1, q_len=8, qk_dim=8, mask=masks.causal())
    kernel = attngen.build(spec)
    q = k = v = jnp.ones(spec.shape_of("q"))
    calls = {
        "jitted function": lambda: kernel.function(q, k, v),
        "kernel": lambda: kernel(q, k, v),
        "attngen.attention": lambda: attngen.attention(q, k, v, mask=masks.causal()),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for function in calls.values():
        seconds_a_call(function)
    for _ in range(ROUNDS):
        for name, function in calls.items():
            times[name].append(seconds_a_call(function) * 1e6)
    base = times["jitted function"]
    beyond = {
        name: statistics.median(t - b for t, b in zip(times[name], base, strict=True))
        for name in calls
    }
    result = {
        "benchmark": "microseconds of an eager call",
        "versions": {n: version(n) for n in ("attngen", "jax", "jaxlib")},
        "median_us": {name: statistics.median(t) for name, t in times.items()},
        "beyond_the_jitted_function_us": beyond,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead_cpu.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
