"""Recall and tune: what was timed of a spec before, and what is timed now."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from attngen import planner, timing
from attngen.backends import Backend
from attngen.building import TRIES, certify_many, emit, passed, stored
from attngen.errors import (
    AttngenError,
    CompileError,
    PlanError,
    TimingError,
    ValidationError,
    WisdomError,
)
from attngen.plans import Alternative, Option, Plan
from attngen.records import Candidate, Key, Record
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import show_bytes
from attngen.version import __version__

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.reports import Certificate
    from attngen.tuner import Prepared

Fix = Mapping[str, Option]
BATCH = (
    8  # plans that one process certifies; the first few are asked for one, two, four
)
LONG_S = 0.5  # modelled: a longer call is validated small here, and whole by `build`
SHOWN = 5  # other plans that were timed, in a plan's explanation


# Wisdom: what was timed before.


def key_of(spec: AttentionSpec, target: Target, by: Backend) -> Key:
    """What a time of the spec holds for, here and now."""
    plain = msgspec.json.decode(spec.to_json())
    plain.pop("memory_budget")
    return Key(
        spec=plain,
        target=target.name,
        device=target.model,
        cores=target.cores,
        backend=by.name,
        versions=_versions(tuple(by.requires)),
    )


@functools.cache
def _versions(requires: tuple[str, ...]) -> dict[str, str]:
    names = [re.split(r"[^\w.-]", r.strip(), maxsplit=1)[0] for r in requires]
    if "jax" in names:
        names.append("jaxlib")
    found = {"attngen": __version__}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def neutral(spec: AttentionSpec, target: Target, by: Backend, choice: Fix) -> Plan:
    """The plan of a full choice, of the spec without its budget: what records are of."""
    free = dataclasses.replace(spec, memory_budget=None)
    return dataclasses.replace(planner.rank(free, target, by, choice)[0], fixed=())


def recall(
    spec: AttentionSpec, target: Target, by: Backend, effort: str, fix: Fix
) -> tuple[Plan, Source] | None:
    """The fastest recorded plan that fits, and that is still emitted as it was recorded.

    None where no search of that effort ended, it was of a smaller budget than the model's
    best plan needs now, or none of its plans fits. Damaged wisdom is a warning where the
    effort is "estimate".

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    from attngen import wisdom

    try:
        record = wisdom.find(key_of(spec, target, by))
    except WisdomError as error:
        if effort != "estimate":
            raise
        warnings.warn(f"Wisdom isn't used: {error}", stacklevel=4)
        return None
    if record is None or not _searched(record, spec, target, by, effort, fix):
        return None
    for candidate in record.ranked(spec.budget_bytes, fix):
        if (plan := _current(candidate, spec, target, by)) is not None:
            others = _others(record, candidate, spec, fix)
            chosen = dataclasses.replace(
                plan, spec=spec, fixed=tuple(fix), alternatives=others
            )
            return chosen, emit(chosen)
    return None


def _searched(
    record: Record,
    spec: AttentionSpec,
    target: Target,
    by: Backend,
    effort: str,
    fix: Fix,
) -> bool:
    """Whether a search of that effort could have chosen what the model likes best now."""
    budgets = [f.budget for f in record.searched(effort, fix)]
    largest = max((b for b in budgets if b is not None), default=0)
    if None in budgets or not budgets:
        return bool(budgets)
    if spec.budget_bytes is not None and spec.budget_bytes <= largest:
        return True
    best = planner.rank(spec, target, by, fix, smallest=1)[0]
    return best.temp_bytes <= largest


def _others(
    record: Record, chosen: Candidate, spec: AttentionSpec, fix: Fix
) -> tuple[Alternative, ...]:
    """What else was timed, in the order of its speed, with the reason against it."""
    made = []
    for c in record.ranked(None, fix):
        if c == chosen:
            continue
        if c.fits(spec.budget_bytes):
            ratio = record.standings[c.identity] / record.standings[chosen.identity]
            reason = f"timed here: {ratio - 1:.0%} slower"
            if ratio < 1:
                reason = "timed here: too few rounds to tell"
        else:
            reason = "timed here: over the budget"
        seconds = timing.spread(c.samples_s).median
        need = c.modelled_bytes if c.temp_bytes is None else c.temp_bytes
        made.append(Alternative(c.choice, need, seconds, reason))
    return tuple(made[:SHOWN])


def _current(
    candidate: Candidate, spec: AttentionSpec, target: Target, by: Backend
) -> Plan | None:
    """The plan of a candidate, if it is emitted today as it was when it was timed."""
    try:
        plan = neutral(spec, target, by, candidate.choice)
        return plan if emit(plan).digest == candidate.digest else None
    except AttngenError:  # a choice that is no longer known, or legal
        return None


