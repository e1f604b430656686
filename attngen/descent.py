"""Down the ranked plans, until the target's compiler certifies one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from attngen import building, joint, planner, storage, targets
from attngen.backends import Backend
from attngen.errors import CompileError, InternalError, PlanError
from attngen.gpus import Gpu
from attngen.plans import Alternative, Choice, Plan, grouped
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import show_bytes, show_time

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.reports import Certificate

Certified = tuple[Plan, "Source", "Certificate"]
Failed = tuple[Plan, bool]  # and whether it is the forward pass that doesn't fit

TRIES = 8  # plans that a build compiles, at most, before the smallest
GROUP = 2  # of them a process
LEAST = 8  # rows of a warp, below which others' products are made again
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
    failed: list[Failed] = []
    reasons: list[str] = []
    usable: list[Certified] = []
    before: list[Alternative] = []
    least: tuple[Plan, int] | None = None
    triton = by.name == "triton"
    groups = _several(ranked, failed) if triton else _smaller(ranked)
    for candidate, source, certificate in _certified(groups, by):
        if reason := unfit(certificate, candidate):
            reasons.append(reason)
            alone = dataclasses.replace(certificate, kernels=None)
            failed.append((candidate, unfit(alone, candidate) is not None))
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
    kernels = certificate.every_kernel.values()
    if spilled := max(k["spill_bytes"] or 0 for k in kernels):
        reason = f"spills {show_bytes(spilled)}"
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
    for name, found in certificate.every_kernel.items():
        own = _choice_of(plan, name)
        what = f"{name} of " * bool(name) + f"{own['q_chunk']} × {own['k_chunk']}"
        if found["spill_bytes"]:
            return f"{what} spills {found['spill_bytes']} bytes of registers"
        if (found["shared_bytes"] or 0) > gpu.shared_bytes:
            return f"{what} takes {found['shared_bytes']} bytes of shared memory"
        if found["blocks_per_multiprocessor"] == 0:
            threads = f"{found['warps']} warps of {found['registers']} registers"
            return f"{what} doesn't fit a multiprocessor: {threads}"
    return None


def _choice_of(plan: Plan, kernel: str) -> Choice:
    """The choices of the pass that a kernel is of."""
    backward = kernel and plan.spec.derivatives
    return joint.backward_part(plan.choice) if backward else plan.choice


def bound_s(plan: Plan, certificate: Certificate, target: Target) -> float | None:
    """Seconds below which the compiled kernel can't end on the target; None: unknown.

    Programs go in waves of as many as the multiprocessors hold at once; those that share
    one share its pipes.
    """
    gpu = target.gpu
    if gpu is None:
        return None
    total = 0.0
    for name, kernel in certificate.every_kernel.items():
        if name == "combine":  # it has no loop
            continue
        cycles = kernel.get("bound_cycles")
        together = kernel["blocks_per_multiprocessor"]
        if cycles is None or not together:
            return None
        choice = _choice_of(plan, name)
        total += cycles * _turns(plan, choice, together, gpu)
    return total / gpu.clock_hz


def _turns(plan: Plan, choice: Choice, together: int, gpu: Gpu) -> float:
    """Tiles that the busiest multiprocessor does, one after the other."""
    spec = storage.typical(plan.spec)
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    heads = grouped(spec, choice)
    splits = int(choice.get("kv_splits", 1))
    blocks = -(-spec.q_len * heads // q) * splits
    programs = spec.batch * spec.q_heads // heads * blocks
    together = min(together, -(-programs // gpu.multiprocessors))
    waves = -(-programs // (gpu.multiprocessors * together))
    visited = plan.tiles.visited * plan.q_chunk * plan.k_chunk / (q * k)
    return waves * together * visited / blocks


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


def _several(ranked: Sequence[Plan], failed: Sequence[Failed]) -> Iterator[list[Plan]]:
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
                if not any(p is x for x, _ in failed)
            ):
                continue
            group.append(plan)
            if len(group) == (min(GROUP, TRIES - len(tried)) if tried else 1):
                break
        if not group:
            break
        tried += group
        yield group
    if len(tried) == len(failed):
        few = 3 if ranked[0].spec.derivatives == "vjp" else 1
        smallest = [p for p in sorted(ranked, key=_held)[:few] if p not in tried]
        if smallest:
            yield smallest


def _held(plan: Plan) -> tuple[float, ...]:
    """By what a warp's tiles have, of both passes."""
    forward, backward = (
        joint.forward_part(plan.choice),
        joint.backward_part(plan.choice),
    )
    own = _rows(forward) * plan.k_chunk, plan.q_chunk
    if not backward:
        return own
    rows = max(_rows(backward), LEAST)
    return rows * int(backward["k_chunk"]), int(backward["q_chunk"]), *own


def _rows(choice: Choice) -> float:
    return int(choice["q_chunk"]) / int(choice["num_warps"])


def _tile(plan: Plan) -> tuple[object, ...]:
    return plan.q_chunk, plan.k_chunk, plan.choice["num_warps"], plan.choice["head_dim"]


def _holds(plan: Plan, failed: Failed) -> bool:
    """Whether a warp surely holds as much as in one that failed: rows, keys, stages."""
    other, forward = failed
    part = joint.forward_part if forward else joint.backward_part
    own, its = part(plan.choice), part(other.choice)
    return (
        _rows(own) >= _rows(its)
        and int(own["k_chunk"]) >= int(its["k_chunk"])
        and int(own["num_stages"]) >= int(its["num_stages"])
        and own.get("loads") == its.get("loads")
    )
