"""Tuning end to end: what is timed once is found again, and nothing is timed twice."""

import dataclasses
import time
import warnings

import pytest
from commands import FAILED, SMALL, WRONG, run
from refusals import refused
from small import SPEC, close, qkv, spec_of

import attngen
from attngen import (
    api,
    backends,
    certifier,
    planner,
    recalling,
    targets,
    timing,
    tuner,
    wisdom,
)
from attngen.errors import (
    BudgetError,
    CompileError,
    PlanError,
    TimingError,
    WisdomError,
)

FIX = {"k_chunk": 16, "unroll": 1, "loop": "fori"}
TARGET, JAX = targets.get(), backends.get()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Wisdom of a test's own; and a machine that may be busy with other tests."""
    monkeypatch.setattr(timing, "USELESS", float("inf"))
    monkeypatch.setattr(tuner, "STAGE_S", 0.0)
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture
def tuned(sizes, monkeypatch):
    """A record of SPEC from two plans; then no clock."""
    monkeypatch.setitem(tuner.MOST, "measure", 2)
    record = attngen.tune(SPEC, seconds=60)

    def clock():
        raise AssertionError("something was timed")

    monkeypatch.setattr(timing, "clock", clock)
    sizes.clear()
    return record


def test_a_second_build_times_nothing(tuned):
    assert len(tuned.ranked()) == 2
    for effort in ("estimate", "measure"):
        kernel = attngen.build(SPEC, effort=effort)
        assert kernel.plan.choice == tuned.best().choice
        assert kernel.report.passed
        assert kernel.plan.fixed == ()


def test_the_explanation_names_what_else_was_timed(tuned):
    best, second = tuned.ranked()
    plan = recalling.recall(SPEC, TARGET, JAX, "measure", {})[0]
    (other,) = plan.alternatives
    assert other.choice == second.choice
    assert other.temp_bytes == second.temp_bytes
    assert "timed here: " in plan.explain()
    if best.temp_bytes < second.temp_bytes:
        spec = spec_of(memory_budget=best.temp_bytes)
        plan = recalling.recall(spec, TARGET, JAX, "measure", {})[0]
        assert "timed here: over the budget" in plan.explain()


def test_a_new_budget_selects_again(tuned):
    small = min(tuned.ranked(), key=lambda c: c.temp_bytes)
    spec = spec_of(memory_budget=small.temp_bytes)
    chosen = recalling.recall(spec, TARGET, JAX, "measure", {})[0]
    assert chosen.choice == small.choice
    assert chosen.spec == spec
    none = spec_of(memory_budget=small.temp_bytes - 1)
    assert recalling.recall(none, TARGET, JAX, "measure", {}) is None


