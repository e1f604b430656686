"""Plans for GPUs that aren't here: ranked by what the compiler makes of them."""

import dataclasses

import pytest
from commands import FAILED, run

import attngen
from attngen import (
    AttentionSpec,
    descent,
    frontier,
    masks,
    offline,
    recalling,
    records,
    targets,
    wisdom,
)
from attngen.errors import InternalError, PlanError
from attngen.keys import canonical
from attngen.reports import Certificate

SPEC = AttentionSpec(
    q_heads=8, q_len=1000, qk_dim=64, dtype="float16", mask=masks.causal()
)
A100 = targets.get("a100")
KERNEL = Certificate("a100", "ptxas", 0, spill_bytes=0, shared_bytes=1024)


@pytest.fixture(autouse=True)
def own_wisdom(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path))


TPU = dataclasses.replace(SPEC, dtype="bfloat16")


def on_tpu(need=2**19, cycles=10**9):
    """A compiler that says the same of all programs of a TPU."""

    def certify_many(compiler, target, programs):
        return [
            Certificate(
                target, "XLA:TPU", need, on_chip_bytes=2**20, estimated_cycles=cycles(i)
            )
            for i, _ in enumerate(programs)
        ]

    return certify_many


def plan(**fix):
    return attngen.plan(SPEC, target="a100", fix=fix)


def test_a_bound_counts_waves_tiles_and_cycles():
    made = plan(q_chunk=128, k_chunk=64, num_warps=4)
    one = dataclasses.replace(KERNEL, bound_cycles=1000.0, blocks_per_multiprocessor=2)
    assert A100.gpu.multiprocessors == 108 > 8 * 8  # a wave of one program each
    tiles = made.tiles.visited / 8
    want = pytest.approx(tiles * 1000 / A100.gpu.clock_hz)
    assert descent.bound_s(made, one, A100) == want
    twice = dataclasses.replace(one, bound_cycles=2000.0)
    assert descent.bound_s(made, twice, A100) == pytest.approx(
        2 * tiles * 1000 / A100.gpu.clock_hz
    )


@pytest.mark.parametrize(
    "change", [{"bound_cycles": None}, {"blocks_per_multiprocessor": 0}]
)
def test_what_is_not_known_is_no_bound(change):
    known = {"bound_cycles": 1.0, "blocks_per_multiprocessor": 1}
    certificate = dataclasses.replace(KERNEL, **known | change)
    assert descent.bound_s(plan(), certificate, A100) is None


def compiled(made, by, target):
    """Stands for the compiler: the smallest tiles are the best, two warps spill."""
    return [
        dataclasses.replace(
            KERNEL,
            bound_cycles=float(p.q_chunk * p.k_chunk),
            blocks_per_multiprocessor=1,
            spill_bytes=8 if p.choice["num_warps"] == 2 else 0,
        )
        for p, _ in made
    ]


@pytest.fixture
def compiler(monkeypatch):
    asked = []

    def certify_many(made, by, target):
        asked.extend(p.choice for p, _ in made)
        return compiled(made, by, target)

    monkeypatch.setattr("attngen.building.certify_many", certify_many)
    return asked


def test_plans_are_ranked_by_their_bounds_and_those_that_spill_have_failed(compiler):
    record = attngen.tune(SPEC, target="a100")
    assert record.effort == "measure"
    assert record.key.device == "a100, not here"
    bounds = [c.bound_s for c in record.ranked()]
    assert bounds == sorted(bounds)
    assert len(bounds) > 8
    for c in record.candidates:
        spills = c.choice["num_warps"] == 2
        assert (c.failed is not None) == spills == (c.bound_s is None)
        assert not c.samples_s
    first, then = compiler[: offline.GROUP], compiler[offline.GROUP :]
    sizes = {canonical(c): c["q_chunk"] * c["k_chunk"] for c in first}
    least = min(sizes.values())
    leaders = [c for c in first if sizes[canonical(c)] == least]
    unsaid = {"pack_gqa": False, "kv_splits": 1}  # where they aren't worth considering
    for c in then:  # the leader's neighbours
        apart = [sum((unsaid | leader)[n] != c[n] for n in c) for leader in leaders]
        assert 1 in apart
    lines = str(record).splitlines()
    assert any("≥" in line for line in lines)
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.slow
def test_what_was_compiled_is_not_compiled_again_and_is_built(compiler, monkeypatch):
    first = attngen.tune(SPEC, target="a100")
    patient = attngen.tune(SPEC, target="a100", effort="patient")
    assert patient.effort == "patient"
    assert len(patient.candidates) > len(first.candidates)
    assert len({canonical(c) for c in compiler}) == len(compiler)
    compiler.clear()
    assert attngen.tune(SPEC, target="a100", effort="patient") == patient
    assert not compiler
    monkeypatch.setattr("attngen.building.certify", lambda *_: KERNEL)
    kernel = attngen.build(SPEC, target="a100")  # wisdom is used by any effort
    assert kernel.plan.choice == patient.best().choice
    assert "bound: " in kernel.plan.explain()


