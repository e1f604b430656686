"""The model of backward passes: what it ranks first, and its bytes beside the compiler's."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

import attngen
from attngen import AttentionSpec, masks, presets
from attngen.backends.jax.passes import Passes
from attngen.joint import backward_names
from attngen.targets import get
from attngen.tiles import count_tiles

MIB = 2**20
PLAIN = AttentionSpec(q_heads=8, q_len=4096, qk_dim=64, derivatives="vjp")
LONG = dataclasses.replace(presets.get("paper-16k"), derivatives="vjp")
RESULTS = Path(__file__).parents[1] / "benchmarks/results/model_backward.json"


def replaced(spec, **fields):
    return dataclasses.replace(spec, **fields)


def usual(spec, target="cpu", **choice):
    kind = choice.pop("algorithm", "by_queries")
    axes = Passes().space(spec, get(target))[kind]
    return {"algorithm": kind} | {n: v[0] for n, v in axes.items()} | choice


def cost(spec, target="cpu", q_chunk=512, k_chunk=512, **choice):
    made = usual(spec, target, q_chunk=q_chunk, k_chunk=k_chunk, **choice)
    tiles = count_tiles(spec, q_chunk, k_chunk)
    return Passes().cost(spec, get(target), made, tiles)


def chosen(spec, target="cpu"):
    """The algorithm and the chunks of the backward pass."""
    choice = attngen.plan(spec, target, backend="jax").choice
    return tuple(
        choice[n] for n in ("backward", "backward_q_chunk", "backward_k_chunk")
    )


# Measured on a processor of two cores: the best chunks, and how far others are behind.


def test_a_processor_goes_by_queries_in_tiles_of_a_few_hundred():
    algorithm, q, k = chosen(PLAIN)
    assert algorithm == "by_queries"
    assert 512 <= q <= 1024
    assert 512 <= k <= 1024


def test_several_heads_of_a_group_take_fewer_queries():
    spec = AttentionSpec(
        q_heads=8, kv_heads=2, q_len=4096, qk_dim=128, derivatives="vjp"
    )
    algorithm, q, _ = chosen(spec)
    assert algorithm == "by_queries"
    assert 128 <= q <= 512


def test_two_passes_take_half_as_long_again():
    once = cost(PLAIN).time_s
    assert 1.4 < cost(PLAIN, algorithm="two_passes").time_s / once < 1.65
    assert 1.0 < cost(PLAIN, algorithm="by_keys").time_s / once < 1.1


def test_small_tiles_take_more_than_twice_as_long():
    assert 2 < cost(PLAIN, q_chunk=64, k_chunk=64).time_s / cost(PLAIN).time_s < 4


def test_delta_that_is_summed_takes_tiles_once_more():
    summed = cost(PLAIN, delta="summed").time_s / cost(PLAIN, delta="again").time_s
    assert 1.3 < summed < 1.65


def test_masked_tiles_take_longer():
    causal = replaced(PLAIN, mask=masks.causal())
    tiles = count_tiles(causal, 512, 512)
    share = tiles.visited / (tiles.visited + tiles.empty)
    assert cost(causal).time_s > share * cost(PLAIN).time_s


def test_without_room_there_are_two_passes():
    for budget, least in (("4MiB", 128), ("1MiB", 64), ("256KiB", 16)):
        spec = AttentionSpec(
            q_heads=1, q_len=16384, qk_dim=64, dtype="bfloat16", derivatives="vjp",
            memory_budget=budget,
        )  # fmt: skip
        plan = attngen.plan(spec, "cpu")
        algorithm, q, k = chosen(spec)
        assert algorithm == "two_passes"
        assert min(q, k) >= least
        assert plan.temp_bytes <= spec.budget_bytes


def test_what_libraries_need_is_beside_the_worst_moment():
    plan = attngen.plan(PLAIN, "cpu")
    other = {"backward_delta": "kept"} | {
        f"backward_{n}": plan.choice[f"backward_{n}"] for n in ("q_chunk", "k_chunk")
    }
    kept = attngen.plan(PLAIN, "cpu", fix=other | {"backward": "by_queries"})
    whole = 4 * PLAIN.q_heads * PLAIN.q_len * PLAIN.v_dim  # out · dout
    assert kept.temp_bytes > plan.temp_bytes + whole * 0.9


# The compiler's estimates.


@pytest.mark.parametrize(("target", "store", "ds"), [
    ("tpu-v2", "narrow", "twice"), ("tpu-v3", "narrow", "twice"),
    ("tpu-v4", "p", "twice"), ("tpu-v5e", "p", "twice"), ("tpu-v6e", "both", "once"),
])  # fmt: skip
def test_tpus_store_what_is_fastest_there(target, store, ds):
    choice = attngen.plan(LONG, target).choice
    assert choice["backward"] == "by_keys"
    assert choice["backward_store"] == store
    assert choice["backward_ds"] == ds


@pytest.mark.parametrize("target", ["tpu-v4", "tpu-v5e", "tpu-v6e"])
def test_all_queries_where_the_tile_fits_the_chip(target):
    assert chosen(LONG, target) == ("by_keys", 16384, 1024)


def test_a_tile_that_does_not_fit_the_chip_goes_to_memory():
    fits, spilled = (
        cost(LONG, "tpu-v5e", 16384, k, algorithm="by_keys") for k in (1024, 2048)
    )
    assert spilled.temp_bytes > fits.temp_bytes + 64 * MIB
    assert spilled.time_s > fits.time_s


def test_one_head_of_a_million_tokens_in_ten_mebibytes():
    spec = replaced(LONG, q_len=2**20, kv_len=2**20, memory_budget="10MiB")
    choice = attngen.plan(spec, "tpu-v3").choice
    assert choice["backward"] == "two_passes"
    assert choice["backward_delta"] == "again"


def test_graphics_processors_are_modelled():
    plan = attngen.plan(LONG, "h100", backend="jax")
    assert plan.time_s > 0
    assert plan.choice["backward"] in ("by_queries", "by_keys")


# Beside the compiler.


@pytest.mark.skipif(not RESULTS.exists(), reason="a checkout has benchmarks/results")
def test_what_is_committed_is_what_the_model_says():
    summary = json.loads(RESULTS.read_text())["summary"]
    assert summary["within_15_percent_or_256_KiB_of_all"] > 0.75
    assert summary["below_the_compiler"] < 0.15 * summary["plans"]


SOME = [
    (PLAIN, {"q_chunk": 512, "k_chunk": 512}),
    (PLAIN, {"algorithm": "by_keys", "delta": "again", "q_chunk": 256, "k_chunk": 512}),
    (PLAIN, {"algorithm": "two_passes", "delta": "again", "q_chunk": 128, "k_chunk": 64}),
    (
        AttentionSpec(q_heads=8, kv_heads=2, q_len=2000, qk_dim=64, derivatives="vjp",
                      mask=masks.causal(), outputs=("out", "lse")),
        {"q_chunk": 128, "k_chunk": 512},
    ),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "choice"), SOME)
def test_the_model_is_an_upper_bound(spec, choice):
    small = {"algorithm": "running", "q_chunk": 8, "k_chunk": 8, "head_chunk": 1}
    plan = attngen.plan(spec, fix=small | backward_names(usual(spec, **choice)))
    certified = _certified(plan)
    assert certified.temp_bytes <= plan.temp_bytes
    assert plan.temp_bytes <= max(
        1.25 * certified.temp_bytes, certified.temp_bytes + MIB
    )


def _certified(plan):
    from attngen import building

    return building.certify(plan, attngen.emit(plan), plan.target)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
@pytest.mark.parametrize(("target", "fields", "mcycles"), [
    ("tpu-v3", {"memory_budget": "16MiB"}, 19.5),
    ("tpu-v3", {"memory_budget": "64MiB"}, 17.0),
    ("tpu-v5e", {}, 4.77),
    ("tpu-v6e", {}, 2.95),
    ("tpu-v3", {"memory_budget": "10MiB", "q_len": 2**20, "kv_len": 2**20}, None),
])  # fmt: skip
def test_what_is_planned_for_tpus_is_certified(target, fields, mcycles):
    spec = replaced(LONG, **fields)
    certified = _certified(attngen.plan(spec, target))
    if spec.budget_bytes is not None:
        assert certified.temp_bytes <= spec.budget_bytes
    if mcycles is not None:
        assert certified.estimated_cycles <= mcycles * 1e6
