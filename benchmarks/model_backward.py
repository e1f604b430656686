"""The model of backward passes against the compiler: bytes of random legal plans.

For each workload class seeded random backward passes, behind one small forward pass: the
modelled temporaries beside XLA:CPU's own figure (library fusions included) of the whole
program, (q, k, v, dout) → (out, dq, dk, dv). Writes benchmarks/results/model_backward.json.

    python benchmarks/model_backward.py [plans of a class] [seed]
    python benchmarks/model_backward.py again      the model anew, beside the figures there

16 plans of each class take some five minutes. Code isn't optimised, which changes
nothing of what XLA allocates.
"""

import json
import random
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from model_cpu import UNOPTIMISED, is_close, progress

from attngen import (
    AttentionSpec,
    api,
    backends,
    joint,
    masks,
    operand,
    score,
    scores,
    slopes,
    targets,
)
from attngen.backends.jax.loader import load_function
from attngen.backends.jax.program import program
from attngen.backends.jax.scratch import scratch_bytes
from attngen.plans import Plan

PATH = Path(__file__).parent / "results" / "model_backward.json"
JAX, CPU = backends.get("jax"), targets.get("cpu")
SMALL = {"algorithm": "running", "q_chunk": 8, "k_chunk": 8, "head_chunk": 1,
         "batch_chunk": 1}  # fmt: skip
RARE = {  # how often a choice is drawn from all its values; else it is the usual one
    "exp": 0.1, "product_dtype": 0.15, "guard": 0.1, "scale": 0.2, "store": 0.15,
    "slices": 0.1, "ds": 0.1, "head_chunk": 0.4, "batch_chunk": 0.4,
}  # fmt: skip
MOST = 2**25  # elements of a tile


def _spec(**fields: Any) -> AttentionSpec:
    return AttentionSpec(derivatives="vjp", **fields)


_slopes = operand("slopes", axes="h", dtype="float32")
CLASSES = {
    "plain": _spec(q_heads=8, q_len=4096, qk_dim=64),
    "one head": _spec(q_heads=1, q_len=16384, qk_dim=64),
    "ragged": _spec(q_heads=4, q_len=3000, qk_dim=40, outputs=("out", "lse")),
    "causal, GQA": _spec(
        q_heads=16, kv_heads=4, q_len=2048, qk_dim=128, mask=masks.causal()
    ),
    "bfloat16": _spec(
        q_heads=1, q_len=8192, qk_dim=64, dtype="bfloat16", out_dtype="float32"
    ),
    "window, bfloat16": _spec(
        batch=2, q_heads=16, kv_heads=4, q_len=2048, qk_dim=64, dtype="bfloat16",
        mask=masks.causal() & masks.sliding_window(512),
    ),
    "bias, float16": _spec(
        batch=2, q_heads=4, q_len=1024, qk_dim=64, dtype="float16",
        score=(scores.bias(axes="hqk"),),
    ),
    "lengths": _spec(batch=8, q_heads=12, q_len=512, qk_dim=64, kv_lengths=True),
    "softcap, alibi": _spec(
        q_heads=8, kv_heads=4, q_len=2048, qk_dim=128, layout="bhtd",
        mask=masks.causal(),
        score=(scores.softcap(50.0), score(lambda s, b, h, q, k: s + _slopes[h] * (k - q))),
    ),
    "sink": _spec(
        batch=2, q_heads=8, kv_heads=2, q_len=2000, qk_dim=64, sink=True,
        mask=masks.causal(), outputs=("out", "lse"),
    ),
    "cross, bhtd": _spec(
        q_heads=6, kv_heads=3, q_len=4000, kv_len=1000, qk_dim=80, v_dim=48,
        layout="bhtd",
    ),
    "float64": _spec(q_heads=4, q_len=2048, qk_dim=64, dtype="float64"),
}  # fmt: skip


