"""Records: to JSON and back, merged, and what they say is fastest."""

import dataclasses
import json

import pytest
from machine import candidate
from refusals import refused
from small import SPEC, spec_of

import attngen
from attngen import backends, planner, recalling, targets
from attngen.errors import FileError
from attngen.records import Finished, Record

TARGET, JAX = targets.get(), backends.get()
PLANS = planner.rank(SPEC, TARGET, JAX)
KEY = recalling.key_of(SPEC, TARGET, JAX)
DONE = Finished(effort="measure", fix={}, budget=None, noise=0.01)


def record(*timed, **changes):
    """A record of plans with (bytes, seconds of each round)."""
    made = tuple(
        candidate(
            plan,
            temp_bytes=need,
            samples_s=tuple(seconds),
            yardsticks_s=tuple(0.01 * (i + 1) for i in range(len(seconds))),
        )
        for plan, (need, seconds) in zip(PLANS, timed, strict=False)
    )
    return Record(**{"key": KEY, "finished": (DONE,), "candidates": made} | changes)


RECORD = record((1000, [3.0, 3.1]), (100, [4.0, 4.1]), (2000, [1.0, 1.0]))


def test_to_json_and_back():
    assert Record.from_json(RECORD.to_json()) == RECORD
    assert attngen.Record is Record
    assert json.loads(RECORD.to_json())["effort"] == "measure"


def test_the_fastest_that_fits():
    first, second, third = RECORD.candidates
    assert RECORD.ranked() == (third, first, second)
    assert RECORD.best(1999) == first
    assert RECORD.best(100) == second
    assert RECORD.best(99) is None
    assert RECORD.best(fix=second.choice) == second
    assert RECORD.best(fix={"q_chunk": -1}) is None
    assert RECORD.best(fix={"no such choice": 1}) is None


def test_what_isnt_timed_or_failed_or_unknown_is_never_best():
    first = dataclasses.replace(RECORD.candidates[0], failed="it crashed")
    second = dataclasses.replace(RECORD.candidates[1], temp_bytes=None)
    third = dataclasses.replace(RECORD.candidates[2], samples_s=(), yardsticks_s=())
    changed = dataclasses.replace(RECORD, candidates=(first, second, third))
    assert changed.ranked() == (second,)
    assert changed.best(10**9) is None
    assert "failed" in str(changed)


def test_one_wild_round_makes_nobody_the_fastest():
    found = record((1000, [3.0] * 4), (100, [4.0] * 4), (2000, [1.0]))
    first, second, wild = found.candidates
    assert found.ranked() == (first, second, wild)
    assert found.standings[first.identity] == 1
    assert found.standings[wild.identity] == pytest.approx(1 / 3)
    assert "1.00×" in str(found)
    alone = record((1000, [3.0]), (100, [4.0]))
    assert alone.best() == alone.candidates[0]


def test_a_finished_search_is_of_an_effort_and_no_narrower():
    assert RECORD.searched("estimate", {}) == (DONE,)
    assert RECORD.searched("measure", {"q_chunk": 16}) == (DONE,)
    assert not RECORD.searched("patient", {})
    narrow = record(finished=(dataclasses.replace(DONE, fix={"q_chunk": 16}),))
    assert not narrow.searched("estimate", {})
    assert narrow.searched("measure", {"q_chunk": 16, "k_chunk": 16})
    assert not narrow.searched("measure", {"q_chunk": 8})
    unfinished = record((1000, [3.0]), finished=())
    assert unfinished.effort == "unfinished"
    assert not unfinished.searched("estimate", {})
    assert record(finished=()).effort == "estimate"


def test_a_search_that_was_stopped_is_used_and_is_of_no_effort():
    stopped = dataclasses.replace(DONE, stopped=True)
    cut = record((1000, [3.0]), finished=(stopped,))
    assert cut.effort == "unfinished"
    assert cut.searched("estimate", {}) == (stopped,)
    assert not cut.searched("measure", {})
    assert cut.merged(RECORD).finished == RECORD.merged(cut).finished == (DONE,)
    assert Record.from_json(cut.to_json()) == cut


