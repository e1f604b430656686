"""The model of XLA:TPU's temporaries against the compiler: bytes of random legal plans.

For each target, seeded random plans over the workload classes, certified by the target's own
compiler in child processes (no TPU is needed, but libtpu): the modelled bytes beside the
certified ones, and the compiler's estimate of cycles. Plans that the compiler refuses, since
they don't fit, are counted apart. Writes benchmarks/results/model_tpu.json after each few
plans, and goes on from there.

    python benchmarks/model_tpu.py [--targets tpu-v3,tpu-v5e] [--count 200] [--seed 0]

A plan takes a second or two.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attngen import (
    AttentionSpec,
    api,
    backends,
    building,
    errors,
    masks,
    presets,
    scores,
    targets,
)
from attngen.backends.jax.spaces import space
from attngen.backends.jax.tpu_memory import temp_bytes
from attngen.plans import Plan
from attngen.targets import Target

RESULTS = Path(__file__).parent / "results"
JAX = backends.get("jax")
BATCH = 12  # plans that one process compiles
ALGORITHMS = {"running": 16, "split_kv": 2, "summaries": 1, "dense": 1}  # by weight
RARE = {  # how often a choice is drawn from all its values, unlike chunks and parts
    "qk": 0.5, "unroll": 0.5, "diagonal": 0.5, "denominator": 0.25, "blank": 0.1,
}  # fmt: skip
DRAWN = ("q_chunk", "k_chunk", "head_chunk", "batch_chunk", "parts")
OTHER = 0.08
LARGEST_TILE = 2**31  # bytes
FEW, SELDOM = 8, 0.2  # chunks of fewer, and how often they are kept
CLASSES = {
    "paper": dataclasses.replace(presets.get("paper-16k"), memory_budget=None),
    "one head, 4096": AttentionSpec(
        q_heads=1, q_len=4096, qk_dim=64, dtype="bfloat16", out_dtype="float32"
    ),
    "causal": AttentionSpec(
        q_heads=1, q_len=8192, qk_dim=64, dtype="bfloat16", out_dtype="float32",
        mask=masks.causal(),
    ),
    "causal, GQA": AttentionSpec(
        q_heads=16, kv_heads=4, q_len=4096, qk_dim=128, dtype="bfloat16",
        mask=masks.causal(),
    ),
    "GQA": AttentionSpec(
        q_heads=16, kv_heads=4, q_len=4096, qk_dim=128, dtype="bfloat16"
    ),
    "float32, lse": AttentionSpec(
        q_heads=4, q_len=2048, qk_dim=64, outputs=("out", "lse")
    ),
    "batch, bhtd": AttentionSpec(
        batch=4, q_heads=8, q_len=1024, qk_dim=64, dtype="bfloat16", layout="bhtd"
    ),
    "window": AttentionSpec(
        batch=2, q_heads=8, kv_heads=4, q_len=4096, qk_dim=128, dtype="bfloat16",
        mask=masks.causal() & masks.sliding_window(1024),
    ),
    "ragged": AttentionSpec(
        q_heads=3, q_len=3000, kv_len=2500, qk_dim=80, dtype="bfloat16"
    ),
    "alibi": AttentionSpec(
        q_heads=8, q_len=2048, qk_dim=64, dtype="bfloat16", mask=masks.causal(),
        score=(scores.alibi(),),
    ),
    "llama": dataclasses.replace(presets.get("llama3-8b"), memory_budget=None),
    "decode": AttentionSpec(
        q_heads=32, kv_heads=8, q_len=1, kv_len=8192, qk_dim=128, dtype="bfloat16"
    ),
    "a million keys": AttentionSpec(
        q_heads=1, q_len=2**20, qk_dim=64, dtype="bfloat16", out_dtype="float32"
    ),
}  # fmt: skip


def random_choice(
    spec: AttentionSpec, target: Target, generator: random.Random
) -> dict[str, Any]:
    """A legal candidate, of all that can be emitted."""
    usual, whole = space(spec, target), space(spec, target, whole=True)
    while True:
        kind = generator.choices(list(ALGORITHMS), list(ALGORITHMS.values()))[0]
        choice: dict[str, Any] = {"algorithm": kind}
        for name, values in whole[kind].items():
            often = 1 if name in DRAWN else RARE.get(name, OTHER)
            drawn = generator.random() < often
            choice[name] = generator.choice(values) if drawn else usual[kind][name][0]
        heads = spec.repeats * choice["head_chunk"] * choice["batch_chunk"]
        if 4 * heads * choice["q_chunk"] * choice["k_chunk"] > LARGEST_TILE:
            continue
        narrow = choice["q_chunk"] < min(FEW, spec.q_len) or choice["k_chunk"] < FEW
        if narrow and generator.random() >= SELDOM:
            continue
        if JAX.illegal(spec, target, choice) is None:
            return choice


def plans(target: Target, count: int, seed: int) -> Iterator[tuple[str, Plan]]:
    """The same for the same seed, of the classes in turn."""
    generator = random.Random(f"{seed} {target.name}")
    for name in itertools.islice(itertools.cycle(CLASSES), count):
        plan = None
        while plan is None:  # what is modelled to exceed the device has no plan
            choice = random_choice(CLASSES[name], target, generator)
            with contextlib.suppress(errors.BudgetError):
                plan = api.plan(CLASSES[name], target=target.name, fix=choice)
        yield name, plan


def measured(target: Target, named: list[tuple[str, Plan]]) -> list[dict[str, Any]]:
    """Rows of some plans, from one child process."""
    made = [(plan, api.emit(plan)) for _, plan in named]
    rows = []
    answers = building.certify_many(made, JAX, target.name)
    for (name, plan), answer in zip(named, answers, strict=True):
        modelled = temp_bytes(plan.spec, plan.choice, plan.tiles, target.tpu)
        row = {"class": name, "choice": plan.choice, "modelled_bytes": modelled}
        if isinstance(answer, errors.CompileError | errors.InternalError):
            row["refused"] = str(answer)[:200]
        else:
            row["temp_bytes"] = answer.temp_bytes
            row["estimated_cycles"] = answer.estimated_cycles
        rows.append(row)
    return rows


def is_close(row: dict[str, Any]) -> bool:
    """Within 15% or 256 KiB above the compiler's figure, and not below it."""
    over = row["modelled_bytes"] - row["temp_bytes"]
    return bool(0 <= over <= max(0.15 * row["temp_bytes"], 2**18))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    known = [r for r in rows if "temp_bytes" in r]
    if not known:
        return {"plans": 0, "refused": len(rows)}
    return {
        "plans": len(known),
        "refused": len(rows) - len(known),
        "below_the_compiler": sum(r["modelled_bytes"] < r["temp_bytes"] for r in known),
        "within_15_percent_or_256_KiB": statistics.mean(is_close(r) for r in known),
    }


