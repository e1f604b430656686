"""The model against the compiler: bytes of random legal plans, and the order of times.

For each workload class, seeded random plans: the modelled temporaries beside XLA:CPU's own
figure (library fusions included), and, for those that are quick to run, the modelled time
beside the measured one, as a rank correlation. A run is divided by a matrix product timed
just before and after it, since times here swing. Writes benchmarks/results/model_cpu.json.

    python benchmarks/model_cpu.py [plans of a class] [timed, of them] [seed]

200 plans of each class, none of them timed, take about a quarter of an hour: for bytes
alone, code isn't optimised, which changes nothing of what XLA allocates. Each class has a
process of its own (compiled programs fill a process's memory map), and the file is written
after each.
"""

import json
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attngen import AttentionSpec, api, backends, inputs, masks, scores, targets
from attngen.backends.jax import model
from attngen.backends.jax.loader import load_function
from attngen.backends.jax.scratch import scratch_bytes
from attngen.backends.jax.spaces import space
from attngen.plans import Plan
from attngen.tiles import count_tiles

RESULTS = Path(__file__).parent / "results"
JAX, CPU = backends.get("jax"), targets.get("cpu")
UNOPTIMISED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
ALGORITHMS = {"running": 10, "split_kv": 4, "summaries": 4, "dense": 1}  # by weight
RARE = {  # how often a choice is drawn from all its values; else it is the usual one
    "exp": 0.3, "product_dtype": 0.4, "guard": 0.2, "scale": 0.5, "denominator": 0.3,
    "qk": 0.3, "slices": 0.3, "steps": 0.3, "unroll": 0.6, "diagonal": 0.7,
}  # fmt: skip
QUICK = 1.5  # modelled seconds: a plan slower than this isn't run
CLASSES = {
    "plain": AttentionSpec(q_heads=8, q_len=4096, qk_dim=64),
    "ragged": AttentionSpec(q_heads=4, q_len=3000, qk_dim=40, outputs=("out", "lse")),
    "causal, GQA": AttentionSpec(
        q_heads=16, kv_heads=4, q_len=4096, qk_dim=128, mask=masks.causal()
    ),
    "bfloat16": AttentionSpec(
        q_heads=1, q_len=8192, qk_dim=64, dtype="bfloat16", out_dtype="float32"
    ),
    "window, bfloat16": AttentionSpec(
        batch=2,
        q_heads=16,
        kv_heads=4,
        q_len=2048,
        qk_dim=64,
        dtype="bfloat16",
        mask=masks.causal() & masks.sliding_window(512),
    ),
    "bias, float16": AttentionSpec(
        batch=2, q_heads=4, q_len=1024, qk_dim=64, dtype="float16",
        score=(scores.bias(axes="hqk"),),
    ),
    "lengths": AttentionSpec(batch=8, q_heads=12, q_len=512, qk_dim=64, kv_lengths=True),
    "softcap": AttentionSpec(
        q_heads=8, kv_heads=4, q_len=2048, qk_dim=256, layout="bhtd",
        mask=masks.causal(), score=(scores.softcap(50.0),),
    ),
    "cross": AttentionSpec(q_heads=8, q_len=4096, kv_len=77, qk_dim=40),
    "documents": AttentionSpec(q_heads=4, q_len=2000, qk_dim=64, mask=masks.documents()),
    "decode": AttentionSpec(
        q_heads=32, kv_heads=8, q_len=1, kv_len=32768, qk_dim=128,
        mask=masks.causal(), q_offset="bottom_right",
    ),
}  # fmt: skip


def random_choice(spec: AttentionSpec, generator: random.Random) -> dict[str, Any]:
    """A legal candidate that a person might wait for, of all that can be emitted."""
    usual, whole = space(spec, CPU), space(spec, CPU, whole=True)
    while True:
        kind = generator.choices(list(ALGORITHMS), list(ALGORITHMS.values()))[0]
        choice: dict[str, Any] = {"algorithm": kind}
        for name, values in whole[kind].items():
            rare = generator.random() < RARE.get(name, 1)
            choice[name] = generator.choice(values) if rare else usual[kind][name][0]
        few = model.shape(spec, choice).scores * 4 <= 2**30
        if few and JAX.illegal(spec, CPU, choice) is None:
            tiles = count_tiles(spec, choice["q_chunk"], choice["k_chunk"], exact=False)
            if model.time_s(spec, choice, tiles) < 4 * QUICK:
                return choice


