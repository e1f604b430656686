"""Gradients on a CPU: (q, k, v, dout) → (out, dq, dk, dv), forward and backward in one.

    memory  one head, d = 64, 2^14 tokens, in bfloat16 and float32: what XLA:CPU certifies
            of the planner's own, and within 4 MiB and 256 KiB; bytes a row from 2^14 to
            2^18 at fixed choices; beside jax.vjp of the paper's algorithm, of jax.nn's and
            of plain attention under jax.checkpoint
    speed   float32, 1 × 8 × 4096 × 64: the planner's own in 24 MiB beside jax.vjp of jax.nn's
            and of the paper's algorithm, torch's scaled_dot_product_attention with its
            backward, and the same causal

Contenders take turns in one process, each with arrays in the layout that its library wants;
ratios are medians of each round's, with quartiles. What takes many seconds a call (jax.nn's,
the paper's) has fewer rounds, beside attngen's again. What is run replaces its part of
results/gradients_cpu.json; "load" is the machine's, before and after.

    python benchmarks/gradients_cpu.py [--only memory,speed] [--rounds 9]
"""

import argparse
import dataclasses
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
from side_by_side import Contest, Goal, circumstances, merge, say

import attngen
from attngen import (
    AttentionSpec,
    backends,
    descent,
    inputs,
    masks,
    peers,
    planner,
    presets,
    slopes,
    targets,
    timing,
)
from attngen.backends.jax.program import program
from attngen.errors import BudgetError
from attngen.peers import Ready
from attngen.peers.jax_common import jax_arrays, ready

KIB, MIB = 2**10, 2**20
LENGTHS = (2**14, 2**16, 2**18)
A_ROW = 8  # bytes that may be kept for each query: lse, and the sum of p
BUDGETS = {"none": None, "4 MiB": 4 * MIB, "256 KiB": 256 * KIB}
SMALL = {  # backward passes that keep the least: delta is made again from out and dout
    "bfloat16": {"backward": "two_passes", "backward_delta": "again"},
    "float32": {"backward": "by_keys", "backward_delta": "again"},
}
JAX, CPU = backends.get("jax"), targets.get("cpu")
Part = tuple[dict[str, Any], list[Goal], list[str]]  # to keep; to print; times