def random_choice(spec: AttentionSpec, generator: random.Random) -> dict[str, Any]:
    """A legal backward pass, of all that can be emitted."""
    assert JAX.backward is not None
    usual = JAX.backward.space(spec, CPU)
    whole = JAX.backward.space(spec, CPU, whole=True)
    while True:
        kind = generator.choice(list(whole))
        choice: dict[str, Any] = {"algorithm": kind}
        for name, values in whole[kind].items():
            rare = generator.random() < RARE.get(name, 1)
            choice[name] = generator.choice(values) if rare else usual[kind][name][0]
        many = choice["batch_chunk"] * choice["head_chunk"] * spec.repeats
        few = many * choice["q_chunk"] * choice["k_chunk"] <= MOST
        long = max(choice["q_chunk"], choice["k_chunk"]) >= 8
        if few and long and JAX.backward.illegal(spec, CPU, choice) is None:
            return choice


def planned(spec: AttentionSpec, choice: dict[str, Any]) -> Plan:
    return api.plan(spec, fix=SMALL | joint.backward_names(choice))


def compiled_bytes(plan: Plan) -> tuple[int, int]:
    """What XLA allocates beyond inputs and outputs, and inside library fusions."""
    spec = plan.spec
    function = load_function(api.stored(api.emit(plan)))
    arrays = {n: n for n in ("q", "k", "v", *(o.name for o in spec.operands))}
    arrays |= slopes.cotangents(spec)
    structs = {
        n: jax.ShapeDtypeStruct(spec.shape_of(x), spec.dtype_of(x))
        for n, x in arrays.items()
    }
    whole = program(function, slopes.gradients(spec), slopes.cotangents(spec))
    with jax.enable_x64(spec.dtype == "float64"):
        made: Any = jax.jit(whole).lower(**structs).compile(UNOPTIMISED)
    own = made.memory_analysis().temp_size_in_bytes
    return int(own), scratch_bytes(made.as_text())


def main(count: int = 16, seed: int = 0) -> None:
    rows: list[dict[str, Any]] = []
    for name, spec in CLASSES.items():
        generator = random.Random(f"{seed} {name}")
        for i in range(count):
            progress(f"{name}: {i + 1} of {count}")
            choice = random_choice(spec, generator)
            plan = planned(spec, choice)
            temp_bytes = sum(compiled_bytes(plan))
            rows.append({"class": name, "choice": choice, "temp_bytes": temp_bytes,
                         "modelled_bytes": plan.temp_bytes})  # fmt: skip
        report(rows, count, seed)


def again() -> None:
    """The model anew, beside the compiler's figures of the committed file."""
    known = json.loads(PATH.read_text())
    for row in known["rows"]:
        plan = planned(CLASSES[row["class"]], row["choice"])
        row["modelled_bytes"] = plan.temp_bytes
    report(known["rows"], known["plans_of_a_class"], known["seed"])


def report(rows: list[dict[str, Any]], count: int, seed: int) -> None:
    below = [r for r in rows if r["modelled_bytes"] < r["temp_bytes"]]
    close = {
        name: statistics.mean(is_close(r) for r in rows if r["class"] == name)
        for name in dict.fromkeys(r["class"] for r in rows)
    }
    summary = {
        "plans": len(rows),
        "below_the_compiler": len(below),
        "least_of_the_compilers": min(
            r["modelled_bytes"] / r["temp_bytes"] for r in rows
        ),
        "within_15_percent_or_256_KiB": close,
        "within_15_percent_or_256_KiB_of_all": statistics.mean(close.values()),
    }
    result = {
        "benchmark": "model of backward passes against XLA:CPU",
        "plans_of_a_class": count,
        "seed": seed,
        "versions": {n: version(n) for n in ("attngen", "jax", "jaxlib")},
        "summary": summary,
        "rows": rows,
    }
    PATH.write_text(
        json.dumps(result, indent=None).replace('{"class"', '\n{"class"') + "\n"
    )
    print(json.dumps(summary, indent=2))
    print(f"wrote {PATH}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["again"]:
        again()
    else:
        main(*map(int, sys.argv[1:]))
