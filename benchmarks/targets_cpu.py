"""How fast and how small attngen is to be on a CPU, and what it is on this one.

    a  float32 forward, 1 × 8 × 4096 × 64, unmasked and causal, in 16 MiB, both layouts
    b  llama3-8b, prefill of 4096 tokens, float32, in 64 MiB
    c  decode-llama3: one query over 32768 keys; in its own bfloat16, and in float32
    d  paper-16k in 2 MiB and in 64 KiB; flat from 2^12 to 2^18 tokens at a fixed plan

Contenders are judged by the reference, then take turns in one process, each with arrays in
the layout that its library wants; ratios are medians of each round's, with quartiles. The
cases that are run replace theirs in results/targets_cpu.json.

    python benchmarks/targets_cpu.py [--only a,b] [--rounds 15] [--effort estimate]
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from side_by_side import Contest, Goal, circumstances, merge, say

import attngen
from attngen import AttentionSpec, masks, presets

KIB, MIB = 2**10, 2**20
LENGTHS = [2**i for i in range(12, 19)]
FLAT = 1.02  # from the least to the most temporaries over LENGTHS
Case = tuple[dict[str, Any], list[Goal], list[str]]  # to keep; to print; times


def forward(rounds: int, effort: str) -> Case:
    contest, sizes = Contest(), []
    full = AttentionSpec(q_heads=8, q_len=4096, qk_dim=64, memory_budget=16 * MIB)
    causal = dataclasses.replace(full, mask=masks.causal())
    for kind, spec in (("full", full), ("causal", causal)):
        for layout in ("bthd", "bhtd"):
            name = f"attngen {kind} {layout}"
            kernel = _own(
                contest, name, dataclasses.replace(spec, layout=layout), effort
            )
            sizes.append(_size(name, 16 * MIB, kernel))
        for peer in ("jax.nn", "sdpa"):
            contest.peer(f"{peer} {kind}", peer, spec)
    goals = []
    for layout in ("bthd", "bhtd"):
        contest.own(f"same chunks {layout}", _in_chunks_of_causal(full, causal, layout))
    contest.run(rounds)
    for layout in ("bthd", "bhtd"):
        ours, masked = f"attngen full {layout}", f"attngen causal {layout}"
        for what, wanted, slow, fast in (
            ("jax.nn by attngen", 3.5, "jax.nn full", ours),
            ("torch SDPA by attngen", 1.0, "sdpa full", ours),
            ("torch SDPA by attngen, causal", 0.95, "sdpa causal", masked),
            ("attngen by its causal", 1.6, ours, masked),
            ("attngen in its causal's chunks by causal", None,
             f"same chunks {layout}", masked),
            ("jax.nn by attngen, causal", None, "jax.nn causal", masked),
            ("torch SDPA by its causal", None, "sdpa full", "sdpa causal"),
        ):  # fmt: skip
            goals.append(Goal(f"{layout}: {what}", wanted, contest.ratio(slow, fast)))
    return contest.to_dict(), goals + sizes, contest.times()


def _in_chunks_of_causal(
    full: AttentionSpec, causal: AttentionSpec, layout: str
) -> attngen.Kernel:
    """What skipping alone is worth: the unmasked kernel in the causal plan's own choices."""
    full, causal = (dataclasses.replace(s, layout=layout) for s in (full, causal))
    return attngen.build(full, fix=attngen.plan(causal).choice | {"diagonal": 0})


def prefill(rounds: int, effort: str) -> Case:
    spec = dataclasses.replace(
        presets.get("llama3-8b"),
        q_len=4096,
        kv_len=4096,
        dtype="float32",
        memory_budget=64 * MIB,
    )
    contest = Contest()
    kernel = _own(contest, "attngen", spec, effort)
    for peer in ("jax.nn", "sdpa"):
        contest.peer(peer, peer, spec)
    contest.run(rounds)
    goals = [
        Goal("jax.nn by attngen", 4.0, contest.ratio("jax.nn", "attngen")),
        Goal("torch SDPA by attngen", 0.9, contest.ratio("sdpa", "attngen")),
        _size("attngen", 64 * MIB, kernel),
    ]
    return contest.to_dict(), goals, contest.times()


