"""Candidates → legal (legality.py) → ranked by the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attngen import joint
from attngen.backends import Backend
from attngen.cost import Cost
from attngen.errors import BudgetError, PlanError
from attngen.legality import Chooser, considered, has, split
from attngen.plans import Alternative, Choice, Option, Plan, check_fix
from attngen.pricing import COMMON, Priced, Pricing, budget_of, exact
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles
from attngen.units import show_bytes, show_time

SHOWN = 3  # alternatives that a plan keeps of each kind


def rank(
    spec: AttentionSpec,
    target: Target,
    backend: Backend,
    fix: Mapping[str, Option] | None = None,
    *,
    smallest: int = 0,
    most: int | None = None,
) -> tuple[Plan, ...]:
    """Every legal plan that is modelled to fit the budget, the fastest first.

    With derivatives "vjp" the forward and the backward pass are ranked each on its own, and
    the best of each are joined.

    Args:
        most: no more than so many of them.
        smallest: where nothing fits, so many plans with the fewest modelled bytes, the
            smallest first, instead of the error: the model is an upper bound, and the
            compiler may certify less.

    Raises:
        NotBuiltError: the spec asks for something that isn't built.
        PlanError: a fixed choice is unknown or leaves nothing legal.
        BudgetError: nothing fits; the error names the least that would.
    """
    backend.refuse(spec)
    fix = check_fix(fix)
    of = Pricing(spec, target, backend, fix)
    if spec.derivatives == "vjp":
        priced, refused = _pairs(of, fix)
    else:
        legal, refused = split(spec, target, backend, fix)
        priced = sorted((of.price(choice) for choice in legal), key=_by_time)
    fitting = [p for p in priced if of.fits(p)]
    if not fitting:
        priced.sort(key=lambda c: (c[2].temp_bytes, c[2].time_s))
        if not smallest:
            raise no_fit(spec, target, backend, priced[0])
        fitting = priced[:smallest]
    listed = _alternatives(priced, refused, of.budget, fitting[0])
    best, *others = fitting[:most]
    sizes = int(best[0]["q_chunk"]), int(best[0]["k_chunk"])
    first = of.plan((best[0], exact(of.of, best[0], *sizes), best[2]), listed)
    return (first, *(of.plan(p, listed) for p in others))


def _pairs(
    of: Pricing, fix: Mapping[str, Option]
) -> tuple[list[Priced], list[Alternative]]:
    """Forward and backward passes joined, the fastest first; and what isn't legal."""
    spec, target, backend = of.spec, of.target, of.backend
    passes = backend.backward
    assert passes is not None
    space = considered(spec, target, backend, joint.forward_part(fix))
    joint.check_names((space, passes.space(spec, target)), fix)
    sides: list[list[Priced]] = []
    refused: list[Alternative] = []
    for chooser, own, price in (
        (backend, joint.forward_part(fix), of.price),
        (passes, joint.backward_part(fix), of.price_backward),
    ):
        try:
            legal, reasons = split(spec, target, chooser, own)
        except PlanError as error:
            if chooser is backend:
                raise
            names = next(iter(passes.space(spec, target).values()))
            raise joint.renamed(error, names) from None
        priced = sorted((price(choice) for choice in legal), key=_by_time)
        fitting = [p for p in priced if of.fits(p)]
        sides.append(joint.worth(fitting or priced, lambda p: p[2].temp_bytes))
        if chooser is backend:
            refused += reasons
    pairs = [of.join(f, b) for f in sides[0] for b in sides[1]]
    if passes.spills:
        known = {id(b) for b in sides[1]}
        pairs += [of.join(sides[0][0], b) for b in priced if id(b) not in known]
    return sorted(pairs, key=_by_time), refused


def near(
    spec: AttentionSpec,
    target: Target,
    backend: Backend,
    choice: Choice,
    fix: Mapping[str, Option] | None = None,
) -> tuple[Plan, ...]:
    """Every legal plan that differs from a candidate in one choice, the fastest first.

    Of all that can be emitted, not only of what `rank` considers; a plan of another
    algorithm keeps the choices that both have. Only those that are modelled to fit.
    """
    fix = check_fix(fix)
    of = Pricing(spec, target, backend, fix)
    if spec.derivatives != "vjp":
        found = [of.price(c) for c in _neighbours(spec, target, backend, choice, fix)]
    else:
        assert backend.backward is not None
        own, other = joint.forward_part(choice), joint.backward_part(choice)
        fixed = joint.forward_part(fix), joint.backward_part(fix)
        forward, backward = of.price(own), of.price_backward(other)
        made = _neighbours(spec, target, backend, own, fixed[0])
        found = [of.join(of.price(c), backward) for c in made]
        made = _neighbours(spec, target, backend.backward, other, fixed[1])
        found += [of.join(forward, of.price_backward(c)) for c in made]
    return tuple(of.plan(p) for p in sorted(filter(of.fits, found), key=_by_time))