def test_merging_keeps_each_sample_once():
    assert RECORD.merged(RECORD) == RECORD
    more = record((1000, [3.0, 3.1, 2.9]))
    merged = RECORD.merged(more)
    assert merged.candidates[0].samples_s == (3.0, 3.1, 2.9)
    assert merged.candidates[1:] == RECORD.candidates[1:]
    assert more.merged(RECORD).candidates[0].samples_s == (3.0, 3.1, 2.9)


def test_a_plan_that_failed_once_and_then_worked_is_kept_as_working():
    bad = candidate(PLANS[0], digest=None, failed="no memory")
    merged = Record(key=KEY, candidates=(bad,)).merged(RECORD)
    assert merged.candidates == RECORD.candidates


def test_the_key_is_the_spec_without_its_budget():
    assert recalling.key_of(spec_of(memory_budget="1MiB"), TARGET, JAX) == KEY
    other = recalling.key_of(spec_of(q_len=64, kv_len=64), TARGET, JAX)
    assert KEY.differences(other) == ["q_len: 48 ≠ 64", "kv_len: 48 ≠ 64"]
    assert {"attngen", "jax", "jaxlib"} == set(KEY.versions)
    older = dataclasses.replace(KEY, versions=KEY.versions | {"jax": "0.1"})
    assert older.differences(KEY)[0].startswith("version of jax: 0.1 ≠ ")


def test_the_table_is_narrow_and_says_what_was_noisy():
    noisy = record((1000, [3.0] * 3), finished=(dataclasses.replace(DONE, noise=0.5),))
    text = str(noisy)
    assert max(map(len, text.splitlines())) <= 100
    assert "noisy: in measure, neighbouring rounds differed by 50%" in text
    assert "1.00×" in text


@pytest.mark.parametrize(
    "change",
    [
        {"key": 3},
        {"candidates": [{}]},
        {"finished": [{"effort": "hard", "fix": {}, "budget": None, "noise": 0}]},
        {
            "candidates": [
                {**json.loads(RECORD.to_json())["candidates"][0], "samples_s": [1]}
            ]
        },
        {
            "candidates": [
                {
                    **json.loads(RECORD.to_json())["candidates"][0],
                    "samples_s": [-1, 2],
                }
            ]
        },
    ],
)
def test_what_isnt_a_record_is_refused(change):
    data = json.loads(RECORD.to_json()) | change
    with refused(FileError):
        Record.from_json(json.dumps(data))
    with refused(FileError):
        Record.from_json("{")


def test_records_of_before_bytes_on_the_chip_were_kept_are_read():
    data = json.loads(RECORD.to_json())
    for each in data["candidates"]:
        del each["on_chip_bytes"]
    assert Record.from_dict(data) == RECORD
    assert "on chip" not in str(RECORD)


def test_merging_with_an_older_record_keeps_bytes_on_the_chip():
    own = dataclasses.replace(RECORD.candidates[0], on_chip_bytes=5)
    newer = dataclasses.replace(RECORD, candidates=(own, *RECORD.candidates[1:]))
    assert newer.merged(RECORD) == newer
    assert RECORD.merged(newer) == newer
    lines = str(newer).splitlines()
    assert lines[3].split()[-3:] == ["on", "chip", "plan"]
    assert max(map(len, lines)) <= 100


def test_a_record_says_what_it_is_of():
    def size(**fields):
        spec = attngen.AttentionSpec(q_heads=2, q_len=1, kv_len=64, qk_dim=16, **fields)
        return record(key=recalling.key_of(spec, TARGET, JAX)).size

    assert size() == "1 × 2 heads, 1 queries × 64 keys × 16, float32"
    paged = size(storage="paged", kv_lengths=True, kv_dtype="int8")
    assert paged == size() + ", paged, int8"
