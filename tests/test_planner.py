"""Candidates: legality with reasons, the ranking, the budget, what the user fixes."""

import dataclasses

import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, backends, masks, planner, presets, scores, targets
from attngen.errors import BudgetError, NotBuiltError, PlanError

JAX, CPU = backends.get("jax"), targets.get("cpu")
SPEC = AttentionSpec(q_heads=4, kv_heads=2, q_len=300, qk_dim=64)
CAUSAL = dataclasses.replace(SPEC, mask=masks.causal())


def rank(spec, **fix):
    return planner.rank(spec, CPU, JAX, fix)


def test_the_ranking_is_by_time_and_every_plan_fits():
    spec = dataclasses.replace(CAUSAL, memory_budget="512KiB")
    ranked = rank(spec)
    times = [p.time_s for p in ranked]
    assert times == sorted(times)
    assert len(ranked) > 10
    assert all(p.temp_bytes <= 512 * 1024 for p in ranked)
    assert all(JAX.illegal(spec, CPU, p.choice) is None for p in ranked)


def test_a_smaller_budget_never_gives_a_faster_plan():
    times = []
    for budget in ("64MiB", "4MiB", "512KiB", "64KiB", "16KiB"):
        spec = dataclasses.replace(CAUSAL, memory_budget=budget)
        times.append(rank(spec)[0].time_s)
    assert times == sorted(times)


def test_the_least_budget_of_the_error_is_enough():
    with pytest.raises(BudgetError) as caught:
        rank(dataclasses.replace(CAUSAL, memory_budget=100))
    least = int(caught.value.hint.split()[-1])
    assert rank(dataclasses.replace(CAUSAL, memory_budget=least))
    with refused(BudgetError):
        rank(dataclasses.replace(CAUSAL, memory_budget=least - 1))


def test_one_query_and_one_key_at_a_time_is_a_plan():
    (plan, *_) = rank(SPEC, algorithm="running", q_chunk=1, k_chunk=1)
    assert (plan.q_chunk, plan.k_chunk) == (1, 1)
    assert plan.tiles.total == 300 * 300


@pytest.mark.parametrize(
    "fix",
    [
        {"q_chunk": 100, "k_chunk": 70},
        {"q_chunk": 300, "k_chunk": 300, "algorithm": "running"},
        {"head_chunk": 2},
        {"algorithm": "dense"},
        {"k_chunk": 150, "loop": "scan", "algorithm": "running"},
        {"loop": "unrolled", "k_chunk": 100, "algorithm": "running"},
    ],
)
def test_what_is_fixed_is_kept_and_named(fix):
    (plan, *_) = rank(SPEC, **fix)
    assert fix.items() <= plan.choice.items()
    assert plan.fixed == tuple(fix)


@pytest.mark.parametrize(
    "fix",
    [
        {"q_chunk": 0},
        {"q_chunk": 301},
        {"q_chunk": -1},
        {"q_chunk": True},
        {"q_chunk": "many"},
        {"q_chunk": 1.5},
        {"k_chunk": 10**9},
        {"head_chunk": 3},
        {"batch_chunk": 2},
        {"loop": "while"},
        {"product_dtype": "int8"},
        {"guard": "yes"},
        {"algorithm": "flash"},
        {"algorithm": "dense", "q_chunk": 10},
        {"loop": "unrolled", "k_chunk": 1},
        {"chunks": 4},
        {"q_chunk": [1]},
    ],
)
def test_what_is_not_legal_is_refused_with_its_reason(fix):
    with refused(PlanError):
        rank(SPEC, **fix)


def test_loops_that_cannot_skip_are_not_legal_where_there_is_something_to_skip():
    for loop in ("scan", "unrolled"):
        with refused(PlanError):
            rank(CAUSAL, loop=loop, k_chunk=100)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "packed", "batch": 2, "batch_shards": 2},
        {"storage": "paged", "derivatives": "vjp"},
        {"storage": "paged", "head_shards": 2},
        {"kv_dtype": "int8", "derivatives": "any"},
        {"kv_dtype": "float8_e4m3", "head_shards": 2},
        {"kv_dtype": "float64"},
    ],
)
def test_what_is_not_built_says_so(change):
    with refused(NotBuiltError):
        rank(dataclasses.replace(SPEC, **change))


