"""The tuner by a clock that a test moves: what it finds, when it ends, what it keeps."""

import dataclasses

import pytest
from machine import Machine, prepared
from refusals import refused
from small import spec_of
from test_records import JAX, KEY, PLANS

from attngen import planner, shortlist, targets, timing, tuner
from attngen.errors import CompileError, TimingError
from attngen.keys import canonical
from attngen.records import Record

DIFFERENT = shortlist.different(PLANS, 8)
TRIED = {canonical(p.choice) for p in DIFFERENT}


def alike(choice):
    """What a search may go on to: of the same algorithm."""
    return [p for p in PLANS if p.algorithm == choice["algorithm"]]


# the one with the most neighbours that the model doesn't propose
LEADER = max(
    DIFFERENT, key=lambda p: len(shortlist.neighbours(p.choice, alike(p.choice), TRIED))
)


class Run:
    """One tuning; `seconds_of` says what a plan's call takes, by its place."""

    def __init__(self, monkeypatch, seconds_of, noise=(1.0,)):
        self.machine = Machine(monkeypatch, noise)
        monkeypatch.setattr(tuner, "STAGE_S", 0.0)
        self.seconds_of = seconds_of
        self.saved, self.said, self.asked = [], [], []
        self.start = Record(key=KEY)
        self.prepare_s = 0.0

    def prepare(self, plan, upcoming):
        index = DIFFERENT.index(plan)
        self.asked.append(index)
        self.machine.now += self.prepare_s
        seconds = self.seconds_of(index)
        if isinstance(seconds, Exception):
            raise seconds
        return prepared(plan, seconds and self.machine.work(seconds))

    def __call__(self, effort="measure", seconds=1000.0, **options):
        return tuner.tune(
            DIFFERENT,
            self.prepare,
            self.start,
            effort=effort,
            seconds=seconds,
            fix={},
            budget=None,
            save=self.saved.append,
            say=self.said.append,
            describe=JAX.describe,
            **options,
        )


def test_the_fastest_is_found_and_the_search_ends_early(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.1 if i == 5 else 0.2)
    found = run()
    assert found.best().choice == DIFFERENT[5].choice
    assert found.effort == "measure"
    assert all(c.samples_s for c in found.candidates)
    assert max(len(c.samples_s) for c in found.candidates) <= 10
    assert run.saved[-1] == found
    assert len(run.said) > len(DIFFERENT)


def test_long_rounds_are_told_now_and_then(monkeypatch):
    run = Run(monkeypatch, lambda i: 1.0 + i / 100)
    run()
    first = run.said.index("timing 8 plans in turns")
    rounds = [line for line in run.said[first:] if line.startswith("round ")]
    assert rounds[0].startswith("round 1: 1.00 s ")
    assert rounds[0].endswith("; 1% ahead")
    assert max(map(len, rounds)) <= 100
    assert run.said[-1].startswith("after ")
    ends = [line for line in run.said if line.startswith("after ")]
    starts = [line for line in run.said if line.startswith("timing ")]
    assert len(starts) == len(ends)
    quick = Run(monkeypatch, lambda i: 0.01 + i / 1000)
    quick()
    assert not [line for line in quick.said if line.startswith("round ")]


def test_the_slower_half_goes(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.1 * 1.01**i)
    found = run()
    counts = {DIFFERENT.index(p): 0 for p in DIFFERENT}
    for c in found.candidates:
        index = next(i for i, p in enumerate(DIFFERENT) if p.choice == c.choice)
        counts[index] = len(c.samples_s)
    assert counts[7] == tuner.STAGES[0]
    assert counts[0] == max(counts.values())
    assert found.best().choice == DIFFERENT[0].choice


def test_a_stage_of_short_calls_has_more_rounds(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.02 * 1.01**i)
    monkeypatch.setattr(tuner, "STAGE_S", 2.0)
    found = run()
    counts = sorted(len(c.samples_s) for c in found.candidates)
    assert counts[0] == pytest.approx(2.0 / (9 * 0.02), rel=0.2)
    assert counts[-1] > 2 * counts[0]
    assert found.best().choice == DIFFERENT[0].choice