def _neighbours(
    spec: AttentionSpec,
    target: Target,
    chooser: Chooser,
    choice: Choice,
    fix: Mapping[str, Option],
) -> list[dict[str, Option]]:
    """The legal candidates that differ from one in one choice."""
    found = []
    usual = considered(spec, target, chooser, fix)
    for algorithm, axes in chooser.space(spec, target, whole=True).items():
        if not has(algorithm, axes, fix):
            continue
        kept = {n: choice.get(n, values[0]) for n, values in axes.items()}
        same: dict[str, Option] = {"algorithm": algorithm} | kept | dict(fix)
        varied = [same] + [
            same | {n: value}
            for n, values in axes.items()
            for value in values
            if n not in fix and value != same[n]
        ]
        unsaid = {
            n: v[0] for n, v in axes.items() if n not in usual.get(algorithm, axes)
        }
        made = [{n: v for n, v in c.items() if v != unsaid.get(n)} for c in varied]
        found += [c for c in made if chooser.illegal(spec, target, c) is None]
    return [c for c in found if _apart(c, choice) == 1]


def _apart(choice: Choice, other: Choice) -> int:
    """In how many choices two candidates differ; those of one algorithm alone are one."""
    if choice["algorithm"] != other["algorithm"]:
        both = [n for n in choice if n in other and n not in ("algorithm", "loop")]
        return 1 + sum(choice[n] != other[n] for n in both)
    return sum(choice.get(n) != other.get(n) for n in {*choice, *other})


def _by_time(priced: Priced) -> tuple[float, int]:
    return (priced[2].time_s, priced[2].temp_bytes)


def check(plan: Plan, target: Target, backend: Backend) -> None:
    """Refuse a plan that wasn't made by `rank`, but edited or read, and isn't legal.

    Raises:
        NotBuiltError: its spec asks for something that isn't built.
        PlanError: it lacks a choice, has one too many, or isn't legal.
    """
    backend.refuse(plan.spec)
    sides: list[tuple[Chooser, Choice]] = [(backend, plan.choice)]
    if plan.spec.derivatives == "vjp" and backend.backward is not None:
        own, other = joint.forward_part(plan.choice), joint.backward_part(plan.choice)
        sides = [(backend, own), (backend.backward, other)]
    for chooser, choice in sides:
        _check_side(plan, target, chooser, choice)


def _check_side(plan: Plan, target: Target, chooser: Chooser, choice: Choice) -> None:
    algorithm = str(choice.get("algorithm"))
    axes = considered(plan.spec, target, chooser, choice).get(algorithm, {})
    names = {"algorithm", *axes}
    if not axes or set(choice) != names:
        raise PlanError(
            "The plan doesn't have the choices of its algorithm.",
            got=", ".join(f"{n}={v!r}" for n, v in plan.choice.items()),
            needed=", ".join(names),
        )
    reason = chooser.illegal(plan.spec, target, choice)
    if reason is not None:
        raise PlanError(
            "The plan isn't legal.",
            got=", ".join(f"{n}={v!r}" for n, v in plan.choice.items()),
            needed=reason,
        )


def no_fit(
    spec: AttentionSpec,
    target: Target,
    backend: Backend,
    least: tuple[Choice, Tiles, Cost] | None = None,
    certified: tuple[Plan, int] | None = None,
) -> BudgetError:
    """The error for a budget that nothing fits, with the least that would do."""
    if certified is not None:
        plan, need = certified
        choice: Any = plan.choice
    else:
        assert least is not None
        choice, need = least[0], least[2].temp_bytes
    budget = spec.budget_bytes
    if budget is not None:
        what = show_bytes(budget)
        got, hint = f"{what} ({budget} bytes)", f"raise memory_budget to {need}"
    else:
        what = got = "what the target's memory leaves"
        hint = "a smaller batch, shorter lengths, or a larger target"
        if (left := budget_of(spec, target)) is not None and target.memory_bytes:
            own, has = target.memory_bytes - left, target.memory_bytes
            got += f": {show_bytes(own)} of inputs and outputs, of {show_bytes(has)}"
    return BudgetError(
        f"No plan fits {what} on {target.name}.",
        got=f"memory_budget = {got}",
        needed=f"at least {show_bytes(need)} ({need} bytes, "
        f"{'certified' if certified else 'modelled'}): {backend.describe(choice)}",
        hint=hint,
    )


def _alternatives(
    priced: list[tuple[dict[str, Option], Tiles, Cost]],
    refused: list[Alternative],
    budget: int | None,
    chosen: tuple[dict[str, Option], Tiles, Cost],
) -> tuple[Alternative, ...]:
    """The next best that fit, the faster ones that don't, dense, and what isn't legal."""
    over, slower = [], []
    seen = {_chunks(chosen[0])}  # of those that differ in lesser choices, the best
    for choice, _, cost in priced:
        if _chunks(choice) in seen:
            continue
        seen.add(_chunks(choice))
        if budget is not None and cost.temp_bytes > budget:
            reason = f"over budget by {show_bytes(cost.temp_bytes - budget)}"
            over.append(Alternative(choice, cost.temp_bytes, cost.time_s, reason))
        else:
            late = cost.time_s - chosen[2].time_s
            reason = (
                f"slower by {show_time(late)}" if late > 0 else "as fast, more memory"
            )
            slower.append(Alternative(choice, cost.temp_bytes, cost.time_s, reason))
    shown = [*slower[:SHOWN], *(a for a in over[:SHOWN] if _sooner(a, chosen[2]))]
    dense = [a for a in (*over, *slower) if a.choice["algorithm"] == "dense"]
    return (*shown, *(a for a in dense if a not in shown), *refused[: 2 * SHOWN])


def _chunks(choice: Choice) -> tuple[Option, ...]:
    return tuple(choice[n] for n in COMMON)


def _sooner(a: Alternative, chosen: Cost) -> bool:
    return a.time_s is not None and a.time_s < chosen.time_s
