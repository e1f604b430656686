"""Gradients of derivatives="vjp": of the whole library, by every backward pass, to the bit."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge, kernel
from library import EXAMPLES, OFFSETS, SPEC, holding, offsets_of, rotating
from refusals import refused

import attngen
from attngen import AttentionSpec, inputs, masks, scores, slopes
from attngen.backends.jax.program import program
from attngen.errors import DerivativeError, PlanError
from attngen.symbols import where

WAYS = ("by_queries", "by_keys", "two_passes")
SIZES = ((16, 24), (24, 16), (7, 70), (50, 11))
VJP = {"derivatives": "vjp"}
FORWARD = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}
EVERY = [
    (name, offset) for name in EXAMPLES for offset in offsets_of(name, lengths=True)
]
# each example by one of the ways, in chunks of one of the sizes
ONCE = [
    (name, offset, WAYS[i % 3], SIZES[i % 4])
    for i, (name, offset) in enumerate(rotating().items())
]
TRAINED = attngen.operand("cap", axes="h", dtype="float32")


def backward(way, q_chunk, k_chunk, **more):
    fix = {"backward": way, "backward_q_chunk": q_chunk, "backward_k_chunk": k_chunk}
    return FORWARD | fix | {f"backward_{n}": v for n, v in more.items()}


@pytest.mark.parametrize(("name", "offset", "way", "sizes"), ONCE)
@pytest.mark.sampled(11)
def test_library(name, offset, way, sizes):
    spec = EXAMPLES[name].spec(q_offset=OFFSETS[offset], **VJP)
    with holding(EXAMPLES[name].operands):
        judge(spec, **backward(way, *sizes))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "offset"), EVERY)
def test_library_every_way(name, offset, way):
    changes = {"layout": "bhtd", "sink": True, "kv_lengths": True, "q_lengths": True}
    spec = EXAMPLES[name].spec(q_offset=OFFSETS[offset], **VJP, **changes)
    with holding(EXAMPLES[name].operands):
        judge(spec, **backward(way, 13, 17))


def given(**changes):
    return dataclasses.replace(SPEC, **VJP, **changes)


CAUSAL = {"mask": masks.causal()}
SPECS = {
    "bfloat16": given(dtype="bfloat16", **CAUSAL),
    "float16, wide out": given(dtype="float16", out_dtype="float32"),
    "out alone": given(outputs=("out",), **CAUSAL),
    "lse alone": given(outputs=("lse",), sink=True, **CAUSAL),
    "lse first": given(outputs=("lse", "out"), sink=True),
    "lengths": given(kv_lengths=True, q_lengths=True, layout="bhtd", **CAUSAL),
    "offset of lengths": given(kv_lengths=True, **CAUSAL),
    "value dim": given(v_dim=24, layout="bhtd", **CAUSAL),
    "rows that see no key": given(
        sink=True, mask=attngen.mask(lambda b, h, q, k: (k <= q) & (q % 7 != 0))
    ),
    "no row sees a key": given(mask=attngen.mask(lambda b, h, q, k: k < q - 10**6)),
    "large scores": given(scale=40.0, score=scores.alibi()),
    "highest": given(precision="highest", dtype="bfloat16"),
    "scores of scores": given(
        score=(scores.softcap(2.0), scores.alibi(), scores.temperature()), **CAUSAL
    ),
    "a trained cap": given(
        score=attngen.score(
            lambda s, b, h, q, k: TRAINED[h] * attngen.tanh(s / TRAINED[h])
        )
    ),
    "dropped keys": given(
        score=attngen.score(lambda s, b, h, q, k: where(k % 3 == 1, -np.inf, s * s / 8))
    ),
    "a score without the score": given(score=scores.bias(axes="hk"), sink=True),
}


@pytest.mark.parametrize(("name", "way"), list(zip(SPECS, itertools.cycle(WAYS))))
@pytest.mark.sampled(4)
def test_specs(name, way):
    judge(SPECS[name], **backward(way, 16, 24))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), list(itertools.product(SPECS, WAYS)))
@pytest.mark.parametrize("sizes", [(13, 70), (50, 17), (1, 24)])
def test_specs_every_way(name, way, sizes):
    judge(SPECS[name], **backward(way, *sizes))


AXES = ("bhqk", "hqk", "bqk", "qk", "bhk", "q", "k", "b", "h", "kq")


@pytest.mark.parametrize(("axes", "way"), list(zip(AXES, itertools.cycle(WAYS))))
@pytest.mark.sampled(5)
def test_a_bias_of_any_axes(axes, way):
    spec = given(score=scores.bias(axes=axes), q_offset=0)
    judge(spec, **backward(way, 24, 16))


FORMS = [
    {"slices": "dn", "store": "narrow"},
    {"slices": "dn", "store": "p", "delta": "again"},
    {"slices": "dn", "store": "both", "delta": "summed"},
    {"store": "free", "exp": "polynomial", "head_chunk": 1, "delta": "kept"},
    {"store": "both", "exp": "exp2", "batch_chunk": 2, "head_chunk": 2, "guard": True},
    {"scale": "scores", "delta": "summed", "head_chunk": 2},
]
TWICE = {"ds": "twice", "store": "p"}


@pytest.mark.parametrize(
    ("way", "more"),
    [
        *zip(itertools.cycle(WAYS), FORMS, strict=False),
        ("by_keys", TWICE | {"slices": "dn"}),
        ("by_queries", TWICE),
    ],
)
@pytest.mark.sampled(2)
def test_forms(way, more):
    spec = given(sink=True, mask=masks.causal())
    judge(spec, **backward(way, 13, 24, **more))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("more", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_forms_every_way(way, more, dtype):
    product = {"product_dtype": dtype, "scale": "scores"}
    spec = given(sink=True, dtype=dtype, layout="bhtd", mask=masks.causal())
    judge(spec, **backward(way, 13, 24, **more | product))


# What gradients don't depend on.


def arrays_of(spec, seed=0):
    made = inputs.arrays(spec, seed=seed) | inputs.cotangents(spec, seed=seed)
    return {name: jnp.asarray(x) for name, x in made.items()}


def gradients(spec, **fix):
    function, _ = kernel(spec, **fix)
    whole = program(function, slopes.gradients(spec), slopes.cotangents(spec))
    return jax.jit(whole), arrays_of(spec)


@pytest.mark.slow
def test_gradients_do_not_depend_on_chunks():
    spec = given(score=scores.alibi(), sink=True, mask=masks.causal())
    found = []
    for way, sizes in zip(WAYS, ((16, 24), (50, 70), (7, 11)), strict=True):
        run, arrays = gradients(spec, **backward(way, *sizes))
        found.append(run(**arrays))
    for x, *others in zip(*found, strict=True):
        for y in others:
            np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4)


def test_repeated_runs_are_the_same_to_the_bit():
    table = scores.relative_buckets(max_distance=20)
    spec = given(score=(table, scores.alibi()), sink=True, mask=masks.causal())
    run, arrays = gradients(spec, **backward("by_queries", 16, 24))
    first = run(**arrays)
    for _ in range(3):
        for x, y in zip(first, run(**arrays), strict=True):
            np.testing.assert_array_equal(x, y)


# As part of programs.


@pytest.fixture(scope="module")
def small():
    spec = AttentionSpec(q_heads=2, q_len=40, qk_dim=8, mask=masks.causal(), **VJP)
    function, _ = kernel(spec, **backward("by_queries", 16, 16))
    generator = np.random.default_rng(0)
    arrays = [
        jnp.asarray(generator.standard_normal(spec.shape_of("q")), jnp.float32)
        for _ in range(3)
    ]
    return function, arrays


def loss(function):
    return lambda *arrays: (function(*arrays) ** 2).sum()


@pytest.mark.slow
def test_vmap_goes_one_by_one_and_keeps_the_memory(small):
    function, arrays = small
    grad = jax.grad(loss(function), (0, 1, 2))
    several = [jnp.stack([x, 2 * x, x + 1, x]) for x in arrays]
    for made in (
        jax.vmap(grad)(*several),
        jax.grad(_total(function), (0, 1, 2))(*several),
    ):
        for i in range(4):
            one = grad(*(x[i] for x in several))
            for x, y in zip(one, made, strict=True):
                np.testing.assert_allclose(x, y[i], rtol=1e-5, atol=1e-6)
    shared = jax.vmap(grad, (0, None, None))(several[0], *arrays[1:])
    assert all(x.shape == (4, *arrays[0].shape) for x in shared)

    def bytes_of(f, given):
        memory = jax.jit(f).lower(*given).compile().memory_analysis()
        return memory.temp_size_in_bytes

    own = sum(x.nbytes for x in several)
    assert bytes_of(jax.vmap(grad), several) < bytes_of(grad, arrays) + 2 * own


def _total(function):
    return lambda *several: jax.vmap(loss(function))(*several).sum()


@pytest.mark.parametrize("policy", ["everything_saveable", "dots_saveable"])
def test_no_policy_saves_scores(small, policy):
    function, arrays = small
    policy = getattr(jax.checkpoint_policies, policy)
    plain = jax.grad(loss(function), (0, 1, 2))
    kept = jax.grad(jax.checkpoint(loss(function), policy=policy), (0, 1, 2))
    for x, y in zip(plain(*arrays), kept(*arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)
    text = jax.jit(kept).lower(*arrays).as_text()
    assert "40x40" not in text


# What isn't there is an error that says so.


def arrays_for(spec):
    made = inputs.arrays(spec)
    return [jnp.asarray(made[n]) for n in "qkv"]


def built(**changes):
    spec = AttentionSpec(q_heads=1, q_len=8, qk_dim=4, **changes)
    return attngen.build(spec), arrays_for(spec)


def test_without_derivatives_it_says_so(certified):
    made, arrays = built()
    for differentiate in (jax.grad(loss(made)), lambda *x: jax.jvp(made, x, x)):
        with refused(DerivativeError, match="without derivatives") as caught:
            differentiate(*arrays)
        assert 'derivatives="vjp"' in str(caught.value) or "vjp" in caught.value.hint
    assert jax.jit(made)(*arrays).shape == arrays[0].shape
    assert jax.vmap(made)(*(x[None] for x in arrays)).shape == (1, *arrays[0].shape)


def test_twice_or_forward_it_says_so(certified):
    made, arrays = built(**VJP)
    grad = jax.grad(loss(made))
    with refused(DerivativeError, match="forward-mode"):
        jax.jvp(made, arrays, arrays)
    for again in (
        lambda: jax.jvp(grad, arrays, arrays),
        lambda: jax.grad(lambda *x: grad(*x).sum())(*arrays),
        lambda: jax.hessian(loss(made))(*arrays),
    ):
        with pytest.raises(TypeError, match="derivatives='any' has all"):
            again()


LIMIT = attngen.operand("limit", axes="h", dtype="float32")


def test_what_is_only_compared_has_no_gradient(certified):
    score = attngen.score(lambda s, b, h, q, k: where(s > LIMIT[h], s, 2 * s))
    made, arrays = built(score=score, **VJP)
    limit = jnp.zeros(1)
    assert jax.grad(lambda q: made(q, *arrays[1:], limit=limit).sum())(arrays[0]).any()
    with pytest.raises(TypeError, match="limit: scores only compare that"):
        jax.grad(lambda x: made(*arrays, limit=x).sum())(limit)


def test_what_only_a_mask_reads_has_a_gradient_of_zero(certified):
    mask = attngen.mask(lambda b, h, q, k: (k < LIMIT[h]) | (k == q))
    made, arrays = built(mask=mask, **VJP)
    got = jax.grad(lambda x: made(*arrays, limit=x).sum())(jnp.full(1, 5.0))
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize(
    ("fix", "says"),
    [
        ({"backward_k_chunk": 71}, "backward_k_chunk must be an integer"),
        ({"backward_head_chunk": 3}, "backward_head_chunk must"),
        ({"backward_store": "q"}, "backward_store must be"),
        ({"backward": "two_passes", "backward_ds": "twice"}, "backward_ds = twice"),
        ({"backward_tile": 3}, "one of algorithm"),
    ],
)
def test_choices_that_are_not_legal(fix, says):
    with refused(PlanError) as caught:
        attngen.plan(given(**CAUSAL), fix=fix)
    assert says in str(caught.value)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("outputs", [("out",), ("out", "lse")])
def test_outputs_that_are_rounded_leave_gradients_as_good(out_dtype, outputs):
    spec = AttentionSpec(
        q_heads=2, q_len=50, qk_dim=16, out_dtype=out_dtype, outputs=outputs,
        derivatives="vjp", **CAUSAL,
    )  # fmt: skip
    judge(spec)
    with refused(PlanError, "delta = summed"):
        attngen.plan(spec, fix={"backward_delta": "kept"})
