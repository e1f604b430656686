"""A plan for a device that isn't here, ranked by what its compiler makes of each.

A kernel's main loop takes at least as long as its busiest pipe. With that bound, and with how
many programs a multiprocessor holds, the best few plans of the model are ranked anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from attngen import building, planner, shortlist, tuner
from attngen.backends import Backend
from attngen.errors import CompileError
from attngen.plans import Option, Plan
from attngen.spec import AttentionSpec
from attngen.targets import Target

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.reports import Certificate

Found = tuple[Plan, "Source", "Certificate"]
GROUP = 8  # plans that one process compiles


def best(
    spec: AttentionSpec,
    target: Target,
    by: Backend,
    effort: str,
    fix: Mapping[str, Option],
    say: Callable[[str], None] | None = None,
) -> Found | None:
    """The plan with the least bound, of as many as the effort tries; None: none compiles.

    Raises:
        As `planner.rank`.
    """
    ranked = planner.rank(spec, target, by, fix)
    plans = shortlist.different(ranked, tuner.MOST[effort])
    found: list[tuple[float, Found]] = []
    for i in range(0, len(plans), GROUP):
        group = plans[i : i + GROUP]
        if say is not None:
            say(f"compiling {i + len(group)} of {len(plans)} plans for {target.name}")
        made = [(plan, building.emit(plan)) for plan in group]
        answers = building.certify_many(made, by, target.name)
        for (plan, source), answer in zip(made, answers, strict=True):
            if isinstance(answer, CompileError) or building.unfit(answer, plan):
                continue
            bound = bound_s(plan, answer, target)
            if bound is not None and building.within(answer, spec):
                found.append((bound, (plan, source, answer)))
                if say is not None:
                    say(f"{bound:.3g} s or more: {by.describe(plan.choice)}")
    return min(found, key=lambda f: f[0])[1] if found else None


def bound_s(plan: Plan, certificate: Certificate, target: Target) -> float | None:
    """Seconds below which the compiled kernel can't end on the target; None: unknown.

    Programs go in waves of as many as the multiprocessors hold at once; those that share
    one share its pipes.
    """
    gpu, cycles = target.gpu, certificate.bound_cycles
    together = certificate.blocks_per_multiprocessor
    if gpu is None or cycles is None or not together:
        return None
    spec = plan.spec
    blocks = -(-spec.q_len // plan.q_chunk)
    programs = spec.batch * spec.q_heads * blocks
    together = min(together, -(-programs // gpu.multiprocessors))
    waves = -(-programs // (gpu.multiprocessors * together))
    return waves * together * plan.tiles.visited / blocks * cycles / gpu.clock_hz
