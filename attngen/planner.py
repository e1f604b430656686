"""Candidates → legal (legality.py) → ranked by the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attngen.backends import Backend
from attngen.cost import Cost, executed_flop, moved_bytes
from attngen.errors import BudgetError, PlanError
from attngen.intervals import examine
from attngen.legality import has, split
from attngen.lists import SPAN, decided
from attngen.plans import Alternative, Choice, Option, Plan, check_fix
from attngen.regions import spans
from attngen.skipping import sees_nothing, warnings
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Limits, Tiles, chunk_limits, count_tiles
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
    legal, refused = split(spec, target, backend, fix)
    of = _Pricing(spec, target, backend, fix)
    priced = [of.price(choice) for choice in legal]
    priced.sort(key=_by_time)
    fitting = [p for p in priced if of.fits(p)]
    if not fitting:
        priced.sort(key=lambda c: (c[2].temp_bytes, c[2].time_s))
        if not smallest:
            raise no_fit(spec, target, backend, priced[0])
        fitting = priced[:smallest]
    listed = _alternatives(priced, refused, of.budget, fitting[0])
    best, *others = fitting[:most]
    sizes = int(best[0]["q_chunk"]), int(best[0]["k_chunk"])
    first = of.plan((best[0], _exact(spec, best[0], *sizes), best[2]), listed)
    return (first, *(of.plan(p, listed) for p in others))


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
    of = _Pricing(spec, target, backend, fix)
    found = []
    for algorithm, axes in backend.space(spec, target, whole=True).items():
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
        found += [c for c in varied if backend.illegal(spec, target, c) is None]
    apart = [of.price(c) for c in found if _apart(c, choice) == 1]
    return tuple(of.plan(p) for p in sorted(filter(of.fits, apart), key=_by_time))


def _apart(choice: Choice, other: Choice) -> int:
    """In how many choices two candidates differ; those of one algorithm alone are one."""
    if choice["algorithm"] != other["algorithm"]:
        both = [n for n in choice if n in other and n not in ("algorithm", "loop")]
        return 1 + sum(choice[n] != other[n] for n in both)
    return sum(choice[n] != other[n] for n in choice)


Priced = tuple[dict[str, Option], Tiles, Cost]


def _by_time(priced: Priced) -> tuple[float, int]:
    return (priced[2].time_s, priced[2].temp_bytes)


class _Pricing:
    """What the candidates of a spec cost, and the plans they make."""

    def __init__(
        self,
        spec: AttentionSpec,
        target: Target,
        backend: Backend,
        fix: Mapping[str, Option],
    ) -> None:
        self.spec, self.target, self.backend = spec, target, backend
        self.fixed = tuple(fix)
        limits = tuple(limit for span in spans(spec) for limit in span.limits)
        self.ranges = examine(spec, limits)
        self.count = _Counter(spec)
        self.warnings = warnings(spec)
        self.budget = _budget(spec, target)

    def price(self, choice: dict[str, Option]) -> Priced:
        tiles = self.count(choice)
        cost = self.backend.cost(self.spec, self.target, choice, tiles)
        if choice.get("skip") == "list" and decided(self.spec):
            seen = SPAN + int(choice["q_chunk"]) + int(choice["k_chunk"])
            left = min(1.0, seen / self.spec.kv_len)
            cost = replace(cost, time_s=cost.time_s * left)
        return (choice, tiles, cost)

    def fits(self, priced: Priced) -> bool:
        return self.budget is None or priced[2].temp_bytes <= self.budget

    def plan(self, priced: Priced, alternatives: tuple[Alternative, ...] = ()) -> Plan:
        choice, tiles, cost = priced
        options = {n: v for n, v in choice.items() if n not in COMMON}
        sizes = int(choice["q_chunk"]), int(choice["k_chunk"])
        return Plan(
            spec=self.spec,
            target=self.target.name,
            backend=self.backend.name,
            algorithm=str(choice["algorithm"]),
            q_chunk=sizes[0],
            k_chunk=sizes[1],
            options=tuple(options.items()),
            tiles=tiles,
            index_dtype=self.ranges.index_dtype,
            drops_keys=self.ranges.drops_keys,
            temp_bytes=cost.temp_bytes,
            time_s=cost.time_s,
            flop=executed_flop(self.spec, tiles, *sizes, cost.edge_share),
            moved_bytes=moved_bytes(self.spec, tiles, sizes[1]),
            fixed=self.fixed,
            warnings=self.warnings,
            alternatives=alternatives,
        )


COMMON = ("algorithm", "q_chunk", "k_chunk")


def check(plan: Plan, target: Target, backend: Backend) -> None:
    """Refuse a plan that wasn't made by `rank`, but edited or read, and isn't legal.

    Raises:
        NotBuiltError: its spec asks for something that isn't built.
        PlanError: it lacks a choice, has one too many, or isn't legal.
    """
    backend.refuse(plan.spec)
    axes = backend.space(plan.spec, target).get(plan.algorithm, {})
    names = {"algorithm", *axes}
    if not axes or set(plan.choice) != names:
        raise PlanError(
            "The plan doesn't have the choices of its algorithm.",
            got=", ".join(f"{n}={v!r}" for n, v in plan.choice.items()),
            needed=", ".join(names),
        )
    reason = backend.illegal(plan.spec, target, plan.choice)
    if reason is not None:
        raise PlanError(
            "The plan isn't legal.",
            got=", ".join(f"{n}={v!r}" for n, v in plan.choice.items()),
            needed=reason,
        )


class _Counter:
    """Tiles by chunk sizes: most candidates share them."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.tiles: dict[tuple[int, int], Tiles] = {}
        self.listed: dict[tuple[int, int], Tiles] = {}
        self.limits: dict[int, list[tuple[Limits, ...]]] = {}

    def __call__(self, choice: Choice) -> Tiles:
        q_chunk, k_chunk = int(choice["q_chunk"]), int(choice["k_chunk"])
        key = (q_chunk, k_chunk)
        if choice.get("skip") == "list":
            if key not in self.listed:
                self.listed[key] = _count_listed(self.spec, *key, exact=False)
            return self.listed[key]
        if q_chunk not in self.limits:
            self.limits[q_chunk] = chunk_limits(self.spec, q_chunk, exact=False)
        if key not in self.tiles:
            known = self.limits[q_chunk]
            self.tiles[key] = count_tiles(self.spec, *key, limits=known)
        return self.tiles[key]


def _exact(spec: AttentionSpec, choice: Choice, q_chunk: int, k_chunk: int) -> Tiles:
    """The tiles of one head, not by a sample."""
    if sees_nothing(spec):  # its chunks are small, and many
        return Tiles(0, 0, -(-spec.q_len // q_chunk) * -(-spec.kv_len // k_chunk))
    by_list = choice.get("skip") == "list"
    return (_count_listed if by_list else count_tiles)(spec, q_chunk, k_chunk)


def _count_listed(
    spec: AttentionSpec, q_chunk: int, k_chunk: int, *, exact: bool = True
) -> Tiles:
    from attngen.tilemap import count_listed  # needs NumPy

    return count_listed(spec, q_chunk, k_chunk, exact=exact)


def _budget(spec: AttentionSpec, target: Target) -> int | None:
    """The spec's budget, or what the target's memory leaves beside inputs and outputs."""
    if spec.budget_bytes is not None or target.memory_bytes is None:
        return spec.budget_bytes
    own = spec.bytes_of("q", "k", "v", *spec.outputs) // spec.devices
    return target.memory_bytes - own - spec.bytes_of(*(o.name for o in spec.operands))


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
        if (left := _budget(spec, target)) is not None and target.memory_bytes:
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
