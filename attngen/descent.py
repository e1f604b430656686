"""Down the ranked plans, until the target's compiler certifies one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from attngen import building, planner, targets
from attngen.backends import Backend
from attngen.errors import CompileError, InternalError, PlanError
from attngen.plans import Alternative, Plan
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import show_bytes, show_time

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.reports import Certificate

Certified = tuple[Plan, "Source", "Certificate"]

TRIES = 8  # plans that a build compiles, at most, before the smallest
GROUP = 2  # of them a process
FEW = 3  # that compile: of these the one with the least bound is taken


def first_certified(ranked: tuple[Plan, ...], by: Backend) -> Certified:
    """The first plan whose certificate is within the budget; on a GPU of a few the best.

    The first has the compiler's process to itself: it nearly always fits. Of the others a
    process certifies GROUP. Where a GPU's first plan isn't to be used, the next that are
    take turns: of FEW that compile the one whose main loops end first, by their bound.

    Raises:
        BudgetError: none was.
        PlanError: none compiles without spills, within the shared memory.
        CompileError: the compiler refused one that came before, or crashed at it.
    """
    target = targets.get(ranked[0].target)
    failed: list[Plan] = []
    reasons: list[str] = []
    usable: list[Certified] = []
    before: list[Alternative] = []
    least: tuple[Plan, int] | None = None
    triton = by.name == "triton"
    groups = _several(ranked, failed) if triton else _smaller(ranked)
    for candidate, source, certificate in _certified(groups, by):
        if reason := unfit(certificate, candidate):
            reasons.append(reason)
            failed.append(candidate)
            before.append(_left(candidate, certificate))
        elif within(certificate, candidate.spec):
            usable.append((candidate, source, certificate))
            if len(usable) == FEW or not failed:
                break
        else:
            need = certificate.temp_bytes
            assert need is not None
            before.append(_left(candidate, certificate))
            if least is None or need < least[1]:
                least = (candidate, need)
    if usable:
        best = min(usable, key=lambda c: bound_s(c[0], c[2], target) or float("inf"))
        return _after(best[0], before), *best[1:]
    if least is None:
        raise PlanError(
            f"No plan compiles for {target.name} as it should.",
            got="; ".join(dict.fromkeys(reasons)),
            needed="a kernel that neither spills nor exceeds shared memory",
            hint="fix smaller chunks or more warps",
        )
    raise planner.no_fit(least[0].spec, target, by, certified=least)


def _left(plan: Plan, certificate: Certificate) -> Alternative:
    """A plan that was compiled and not taken, with why in a few words."""
    if certificate.spill_bytes:
        reason = f"spills {show_bytes(certificate.spill_bytes)}"
    elif unfit(certificate, plan):
        reason = "doesn't fit, compiled"
    else:
        reason = f"certified {show_bytes(certificate.temp_bytes or 0)}"
    return Alternative(plan.choice, plan.temp_bytes, plan.time_s, reason)


def _after(chosen: Plan, before: Sequence[Alternative]) -> Plan:
    """A plan that others came before, with why they weren't taken among its alternatives.

    What the ranking said of the others was said beside its first.
    """
    if not before:
        return chosen
    said = [chosen.choice, *(a.choice for a in before)]
    others = []
    for a in chosen.alternatives:
        if a.choice in said:
            continue
        budget = chosen.spec.budget_bytes
        if a.temp_bytes is not None and (budget is None or a.temp_bytes <= budget):
            late = (a.time_s or 0.0) - chosen.time_s
            reason = f"slower by {show_time(late)}" if late > 0 else "not compiled"
            a = dataclasses.replace(a, reason=reason)
        others.append(a)
    return dataclasses.replace(chosen, alternatives=(*before, *others))


def within(certificate: Certificate, spec: AttentionSpec) -> bool:
    """Whether what is known of the bytes is within the spec's budget."""
    budget, need = spec.budget_bytes, certificate.temp_bytes
    return budget is None or need is None or need <= budget


