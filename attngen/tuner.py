"""Candidates → which is fastest here: prepared one by one, then timed side by side.

A worker: it is handed plans, how to make one callable, and where to keep what it found.
Nothing it finds is lost when it is interrupted: it hands over the record as it grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from attngen import timing
from attngen.errors import CALL_FAULTS, AttngenError, TimingError
from attngen.keys import canonical
from attngen.plans import Option, Plan
from attngen.records import Candidate, Finished, Record
from attngen.shortlist import neighbours
from attngen.timing import Call, Rounds
from attngen.units import show_bytes, show_time

MOST = {"estimate": 8, "measure": 8, "patient": 48}  # plans that are tried
SECONDS = {"estimate": 60.0, "measure": 60.0, "patient": 900.0}  # unless the user says
STAGES = (3, 4, 8, 16)  # least rounds of each; after it the slower half goes
STAGE_S = 2.0  # least time of each: of short calls there are more rounds
MOST_ROUNDS = 100  # of a stage
FAR = 1.5  # times the leader's: goes after any stage
CLEAR = 1.03  # the lower quartile of each other's ratio to the leader's: it is clear
SAVE_S = 0.2  # between two savings at least, and so many times what one takes
SAVE_SHARE = 10
SAY_S = 5.0  # between two lines about rounds at least
PREPARE = 0.5  # of the time that is left: the most that is spent before timing
CLIMB = 0.1  # of the allowance: with less left no more neighbours are tried


@dataclass(frozen=True)
class Prepared:
    """A plan that is certified and validated, ready to be timed.

    call returns when its work is done; None where the plan failed, or doesn't fit the
    budget.
    """

    candidate: Candidate
    call: Call | None


Prepare = Callable[[Plan, Sequence[Plan]], Prepared]
Save = Callable[[Record], object]
Say = Callable[[str], None]
Near = Callable[[Mapping[str, Option]], Sequence[Plan]]


def tune(
    plans: Sequence[Plan],
    prepare: Prepare,
    record: Record,
    *,
    effort: str,
    seconds: float,
    fix: Mapping[str, Option],
    budget: int | None,
    save: Save,
    say: Say,
    describe: Callable[[Mapping[str, Option]], str],
    near: Near = lambda choice: (),
) -> Record:
    """Time plans on this device, within about so many seconds.

    Successive halving (Jamieson & Talwalkar 2016): all run some rounds, the faster half
    twice as many, and so on until the fastest is clear. "estimate" times nothing: it
    ends with the first plan that is certified and validated.

    Args:
        plans: best first.
        prepare: certifies and validates a plan, given those that come next; raises
            AttngenError where that fails.
        record: what is known already; its samples are kept.
        seconds: the allowance; one plan and one round are always done.
        fix, budget: of the request, for the record.
        save: receives the record after each sample, at most every SAVE_S.
        say: receives what is being done, a line each.
        near: plans that differ from a choice in one thing, best first: "patient" tries
            those of the fastest too.

    Raises:
        TimingError: nothing could be timed, or the machine is too noisy.
    """
    fixed = timing.yardstick()
    timing.sample(fixed)  # a clock that stands is found before anything else
    search = _Search(record, prepare, seconds, save, say, describe, fixed)
    try:
        search.prepare(
            plans[: MOST[effort]], enough=1 if effort == "estimate" else None
        )
        if effort == "estimate":
            return search.record
        noise = search.run()
        if effort == "patient":
            noise = search.climb(near, noise)
    finally:  # an interrupt, too, keeps each finished sample
        save(search.record)
    if noise >= timing.NOISY:
        say(
            f"this machine is noisy: neighbouring rounds differ by {noise:.0%}; differences "
            "below that may be chance"
        )
    done = Finished(
        effort=effort,  # type: ignore[arg-type]
        fix=dict(fix),
        budget=budget,
        noise=noise,
        stopped=search.stopped and seconds < SECONDS[effort],
    )
    found = search.record.merged(replace(search.record, finished=(done,)))
    save(found)
    return found


class _Search:
    def __init__(
        self,
        record: Record,
        prepare: Prepare,
        seconds: float,
        save: Save,
        say: Say,
        describe: Callable[[Mapping[str, Option]], str],
        fixed: Call,
    ) -> None:
        self.key, self.finished = record.key, record.finished
        self.candidates = {c.identity: c for c in record.candidates}
        self.make = prepare
        self.tried: set[str] = set()  # choices
        self.save, self.say, self.describe = save, say, describe
        self.fixed = fixed
        self.begin = self.saved = timing.clock()
        self.pause = SAVE_S
        self.seconds = seconds
        self.stopped = False  # by the allowance, before it was done
        self.calls: dict[str, Call] = {}
        self.yardsticks: list[float] = []

    def _left(self) -> float:
        return self.begin + self.seconds - timing.clock()

    @property
    def record(self) -> Record:
        """All that is known so far."""
        made = tuple(self.candidates.values())
        return Record(key=self.key, finished=self.finished, candidates=made)

    def _keep(self, candidate: Candidate) -> None:
        self.candidates[candidate.identity] = candidate

    def _save(self, *, soon: bool = False) -> None:
        """Hand the record over; `soon`, only where the last time is long enough ago."""
        begin = timing.clock()
        if soon and begin - self.saved < self.pause:
            return
        self.save(self.record)
        self.saved = timing.clock()
        self.pause = max(SAVE_S, SAVE_SHARE * (self.saved - begin))

    def prepare(self, plans: Sequence[Plan], *, enough: int | None = None) -> None:
        """Certify and validate plans until half of the time is spent, or enough are."""
        failures: list[str] = []
        stop = (1 - PREPARE) * self._left()
        for index, plan in enumerate(plans, 1):
            if self.calls and self._left() < stop:
                self.say(f"time for {index - 1} of {len(plans)} plans")
                self.stopped = True
                break
            words = self.describe(plan.choice)
            self.say(f"{index} of {len(plans)}: {words}")
            self.tried.add(canonical(plan.choice))
            try:
                made = self.make(plan, plans[index:])
            except AttngenError as error:
                made = Prepared(_failed(plan, str(error)), None)
            self._keep(made.candidate)
            if made.call is not None:
                self.calls[made.candidate.identity] = made.call
            elif made.candidate.failed is not None:
                what = made.candidate.failed.splitlines()[0]
                failures.append(f"{words}: {what}")
                self.say(f"  failed: {what}")
            else:
                need = show_bytes(made.candidate.temp_bytes or 0)
                self.say(f"  over the budget: {need}, certified")
            if len(self.calls) == enough:
                break
        self._save()
        if not self.calls:
            raise TimingError(
                "There is nothing to time: no plan was certified and validated.",
                got="; ".join(failures[:3])
                or "each plan is over the budget, certified",
                needed="a plan that is",
                hint="build(spec) says more of the first",
            )

    def climb(self, near: Near, noise: float) -> float:
        """Try the neighbours of the fastest while that finds a faster one; the noise."""
        while True:
            if self._left() <= CLIMB * self.seconds:
                self.stopped = True
                break
            leader = self._racing(self.record)[0]
            untried = neighbours(leader.choice, near(leader.choice), self.tried)
            if not untried:
                break
            self.say(f"neighbours of {self.describe(leader.choice)}")
            self.calls = {leader.identity: self.calls[leader.identity]}
            self.prepare(untried)
            noise = self.run()
            record = self.record
            fastest = self._racing(record)[0]
            gain = (
                record.standings[leader.identity] / record.standings[fastest.identity]
            )
            if gain < CLEAR:
                break
        return noise

    def _racing(self, record: Record) -> list[Candidate]:
        """Those of a record that are in the race, the fastest first."""
        return [c for c in record.ranked() if c.identity in self.calls]

    def run(self) -> float:
        """Time what was prepared, stage by stage; returns the noise.

        Raises:
            TimingError: the machine is too noisy, or no call ended.
        """
        names = list(self.calls)
        for rounds in STAGES:
            if len(names) == 1 and self.yardsticks:
                break
            found, over = self._stage(names, rounds)
            names = self._survivors([n for n in names if n in self.calls])
            if not names:
                raise TimingError(
                    "No call ended.",
                    got="; ".join(str(c.failed) for c in self.record.candidates[:3]),
                    needed="memory for inputs and outputs, and for one call",
                )
            if self._clear(found):
                break
            if over:
                self.stopped = True
                break
        timing.check_noise(self.yardsticks)
        return timing.noise(self.yardsticks)

    def _stage(self, names: list[str], rounds: int) -> tuple[Rounds, bool]:
        """At least some rounds of those named; whether the allowance is spent."""
        over = False
        begin = said = timing.clock()
        self.say(f"timing {len(names)} plan{'' if len(names) == 1 else 's'} in turns")

        def on_sample(name: str, seconds: float, yardstick: float) -> None:
            known = self.candidates[name]
            self._keep(
                replace(
                    known,
                    samples_s=(*known.samples_s, seconds),
                    yardsticks_s=(*known.yardsticks_s, yardstick),
                )
            )
            self._save(soon=True)

        def on_round(found: Rounds) -> bool:
            nonlocal over, said
            now = timing.clock()
            over = self._left() <= 0
            long = now - begin >= STAGE_S or found.count == MOST_ROUNDS
            ended = over or (long and found.count >= rounds) or self._clear(found)
            if not ended and now - said >= SAY_S:
                self._report(f"round {found.count}")
                said = now
            return ended

        calls = {n: self._guarded(n) for n in names}
        try:
            found = timing.interleaved(
                calls,
                MOST_ROUNDS,
                on_sample=on_sample,
                on_round=on_round,
                yardstick=self.fixed,
                warm_up=False,
            )
        except _Broken as error:
            self.calls.pop(error.name)
            self._keep_failed(error)
            rest = [n for n in names if n in self.calls]
            return self._stage(rest, rounds) if rest else (Rounds({}), True)
        self._save()
        self.yardsticks += found.yardsticks_s
        count = len(self.yardsticks)
        self._report(f"after {count} round{'' if count == 1 else 's'}")
        return found, over

    def _guarded(self, name: str) -> Call:
        call = self.calls[name]

        def guarded() -> None:
            try:
                call()
            except CALL_FAULTS as error:
                raise _Broken(
                    name, f"{type(error).__name__}: {error!s:.200}"
                ) from error

        return guarded

    def _keep_failed(self, error: _Broken) -> None:
        failed = replace(self.candidates[error.name], failed=str(error))
        self._keep(failed)
        self.say(f"  failed: {self.describe(failed.choice)}: {error}")
        self._save()

    def _survivors(self, names: list[str]) -> list[str]:
        """The faster half, at least two, none that is far behind."""
        standings = self.record.standings
        ranked = sorted(
            (n for n in names if n in standings), key=lambda n: standings[n]
        )
        if not ranked:
            return []
        lead = standings[ranked[0]]
        near = [n for n in ranked if standings[n] <= FAR * lead]
        return near[: max(2, (len(ranked) + 1) // 2)]

    def _clear(self, found: Rounds) -> bool:
        """Whether one is faster than each other in nearly every round."""
        if found.count < timing.ENOUGH or len(found.samples_s) < 2:
            return False
        medians = {n: timing.spread(s).median for n, s in found.samples_s.items()}
        leader = min(medians, key=lambda n: medians[n])
        return all(found.ratio(n, leader).low >= CLEAR for n in medians if n != leader)

    def _report(self, when: str) -> None:
        record = self.record
        ranked = self._racing(record)
        if not ranked:
            return
        first = ranked[0]
        took = show_time(timing.spread(first.samples_s).median)
        text = f"{when}: {took} {self.describe(first.choice)}"
        if len(ranked) > 1:
            standings = record.standings
            ahead = standings[ranked[1].identity] / standings[first.identity] - 1
            text += f"; {ahead:.0%} ahead"
        self.say(text)


class _Broken(Exception):
    """A contender's call failed."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def _failed(plan: Plan, reason: str) -> Candidate:
    return Candidate(
        choice=plan.choice,
        digest=None,
        temp_bytes=None,
        modelled_bytes=plan.temp_bytes,
        modelled_s=plan.time_s,
        failed=reason,
    )
