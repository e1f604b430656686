"""Down the ranking on a GPU: what spills is passed over, and of a few the best is taken."""

import dataclasses

import pytest

from attngen import AttentionSpec, backends, descent, masks, planner, presets, targets
from attngen.backends.triton import candidates
from attngen.errors import PlanError
from attngen.reports import Certificate

SPEC = AttentionSpec(
    q_heads=8, q_len=1000, qk_dim=64, dtype="float16", mask=masks.causal()
)
BY, H100 = backends.get("triton"), targets.get("h100")
GOOD = Certificate(
    "h100", "ptxas", 0, spill_bytes=0, shared_bytes=1024, blocks_per_multiprocessor=1
)


@pytest.fixture
def compiler(monkeypatch):
    """Of each plan whether it spills and its bound, from a function; plans in order."""
    asked = []

    def use(spills, cycles=lambda plan: 1000.0):
        def certify_many(made, by, target):
            asked.extend(plan for plan, _ in made)
            return [
                dataclasses.replace(
                    GOOD, spill_bytes=8 * spills(p), bound_cycles=float(cycles(p))
                )
                for p, _ in made
            ]

        monkeypatch.setattr("attngen.building.certify_many", certify_many)
        return asked

    return use


def ranked(**fix):
    return planner.rank(SPEC, H100, BY, fix)


def held(plan):
    """Scores of a warp, in each stage."""
    warps, stages = plan.choice["num_warps"], plan.choice["num_stages"]
    return plan.q_chunk * plan.k_chunk // warps * stages


def test_the_first_is_taken_where_it_compiles(compiler):
    asked = compiler(lambda plan: False)
    plans = ranked()
    assert descent.first_certified(plans, BY)[0] == plans[0]
    assert asked == [plans[0]]


def test_of_the_next_few_that_compile_the_one_with_the_least_bound_is_taken(compiler):
    plans = ranked()
    asked = compiler(lambda plan: plan == plans[0], lambda p: 1e6 / p.k_chunk)
    chosen, _, certificate = descent.first_certified(plans, BY)
    assert len(asked) <= 1 + descent.FEW + descent.GROUP - 1
    usable = asked[1 : 1 + descent.FEW]
    bounds = [
        descent.bound_s(
            p, dataclasses.replace(GOOD, bound_cycles=1e6 / p.k_chunk), H100
        )
        for p in usable
    ]
    assert len(set(bounds)) > 1
    assert chosen.choice == usable[bounds.index(min(bounds))].choice
    assert chosen.alternatives[0].choice == plans[0].choice  # with why it isn't taken
    assert certificate.spill_bytes == 0


@pytest.mark.parametrize("most", [200, 600, 1500, 4000])
def test_nothing_is_tried_that_holds_as_much_as_what_spilled_before(compiler, most):
    asked = compiler(lambda plan: held(plan) > most)
    chosen = descent.first_certified(ranked(), BY)[0]
    assert held(chosen) <= most
    assert len(asked) <= descent.TRIES + 1
    for i, plan in enumerate(asked):
        for other in asked[: max(0, i - descent.GROUP + 1)]:  # whose answers are known
            if held(other) > most:
                apart = [
                    plan.q_chunk / plan.choice["num_warps"]
                    < other.q_chunk / other.choice["num_warps"],
                    plan.k_chunk < other.k_chunk,
                    plan.choice["num_stages"] < other.choice["num_stages"],
                ]
                assert any(apart)


def test_where_all_spill_the_smallest_was_tried_too(compiler):
    asked = compiler(lambda plan: True)
    with pytest.raises(PlanError, match="No plan compiles"):
        descent.first_certified(ranked(), BY)
    assert len(asked) <= descent.TRIES + 1
    assert any((p.q_chunk, p.k_chunk) == (16, 16) for p in asked)


def test_what_is_likely_to_spill_is_ranked_behind_what_is_not():
    spec = presets.get("llama3-8b")
    plans = planner.rank(spec, H100, BY)
    crowded = [candidates.crowding(spec, p.choice, H100.gpu) >= 1 for p in plans]
    assert not crowded[0]
    assert any(crowded)
    alike = {"q_chunk": 128, "k_chunk": 128, "num_warps": 8}
    two, three = (
        planner.rank(spec, H100, BY, alike | {"num_stages": n})[0] for n in (2, 3)
    )
    assert two.time_s < three.time_s  # which spills


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h100", "a100"])
def test_a_first_plan_has_about_the_best_bound_of_its_neighbours(target):
    pytest.importorskip("triton", reason="needs attngen[triton]")
    from attngen import building, shortlist
    from attngen.keys import canonical

    spec, device = presets.get("llama3-8b"), targets.get(target)
    chosen, _, certificate = descent.first_certified(planner.rank(spec, device, BY), BY)
    near = planner.near(spec, device, BY, chosen.choice)
    plans = shortlist.neighbours(chosen.choice, near, {canonical(chosen.choice)})
    answers = building.certify_many([(p, building.emit(p)) for p in plans], BY, target)
    bounds = [
        descent.bound_s(p, a, device)
        for p, a in zip(plans, answers, strict=True)
        if isinstance(a, Certificate) and not descent.unfit(a, p)
    ]
    own = descent.bound_s(chosen, certificate, device)
    assert own <= 1.1 * min(b for b in bounds if b is not None)