def test_patient_climbs_from_the_fastest_to_its_neighbours(monkeypatch):
    """Its neighbours are quicker, and theirs: what the model never proposed."""
    chosen = LEADER.choice
    monkeypatch.setattr(shortlist, "NEAR", 3)

    def apart(plan):
        return sum(plan.choice.get(n) != v for n, v in chosen.items())

    def prepare(plan, upcoming):
        run.asked.append(plan)
        slow = plan in DIFFERENT and plan != LEADER
        seconds = 0.2 if slow else 0.1 / (1 + apart(plan) / 4)
        return prepared(plan, run.machine.work(seconds))

    run = Run(monkeypatch, None)
    run.prepare = prepare
    found = run("patient", near=alike)
    tried = [p for p in run.asked if p not in DIFFERENT]
    assert [apart(p) for p in tried][:3] == [1, 1, 1]
    assert max(apart(p) for p in tried) > 1
    best = found.best().choice
    assert best not in [p.choice for p in DIFFERENT]
    assert len({str(p.choice) for p in run.asked}) == len(run.asked)
    assert found.effort == "patient"


def test_patient_ends_where_no_neighbour_is_faster(monkeypatch):
    asked = []

    def prepare(plan, upcoming):
        asked.append(plan)
        seconds = 0.1 if plan == LEADER else 0.2
        return prepared(plan, run.machine.work(seconds))

    run = Run(monkeypatch, None)
    run.prepare = prepare
    found = run("patient", near=alike)
    assert found.best().choice == LEADER.choice
    assert len(DIFFERENT) < len(asked) <= len(DIFFERENT) + shortlist.NEAR


def test_estimate_times_nothing_and_takes_the_first_that_works(monkeypatch):
    error = CompileError("It crashed.", got="this", needed="that")
    run = Run(monkeypatch, lambda i: (error, None, 0.1)[min(i, 2)])
    found = run("estimate")
    assert run.asked == [0, 1, 2]
    assert len(found.candidates) == 3
    assert not any(c.samples_s for c in found.candidates)
    assert not found.finished
    assert found.effort == "estimate"
    assert run.saved[-1] == found


def test_the_allowance_ends_it(monkeypatch):
    run = Run(monkeypatch, lambda i: 1.0)
    run.prepare_s = 2.0
    found = run(seconds=10)
    assert len(run.asked) == 3  # until half of it is spent
    assert run.machine.now < 16
    assert found.finished[0].stopped
    assert found.effort == "unfinished"
    assert "stopped: measure had less time than it takes" in str(found)
    assert any("time for 3 of 8" in line for line in run.said)


def test_an_effort_that_has_the_time_it_takes_is_done_when_that_is_over(monkeypatch):
    run = Run(monkeypatch, lambda i: 1.0)
    run.prepare_s = 20.0
    found = run(seconds=tuner.SECONDS["measure"])
    assert any("time for 2 of 8" in line for line in run.said)
    assert found.effort == "measure"


def test_a_search_that_ends_by_itself_is_not_stopped(monkeypatch):
    found = Run(monkeypatch, lambda i: 0.1 + 0.1 * i)(seconds=50)
    assert not found.finished[0].stopped
    assert found.effort == "measure"


def test_an_allowance_of_nearly_nothing_times_one_plan(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.1)
    run.prepare_s = 1.0
    found = run(seconds=1e-3)
    assert [len(c.samples_s) for c in found.candidates] == [1]


def test_failures_are_recorded_with_their_reasons(monkeypatch):
    error = CompileError("It crashed.", got="this", needed="that")
    run = Run(monkeypatch, lambda i: error if i == 0 else 0.1 + i / 100)
    found = run()
    failed = [c for c in found.candidates if c.failed]
    assert [c.choice for c in failed] == [DIFFERENT[0].choice]
    assert failed[0].failed.startswith("It crashed.")
    assert found.best().choice == DIFFERENT[1].choice