def why(spec: AttentionSpec, target: Target, by: Backend) -> str:
    """Whether a record of a spec is used by `build`, and if not, why not.

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    from attngen import wisdom

    key = key_of(spec, target, by)
    record = wisdom.find(key)
    lines = [wisdom.why(key)]
    timed = () if record is None else record.ranked()
    if record is None or not record.finished or not timed:
        return lines[0]
    current = [c for c in timed if _current(c, spec, target, by) is not None]
    if stale := len(timed) - len(current):
        lines.append(
            f"{stale} of the {len(timed)} plans that were timed aren't used: they would be "
            "emitted differently today."
        )
    if current and not any(c.fits(spec.budget_bytes) for c in current):
        least = min(c.temp_bytes for c in current if c.temp_bytes is not None)
        lines.append(
            f"No other is within the budget: the least is {show_bytes(least)}."
        )
    elif not _searched(record, spec, target, by, "estimate", {}):
        lines.append(
            "It isn't used: only a smaller budget was tuned for, or fixed choices."
        )
    elif current:
        lines.append("`build` uses it.")
    return "\n".join(lines)


# Tuning: what is timed now.


def check_seconds(seconds: float | None) -> None:
    """Refuse an allowance that allows nothing.

    Raises:
        PlanError: it isn't a positive number of seconds.
    """
    if seconds is None:
        return
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (number and seconds > 0 and math.isfinite(seconds)):
        raise PlanError(
            "Tuning needs time.",
            got=f"seconds={seconds!r}",
            needed="a positive number of seconds",
        )


def tune(
    spec: AttentionSpec,
    target: Target,
    by: Backend,
    effort: str,
    fix: Fix,
    seconds: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Record:
    """Time plans of a spec and keep what was found as wisdom; see `attngen.tune`."""
    from attngen import tuner, wisdom

    check_seconds(seconds)
    ranked = planner.rank(spec, target, by, fix, smallest=TRIES)
    key = key_of(spec, target, by)
    wisdom.check_writable(key)
    record = wisdom.find(key) or Record(key=key)
    prepare = _Preparer(spec, target, by, record, again=effort == "patient")
    _ = prepare.arrays  # too large ones are found before time is spent
    try:
        return tuner.tune(
            tuner.different(ranked, tuner.MOST[effort]),
            prepare,
            record,
            effort=effort,
            seconds=tuner.SECONDS[effort] if seconds is None else float(seconds),
            fix=fix,
            budget=spec.budget_bytes,
            save=wisdom.add,
            say=say or (lambda _: None),
            describe=by.describe,
            others=ranked,
        )
    except TimingError as error:
        if prepare.fitted or not prepare.over:
            raise
        least = min(prepare.over, key=lambda p: p[1])
        raise planner.no_fit(spec, target, by, certified=least) from error


class _Preparer:
    """Makes plans callable: certified, validated, with the same inputs for all."""

    def __init__(
        self,
        spec: AttentionSpec,
        target: Target,
        by: Backend,
        record: Record,
        again: bool,
    ) -> None:
        self.spec, self.target, self.by, self.record = spec, target, by, record
        self.again = again  # whether what failed once is tried again
        self.certificates: dict[str, Certificate | CompileError] = {}
        self.batch = 1  # plans that are certified together
        self.fitted = False  # whether one is within the budget
        self.over: list[tuple[Plan, int]] = []  # those that aren't, with their bytes

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        from attngen import inputs

        spec = self.spec
        try:
            given = inputs.arrays(spec)
            return {n: self.by.array(x, spec.dtype_of(n)) for n, x in given.items()}
        except (MemoryError, RuntimeError) as error:
            raise TimingError(
                "The inputs don't fit this machine's memory.",
                got=f"{type(error).__name__}: {error!s:.200}",
                needed="memory for q, k, v and the output",
                hint="tune a smaller spec, or on a larger machine",
            ) from error

    def __call__(self, plan: Plan, upcoming: Sequence[Plan]) -> Prepared:
        from attngen import tuner

        plan, source, known = self._known(plan)
        if known.failed is not None and not self.again:
            return tuner.Prepared(known, None)
        known = dataclasses.replace(known, failed=None)
        try:
            if known.temp_bytes is None:
                need = self._certificate(source, [plan, *upcoming]).temp_bytes
                known = dataclasses.replace(known, temp_bytes=need)
            return self._prepared(plan, source, known)
        except (CompileError, TimingError, ValidationError) as error:
            failed = dataclasses.replace(known, failed=str(error))
            return tuner.Prepared(failed, None)

    def _known(self, plan: Plan) -> tuple[Plan, Source, Candidate]:
        """A plan of the spec without its budget, its source, and what is recorded of it."""
        plan = neutral(self.spec, self.target, self.by, plan.choice)
        source = emit(plan)
        known = self.record.find(plan.choice, source.digest) or Candidate(
            choice=plan.choice,
            digest=source.digest,
            temp_bytes=None,
            modelled_bytes=plan.temp_bytes,
            modelled_s=plan.time_s,
        )
        return plan, source, known

    def _certificate(self, source: Source, plans: Sequence[Plan]) -> Certificate:
        """Of the first of some plans; of ever more of the next ones in the same process.

        Raises:
            CompileError: the compiler refused, crashed, or took too long.
        """
        if source.digest not in self.certificates:
            batch = []
            for plan in plans[: self.batch]:
                made, text, known = self._known(plan)
                if known.temp_bytes is None and text.digest not in self.certificates:
                    batch.append((made, text))
            answers = certify_many(batch, self.by, self.target.name)
            for (_, text), answer in zip(batch, answers, strict=True):
                self.certificates[text.digest] = answer
            self.batch = min(2 * self.batch, BATCH)
        answer = self.certificates[source.digest]
        if isinstance(answer, CompileError):
            raise answer
        return answer

    def _prepared(self, plan: Plan, source: Source, known: Candidate) -> Prepared:
        """Within the budget, validated and called once.

        Raises:
            ValidationError: as it says.
            TimingError: the call failed.
        """
        from attngen import tuner

        budget = self.spec.budget_bytes
        if budget is not None and (known.temp_bytes or 0) > budget:
            self.over.append((plan, known.temp_bytes or 0))
            return tuner.Prepared(known, None)
        self.fitted = True
        function = self.by.load(stored(source))
        if not known.samples_s:  # what was timed once was validated
            passed(plan, self.by, function, LONG_S)
        arrays, block = self.arrays, self.by.block

        def call() -> Any:
            return block(function(**arrays))

        try:
            call()
        except tuner.BROKEN as error:
            raise TimingError(
                "A call failed.",
                got=f"{type(error).__name__}: {error!s:.200}",
                needed="memory for the temporaries and the output",
            ) from error
        return tuner.Prepared(known, call)