def test_the_allowance_ends_it_after_the_first_plans(compiler):
    record = attngen.tune(SPEC, target="a100", effort="patient", seconds=1e-6)
    assert len(compiler) == offline.GROUP
    assert record.finished[0].stopped
    assert record.effort == "unfinished"


def test_an_interrupt_keeps_what_was_compiled(monkeypatch):
    done = []

    def certify_many(made, by, target):
        if len(done) >= offline.GROUP:  # a group may be of several processes
            raise KeyboardInterrupt
        done.extend(made)
        return compiled(made, by, target)

    monkeypatch.setattr("attngen.building.certify_many", certify_many)
    with pytest.raises(KeyboardInterrupt):
        attngen.tune(SPEC, target="a100", effort="patient")
    by = attngen.backends.get("triton")
    record = wisdom.find(recalling.key_of(SPEC, A100, by))
    assert len(record.candidates) == offline.GROUP
    assert not record.finished


def test_an_interrupt_keeps_what_was_compiled_of_a_group(monkeypatch):
    certify_many = on_tpu(cycles=lambda i: 10**9)
    monkeypatch.setattr(
        "attngen.certifier.certify_many",
        lambda *given: certify_many(*given)[:1],  # the others are left
    )
    monkeypatch.setattr(
        "attngen.interrupts.in_threads",
        lambda function, given: ([function(x) for x in given], True),
    )
    with pytest.raises(KeyboardInterrupt):
        attngen.tune(TPU, target="tpu-v5e")
    key = recalling.key_of(TPU, targets.get("tpu-v5e"), attngen.backends.get("jax"))
    record = wisdom.find(key)
    assert 0 < len(record.candidates) < offline.GROUP
    assert not record.finished


def test_where_nothing_compiles_building_says_so(monkeypatch):
    spilling = dataclasses.replace(KERNEL, spill_bytes=8)
    monkeypatch.setattr(
        "attngen.building.certify_many",
        lambda made, by, target: [spilling] * len(made),
    )
    monkeypatch.setattr(
        "attngen.descent._certified",
        lambda groups, by: [(p, None, spilling) for group in groups for p in group],
    )
    record = attngen.tune(SPEC, target="a100")
    assert record.best() is None
    with pytest.raises(PlanError, match="No plan compiles"):
        attngen.build(SPEC, target="a100", effort="measure")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), True, "60"])
def test_an_allowance_is_a_positive_number(seconds):
    with pytest.raises(PlanError, match="needs time"):
        attngen.tune(SPEC, target="a100", seconds=seconds)


def test_tensor_descriptors_are_among_the_neighbours_where_a_target_has_them(compiler):
    attngen.tune(SPEC, target="h100")
    assert any(c["loads"] == "descriptors" for c in compiler)
    compiler.clear()
    attngen.tune(SPEC, target="a100")
    assert {c["loads"] for c in compiler} == {"pointers"}


def test_wisdom_of_bounds_is_shown(compiler):
    attngen.tune(SPEC, target="a100")
    shown, _ = run("wisdom", "show")
    assert "a100, not here" in shown
    assert "≥" in shown


def test_where_the_best_do_not_fit_smaller_neighbours_are_compiled(monkeypatch):
    spec = dataclasses.replace(SPEC, memory_budget="4MiB")
    fix = {"q_chunk": 512}
    compiled = []

    def certify_many(made, by, target):
        """The model's best need more than it says; all others next to nothing."""
        first = len(compiled) < offline.GROUP
        compiled.extend(p for p, _ in made)
        need = 2**22 + 1 if first else 2**10
        return [
            Certificate(target, "XLA:TPU", need, estimated_cycles=10**9) for _ in made
        ]

    monkeypatch.setattr("attngen.building.certify_many", certify_many)
    monkeypatch.setattr(offline, "ROOM", 1.0)
    record = attngen.tune(spec, target="tpu-v3", fix=fix, effort="estimate")
    smallest = record.candidates[0]  # of those that take as much, the model's best
    others = compiled[offline.GROUP :]
    assert others
    assert all(p.temp_bytes < smallest.modelled_bytes for p in others)
    assert record.best(spec.budget_bytes).temp_bytes == 2**10
    assert all(c.choice["q_chunk"] == 512 for c in record.candidates)


