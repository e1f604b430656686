"""Tune for a device that isn't here: plans ranked by what its compiler makes of each.

A Triton kernel's main loop takes at least as long as its busiest pipe: with that bound, and
with how many programs a multiprocessor holds, the model's best plans are ranked anew. For a
TPU the compiler's own estimate of cycles ranks them. What is found is kept as wisdom: of the
device as one that isn't here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from attngen import building, descent, interrupts, planner, shortlist, targets, tuner
from attngen.backends import Backend
from attngen.errors import CompileError, InternalError, TimingError
from attngen.keys import canonical
from attngen.plans import Option, Plan
from attngen.recalling import key_of, neutral
from attngen.records import Candidate, Finished, Record
from attngen.spec import AttentionSpec
from attngen.targets import Target

if TYPE_CHECKING:
    from attngen.building import Answer
    from attngen.emitter import Source
    from attngen.reports import Certificate

ROOM = 1.6  # times the budget, that a plan which is compiled may take by the model
GROUP = 8  # plans that are compiled before they are kept
PROCESSES = 8  # at most, that compile at once: each takes up to a gigabyte


def tune(
    spec: AttentionSpec,
    target: Target,
    by: Backend,
    effort: str,
    fix: Mapping[str, Option],
    seconds: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Record:
    """Rank plans by their bounds, and keep what was found as wisdom; see `attngen.tune`.

    Of the model's best, and of the neighbours of the best of these: once, or as long as
    that finds a better one where the effort is "patient". What was compiled before isn't
    compiled again.
    """
    from attngen import wisdom

    if target.kind != "tpu" and by.name == "jax":
        raise TimingError(
            f"{target.name} isn't here, and its compiler says nothing of time.",
            got=f"target {target.name} by XLA",
            needed="the device itself, or backend='triton', whose compiler tells bounds",
            hint='build(effort="estimate") takes the model\'s best plan, certified',
        )
    key = key_of(spec, target, by)
    wisdom.check_writable(key)
    search = _Search(spec, target, by, wisdom.find(key) or Record(key=key))
    search.allowance = tuner.SECONDS[effort] if seconds is None else float(seconds)
    search.say = say or search.say
    try:
        search.run(effort, fix)
    finally:
        building.tell(search.faults)
    return search.record


def _roomier(spec: AttentionSpec) -> AttentionSpec:
    """With a larger budget for modelled bytes: certificates decide, and the model is above."""
    budget = spec.budget_bytes
    if budget is None:
        return spec
    return dataclasses.replace(spec, memory_budget=int(ROOM * budget))


class _Search:
    """Plans that are compiled, those of a record excepted; and the record as it grows."""

    def __init__(
        self, spec: AttentionSpec, target: Target, by: Backend, record: Record
    ) -> None:
        self.spec, self.target, self.by, self.record = spec, target, by, record
        self.roomy = _roomier(spec)
        self.say: Callable[[str], None] = lambda _: None
        self.tried: set[str] = set()
        self.faults: list[InternalError] = []  # those that certificates showed
        self.allowance, self.start = float("inf"), time.monotonic()
        self.stopped = False

    def run(self, effort: str, fix: Mapping[str, Option]) -> None:
        """Compile the model's best, then neighbours of the best of these."""
        of = self.roomy, self.target, self.by
        ranked = planner.rank(*of, fix, smallest=descent.TRIES)
        self.compile(shortlist.different(ranked, tuner.MOST[effort]))
        leader = self.leader(fix) or self.descend(fix)
        while leader is not None and effort != "estimate":
            self.compile_near(leader, fix)
            before, leader = leader, self.leader(fix)
            if leader == before or effort != "patient":
                break
        if effort != "estimate":
            self.finish(effort, fix)

    def leader(self, fix: Mapping[str, Option]) -> Candidate | None:
        return self.record.best(self.spec.budget_bytes, fix)

    def descend(self, fix: Mapping[str, Option]) -> Candidate | None:
        """From the smallest plan to smaller neighbours, until one is within the budget."""
        smallest = self._smallest(fix)
        while smallest is not None:
            self.compile_near(smallest, fix)
            if leader := self.leader(fix):
                return leader
            before, smallest = smallest, self._smallest(fix)
            if smallest == before or self.stopped:
                break
        return None

    def _smallest(self, fix: Mapping[str, Option]) -> Candidate | None:
        ranked = self.record.ranked(None, fix)
        known = [c for c in ranked if c.temp_bytes is not None]
        return min(known, key=lambda c: c.temp_bytes or 0, default=None)

    def compile_near(self, candidate: Candidate, fix: Mapping[str, Option]) -> None:
        """Compile neighbours of a candidate: those that should fit, or be smaller.

        What the model says of their bytes counts as much as it did of the candidate's.
        """
        free = dataclasses.replace(self.spec, memory_budget=None)
        near = planner.near(free, self.target, self.by, candidate.choice, fix)
        budget = self.spec.budget_bytes
        if budget is not None and candidate.temp_bytes:
            most = max(1, candidate.modelled_bytes) * budget / candidate.temp_bytes
            if candidate.temp_bytes > budget:  # halves of a chunk may not suffice
                most = candidate.modelled_bytes - 1
            near = tuple(p for p in near if p.temp_bytes <= most)
        self.compile(shortlist.neighbours(candidate.choice, near, self.tried))

    def compile(self, plans: Sequence[Plan]) -> None:
        """Compile plans, group by group, as long as time is left; the first always."""
        for i in range(0, len(plans), GROUP):
            spent = time.monotonic() - self.start
            self.stopped = bool(self.tried) and spent > self.allowance
            if self.stopped:
                return
            group = plans[i : i + GROUP]
            self.tried |= {canonical(plan.choice) for plan in group}
            done = f"{i + len(group)} of {len(plans)}"
            self.say(f"compiling {done} plans for {self.target.name}")
            self._compile(group)

    def _compile(self, plans: Sequence[Plan]) -> None:
        made = []
        for choice in (plan.choice for plan in plans):
            plan = neutral(self.spec, self.target, self.by, choice)
            source = building.emit(plan)
            if self.record.find(choice, source.digest) is None:
                made.append((plan, source))
        if not made:
            return
        answers, interrupted = _in_parallel(made, self.by, self.target)
        found = [self._candidate(*made[i], answer) for i, answer in answers.items()]
        self._keep(Record(key=self.record.key, candidates=tuple(found)))
        if interrupted:
            raise KeyboardInterrupt

    def _candidate(self, plan: Plan, source: Source, answer: Answer) -> Candidate:
        known = Candidate(
            choice=plan.choice,
            digest=source.digest,
            temp_bytes=None,
            modelled_bytes=plan.temp_bytes,
            modelled_s=plan.time_s,
        )
        if isinstance(answer, InternalError):
            self.faults.append(answer)
        if isinstance(answer, CompileError | InternalError):
            return dataclasses.replace(known, failed=str(answer))
        known = dataclasses.replace(
            known, temp_bytes=answer.temp_bytes, on_chip_bytes=answer.on_chip_bytes
        )
        if reason := descent.unfit(answer, plan):
            return dataclasses.replace(known, failed=reason)
        known = dataclasses.replace(
            known,
            bound_s=descent.bound_s(plan, answer, self.target),
            estimated_s=estimated_s(answer, self.target),
        )
        if known.compiled_s is None:
            return dataclasses.replace(known, failed="what it takes isn't known")
        self.say(f"{known.least}: {self.by.describe(plan.choice)}")
        return known

    def finish(self, effort: str, fix: Mapping[str, Option]) -> None:
        done = Finished(
            effort="patient" if effort == "patient" else "measure",
            fix=dict(fix),
            budget=self.spec.budget_bytes,
            noise=0.0,
            stopped=self.stopped,
        )
        self._keep(Record(key=self.record.key, finished=(done,)))

    def _keep(self, more: Record) -> None:
        from attngen import wisdom

        self.record = self.record.merged(more)
        wisdom.add(self.record)


def estimated_s(certificate: Certificate, target: Target) -> float | None:
    """Seconds of a call by the compiler's estimate of cycles; None: unknown."""
    if target.tpu is None or certificate.estimated_cycles is None:
        return None
    return certificate.estimated_cycles / target.tpu.clock_hz


def _in_parallel(
    made: Sequence[tuple[Plan, Source]], by: Backend, target: Target
) -> tuple[dict[int, Answer], bool]:
    """What each certifies, by its place, a process for each of this machine's cores.

    Also whether Ctrl-C came: then of those that were done.
    """
    count = max(1, min(len(made), targets.get("cpu").cores, PROCESSES))
    parts = [made[i::count] for i in range(count)]
    found, interrupted = interrupts.in_threads(
        lambda part: building.certify_many(part, by, target.name), parts
    )
    answers = {
        i + count * j: answer
        for i, part in enumerate(found)
        for j, answer in enumerate(part)
    }
    return dict(sorted(answers.items())), interrupted
