"""How a tile is raised: exp, 2**x, and a polynomial of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge, kernel

import attngen
from attngen import AttentionSpec, api, masks, scores
from attngen.backends.jax.loader import load_function
from attngen.errors import PlanError

PLAIN = AttentionSpec(
    q_heads=4, kv_heads=2, q_len=33, kv_len=47, qk_dim=8, outputs=("out", "lse")
)
SPECS = {
    "plain": PLAIN,
    "masked rows": dataclasses.replace(PLAIN, mask=masks.causal(), q_offset=-9),
    "sink and softcap": dataclasses.replace(
        PLAIN, sink=True, score=(scores.softcap(3.0),)
    ),
    "bias that leaves keys out": dataclasses.replace(PLAIN, score=(scores.bias(),)),
    "lengths": dataclasses.replace(PLAIN, kv_lengths=True),
    "bfloat16": dataclasses.replace(PLAIN, dtype="bfloat16"),
}
CHUNKS = {"algorithm": "running", "q_chunk": 8, "k_chunk": 16}


@pytest.mark.parametrize("exp", ["exp", "exp2", "polynomial"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(4)
def test_each_computes_the_spec(name, exp):
    judge(SPECS[name], **CHUNKS, exp=exp)


@pytest.mark.parametrize("name", ["plain", "bfloat16"])
@pytest.mark.parametrize(("k_chunk", "unroll"), [(16, 2), (5, 2), (5, 8), (6, 4)])
def test_unrolled_steps_compute_the_spec(name, k_chunk, unroll):
    judge(SPECS[name], **CHUNKS | {"k_chunk": k_chunk}, unroll=unroll)


@pytest.mark.parametrize(
    ("spec", "fix"),
    [
        (PLAIN, {"unroll": 3}),
        (PLAIN, {"unroll": True}),
        (PLAIN, {"unroll": 4}),  # of three chunks
        (PLAIN, {"unroll": 2, "loop": "scan"}),
        (dataclasses.replace(PLAIN, mask=masks.dense()), {"unroll": 2}),
        (PLAIN, {"exp": "taylor"}),
        (dataclasses.replace(PLAIN, dtype="float64"), {"exp": "polynomial"}),
    ],
)
def test_what_is_not_legal_is_refused(spec, fix):
    with pytest.raises(PlanError):
        attngen.plan(spec, fix=CHUNKS | fix)


def polynomial(spec):
    """The emitted function 2**x."""
    source = api.emit(api.plan(spec, fix=CHUNKS | {"exp": "polynomial"}))
    return load_function(api.stored(source)).__globals__["_exp2"]


@pytest.mark.parametrize("name", ["plain", "masked rows"])
def test_the_polynomial_is_as_exact_as_it_says(name):
    x = -np.linspace(0, 126, 1_000_001, dtype=np.float32)
    got = np.asarray(polynomial(SPECS[name])(x), np.float64)
    assert np.abs(got / 2.0 ** x.astype(np.float64) - 1).max() < 2e-7


def test_the_polynomial_at_its_ends():
    x = jnp.array([-jnp.inf, -1000.0, -127.0, 0.0, jnp.nan])
    y = np.asarray(polynomial(PLAIN)(x))
    np.testing.assert_array_equal(y[:4], [0, 0, 0, 1])
    assert np.isnan(y[4])


def test_the_polynomial_below_the_smallest_normal_number():
    x = -np.linspace(126, 127.5, 100_001, dtype=np.float32)
    y = np.asarray(polynomial(PLAIN)(jnp.asarray(x)), np.float64)
    assert np.all((y >= 0) & (np.abs(y - 2.0 ** x.astype(np.float64)) < 1.2e-38))


@pytest.mark.parametrize("exp", ["exp", "polynomial"])
def test_finite_values_in_keys_that_are_not_seen_do_not_matter(exp):
    """Not even the largest: 2**-126 of them would be seen, so weights are exactly 0."""
    spec = dataclasses.replace(SPECS["masked rows"], q_offset=3, kv_lengths=True)
    function, _ = kernel(spec, **CHUNKS | {"exp": exp})
    arrays = attngen.inputs.arrays(spec, nan=False)
    arrays["kv_lengths"][:] = 20
    made = {n: jnp.asarray(x, spec.dtype_of(n)) for n, x in arrays.items()}
    changed = made | {"v": made["v"].at[:, 20:].set(3e38)}
    for a, b in zip(function(**made), function(**changed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_has_a_gradient_of_both_modes():
    spec = dataclasses.replace(PLAIN, outputs=("out",), kv_heads=4)
    generator = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(generator.standard_normal(spec.shape_of(n)), jnp.float32)
        for n in "qkv"
    )

    def total(exp):
        function, _ = kernel(spec, **CHUNKS | {"exp": exp})
        return lambda *arrays: (function(*arrays) ** 2).sum()

    want = jax.grad(total("exp"), (0, 1, 2))(q, k, v)
    got = jax.grad(total("polynomial"), (0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    tangent = jax.jvp(total("polynomial"), (q, k, v), (q, k, v))[1]
    expected = sum((a * b).sum() for a, b in zip(want, (q, k, v), strict=True))
    np.testing.assert_allclose(tangent, expected, rtol=1e-3)
