"""The model of XLA:CPU: its bytes are an upper bound, its order of times is sensible."""

import random

import jax
import pytest

from attngen import AttentionSpec, api, backends, masks, scores, targets
from attngen.backends.jax import model
from attngen.backends.jax.loader import load_function
from attngen.backends.jax.scratch import scratch_bytes
from attngen.tiles import Tiles

JAX, CPU = backends.get("jax"), targets.get("cpu")
SPECS = {
    "plain": AttentionSpec(q_heads=4, q_len=1024, qk_dim=64),
    "ragged": AttentionSpec(q_heads=2, q_len=750, qk_dim=40, outputs=("out", "lse")),
    "causal": AttentionSpec(
        q_heads=8, kv_heads=2, q_len=1024, qk_dim=64, mask=masks.causal()
    ),
    "bfloat16": AttentionSpec(
        q_heads=1, q_len=2048, qk_dim=64, dtype="bfloat16", out_dtype="float32"
    ),
    "bias": AttentionSpec(q_heads=2, q_len=512, qk_dim=64, score=(scores.bias(),)),
    "lengths": AttentionSpec(batch=4, q_heads=4, q_len=256, qk_dim=64, kv_lengths=True),
    "window": AttentionSpec(
        batch=2,
        q_heads=4,
        kv_heads=2,
        q_len=777,
        qk_dim=64,
        dtype="float16",
        mask=masks.causal() & masks.sliding_window(200),
        sink=True,
    ),
    "wide": AttentionSpec(  # what the model's sums weren't made from
        batch=2,
        q_heads=6,
        kv_heads=3,
        q_len=390,
        kv_len=610,
        qk_dim=48,
        v_dim=80,
        layout="bhtd",
    ),
    "decode": AttentionSpec(
        q_heads=12,
        kv_heads=3,
        q_len=1,
        kv_len=5000,
        qk_dim=96,
        mask=masks.causal(),
        q_offset="bottom_right",
    ),
}


# unoptimised code, which changes nothing of what XLA allocates
QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
KINDS = {"running": 4, "split_kv": 3, "summaries": 2}  # how often, beside dense
RARE = {"product_dtype": 0.4, "guard": 0.2, "loop": 0.5, "diagonal": 0.7, "unroll": 0.6}


def compiled_bytes(plan):
    """What XLA allocates beyond inputs and outputs, its library fusions included."""
    spec = plan.spec
    function = load_function(api.stored(api.emit(plan)))
    names = ("q", "k", "v", *(o.name for o in spec.operands))
    structs = {
        n: jax.ShapeDtypeStruct(spec.shape_of(n), spec.dtype_of(n)) for n in names
    }
    program = jax.jit(function).lower(**structs).compile(QUICKLY)
    temp = program.memory_analysis().temp_size_in_bytes
    return temp + scratch_bytes(program.as_text())


def choices(spec, generator, count):
    space = JAX.space(spec, CPU)
    while count:
        algorithm = generator.choices(["running", "dense"], [9, 1])[0]
        axes = space[algorithm]
        choice = {"algorithm": algorithm}
        choice |= {n: generator.choice(list(v)) for n, v in axes.items()}
        if algorithm == "running":
            choice["loop"] = generator.choice(["fori", "fori", "scan", "unrolled"])
        if JAX.illegal(spec, CPU, choice) is None:
            count -= 1
            yield choice


def any_choices(spec, generator, count):
    """Of all algorithms, each choice usual or of all its values."""
    usual, whole = JAX.space(spec, CPU), JAX.space(spec, CPU, whole=True)
    while count:
        kind = generator.choices(list(KINDS), list(KINDS.values()))[0]
        choice = {"algorithm": kind}
        for name, values in whole[kind].items():
            if name in ("blank", "mask"):  # of one value here
                choice[name] = values[0]
                continue
            chunk = name.endswith("_chunk") or name == "parts"
            rare = chunk or generator.random() < RARE.get(name, 0.3)
            choice[name] = generator.choice(values if rare else usual[kind][name][:1])
        if JAX.illegal(spec, CPU, choice) is None:
            count -= 1
            yield choice


def close(plan, actual):
    """Within 15% or 256 KiB above the compiler's figure."""
    return plan.temp_bytes - actual <= max(0.15 * actual, 2**18)


def check(name, seed, count):
    spec = SPECS[name]
    for choice in choices(spec, random.Random(f"{seed} {name}"), count):
        plan = api.plan(spec, fix=choice)
        actual = compiled_bytes(plan)
        assert actual <= plan.temp_bytes, f"{choice}: {actual} > {plan.temp_bytes}"


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(2)
def test_modelled_bytes_are_an_upper_bound(name):
    check(name, seed=0, count=3)


def compared(count):
    """Plans of all algorithms, so many of each spec: how many are close, and how many not.

    Each is an upper bound.
    """
    near, total, below = 0, 0, []
    for name, spec in SPECS.items():
        for choice in any_choices(spec, random.Random(f"any {name}"), count):
            plan = api.plan(spec, fix=choice)
            actual = compiled_bytes(plan)
            near += close(plan, actual)
            total += 1
            if plan.temp_bytes < actual:
                below.append(f"{name} {choice}: {plan.temp_bytes} < {actual}")
    assert not below
    return near, total


def test_bytes_of_all_algorithms_are_bounds():
    assert compared(1)[1] == len(SPECS)


@pytest.mark.slow
def test_bytes_of_all_algorithms_are_bounds_and_most_are_close():
    near, total = compared(5)
    assert near / total >= 0.85


def test_a_tiny_plan_is_not_charged_kilobytes():
    spec = AttentionSpec(q_heads=1, q_len=4, qk_dim=2)
    plan = api.plan(spec, fix={"q_chunk": 1, "k_chunk": 1, "unroll": 1, "loop": "fori"})
    assert compiled_bytes(plan) <= plan.temp_bytes <= 2048


@pytest.mark.parametrize("name", SPECS)
def test_without_tiles_the_bytes_are_no_fewer(name):
    spec = SPECS[name]
    for choice in choices(spec, random.Random(name), 50):
        some = api.plan(spec, fix=choice).temp_bytes
        assert some <= model.temp_bytes(spec, choice)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("name", SPECS)
def test_modelled_bytes_are_an_upper_bound_of_many(name, seed):
    check(name, seed, count=12)


def test_more_tiles_take_longer():
    spec = SPECS["causal"]
    choice = api.plan(spec, fix={"algorithm": "running"}).choice
    few, many = Tiles(2, 2, 12), Tiles(10, 2, 4)
    assert model.time_s(spec, choice, few) < model.time_s(spec, choice, many)


def test_a_slice_that_is_not_guarded_converts_everything():
    spec = SPECS["bfloat16"]
    choice = api.plan(spec, fix={"algorithm": "running"}).choice
    bare = model.temp_bytes(spec, dict(choice, guard=False))
    assert bare - model.temp_bytes(spec, dict(choice, guard=True)) == 4 * 3 * 2048 * 64