def write(path: Path, seed: int, rows: dict[str, list[dict[str, Any]]]) -> None:
    result = {
        "benchmark": "model against XLA:TPU",
        "seed": seed,
        "versions": {n: version(n) for n in ("attngen", "jax", "jaxlib", "libtpu")},
        "summary": {name: summary(r) for name, r in rows.items()},
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", default="tpu-v3,tpu-v5e")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    path = RESULTS / "model_tpu.json"
    rows: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["seed"] == given.seed:
            rows = earlier["rows"]
    for name in given.targets.split(","):
        target, known = targets.get(name), rows.setdefault(name, [])
        drawn = list(plans(target, max(given.count, len(known)), given.seed))
        same = 0
        for row, (_, plan) in zip(known, drawn, strict=False):
            if row["choice"] != plan.choice:  # of a version that drew otherwise
                break
            same += 1
            row["modelled_bytes"] = temp_bytes(
                plan.spec, plan.choice, plan.tiles, target.tpu
            )
        del known[same:]
        left = drawn[same:]
        for i in range(0, len(left), BATCH):
            print(f"\r{name}: {len(known)} of {given.count}", end="", file=sys.stderr)
            known += measured(target, left[i : i + BATCH])
            write(path, given.seed, rows)
    write(path, given.seed, rows)
    print(json.dumps({n: summary(r) for n, r in rows.items()}, indent=2))
    for name, found in rows.items():
        for r in found:
            if "temp_bytes" in r and r["modelled_bytes"] < r["temp_bytes"]:
                print(f"below: {name} {r['class']} {r['choice']}:", end=" ")
                print(f"{r['modelled_bytes']} < {r['temp_bytes']}")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
