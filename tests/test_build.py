"""build: the model proposes, the compiler confirms the budget, the reference judges."""

import dataclasses

import pytest
from refusals import refused
from small import FIX, SPEC, close, qkv, spec_of

import attngen
from attngen import backends, building, certifier, descent, planner, targets
from attngen.backends.jax import model
from attngen.cost import Cost
from attngen.errors import BudgetError, CompileError, PlanError, ValidationError
from attngen.reports import Certificate


def test_a_kernel_is_certified_and_validated():
    kernel = attngen.build(spec_of(memory_budget="64KiB"), fix=FIX)
    assert kernel.report.passed
    assert kernel.report.max_error < 1e-5
    assert 0 < kernel.certificate.temp_bytes <= 2**16
    assert kernel.certificate.digest == kernel.source.digest
    assert kernel.source == attngen.emit(kernel.plan)
    arrays = qkv()
    assert close(SPEC, kernel(*arrays), arrays)


def test_one_budget_less_and_it_is_refused(certificates):
    certificates(lambda source: 4096)
    assert attngen.build(spec_of(memory_budget=2**16)).certificate.temp_bytes == 4096
    assert attngen.build(spec_of(memory_budget=2**30)).certificate.temp_bytes == 4096
    certificates(lambda source: 2**16 + 1)
    with refused(BudgetError):
        attngen.build(spec_of(memory_budget=2**16), fix=FIX)


@pytest.fixture
def lying_model(monkeypatch):
    """A model that counts scores, not bytes: only the certificate tells."""

    def cost(spec, target, choice, tiles):
        scores = choice["q_chunk"] * choice["k_chunk"] * choice["head_chunk"]
        return Cost(temp_bytes=scores, time_s=1.0 / scores)

    monkeypatch.setattr(model, "cost", cost)


def chunk_of(source):
    """The bytes of scores of a tile: from the file's own words."""
    if "K_CHUNK" not in source:
        return 2 * 48 * 48 * 4
    line = next(n for n in source.splitlines() if n.startswith("Q_CHUNK, K_CHUNK = "))
    q_chunk, k_chunk = line.split("#")[0].split("=")[1].split(",")
    return int(q_chunk) * int(k_chunk) * 4


def test_build_goes_down_the_ranking_until_one_is_certified(lying_model, certificates):
    asked = certificates(chunk_of)
    spec = spec_of(memory_budget=8 * 1024)
    fastest = attngen.plan(spec)
    assert chunk_of(attngen.emit(fastest).text) > 8 * 1024
    kernel = attngen.build(spec)
    assert kernel.certificate.temp_bytes <= 8 * 1024
    assert kernel.plan != fastest
    assert kernel.report.passed
    assert asked[0] == attngen.emit(fastest).digest
    assert kernel.source.digest in asked[-descent.GROUP :]
    assert len(asked) > 1
    assert len(asked) == len(set(asked))


def test_what_the_compiler_refused_is_told_beside_what_was_chosen(
    lying_model, certificates
):
    certificates(chunk_of)
    spec = spec_of(memory_budget=8 * 1024)
    fastest = attngen.plan(spec)
    chosen = attngen.build(spec).plan
    first = chosen.alternatives[0]
    assert first.choice == fastest.choice
    assert first.reason == "certified 9.0 KiB"
    assert chosen.choice not in [a.choice for a in chosen.alternatives]
    for a in chosen.alternatives:
        if a.reason.startswith("slower"):
            assert a.time_s > chosen.time_s
        if a.reason == "not compiled":
            assert a.time_s <= chosen.time_s
    assert attngen.emit(chosen) == attngen.emit(
        dataclasses.replace(chosen, alternatives=())
    )


def test_what_spilled_is_told_in_a_line(monkeypatch):
    spilled = [17072, 17072]

    def certify_many(compiler, target, programs):
        return [
            Certificate(
                target, compiler, 0, spill_bytes=spilled.pop(0) if spilled else 0
            )
            for _ in programs
        ]

    monkeypatch.setattr(certifier, "certify_many", certify_many)
    spec = attngen.AttentionSpec(q_heads=2, q_len=500, qk_dim=300, dtype="bfloat16")
    by, device = backends.get("triton"), targets.get("a100")
    ranked = planner.rank(spec, device, by)
    chosen, _, _ = descent.first_certified(ranked, by)
    assert chosen.alternatives[0].choice == ranked[0].choice
    assert chosen.choice not in [a.choice for a in chosen.alternatives]
    lines = chosen.explain().splitlines()
    assert sum(line.endswith("   spills 16.7 KiB") for line in lines) == 2
    assert all(len(line) <= 100 for line in lines)