def compiled(plan: Plan, *, to_run: bool) -> Callable[..., Any]:
    """The program; where it isn't to run, of the same buffers and unoptimised code."""
    spec = plan.spec
    function = load_function(api.stored(api.emit(plan)))
    names = ("q", "k", "v", *(o.name for o in spec.operands))
    structs = {
        n: jax.ShapeDtypeStruct(spec.shape_of(n), spec.dtype_of(n)) for n in names
    }
    return jax.jit(function).lower(**structs).compile(None if to_run else UNOPTIMISED)


def compiled_bytes(plan: Plan) -> int:
    """What XLA allocates beyond inputs and outputs, inside library fusions too."""
    program: Any = compiled(plan, to_run=False)
    own = program.memory_analysis().temp_size_in_bytes
    return int(own) + scratch_bytes(program.as_text())


def yardstick() -> float:
    """Seconds of a fixed matrix product."""
    start = time.perf_counter()
    jax.block_until_ready(_product(_MATRIX))
    return time.perf_counter() - start


_MATRIX = jnp.ones((1024, 1024), jnp.float32)
_product = jax.jit(lambda a: a @ a @ a @ a)


def relative_time(function: Callable[..., Any], arrays: dict[str, Any]) -> float:
    """Median over five runs, each in yardsticks."""
    jax.block_until_ready(function(**arrays))
    ratios = []
    for _ in range(5):
        before = yardstick()
        start = time.perf_counter()
        jax.block_until_ready(function(**arrays))
        seconds = time.perf_counter() - start
        ratios.append(2 * seconds / (before + yardstick()))
    return statistics.median(ratios)


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def main(count: int = 200, most_timed: int = 12, seed: int = 0) -> None:
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as child:
        for name in CLASSES:
            rows += child.submit(measured, name, count, most_timed, seed).result()
            report(rows, count, seed)


def measured(name: str, count: int, most_timed: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one class."""
    yardstick()
    spec, generator = CLASSES[name], random.Random(f"{seed} {name}")
    known: dict[str, int] = {}  # plans are drawn with repetition
    rows = []
    for i in range(count):
        progress(f"{name}: {i + 1} of {count}")
        plan = api.plan(spec, fix=random_choice(spec, generator))
        key = json.dumps(plan.choice, sort_keys=True)
        if key not in known:
            known[key] = compiled_bytes(plan)
        row = {
            "class": name,
            "choice": plan.choice,
            "temp_bytes": known[key],
            "modelled_bytes": plan.temp_bytes,
            "modelled_s": plan.time_s,
        }
        if most_timed and plan.time_s < QUICK:
            most_timed -= 1
            program = compiled(plan, to_run=True)
            row["yardsticks"] = relative_time(program, arrays_of(spec))
        rows.append(row)
    return rows


def arrays_of(spec: AttentionSpec) -> dict[str, Any]:
    made = inputs.arrays(spec, nan=False)
    return {n: JAX.array(x, spec.dtype_of(n)) for n, x in made.items()}


def progress(text: str) -> None:
    print(f"\r{text:60}", end="", file=sys.stderr, flush=True)


def is_close(row: dict[str, Any]) -> bool:
    """Within 15% or 256 KiB above the compiler's figure."""
    over = row["modelled_bytes"] - row["temp_bytes"]
    return bool(over <= max(0.15 * row["temp_bytes"], 2**18))


def report(rows: list[dict[str, Any]], count: int, seed: int) -> None:
    below = [r for r in rows if r["modelled_bytes"] < r["temp_bytes"]]
    close = {
        name: statistics.mean(is_close(r) for r in rows if r["class"] == name)
        for name in dict.fromkeys(r["class"] for r in rows)
    }
    timed = [r for r in rows if "yardsticks" in r]
    correlations = {}
    for name in CLASSES:
        own = [r for r in timed if r["class"] == name]
        if len(own) > 3:
            correlations[name] = rank_correlation(
                [r["modelled_s"] for r in own], [r["yardsticks"] for r in own]
            )
    summary = {
        "plans": len(rows),
        "below_the_compiler": len(below),
        "within_15_percent_or_256_KiB": close,
        "within_15_percent_or_256_KiB_of_all": statistics.mean(close.values()),
        "rank_correlation": correlations,
        "rank_correlation_of_all": rank_correlation(
            [r["modelled_s"] for r in timed], [r["yardsticks"] for r in timed]
        )
        if timed
        else None,
    }
    result = {
        "benchmark": "model against XLA:CPU",
        "plans_of_a_class": count,
        "seed": seed,
        "versions": {n: version(n) for n in ("attngen", "jax", "jaxlib")},
        "summary": summary,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "model_cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary, indent=2))
    for r in below:
        print(
            f"below: {r['class']} {r['choice']}: {r['modelled_bytes']} < {r['temp_bytes']}"
        )
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