def test_a_larger_budget_isnt_held_to_the_plans_of_a_small_one(tuned):
    best = planner.rank(SPEC, TARGET, JAX)[0].temp_bytes
    for budget, found in ((best // 2, False), (best, True), (None, True)):
        done = dataclasses.replace(tuned.finished[0], budget=budget)
        wisdom.clear()
        wisdom.add(dataclasses.replace(tuned, finished=(done,)))
        for effort in ("estimate", "measure"):
            assert bool(recalling.recall(SPEC, TARGET, JAX, effort, {})) == found
        for larger, known in ((best, found), (2 * best, found), (best // 3, True)):
            spec = spec_of(memory_budget=larger)
            record = wisdom.find(recalling.key_of(spec, TARGET, JAX))
            assert (
                recalling._searched(record, spec, TARGET, JAX, "measure", {}) == known
            )


def test_a_greater_effort_or_another_spec_isnt_there(tuned):
    assert recalling.recall(SPEC, TARGET, JAX, "patient", {}) is None
    assert recalling.recall(spec_of(qk_dim=4), TARGET, JAX, "estimate", {}) is None
    with pytest.raises(AssertionError, match="something was timed"):
        attngen.build(SPEC, effort="patient")


def test_fixed_choices_agree(tuned):
    second = tuned.ranked()[1].choice
    assert recalling.recall(SPEC, TARGET, JAX, "measure", second)[0].choice == second
    assert recalling.recall(SPEC, TARGET, JAX, "measure", {"q_chunk": 1}) is None


def test_what_is_emitted_otherwise_today_is_stale(tuned, monkeypatch):
    best, second = tuned.ranked()
    stale = dataclasses.replace(best, digest="0" * 64)
    changed = dataclasses.replace(tuned, candidates=(stale, second))
    wisdom.clear()
    wisdom.add(changed)
    found = recalling.recall(SPEC, TARGET, JAX, "measure", {})
    assert found[0].choice == second.choice
    wisdom.clear()
    wisdom.add(dataclasses.replace(tuned, candidates=(stale,)))
    assert recalling.recall(SPEC, TARGET, JAX, "estimate", {}) is None


def test_a_choice_that_is_no_longer_known_is_stale(tuned):
    best, second = tuned.ranked()
    odd = dataclasses.replace(best, choice=best.choice | {"magic": 1})
    wisdom.clear()
    wisdom.add(dataclasses.replace(tuned, candidates=(odd, second)))
    assert recalling.recall(SPEC, TARGET, JAX, "measure", {})[0].choice == second.choice


def odd(choice):
    """A plan's choices as other versions might have them: with what is odd, in words."""
    for name in choice:
        without = {n: v for n, v in choice.items() if n != name}
        yield without, "isn't known" if name == "algorithm" else f"'{name}', which"
        for value in ("odd", -1, 10**30, True):
            if value is not choice[name]:
                yield choice | {name: value}, "today"
    yield choice | {"magic": 1}, "'magic' isn't known"


def test_choices_of_another_version_are_ignored_with_the_reason(tuned):
    best, second = tuned.ranked()
    for choice, word in odd(best.choice):
        other = dataclasses.replace(best, choice=choice)
        wisdom.clear()
        wisdom.add(dataclasses.replace(tuned, candidates=(other, second)))
        plan, source = recalling.recall(SPEC, TARGET, JAX, "measure", {})
        assert plan.choice == second.choice, choice
        assert source == attngen.emit(plan)
        assert "timed here" not in plan.explain()
        said = recalling.why(SPEC, TARGET, JAX)
        assert "1 of the 2 plans that were timed aren't used: " in said, choice
        assert word in said or "isn't known" in said, (choice, said)
        assert max(map(len, said.splitlines())) <= 100
        assert said.endswith("`build` uses it.")


def test_only_what_can_be_had_is_named_beside_a_recalled_plan(tuned):
    """The faster one would be emitted differently; the third has a choice no more."""
    best, second = tuned.ranked()
    stale = dataclasses.replace(best, digest="0" * 64)
    few = {n: best.choice[n] for n in ("algorithm", "q_chunk", "k_chunk")}
    old = dataclasses.replace(best, choice=few, digest="1" * 64)
    wisdom.clear()
    wisdom.add(dataclasses.replace(tuned, candidates=(stale, second, old)))
    plan = recalling.recall(SPEC, TARGET, JAX, "measure", {})[0]
    assert plan.choice == second.choice
    assert plan.alternatives == ()
    assert "timed here" not in plan.explain()


def test_where_all_are_stale_it_is_said_and_tuned_anew(tuned, monkeypatch):
    best, second = tuned.ranked()
    old = [
        dataclasses.replace(c, choice=c.choice | {"magic": 1}) for c in (best, second)
    ]
    wisdom.clear()
    wisdom.add(dataclasses.replace(tuned, candidates=tuple(old)))
    assert recalling.why(SPEC, TARGET, JAX).splitlines()[1:] == [
        "2 of the 2 plans that were timed aren't used: choice 'magic' isn't known.",
        "Nothing is left of it: tune again.",
    ]
    monkeypatch.setattr(timing, "clock", time.perf_counter)
    record = attngen.tune(SPEC, seconds=1e-3, fix={"loop": "fori"})
    assert [c for c in record.candidates if "magic" in c.choice] == old
    assert len(record.candidates) == 3


def test_why_says_whether_it_is_used(tuned):
    best, second = tuned.ranked()
    assert recalling.why(SPEC, TARGET, JAX).endswith("`build` uses it.")
    least = min(best.temp_bytes, second.temp_bytes)
    small = spec_of(memory_budget=least - 1)
    assert "within the budget: the least is" in recalling.why(small, TARGET, JAX)
    stale = dataclasses.replace(best, digest="0" * 64)
    wisdom.clear()
    wisdom.add(dataclasses.replace(tuned, candidates=(stale, second)))
    said = recalling.why(SPEC, TARGET, JAX)
    assert "1 of the 2 plans that were timed aren't used" in said
    assert said.endswith("`build` uses it.")
    done = dataclasses.replace(tuned.finished[0], budget=1)
    wisdom.clear()
    wisdom.add(dataclasses.replace(tuned, finished=(done,)))
    assert "only a smaller budget" in recalling.why(SPEC, TARGET, JAX)
    wisdom.clear()
    assert "no wisdom yet" in recalling.why(SPEC, TARGET, JAX)


def test_attention_recalls_in_and_outside_a_trace(tuned):
    import jax

    api._kernel_of.cache_clear()
    q, k, v = qkv()

    def call(*arrays):
        return attngen.attention(*arrays, mask=SPEC.mask, effort="measure")

    assert close(SPEC, call(q, k, v), (q, k, v))
    assert close(SPEC, jax.jit(call)(q, k, v), (q, k, v))
    api._kernel_of.cache_clear()


def test_tuning_again_adds_samples_and_certifies_nothing(sizes, monkeypatch):
    monkeypatch.setitem(tuner.MOST, "measure", 2)
    first = attngen.tune(SPEC, seconds=60)
    asked = len(sizes)
    second = attngen.tune(SPEC, seconds=60)
    assert len(sizes) == asked
    for c in first.candidates:
        now = second.find(c.choice, c.digest)
        assert now.samples_s[: len(c.samples_s)] == c.samples_s
        assert len(now.samples_s) > len(c.samples_s)
    assert wisdom.find(second.key) == second


def test_a_search_with_fixed_choices_doesnt_decide_for_others(sizes):
    attngen.tune(SPEC, seconds=1e-3, fix={"q_chunk": 1})
    assert recalling.recall(SPEC, TARGET, JAX, "estimate", {}) is None
    assert recalling.recall(SPEC, TARGET, JAX, "measure", {"q_chunk": 1}) is None
    fixed = recalling.recall(SPEC, TARGET, JAX, "estimate", {"q_chunk": 1})
    assert fixed[0].q_chunk == 1
    assert fixed[0].fixed == ("q_chunk",)


def test_damaged_wisdom_warns_an_estimate_and_stops_a_tuning(sizes, folder):
    path = wisdom.path_of(recalling.key_of(SPEC, TARGET, JAX))
    folder.mkdir()
    path.write_text("{")
    with pytest.warns(UserWarning, match="is damaged"):
        kernel = attngen.build(SPEC, fix={"q_chunk": 16, "k_chunk": 16})
    assert kernel.report.passed
    for effort in ("measure", "patient"):
        with refused(WisdomError, "damaged"):
            attngen.build(SPEC, effort=effort)
        with refused(WisdomError, "damaged"):
            attngen.tune(SPEC, effort=effort)
    assert path.read_text() == "{"


def test_a_place_that_cant_be_written_is_refused_before_time_is_spent(
    no_compiler, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "file" / "own"))
    with refused(WisdomError, "can't be written"):
        attngen.tune(SPEC)
    assert "WisdomError" in run("tune", *SMALL, code=WRONG)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert wisdom.find(recalling.key_of(SPEC, TARGET, JAX)) is None


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "5", True])
def test_no_time_is_refused(seconds, no_compiler):
    with refused(PlanError, "needs time"):
        attngen.tune(SPEC, seconds=seconds)


def test_an_unknown_effort_is_refused(no_compiler):
    with refused(PlanError, "no effort"):
        attngen.tune(SPEC, effort="hard")


def test_estimate_certifies_and_validates_and_times_nothing(sizes):
    record = attngen.tune(SPEC, effort="estimate")
    (only,) = record.candidates
    assert only.choice == attngen.plan(SPEC).choice
    assert only.temp_bytes == 1000
    assert only.samples_s == ()
    assert only.failed is None
    assert wisdom.find(record.key) == record
    assert recalling.recall(SPEC, TARGET, JAX, "estimate", {}) is None
    assert "an estimate" in wisdom.why(record.key)


def test_what_failed_is_kept_with_its_reason_and_not_tried_again(monkeypatch, sizes):
    monkeypatch.setitem(tuner.MOST, "measure", 2)
    say, tried = certifier.certify, []

    def certify(*given, **named):
        tried.append(named["digest"])
        if named["digest"] == tried[0]:
            raise CompileError("It was refused.", got="this", needed="that")
        return say(*given, **named)

    monkeypatch.setattr(certifier, "certify", certify)
    first = attngen.tune(SPEC, seconds=60)
    (failed,) = [c for c in first.candidates if c.failed]
    assert failed.failed.startswith("It was refused.")
    assert failed.digest == tried[0]
    assert "It was refused." in str(first)
    assert len(first.ranked()) == 1
    lines = []
    second = attngen.tune(SPEC, seconds=60, on_progress=lines.append)
    assert tried.count(failed.digest) == 1
    assert "  failed: It was refused." in lines
    assert failed in second.candidates
    monkeypatch.setattr(certifier, "certify", say)
    monkeypatch.setitem(tuner.MOST, "patient", 2)
    third = attngen.tune(SPEC, effort="patient", seconds=1e-3)
    assert not any(c.failed for c in third.candidates)


def test_inputs_beyond_memory_are_refused(no_compiler, monkeypatch):
    def arrays(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr("attngen.inputs.arrays", arrays)
    with refused(TimingError, "memory"):
        attngen.tune(SPEC)
    assert "TimingError" in run("tune", *SMALL, code=FAILED)[1]


def test_inputs_larger_than_the_machine_are_not_even_made(no_compiler):
    huge = (*SMALL, "--q-len", str(10**9), "--kv-len", "1", "--q-offset", "0")
    for command in ("tune", "bench"):
        out, err = run(command, *huge, code=FAILED)
        assert out == ""
        assert "The inputs don't fit this machine's memory." in err
    assert not wisdom.folder().exists()


def test_a_budget_that_nothing_is_certified_within_is_refused(certificates):
    certificates(lambda source: 5000)
    for act in (attngen.tune, lambda spec: attngen.build(spec, effort="measure")):
        with refused(BudgetError) as caught:
            act(spec_of(memory_budget=4999))
        assert "5000 bytes, certified" in caught.value.needed


def test_another_backend_is_tuned_alike():
    backends.register("numpy", "toy_backend")
    spec = spec_of(q_len=100, kv_len=100)
    record = attngen.tune(spec, backend="numpy", seconds=20)
    assert record.key.backend == "numpy"
    assert "numpy" in record.key.versions
    assert "jax" not in record.key.versions
    kernel = attngen.build(spec, backend="numpy")
    assert kernel.plan.choice == record.best().choice
    assert recalling.recall(spec, TARGET, JAX, "estimate", {}) is None
