"""Tuning for ever smaller budgets: which, in which order, and when it ends."""

import dataclasses

import pytest

from attngen import AttentionSpec, keys, sweeping, timing
from attngen.errors import BudgetError, TimingError
from attngen.records import Candidate, Finished, Record

SPEC = AttentionSpec(q_heads=1, q_len=64, qk_dim=8)
KEY = keys.Key(
    spec={}, target="abacus", device="", cores=1, backend="beads", versions={}
)
MIB = 2**20


class Searches:
    """Stands for tuning: each search finds a plan that needs all of its budget."""

    def __init__(self, monkeypatch, *, first=MIB, least=0, seconds=1.0, done=()):
        self.first, self.least, self.seconds = first, least, seconds
        self.now, self.asked, self.shares = 0.0, [], []
        self.record = Record(key=KEY, finished=tuple(map(finished, done)))
        monkeypatch.setattr(timing, "clock", lambda: self.now)

    def __call__(self, spec, seconds):
        budget = spec.budget_bytes
        self.asked.append(budget)
        self.shares.append(seconds)
        self.now += self.seconds
        need = self.first if budget is None else budget
        if need < self.least:
            raise BudgetError("Nothing fits.", got=need, needed=self.least)
        made = candidate(need, MIB / (1 + need) + 1)
        more = Record(key=KEY, candidates=(made,), finished=(finished(budget),))
        self.record = self.record.merged(more)
        return self.record


def candidate(need, seconds):
    return Candidate(
        choice={"q_chunk": need},
        digest="d",
        temp_bytes=need,
        modelled_bytes=need,
        modelled_s=1.0,
        estimated_s=seconds,
    )


def finished(budget):
    return Finished(effort="measure", fix={}, budget=budget, noise=0.0)


def sweep(searches, seconds=100.0, spec=SPEC):
    said = []
    record = sweeping.sweep(
        spec, searches, effort="measure", seconds=seconds, fix={}, say=said.append
    )
    return record, said


@pytest.mark.parametrize("most", [0, 1, 2**17, 2**17 + 1, 3 * MIB, 4 * MIB])
def test_budgets_are_powers_of_two_below_what_is_taken(most):
    found = sweeping.halvings(most)
    assert found == sorted(found, reverse=True)
    assert all(b & (b - 1) == 0 and sweeping.LEAST <= b < most for b in found)
    if found:
        assert found[0] * 2 >= most
        assert found[-1] == sweeping.LEAST
    else:
        assert most <= sweeping.LEAST


def test_each_budget_is_searched_and_the_first_has_a_share(monkeypatch):
    searches = Searches(monkeypatch)
    record, said = sweep(searches)
    assert searches.asked == [None, 2**19, 2**18, 2**17]
    assert searches.shares[0] == 100 / sweeping.SHARE
    assert searches.shares[1:] == [99 / 4, 98 / 3, 97 / 2]
    assert {c.temp_bytes for c in record.candidates} == {MIB, 2**19, 2**18, 2**17}
    assert said == ["within 512.0 KiB", "within 256.0 KiB", "within 128.0 KiB"]


def test_what_was_searched_before_comes_last(monkeypatch):
    searches = Searches(monkeypatch)
    sweep(searches, seconds=2.5)
    assert searches.asked == [None, 2**19, 2**18]
    searches.asked.clear()
    sweep(searches)
    assert searches.asked == [None, 2**17, 2**19, 2**18]


def test_budgets_between_plans_that_take_as_long_are_left_out(monkeypatch):
    """The second search finds a plan of far fewer bytes, hardly slower."""
    searches = Searches(monkeypatch, first=64 * MIB)
    small = candidate(3 * MIB, 1.02)

    def search(spec, seconds):
        searches(spec, seconds)
        if spec.budget_bytes == 32 * MIB:
            found = Record(key=KEY, candidates=(small, candidate(32 * MIB, 1.0)))
            searches.record = searches.record.merged(found)
        return searches.record

    sweep(search)
    assert searches.asked[:4] == [None, 32 * MIB, 2 * MIB, MIB]


def test_below_what_nothing_fits_nothing_is_searched(monkeypatch):
    searches = Searches(monkeypatch, least=2**18 + 1)
    record, said = sweep(searches)
    assert searches.asked == [None, 2**19, 2**18]
    assert said[-1] == "nothing fits 256.0 KiB"
    assert min(c.temp_bytes for c in record.candidates) == 2**19


def test_it_ends_when_its_time_is_spent_and_says_so(monkeypatch):
    searches = Searches(monkeypatch, seconds=10.0)
    _, said = sweep(searches, seconds=15.0)
    assert searches.asked == [None, 2**19]
    assert said[-1] == "no time for 256.0 KiB and less; tune again to go on"


def test_a_plan_without_temporaries_leaves_all_time_to_the_first(monkeypatch):
    searches = Searches(monkeypatch, first=0)
    searches.record = dataclasses.replace(searches.record, finished=())
    sweep(searches)
    assert searches.asked == [None]


def test_a_first_search_that_was_stopped_goes_on(monkeypatch):
    searches = Searches(monkeypatch, first=0)

    def stopped(spec, seconds):
        made = searches(spec, seconds)
        ended = tuple(dataclasses.replace(f, stopped=True) for f in made.finished)
        return dataclasses.replace(made, finished=ended)

    sweep(stopped)
    assert searches.asked == [None, None]
    assert searches.shares == [100 / sweeping.SHARE, 99]


def test_a_machine_that_becomes_noisy_ends_it_and_loses_nothing(monkeypatch):
    searches = Searches(monkeypatch)

    def search(spec, seconds):
        if spec.budget_bytes == 2**18:
            raise TimingError("Too noisy.", got="300%", needed="a quiet machine")
        return searches(spec, seconds)

    record, said = sweep(search)
    assert {c.temp_bytes for c in record.candidates} == {MIB, 2**19}
    assert said[-1] == "no more budgets: Too noisy. (300%)"


def test_an_error_of_the_first_is_the_users(monkeypatch):
    def search(spec, seconds):
        raise TimingError("Noisy.", got=1, needed=2)

    Searches(monkeypatch)
    with pytest.raises(TimingError):
        sweep(search)