def test_plans_modelled_a_little_above_the_budget_are_compiled(monkeypatch):
    spec = dataclasses.replace(SPEC, memory_budget="1MiB")
    compiled = []

    def certify_many(made, by, target):
        compiled.extend(p for p, _ in made)
        return [
            Certificate(target, "XLA:TPU", 2**19, estimated_cycles=10**9) for _ in made
        ]

    monkeypatch.setattr("attngen.building.certify_many", certify_many)
    record = attngen.tune(spec, target="tpu-v3", effort="estimate")
    assert any(p.temp_bytes > spec.budget_bytes for p in compiled)
    assert all(p.temp_bytes <= offline.ROOM * spec.budget_bytes for p in compiled)
    assert record.best(spec.budget_bytes).modelled_bytes > 0


def test_bytes_on_the_chip_are_kept_and_shown(monkeypatch):
    monkeypatch.setattr(
        "attngen.certifier.certify_many", on_tpu(cycles=lambda _: 10**9)
    )
    record = attngen.tune(TPU, target="tpu-v5e")
    assert {c.on_chip_bytes for c in record.candidates} == {2**20}
    key = recalling.key_of(TPU, targets.get("tpu-v5e"), attngen.backends.get("jax"))
    assert wisdom.find(key) == record
    head, *rows = str(record).splitlines()[3:]
    assert head.split()[:5] == ["a", "call", "certified", "on", "chip"]
    assert all("512.0 KiB    1.0 MiB  " in row for row in rows[: records.SHOWN])
    assert max(map(len, str(record).splitlines())) <= 100
    points = frontier.of(record, targets.get("tpu-v5e"), []).to_dict()["line"]
    assert points[0]["on_chip_bytes"] == 2**20


def test_an_internal_error_of_one_plan_is_told_and_the_others_are_ranked(monkeypatch):
    monkeypatch.setattr(
        "attngen.certifier.certify_many",
        on_tpu(cycles=lambda i: 1 if i == 0 else 10**9),
    )
    with pytest.warns(UserWarning, match="report it with the spec") as told:
        record = attngen.tune(TPU, target="tpu-v5e")
    assert len(told) == 1
    assert record.effort == "measure"
    failed = [c for c in record.candidates if c.failed is not None]
    assert 0 < len(failed) < len(record.candidates)
    assert str(told[0].message).startswith(f"{len(failed)} plans left out. tpu-v5e: ")
    assert all("is below the" in c.failed for c in failed)
    assert record.best().failed is None
    plan = attngen.plan(TPU, target="tpu-v5e")
    low = on_tpu(cycles=lambda i: 1)
    monkeypatch.setattr(
        "attngen.certifier.certify", lambda c, t, **_: low(c, t, [None])[0]
    )
    with pytest.raises(InternalError, match="is below the"):
        attngen.certify(plan)
    monkeypatch.setattr("attngen.certifier.certify_many", low)
    wisdom.clear()
    with pytest.raises(InternalError, match="is below the"):
        attngen.build(TPU, target="tpu-v5e")


@pytest.mark.filterwarnings("default")
def test_the_command_tells_an_internal_error_without_a_traceback(monkeypatch):
    monkeypatch.setattr("attngen.certifier.certify_many", on_tpu(cycles=lambda i: 1))
    size = ("--q-heads", "1", "--q-len", "256", "--qk-dim", "64")
    out, err = run("tune", *size, "--target", "tpu-v5e", code=FAILED)
    said = " ".join(err.split())
    assert (
        "attngen: warning: 8 plans left out. tpu-v5e: an estimate of 1 cycles" in said
    )
    assert "This is a fault in attngen. Please report it" in said
    assert out.count("failed ") >= 8
    assert "none of 8 plans can be used" in err
    assert max(map(len, [*out.splitlines(), *err.splitlines()])) <= 100