def decode(rounds: int, effort: str) -> Case:
    contest, sizes = Contest(), []
    preset = presets.get("decode-llama3")
    dtypes = (preset.dtype, "float32")
    for dtype in dtypes:
        spec = dataclasses.replace(preset, dtype=dtype)
        kernel = _own(contest, f"attngen {dtype}", spec, effort)
        contest.peer(f"sdpa {dtype}", "sdpa", spec)
        sizes.append(_size(f"attngen {dtype}", None, kernel))
    contest.run(rounds)
    goals = [
        Goal(
            f"torch SDPA by attngen, {d}",
            0.9,
            contest.ratio(f"sdpa {d}", f"attngen {d}"),
        )
        for d in dtypes
    ]
    return contest.to_dict(), goals + sizes, contest.times()


def _own(
    contest: Contest, name: str, spec: AttentionSpec, effort: str
) -> attngen.Kernel:
    kernel = attngen.build(spec, effort=effort, on_progress=say)
    contest.own(name, kernel)
    return kernel


def _size(name: str, budget: int | None, kernel: attngen.Kernel) -> Goal:
    assert kernel.certificate is not None
    return Goal(f"{name}: temporaries", budget, kernel.certificate.temp_bytes)


def memory(rounds: int, effort: str) -> Case:
    """What the compiler certifies; nothing is timed."""
    goals: list[Goal] = []
    kept = {}
    for dtype in ("bfloat16", "float32"):
        for budget in (2 * MIB, 64 * KIB):
            name = f"{dtype} in {budget // KIB} KiB"
            spec = dataclasses.replace(
                presets.get("paper-16k"), dtype=dtype, memory_budget=budget
            )
            kernel = attngen.build(spec)
            assert kernel.certificate is not None
            assert kernel.report is not None
            say(f"{name}: {kernel.certificate}, {kernel.plan.choice}")
            goals.append(_size(f"paper-16k, {name}", budget, kernel))
            choice, sizes = _over_lengths(spec)
            allowed = int(FLAT * min(sizes.values()))
            most = max(sizes.values())
            goals.append(Goal(f"{name}: most over n, a fixed plan", allowed, most))
            kept[name] = {
                "choice": kernel.plan.choice,
                "certified_bytes": kernel.certificate.temp_bytes,
                "max_error": kernel.report.max_error,
                "fixed_choice": choice,
                "certified_bytes_by_length": sizes,
            }
    return kept, goals, []


def _over_lengths(spec: AttentionSpec) -> tuple[dict[str, Any], dict[int, int]]:
    """The plan of the shortest length, and its certified temporaries at each."""

    def at(length: int, fix: Any, budget: int | str | None) -> attngen.Plan:
        sized = dataclasses.replace(
            spec, q_len=length, kv_len=length, memory_budget=budget
        )
        return attngen.plan(sized, fix=fix)

    # one that is legal at any length: no loop is spelled out
    fix = {"algorithm": "running", "loop": "fori"}
    choice = dict(at(LENGTHS[0], fix, spec.memory_budget).choice)
    sizes = {}
    for length in LENGTHS:
        sizes[length] = attngen.certify(at(length, choice, None)).temp_bytes or 0
        say(f"n = {length}: {sizes[length]} bytes")
    return choice, sizes


CASES: dict[str, Callable[[int, str], Case]] = {
    "a": forward,
    "b": prefill,
    "c": decode,
    "d": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CASES), help="of a,b,c,d")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--effort", default="estimate", help="of attngen's kernels")
    given = parser.parse_args()
    chosen = [n.strip() for n in given.only.split(",")]
    if not set(chosen) <= set(CASES):
        parser.error("--only takes some of " + ",".join(CASES))
    if given.rounds < 1:
        parser.error("--rounds takes at least 1")
    for name in chosen:
        kept, goals, times = CASES[name](given.rounds, given.effort)
        effort = {"effort": given.effort} if name != "d" else {}
        data = {"goals": [g.to_dict() for g in goals]} | circumstances() | effort | kept
        path = merge("targets_cpu.json", {name: data})
        print(f"{name}  {'':<49}{'wanted':>11}  measured")
        print("\n".join(f"   {g}" for g in goals))
        print("\n".join(times), flush=True)
        say(f"merged into {path.name}")


if __name__ == "__main__":
    main()
