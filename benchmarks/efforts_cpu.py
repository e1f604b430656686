"""How near the estimate's plan comes to the best that a patient tuning finds.

For each preset that runs here: the cost model's first plan, beside the fastest plan of
`effort="patient"`, in turns. Wanted: the estimate takes at most 1 / 0.8 of the time. What
tuning finds is kept as wisdom, so a second run tunes nothing. Results are merged into
results/efforts_cpu.json.

    python benchmarks/efforts_cpu.py [--only bert-base,t5-large] [--rounds 15] [--seconds S]
"""

import argparse
from typing import Any

from side_by_side import Contest, circumstances, merge, say

import attngen
from attngen import AttentionSpec, backends, presets, timing
from attngen.errors import AttngenError, NotBuiltError

WANTED = 0.8  # of the speed that patient finds


def runs_here(name: str) -> bool:
    try:
        backends.get("jax").refuse(presets.get(name))
    except NotBuiltError as error:
        say(f"{name}: left out: {error.what}")
        return False
    return True


def compared(
    spec: AttentionSpec, rounds: int, seconds: float | None
) -> tuple[dict[str, Any], timing.Spread]:
    """What both efforts chose, and patient's time by the estimate's: the share reached."""
    # The plan's own choices are fixed: what was timed before has no say in it.
    estimate = attngen.build(spec, fix=attngen.plan(spec).choice)
    if seconds is not None:
        attngen.tune(spec, effort="patient", seconds=seconds, on_progress=say)
    patient = attngen.build(spec, effort="patient", on_progress=say)
    contest = Contest()
    contest.own("estimate", estimate)
    if estimate.plan.choice == patient.plan.choice:
        same = {"same_plan": True, "contenders": contest.facts}
        return same, timing.Spread(1.0, 1.0, 1.0)
    contest.own("patient", patient)
    contest.run(rounds)
    found = contest.ratio("patient", "estimate")
    assert found is not None
    return {"same_plan": False} | contest.to_dict(), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(presets.names()), help="presets")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, help="of each tuning; default: its own"
    )
    given = parser.parse_args()
    missed = []
    for name in (n.strip() for n in given.only.split(",")):
        if not runs_here(name):
            continue
        try:
            kept, share = compared(presets.get(name), given.rounds, given.seconds)
        except AttngenError as error:
            say(f"{name}: {error}")
            print(f"{name:<18}failed: {error.what}", flush=True)
            missed.append(name)
            continue
        spread = {"median": share.median, "low": share.low, "high": share.high}
        data = {"share": spread, "wanted": WANTED} | circumstances() | kept
        merge("efforts_cpu.json", {name: data})
        met = share.median >= WANTED
        missed += [] if met else [name]
        same = ", the same plan" if kept["same_plan"] else ""
        print(
            f"{name:<18}{share.median:>6.2f} [{share.low:.2f} {share.high:.2f}]  wanted "
            f"≥ {WANTED}  {'yes' if met else 'NO'}{same}",
            flush=True,
        )
    print("all reach it" if not missed else "missed: " + ", ".join(missed))


if __name__ == "__main__":
    main()