def test_a_call_that_fails_while_it_is_timed_is_left_out(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.1)

    def broken():
        raise MemoryError("no room")

    def prepare(plan, upcoming):
        made = Run.prepare(run, plan, upcoming)
        return dataclasses.replace(made, call=broken) if plan == DIFFERENT[0] else made

    run.prepare = prepare
    found = run()
    assert [c.failed for c in found.candidates if c.failed] == ["MemoryError: no room"]
    assert len(found.ranked()) == len(DIFFERENT) - 1


def test_nothing_that_works_is_an_error(monkeypatch):
    error = CompileError("It crashed.", got="this", needed="that")
    run = Run(monkeypatch, lambda i: error)
    with refused(TimingError, "nothing to time"):
        run()
    assert not run.saved[-1].finished
    run = Run(monkeypatch, lambda i: None)  # each over the budget
    with refused(TimingError, "nothing to time") as caught:
        run()
    assert "over the budget" in caught.value.got


def test_a_noisy_machine_is_said(monkeypatch):
    noise = [1.0] * 9 + [1.4] * 9  # a round of the yardstick and eight plans
    run = Run(monkeypatch, lambda i: 0.1 * 1.001**i, noise=noise)
    monkeypatch.setattr(tuner, "STAGES", (12,))
    found = run()
    assert found.finished[0].noise == pytest.approx(0.4)
    assert "differ by 40%" in run.said[-1]
    assert "noisy" in str(found)
    assert found.best().choice == DIFFERENT[0].choice


def test_a_useless_machine_is_an_error_that_keeps_the_samples(monkeypatch):
    noise = [9.0] * 9 + [1.0] * 9
    run = Run(monkeypatch, lambda i: 0.1 * 1.001**i, noise=noise)
    monkeypatch.setattr(tuner, "FAR", 1e9)
    monkeypatch.setattr(tuner, "STAGES", (12,))
    with refused(TimingError, "too noisy"):
        run()
    assert not run.saved[-1].finished
    assert len(run.saved[-1].candidates[0].samples_s) == 12


def test_a_clock_that_stands_is_found_before_anything_is_prepared(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.1)
    monkeypatch.setattr(timing, "clock", lambda: 1.0)
    with refused(TimingError, "doesn't advance"):
        run()
    assert run.asked == []


def test_an_interrupt_keeps_every_finished_sample(monkeypatch):
    run = Run(monkeypatch, lambda i: 0.1)
    done = []

    def interrupted(plan, upcoming):
        made = Run.prepare(run, plan, upcoming)

        def call():
            if len(done) == 11:
                raise KeyboardInterrupt
            made.call()
            done.append(plan)

        return dataclasses.replace(made, call=call)

    run.prepare = interrupted
    with pytest.raises(KeyboardInterrupt):
        run()
    kept = run.saved[-1]
    assert sum(len(c.samples_s) for c in kept.candidates) == 11
    assert kept.effort == "unfinished"
    run.start = kept
    run.prepare = lambda plan, upcoming: prepared(
        plan,
        run.machine.work(0.1),
        samples_s=next(c.samples_s for c in kept.candidates if c.choice == plan.choice),
        yardsticks_s=next(
            c.yardsticks_s for c in kept.candidates if c.choice == plan.choice
        ),
    )
    again = run()
    assert sum(len(c.samples_s) for c in again.candidates) > 11
    assert again.effort == "measure"


def test_different_plans_arent_all_alike():
    plans = planner.rank(spec_of(q_len=2048, kv_len=2048), targets.get(), JAX)
    picked = shortlist.different(plans, 8)
    chunks = [(p.algorithm, p.q_chunk, p.k_chunk) for p in picked]
    assert picked[0] == plans[0]
    assert len({str(p.choice) for p in picked}) == 8
    assert max(chunks[:6].count(c) for c in chunks[:6]) <= 2
    assert picked[6].temp_bytes <= min(p.temp_bytes for p in picked[:6]) / 4
    assert shortlist.different(plans[:3], 8) == list(plans[:3])