@pytest.fixture
def falling(certificates):
    """Each plan needs a byte less than the one before; what was asked."""

    def bytes_of(source):
        order = list(dict.fromkeys(asked))
        return 2**30 - order.index(asked[-1])

    asked = certificates(bytes_of)
    return asked


@pytest.mark.parametrize(
    ("spare", "sizes"), [(0, [1]), (1, [1, 2]), (2, [1, 2]), (3, [1, 2, 2])]
)
def test_few_processes_certify_and_stop_at_the_first_that_fits(
    spare, sizes, monkeypatch, falling
):
    groups, ask = [], certifier.certify_many

    def certify_many(compiler, target, programs):
        groups.append(len(programs))
        return ask(compiler, target, programs)

    monkeypatch.setattr(certifier, "certify_many", certify_many)
    kernel = attngen.build(spec_of(memory_budget=2**30 - spare))
    assert kernel.certificate.temp_bytes == 2**30 - spare
    assert groups == sizes


@pytest.mark.parametrize(
    ("failing", "asks", "built"),
    [
        ({1}, 1, False),
        ({2}, 4, True),  # beside another: alone it is certified
        ({2, 4}, 4, False),
        ({3}, 3, True),  # a plan that isn't needed
    ],
)
def test_a_refused_plan_stops_a_build_when_its_turn_comes(
    failing, asks, built, monkeypatch, falling
):
    say = certifier.certify

    def certify(*given, **named):
        answer = say(*given, **named)
        if len(falling) in failing:
            raise CompileError("It was refused.", got="this", needed="that")
        return answer

    monkeypatch.setattr(certifier, "certify", certify)
    spec = spec_of(memory_budget=2**30 - 1)  # the second plan fits
    if built:
        assert attngen.build(spec).certificate.temp_bytes == 2**30 - 1
    else:
        with refused(CompileError, "refused"):
            attngen.build(spec)
    assert len(falling) == asks


def test_when_nothing_is_certified_the_least_is_named_and_does(
    lying_model, certificates
):
    certificates(lambda source: 1000 + chunk_of(source))
    spec = spec_of(memory_budget=100)
    with refused(BudgetError) as caught:
        attngen.build(spec)
    assert "1004 bytes, certified" in caught.value.needed
    assert "1 queries × 1 keys" in caught.value.needed
    assert caught.value.hint == "raise memory_budget to 1004"
    kernel = attngen.build(dataclasses.replace(spec, memory_budget=1004))
    assert kernel.certificate.temp_bytes == 1004
    assert (kernel.plan.q_chunk, kernel.plan.k_chunk) == (1, 1)


def test_no_budget_takes_the_fastest(lying_model, certificates):
    asked = certificates(lambda source: 2**50)
    kernel = attngen.build(SPEC)
    assert kernel.plan == attngen.plan(SPEC)
    assert len(asked) == 1


def test_the_least_budget_of_a_plan_is_named_and_does():
    with refused(BudgetError) as caught:
        attngen.plan(spec_of(memory_budget=1))
    assert "modelled" in caught.value.needed
    least = int(caught.value.hint.removeprefix("raise memory_budget to "))
    assert attngen.plan(spec_of(memory_budget=least)).temp_bytes <= least
    with refused(BudgetError):
        attngen.plan(spec_of(memory_budget=least - 1))


def test_a_kernel_that_computes_something_else_is_not_returned(
    monkeypatch, certificates
):
    certificates(lambda source: 1)
    emit = building.emit

    def wrong(plan):
        source = emit(plan)
        return dataclasses.replace(
            source, text=source.text.replace("\nSCALE = ", "\nSCALE = 2 * ")
        )

    monkeypatch.setattr(building, "emit", wrong)
    with refused(ValidationError) as caught:
        attngen.build(SPEC, fix=FIX)
    assert "FAILED" in caught.value.got


def test_an_effort_that_is_not_there():
    with refused(PlanError):
        attngen.build(SPEC, effort="hard")
    with refused(PlanError):
        attngen.attention(*qkv(), effort="hard")