def unfit(certificate: Certificate, plan: Plan) -> str | None:
    """Why a compiled kernel isn't to be used on its target, whatever the budget; or None."""
    gpu = targets.get(plan.target).gpu
    if gpu is None:
        return None
    size = f"{plan.q_chunk} × {plan.k_chunk}"
    if certificate.spill_bytes:
        return f"{size} spills {certificate.spill_bytes} bytes of registers"
    for name, found in {
        "": certificate.to_dict(),
        **(certificate.kernels or {}),
    }.items():
        what = f"{size}, {name}," if name else size
        if (found["shared_bytes"] or 0) > gpu.shared_bytes:
            return f"{what} takes {found['shared_bytes']} bytes of shared memory"
        if found["blocks_per_multiprocessor"] == 0:
            threads = f"{found['warps']} warps of {found['registers']} registers"
            return f"{what} doesn't fit a multiprocessor: {threads}"
    return None


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


# Which plans are tried, and in what order.


def _certified(groups: Iterable[Sequence[Plan]], by: Backend) -> Iterator[Certified]:
    """Each plan of some groups with its source and certificate, a process a group.

    Raises:
        CompileError, InternalError: of a plan, when its turn comes.
    """
    for group in groups:
        made = [(plan, building.emit(plan)) for plan in group]
        answers = building.certify_many(made, by, group[0].target)
        for (plan, source), answer in zip(made, answers, strict=True):
            if isinstance(answer, InternalError):
                raise answer
            if isinstance(answer, CompileError):
                if len(group) == 1:
                    raise answer
                # the others of its process may have left it too little time or memory
                answer = building.certify(plan, source, plan.target)
            yield plan, source, answer


def _smaller(ranked: Sequence[Plan]) -> list[list[Plan]]:
    """The fastest few, then ever smaller ones: each with a quarter less memory."""
    tried = list(ranked[: TRIES // 2])
    for candidate in ranked[TRIES // 2 :]:
        if candidate.temp_bytes <= 0.75 * min(p.temp_bytes for p in tried):
            tried.append(candidate)
        if len(tried) == TRIES:
            break
    smallest = min(ranked, key=lambda p: p.temp_bytes)
    tried += [smallest] if smallest not in tried else []
    return [tried[:1]] + [tried[i : i + GROUP] for i in range(1, len(tried), GROUP)]


def _several(ranked: Sequence[Plan], failed: Sequence[Plan]) -> Iterator[list[Plan]]:
    """The fastest whose tiles differ, without what holds as much as one that failed.

    Args:
        failed: grows while groups are taken.
    """
    tried: list[Plan] = []
    while len(tried) < TRIES:
        group: list[Plan] = []
        for plan in ranked:
            known = [*tried, *group]
            if any(plan is p for p in known) or any(_holds(plan, p) for p in failed):
                continue
            if any(
                _tile(plan) == _tile(p)
                for p in known
                if not any(p is x for x in failed)
            ):
                continue
            group.append(plan)
            if len(group) == (min(GROUP, TRIES - len(tried)) if tried else 1):
                break
        if not group:
            break
        tried += group
        yield group
    smallest = min(ranked, key=lambda p: (_rows(p) * p.k_chunk, p.q_chunk))
    if smallest not in tried and len(tried) == len(failed):
        yield [smallest]


def _rows(plan: Plan) -> float:
    return plan.q_chunk / int(plan.choice["num_warps"])


def _tile(plan: Plan) -> tuple[object, ...]:
    return plan.q_chunk, plan.k_chunk, plan.choice["num_warps"], plan.choice["head_dim"]


def _holds(plan: Plan, other: Plan) -> bool:
    """Whether a warp surely holds as much as in another plan: rows, keys, stages."""
    return (
        _rows(plan) >= _rows(other)
        and plan.k_chunk >= other.k_chunk
        and int(plan.choice["num_stages"]) >= int(other.choice["num_stages"])
        and plan.choice["loads"] == other.choice["loads"]
    )