def vjp(function: Any) -> Any:
    """(q, k, v, dout) → (out, dq, dk, dv)."""
    import jax

    def gradient(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(function, q, k, v)
        return (out, *pull(dout))

    return gradient


def forwards(spec: AttentionSpec) -> dict[str, Any]:
    """(q, k, v) → out by others, in the layout "bthd"."""
    import jax

    plain = dataclasses.replace(spec, derivatives=None)
    paper, whole = (peers.get(n) for n in ("paper", "plain"))

    def nn(q: Any, k: Any, v: Any) -> Any:
        out = jax.nn.dot_product_attention(q, k, v)
        return out.astype(spec.out_dtype_name)

    return {
        "paper": paper.function(plain),  # type: ignore[attr-defined]
        "jax.nn": nn,
        "plain, checkpoint": jax.checkpoint(whole.function(plain)),  # type: ignore[attr-defined]
    }


# What is certified.


def memory(rounds: int) -> Part:
    kept: dict[str, Any] = {}
    goals: list[Goal] = []
    for dtype in SMALL:
        one = dataclasses.replace(
            presets.get("paper-16k"), dtype=dtype, derivatives="vjp"
        )
        made: dict[str, Any] = {"budgets": {}}
        for name, budget in BUDGETS.items():
            found = certified(dataclasses.replace(one, memory_budget=budget))
            made["budgets"][name] = found
            goals.append(
                Goal(f"{dtype}, {name}", budget, found and found["temp_bytes"])
            )
        made["fixed"] = by_length(one, SMALL[dtype])
        sizes, rows = made["fixed"]["temp_bytes"], LENGTHS[-1] - LENGTHS[0]
        what = f"{dtype}, {SMALL[dtype]['backward']}: growth over {rows} rows"
        goals.append(Goal(what, A_ROW * rows, sizes[LENGTHS[-1]] - sizes[LENGTHS[0]]))
        made["others"] = others(one)
        for name, sizes in made["others"].items():
            goals.append(Goal(f"{dtype}, {name}", None, sizes[one.q_len]))
        kept[dtype] = made
    return kept, goals, []


def certified(spec: AttentionSpec) -> dict[str, Any] | None:
    """The planner's first that is certified within the budget, as a build takes it."""
    try:
        ranked = planner.rank(spec, CPU, JAX, None, smallest=descent.TRIES)
        plan, _, found = descent.first_certified(ranked, JAX)
    except BudgetError as error:
        say(str(error))
        return None
    say(f"{spec.dtype}, {spec.memory_budget}: {found.temp_bytes} bytes, {plan.choice}")
    return {
        "choice": plan.choice,
        "modelled_bytes": plan.temp_bytes,
        "temp_bytes": found.temp_bytes,
    }


def sized(spec: AttentionSpec, length: int) -> AttentionSpec:
    return dataclasses.replace(spec, q_len=length, kv_len=length, memory_budget=None)


def by_length(spec: AttentionSpec, fix: dict[str, Any]) -> dict[str, Any]:
    """Certified temporaries at each length, in the choices of 256 KiB at the first."""
    first = dataclasses.replace(sized(spec, LENGTHS[0]), memory_budget="256KiB")
    fix = fix | {"algorithm": "running", "loop": "fori"}
    choice = dict(attngen.plan(first, fix=fix).choice)
    sizes: dict[int, int] = {}
    for length in LENGTHS:
        plan = attngen.plan(sized(spec, length), fix=choice)
        sizes[length] = attngen.certify(plan).temp_bytes or 0
        say(f"n = {length}: {sizes[length]} bytes")
    return {
        "choice": choice,
        "temp_bytes": sizes,
        "bytes_a_row": a_row(sizes),
    }


def a_row(sizes: dict[int, int]) -> float:
    """Bytes that one more query takes."""
    first, last = min(sizes), max(sizes)
    return (sizes[last] - sizes[first]) / (last - first)


def others(spec: AttentionSpec) -> dict[str, dict[int, int | None]]:
    """Certified temporaries of jax.vjp of what others do, at the first length and the last."""
    import jax

    found: dict[str, dict[int, int | None]] = {}
    for length in (LENGTHS[0], LENGTHS[-1]):
        at = sized(spec, length)
        shapes = [
            jax.ShapeDtypeStruct(at.shape_of(n), at.dtype_of(n))
            for n in ("q", "k", "v", "out")
        ]
        for name, function in forwards(at).items():
            made = attngen.certify(vjp(function), *shapes, target="cpu")
            found.setdefault(name, {})[length] = made.temp_bytes
            say(f"{name}, n = {length}: {made.temp_bytes} bytes")
    return found


# What is timed.


def speed(rounds: int) -> Part:
    before = os.getloadavg()
    full = AttentionSpec(
        q_heads=8, q_len=4096, qk_dim=64, derivatives="vjp", memory_budget=24 * MIB
    )
    causal = dataclasses.replace(full, mask=masks.causal())
    arrays = inputs.arrays(full, nan=False)
    arrays["dout"] = np.random.default_rng(1).standard_normal(
        full.shape_of("out"), dtype="float32"
    )
    contest, slow, goals = Contest(), Contest(), []
    for name, spec in (("attngen", full), ("attngen causal", causal)):
        kernel = attngen.build(spec)
        assert kernel.certificate is not None
        own(contest, name, kernel, arrays)
        need = kernel.certificate.temp_bytes
        goals.append(Goal(f"{name}: temporaries", 24 * MIB, need))
    given = jax_arrays(full, {n: arrays[n] for n in "qkv"})
    given["dout"] = JAX.array(arrays["dout"], "float32", CPU)
    slow.ready["attngen"], slow.facts["attngen"] = contest.ready["attngen"], {}
    for name in ("jax.nn", "paper"):
        slow.ready[name] = ready(vjp(forwards(full)[name]), given, "jax.vjp")
        slow.facts[name] = {"temp_bytes": slow.ready[name].temp_bytes}
    contest.ready["sdpa"] = torch_gradient(arrays)
    contest.facts["sdpa"] = {"said": contest.ready["sdpa"].said}
    compare(contest)
    compare(slow)
    contest.run(rounds)
    slow.run(max(3, rounds // 4))
    for what, wanted, ratio in (
        ("torch SDPA by attngen", 1.0, contest.ratio("sdpa", "attngen")),
        ("attngen by its causal", 1.6, contest.ratio("attngen", "attngen causal")),
        ("jax.nn by attngen", 2.5, slow.ratio("jax.nn", "attngen")),
        ("the paper's algorithm by attngen", None, slow.ratio("paper", "attngen")),
    ):
        goals.append(Goal(what, wanted, ratio))
    load = {"before": before, "after": os.getloadavg()}
    kept = {"load": load, "fast": told(contest), "slow": told(slow)}
    return kept, goals, [*contest.times(), *slow.times()]


def told(contest: Contest) -> dict[str, Any]:
    """All samples, with their quartiles."""
    assert contest.rounds is not None
    samples = contest.rounds.samples_s
    quartiles = {n: asdict(timing.spread(s)) for n, s in samples.items()}
    return {"quartiles_s": quartiles} | contest.to_dict()


def own(
    contest: Contest, name: str, kernel: attngen.Kernel, arrays: dict[str, Any]
) -> None:
    spec = kernel.spec
    function = program(kernel.function, slopes.gradients(spec), slopes.cotangents(spec))
    given = jax_arrays(spec, {n: arrays[n] for n in "qkv"})
    given["dout"] = JAX.array(arrays["dout"], "float32", CPU)
    assert kernel.certificate is not None
    assert kernel.report is not None
    contest.ready[name] = ready(function, given, "")
    contest.facts[name] = {
        "choice": kernel.plan.choice,
        "certified_bytes": kernel.certificate.temp_bytes,
        "max_error": kernel.report.max_error,
    }
    say(f"{name}: {kernel.certificate}, {kernel.plan.choice}")


def torch_gradient(arrays: dict[str, Any]) -> Ready:
    """torch's, forward and backward, in the layout "bhtd"."""
    import torch

    torch.set_num_threads(CPU.cores)

    def tensor(name: str) -> Any:
        return torch.from_numpy(np.ascontiguousarray(arrays[name].swapaxes(1, 2)))

    given = [tensor(n).requires_grad_() for n in "qkv"]
    dout = tensor("dout")

    def call() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(*given)
        return (out, *torch.autograd.grad(out, given, dout))

    def outputs(made: Any) -> Any:
        return tuple(x.detach().numpy().swapaxes(1, 2) for x in made)

    return Ready(call, outputs, "autograd.grad, arrays in bhtd")


def compare(contest: Contest) -> None:
    """Largest differences of out, dq, dk and dv from attngen's own, which was judged."""
    wanted: Any = None
    for name, one in contest.ready.items():
        if name == "attngen causal":
            continue
        made = one.outputs(one.call())
        wanted = made if wanted is None else wanted
        apart = [float(np.abs(a - b).max()) for a, b in zip(made, wanted, strict=True)]
        contest.facts[name]["differs_from_attngen"] = apart
        say(f"{name}: differs by {apart}")


PARTS: dict[str, Callable[[int], Part]] = {"memory": memory, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="of memory,speed")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    chosen = [n.strip() for n in given.only.split(",")]
    if not set(chosen) <= set(PARTS):
        parser.error("--only takes some of " + ",".join(PARTS))
    for name in chosen:
        kept, goals, times = PARTS[name](given.rounds)
        data = {"goals": [g.to_dict() for g in goals]} | circumstances() | kept
        path = merge("gradients_cpu.json", {name: data})
        print(f"{name:<52}{'wanted':>14}  seen")
        print("\n".join(f"   {g}" for g in goals))
        print("\n".join(times), flush=True)
        say(f"merged into {path.name}")


if __name__ == "__main__":
    main()
