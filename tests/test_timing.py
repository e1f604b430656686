"""The clock: samples, rounds, spreads, noise."""

import itertools
import time

import pytest
from machine import Machine
from refusals import refused

from attngen import timing
from attngen.errors import TimingError


def test_a_spread_is_the_median_and_the_quartiles():
    found = timing.spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert found.relative == pytest.approx(2 / 3)
    assert timing.spread([7.0]).relative == 0


def test_ratios_are_taken_round_by_round():
    # each round twice as slow as the one before: the ratio is the same in all
    assert timing.ratio([2, 4, 8], [1, 2, 4]) == timing.Spread(2, 2, 2)


def test_a_short_call_is_timed_many_times(monkeypatch):
    machine = Machine(monkeypatch)
    assert timing.sample(machine.work(1e-4)) == pytest.approx(1e-4)
    assert machine.now == pytest.approx(timing.FILL_S + 1e-4)
    assert timing.sample(machine.work(0.5)) == pytest.approx(0.5)


def test_a_clock_that_stands_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "clock", lambda: 5.0)
    with refused(TimingError, "doesn't advance"):
        timing.sample(lambda: None)


def test_a_clock_that_runs_backwards_is_refused(monkeypatch):
    ticks = itertools.count(0, -1)
    monkeypatch.setattr(timing, "clock", lambda: float(next(ticks)))
    with refused(TimingError, "doesn't advance"):
        timing.sample(lambda: None)


def test_contenders_take_turns(monkeypatch):
    machine = Machine(monkeypatch)
    order = []

    def contender(name, seconds):
        work = machine.work(seconds)
        return lambda: (order.append(name), work())

    calls = {"a": contender("a", 0.1), "b": contender("b", 0.2)}
    found = timing.interleaved(calls, 3, warm_up=False)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found.count == 3
    assert found.ratio("b", "a").median == pytest.approx(2)
    ended = timing.interleaved(calls, 30, on_round=lambda r: r.count == 2)
    assert ended.count == 2


@pytest.mark.parametrize("tick", [0.0, -0.001, float("nan")])
def test_a_clock_that_stands_is_found_soon(tick, monkeypatch):
    """And not after as many calls as would fill a sample."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "clock", lambda: 5 + tick * next(ticks))
    monkeypatch.setattr(timing, "STANDS_S", 0.02)
    calls = []

    def call():
        calls.append(1)
        end = time.process_time() + 0.001
        while time.process_time() < end:
            pass

    with refused(TimingError, "doesn't advance"):
        timing.sample(call)
    assert len(calls) < 200


def test_a_coarse_clock_needs_more_calls(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(timing, "clock", lambda: next(now) // 30 * 0.03)

    def call():
        next(now)  # a thousandth of a second; the clock shows thirty at a time

    assert 0.0005 < timing.sample(call) < 0.003


def test_a_slow_change_is_no_noise_and_a_quick_one_is():
    assert timing.noise([1.1**i for i in range(20)]) == pytest.approx(0, abs=1e-9)
    assert timing.noise([1, 1.3] * 10) == pytest.approx(0.3)
    assert timing.noise([1, 5]) == 0  # too few to tell
    with refused(TimingError, "too noisy"):
        timing.check_noise([1, 9] * 10)
    timing.check_noise([1, 1.05] * 10)


def rounds(*sessions):
    """(speed, number of rounds, seconds by name) → seconds by name and round, and fixed."""
    seconds, fixed = {}, {}
    for speed, count, times in sessions:
        for turn in range(len(fixed), len(fixed) + count):
            fixed[turn] = 0.01 * speed
            for name, s in times.items():
                seconds.setdefault(name, {})[turn] = s * speed
    return seconds, fixed


def test_standings_join_rounds_that_not_all_ran():
    # the second session is three times as slow; b ran in both, a and c in one each
    found = timing.standings(
        *rounds((1, 2, {"a": 1.0, "b": 2.0}), (3, 2, {"b": 2.0, "c": 4.0}))
    )
    assert found == pytest.approx({"a": 1, "b": 2, "c": 4})


def test_standings_of_those_that_ran_only_at_first():
    """Most left early, and are no quicker for it."""
    times = dict(
        zip("abcdefgh", [1.0, 1.01, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6], strict=True)
    )
    few = {n: times[n] for n in "ab"}
    for sessions in (
        ((1, 2, times), (1, 12, few)),
        ((1, 2, times), (3, 12, few)),
        ((3, 20, few), (1, 2, times)),
    ):
        found = timing.standings(*rounds(*sessions))
        assert found == pytest.approx(times)


def test_standings_of_sessions_with_nobody_in_common_go_by_the_fixed_work():
    found = timing.standings(
        *rounds((1, 2, {"a": 1.0, "b": 1.5}), (4, 5, {"c": 3.0, "d": 0.5}))
    )
    assert found == pytest.approx({"a": 2, "b": 3, "c": 6, "d": 1})


def test_one_wild_sample_changes_no_standing():
    seconds, fixed = rounds((1, 7, {"a": 1.0, "b": 1.3}))
    seconds["a"][3] = 40.0
    assert timing.standings(seconds, fixed) == pytest.approx({"a": 1.0, "b": 1.3})
    assert timing.standings({"a": {1: 5.0}}, {1: 1.0}) == {"a": 1.0}
    assert timing.standings({}, {}) == {}
