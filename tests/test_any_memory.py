"""derivatives="any": the memory of forward and backward, and the model of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attngen
from attngen import AttentionSpec, building, inputs, masks, scores
from attngen.backends.jax.loader import load_function
from attngen.errors import PlanError


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def function_of(spec, folder, fix):
    """The plain function of a spec's file."""
    source = attngen.emit(attngen.plan(spec, fix=fix))
    return load_function(source.write(folder / f"{source.digest}.py"))


LONG = AttentionSpec(
    q_heads=1, q_len=2048, qk_dim=32, mask=masks.causal(), derivatives="any"
)
CHUNKS = {"q_chunk": 128, "k_chunk": 128}


def temporaries(spec, folder, wrap=lambda f: f):
    function = wrap(function_of(spec, folder, CHUNKS))
    q = jax.ShapeDtypeStruct(spec.shape_of("q"), spec.dtype)

    def both(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(dout)

    compiled = jax.jit(both).lower(q, q, q, q).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_linear(dtype, tmp_path):
    spec = dataclasses.replace(LONG, dtype=dtype)
    sizes = [
        temporaries(dataclasses.replace(spec, q_len=n, kv_len=n), tmp_path)
        for n in (2048, 4096, 8192)
    ]
    first, second = sizes[1] - sizes[0], sizes[2] - sizes[1]
    assert abs(second - 2 * first) < 0.02 * second
    assert second / 4096 < 40 * spec.qk_dim  # bytes a row


@pytest.mark.parametrize("policy", ["dots_saveable", "everything_saveable"])
@pytest.mark.sampled(2)
def test_no_policy_saves_scores(policy, tmp_path):
    def kept(function):
        return jax.checkpoint(function, policy=getattr(jax.checkpoint_policies, policy))

    scores = LONG.q_len * LONG.kv_len * 4
    more = temporaries(LONG, tmp_path, kept) - temporaries(LONG, tmp_path)
    assert more <= LONG.bytes_of("q", "k", "v") < scores / 16


HEADS = AttentionSpec(
    batch=2, q_heads=4, kv_heads=2, q_len=500, qk_dim=32, derivatives="any"
)
GATE = attngen.operand("gate", axes="k", dtype="float32")
GATED = attngen.score(lambda s, b, h, q, k: s * GATE[k] + attngen.log(GATE[k]))
MODELLED = {
    "plain": ({}, {}),
    "bfloat16": ({"dtype": "bfloat16"}, {}),
    "float16": ({"dtype": "float16", "out_dtype": "float32"}, {"q_chunk": 16}),
    "causal": ({"mask": masks.causal()}, {"k_chunk": 512 - 12}),
    "window": ({"mask": masks.causal() & masks.sliding_window(50)}, {"k_chunk": 16}),
    "together": ({"layout": "bhtd"}, {"head_chunk": 2, "batch_chunk": 2}),
    "scores": ({"score": (scores.softcap(9.0), scores.bias(axes="hqk"))}, {}),
    "guarded": (
        {"mask": masks.causal(), "score": (GATED,)},
        {"q_chunk": 250, "k_chunk": 256, "head_chunk": 2, "batch_chunk": 2},
    ),
    "lengths": ({"kv_lengths": True, "sink": True, "outputs": ("out", "lse")}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELLED)
def test_the_model_is_an_upper_bound(name):
    """Of XLA:CPU's bytes for forward and backward in one program."""
    changes, fix = MODELLED[name]
    fix = {"q_chunk": 64, "k_chunk": 64, "head_chunk": 1, "batch_chunk": 1} | fix
    plan = attngen.plan(dataclasses.replace(HEADS, **changes), fix=fix)
    certified = building.certify(plan, attngen.emit(plan), "cpu").temp_bytes
    assert certified <= plan.temp_bytes <= 2.5 * certified


def test_no_heads_are_gathered():
    spec = dataclasses.replace(HEADS, batch=4, batch_shards=2, head_shards=2)
    plan = attngen.plan(spec, fix={"q_chunk": 50, "k_chunk": 50})
    certificate = building.certify(plan, attngen.emit(plan), "cpu")
    assert "all-gather" not in certificate.collectives
    assert certificate.temp_bytes <= plan.temp_bytes
    with pytest.raises(PlanError, match="a step: batch_chunk = batch"):
        attngen.plan(spec, fix={"batch_chunk": 2})


def test_gradients_are_summed_in_float32(tmp_path):
    """65536 ones add up to 32768 in bfloat16."""
    spec = AttentionSpec(
        q_heads=1, q_len=4096, kv_len=16, qk_dim=4, dtype="bfloat16", derivatives="any"
    )
    function = function_of(spec, tmp_path, {"q_chunk": 4, "k_chunk": 16})
    q, k, v = (jnp.zeros(spec.shape_of(n), spec.dtype) for n in "qkv")
    dv = jax.grad(lambda v: function(q, k, v).astype("float32").sum())(v)
    np.testing.assert_array_equal(np.asarray(dv, float), 4096 / 16)


@pytest.mark.parametrize("target", ["cpu", "tpu-v5e", "h100"])
@pytest.mark.parametrize("budget", [None, "8MiB"])
def test_there_is_a_plan_for_each_target(target, budget):
    spec = dataclasses.replace(LONG, memory_budget=budget, dtype="bfloat16")
    plan = attngen.plan(spec, target=target, backend="jax")
    assert plan.algorithm == "scanned"
    assert budget is None or plan.temp_bytes <= spec.budget_bytes


@pytest.mark.slow
def test_a_kernel_is_certified_with_its_gradients():
    with jax.enable_x64(False):
        spec = dataclasses.replace(LONG, q_len=512, kv_len=512, memory_budget="4MiB")
        attn = attngen.build(spec)
        assert attn.certificate.temp_bytes <= attn.plan.temp_bytes <= 2**22
        given = [jnp.asarray(x) for x in inputs.arrays(spec).values()]
        out, moved = jax.jvp(attn, given, given)
        assert out.shape == moved.shape == spec.shape_of("out")

        def loss(q):
            return (attn(q, *given[1:]) ** 2).sum()

        step = 1e-2
        along = jax.jvp(jax.grad(loss), (given[0],), (given[0],))[1]
        near = [jax.grad(loss)(given[0] * (1 + x)) for x in (-step, step)]
        want = (near[1] - near[0]) / (2 * step)
        assert np.abs(along - want).max() < 1e-2 * np.abs(want).max()
