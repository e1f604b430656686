"""Tune: plans of a spec made callable, timed on this device, and kept as wisdom."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attngen import planner, slopes
from attngen.backends import Backend
from attngen.building import certify_many, emit, passed, stored, tell
from attngen.descent import TRIES
from attngen.errors import (
    CALL_FAULTS,
    CompileError,
    InternalError,
    NotBuiltError,
    PlanError,
    TimingError,
    ValidationError,
)
from attngen.keys import canonical
from attngen.plans import Option, Plan
from attngen.recalling import key_of, neutral
from attngen.records import Candidate, Record
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import show_bytes

if TYPE_CHECKING:
    from attngen.building import Answer
    from attngen.emitter import Source
    from attngen.reports import Certificate
    from attngen.tuner import Prepared

Fix = Mapping[str, Option]
BATCH = (
    8  # plans that one process certifies; the first few are asked for one, two, four
)
LONG_S = 0.5  # modelled: a longer call is validated small here, and whole by `build`


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


def check_room(spec: AttentionSpec, target: Target) -> None:
    """Refuse what would fill the memory before it fails.

    Raises:
        TimingError: inputs and outputs are more than the target's memory.
    """
    operands = (o.name for o in spec.operands)
    need = spec.bytes_of("q", "k", "v", *spec.outputs, *operands)
    if target.memory_bytes is not None and need > target.memory_bytes:
        raise _no_room(f"{show_bytes(need)} of {show_bytes(target.memory_bytes)}")


def _no_room(got: str) -> TimingError:
    return TimingError(
        "The inputs don't fit this machine's memory.",
        got=got,
        needed="memory for q, k, v and the output",
        hint="a smaller spec, or a larger machine",
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
    from attngen import shortlist, tuner, wisdom

    if spec.devices > 1:
        raise NotBuiltError(
            "Times of a sharded spec can't be taken yet.",
            got=f"batch_shards={spec.batch_shards}, head_shards={spec.head_shards}",
            needed="one device",
            hint="tune the spec of what one device has, and fix what it finds; chunks of "
            "heads and batches are then as many times as much",
        )
    check_room(spec, target)
    ranked = planner.rank(spec, target, by, fix, smallest=TRIES)
    key = key_of(spec, target, by)
    wisdom.check_writable(key)
    record = wisdom.find(key) or Record(key=key)
    prepare = _Preparer(spec, target, by, record, again=effort == "patient")
    _ = prepare.arrays  # too large ones are found before time is spent
    try:
        return tuner.tune(
            shortlist.different(ranked, tuner.MOST[effort]),
            prepare,
            record,
            effort=effort,
            seconds=tuner.SECONDS[effort] if seconds is None else float(seconds),
            fix=fix,
            budget=spec.budget_bytes,
            save=wisdom.add,
            say=say or (lambda _: None),
            describe=by.describe,
            near=lambda choice: planner.near(spec, target, by, choice, fix),
        )
    except TimingError as error:
        if prepare.fitted or not prepare.over:
            raise
        least = min(prepare.over, key=lambda p: p[1])
        raise planner.no_fit(spec, target, by, certified=least) from error
    finally:
        tell(prepare.faults)


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
        self.known: dict[str, tuple[Plan, Source, Candidate]] = {}  # by choice
        self.certificates: dict[str, Answer] = {}
        self.faults: list[InternalError] = []  # of attngen's own
        self.batch = 1  # plans that are certified together
        self.fitted = False  # whether one is within the budget
        self.over: list[tuple[Plan, int]] = []  # those that aren't, with their bytes

    @functools.cached_property
    def arrays(self) -> dict[str, Any]:
        from attngen import inputs

        spec = self.spec
        try:
            given = inputs.arrays(spec)
            made = {
                n: self.by.array(x, spec.dtype_of(n), self.target)
                for n, x in given.items()
            }
            of = slopes.cotangents(spec)
            for name, x in inputs.cotangents(spec).items():
                made[name] = self.by.array(x, spec.dtype_of(of[name]), self.target)
            return made
        except (MemoryError, RuntimeError) as error:
            raise _no_room(f"{type(error).__name__}: {error!s:.200}") from error

    def __call__(self, plan: Plan, upcoming: Sequence[Plan]) -> Prepared:
        from attngen import tuner

        plan, source, known = self._known(plan)
        if known.failed is not None and not self.again:
            return tuner.Prepared(known, None)
        known = dataclasses.replace(known, failed=None)
        try:
            if known.temp_bytes is None:
                found = self._certificate(source, [plan, *upcoming])
                need, own = found.temp_bytes, found.on_chip_bytes
                known = dataclasses.replace(known, temp_bytes=need, on_chip_bytes=own)
            return self._prepared(plan, source, known)
        except (CompileError, InternalError, TimingError, ValidationError) as error:
            if isinstance(error, InternalError):
                self.faults.append(error)
            failed = dataclasses.replace(known, failed=str(error))
            return tuner.Prepared(failed, None)

    def _known(self, plan: Plan) -> tuple[Plan, Source, Candidate]:
        """A plan of the spec without its budget, its source, and what is recorded of it.

        Made once: a plan is asked for when others are certified, and when its turn comes.
        """
        choice = canonical(plan.choice)
        if choice not in self.known:
            self.known[choice] = self._emitted(plan)
        return self.known[choice]

    def _emitted(self, plan: Plan) -> tuple[Plan, Source, Candidate]:
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
            InternalError: it says what can't be.
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
        if isinstance(answer, CompileError | InternalError):
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
        function = self.by.load(stored(source), self.target)
        if not known.samples_s:  # what was timed once was validated
            passed(plan, self.by, source, function, LONG_S)
        arrays, block = self.arrays, self.by.block
        program = self.by.program(self.spec, function)

        def call() -> Any:
            return block(program(**arrays))

        try:
            call()
        except CALL_FAULTS as error:
            raise TimingError(
                "A call failed.",
                got=f"{type(error).__name__}: {error!s:.200}",
                needed="memory for the temporaries and the output",
            ) from error
        return tuner.Prepared(known, call)