def test_a_kv_dtype_that_is_the_dtype_is_no_quantisation():
    assert rank(dataclasses.replace(SPEC, kv_dtype="float32"))


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_has_a_plan(name):
    spec = dataclasses.replace(presets.get(name), derivatives=None)
    (plan, *_) = rank(spec)
    assert plan.temp_bytes > 0
    assert plan.flop > 0
    tiles = plan.tiles
    assert tiles.full >= 0
    assert tiles.edge >= 0
    assert tiles.empty >= 0
    chunks = -(-spec.q_len // plan.q_chunk) * -(-spec.kv_len // plan.k_chunk)
    assert tiles.total == chunks


def test_a_budget_below_dense_takes_less():
    roomy = rank(dataclasses.replace(SPEC, memory_budget="1GiB"))[0]
    tight = rank(dataclasses.replace(SPEC, memory_budget="64KiB"))[0]
    assert tight.temp_bytes <= 64 * 1024 < roomy.temp_bytes
    dense = [a for a in tight.alternatives if a.choice["algorithm"] == "dense"]
    assert dense
    assert dense[0].reason.startswith("over budget by")


def test_alternatives_hold_the_reason_against_each():
    plan = rank(dataclasses.replace(CAUSAL, memory_budget="1MiB"))[0]
    assert all(a.reason for a in plan.alternatives)
    assert any(a.temp_bytes is None for a in plan.alternatives)
    faster = [a for a in plan.alternatives if (a.time_s or plan.time_s) < plan.time_s]
    assert all(a.reason.startswith("over budget") for a in faster)


def test_a_plan_is_the_same_on_every_machine():
    few = dataclasses.replace(CPU, cores=1, memory_bytes=None)
    spec = dataclasses.replace(CAUSAL, memory_budget="1MiB")
    assert planner.rank(spec, few, JAX)[0] == planner.rank(spec, CPU, JAX)[0]


def test_without_a_budget_the_targets_memory_is_the_limit():
    small = dataclasses.replace(CPU, memory_bytes=2**20)
    (plan, *_) = planner.rank(SPEC, small, JAX)
    own = SPEC.bytes_of("q", "k", "v", "out")
    assert plan.temp_bytes <= 2**20 - own


def test_an_impossible_target_memory_is_an_error():
    tiny = dataclasses.replace(CPU, memory_bytes=1000)
    with refused(BudgetError):
        planner.rank(SPEC, tiny, JAX)


def test_without_a_budget_none_is_to_be_raised():
    spec = AttentionSpec(q_heads=128, q_len=2**22, qk_dim=128)
    with pytest.raises(BudgetError, match=r"1024\.0 GiB of inputs") as caught:
        planner.rank(spec, targets.get("tpu-v5e"), JAX)
    assert "memory_budget" not in caught.value.hint


def test_index_dtype_and_dropped_keys_are_in_the_plan():
    far = attngen.mask(lambda b, h, q, k: q * 10**8 >= k * 10**8)
    assert rank(dataclasses.replace(SPEC, mask=far))[0].index_dtype == "int64"
    assert rank(CAUSAL)[0].index_dtype == "int32"
    assert not rank(dataclasses.replace(SPEC, score=(scores.softcap(5.0),)))[
        0
    ].drops_keys
    assert rank(dataclasses.replace(SPEC, score=(scores.bias(),)))[0].drops_keys


def test_neighbours_differ_in_one_choice_and_fit():
    spec = dataclasses.replace(CAUSAL, q_len=512, kv_len=512, memory_budget="1MiB")
    plan = rank(spec, algorithm="running", q_chunk=64, k_chunk=64)[0]
    found = planner.near(spec, CPU, JAX, plan.choice)
    assert {p.algorithm for p in found} == {"running", "split_kv", "summaries"}
    assert all(p.temp_bytes <= 2**20 for p in found)
    times = [p.time_s for p in found]
    assert times == sorted(times)
    names = set()
    for near in found:
        assert JAX.illegal(spec, CPU, near.choice) is None
        if near.algorithm == plan.algorithm:
            apart = {n for n, v in near.choice.items() if v != plan.choice[n]}
            assert len(apart) == 1
            names |= apart
    seldom = {"denominator", "qk", "slices", "steps", "exp"}
    assert names >= seldom | {"q_chunk", "k_chunk", "head_chunk", "unroll"}
    spec = dataclasses.replace(spec, memory_budget=None)
    aligned = rank(spec, algorithm="running", q_chunk=256, k_chunk=256, diagonal=0)[0]
    assert any(
        p.choice.get("diagonal") for p in planner.near(spec, CPU, JAX, aligned.choice)
    )


def test_moved_bytes_read_keys_anew_for_each_chunk_of_queries():
    spec = dataclasses.replace(SPEC, batch=3, dtype="bfloat16", out_dtype="float32")
    plan = rank(spec, algorithm="running", q_chunk=300, k_chunk=300)[0]
    keys = spec.bytes_of("k", "v")
    assert plan.moved_bytes == spec.bytes_of("q", "out") + keys
    half = rank(spec, algorithm="running", q_chunk=150, k_chunk=300)[0]
    assert half.moved_bytes == plan.moved_bytes + keys
    causal = rank(
        dataclasses.replace(spec, mask=masks.causal()), q_chunk=150, k_chunk=150
    )
    assert causal[0].moved_bytes == plan.moved_bytes + keys // 2


def test_neighbours_keep_what_the_user_fixed():
    fix = {"q_chunk": 50, "qk": "once"}
    plan = rank(SPEC, **fix)[0]
    found = planner.near(SPEC, CPU, JAX, plan.choice, fix)
    assert found
    assert all(p.q_chunk == 50 and p.choice["qk"] == "once" for p in found)
    assert all(p.fixed == ("q_chunk", "qk") for p in found)


def test_an_algorithm_that_lacks_a_fixed_choice_is_not_considered():
    assert {p.algorithm for p in rank(SPEC, parts=2)} == {"split_kv"}
    with refused(PlanError, "diagonal"):
        rank(SPEC, algorithm="split_kv", diagonal=16)
