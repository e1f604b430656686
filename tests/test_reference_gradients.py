"""The reference's gradients against JAX's own, in 64 bits, of attention written densely."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from library import SCORES, SWIN
from plainly import dense

import attngen
from attngen import AttentionSpec, inputs, masks, reference, scores, slopes
from attngen.reference_gradients import gradients
from attngen.symbols import exp, log, maximum, minimum, tanh, where

VJP = {"derivatives": "vjp"}
BASE = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=5,
    kv_len=7,
    qk_dim=3,
    v_dim=2,
    q_offset=1,
    outputs=("out", "lse"),
    **VJP,
)


def changed(spec=BASE, **changes):
    return dataclasses.replace(spec, **changes)


def of_jax(spec, arrays, cotangents):
    """Gradients of q, k, v and all float operands."""
    with jax.enable_x64(True):
        wide = {
            n: jnp.asarray(x, jnp.float64 if x.dtype.kind not in "bi" else None)
            for n, x in arrays.items()
        }
        moving = {n: x for n, x in wide.items() if x.dtype == jnp.float64}

        def outputs(moving):
            given = wide | moving
            q, k, v = (given.pop(n) for n in "qkv")
            made = dense(spec, q, k, v, given)
            return [made[n] for n in spec.outputs]

        _, pull = jax.vjp(outputs, moving)
        pulled = [jnp.asarray(x, jnp.float64) for x in cotangents.values()]
        (found,) = pull(pulled)
        return {n: np.asarray(x) for n, x in found.items()}


def arrays_of(spec, **held):
    """Inputs of a spec, NaN in keys that aren't there; cotangents, NaN in rows that aren't."""
    made = inputs.arrays(spec)
    for name, x in held.items():
        made[name] = np.broadcast_to(x, made[name].shape).astype(made[name].dtype)
    return made, inputs.cotangents(spec)


def without_nan(arrays):
    return {n: np.nan_to_num(x, nan=0.5, posinf=None, neginf=-np.inf) for n, x in arrays.items()}  # fmt: skip


def own(spec, arrays, cotangents, **how):
    q, k, v = (arrays[n] for n in "qkv")
    operands = {n: x for n, x in arrays.items() if n not in ("q", "k", "v")}
    return gradients(spec, q, k, v, operands, cotangents, **how)


def agree(spec, arrays, cotangents, tolerance=1e-12):
    """Assert that the reference's gradients are JAX's, and that there are no others."""
    got = own(spec, arrays, cotangents)
    want = of_jax(spec, without_nan(arrays), without_nan(cotangents))
    assert list(got) == list(slopes.gradients(spec))
    everything = np.arange(spec.q_len)
    for name, of in slopes.gradients(spec).items():
        exact = want.pop(of)
        if name == "dq":
            exact = reference.pick(spec, "dq", exact, everything)
        size = np.abs(exact).max(initial=1.0)
        assert got[name].shape == exact.shape
        np.testing.assert_allclose(got[name], exact, rtol=0, atol=tolerance * size)
    for name, x in want.items():
        assert not x.any(), f"{name} has a gradient"
    return got


table = attngen.operand("table", axes=("h", 3), dtype="float32")
x = attngen.operand("x", axes="h", dtype="float32")
wide = attngen.operand("wide", axes="qk", dtype="float32")

OWN_SCORES = {
    "exp and log": lambda s, b, h, q, k: log(exp(s) + exp(x[h]) * 2) - s * s / 4,
    "abs": lambda s, b, h, q, k: abs(s * x[h]) + abs(x[h]),
    "extremes": lambda s, b, h, q, k: minimum(s, x[h] * s) - maximum(s, 0.1),
    "where": lambda s, b, h, q, k: (
        where(s > x[h], s * x[h], -s) + where(k > q, x[h], s)
    ),
    "integers": lambda s, b, h, q, k: s * (q // 3 - k % 2) - -(x[h] - s),
    "two reads": lambda s, b, h, q, k: s + table[h, q % 3] * table[h, k % 3],
    "a fixed entry": lambda s, b, h, q, k: s * table[2, 1] + table[h, 0] / table[0, 2],
    "of q, in the denominator": lambda s, b, h, q, k: s / (2 + tanh(wide[q, k])),
    "only compared": lambda s, b, h, q, k: where(s > wide[q, k], s, s / 2),
    "without s": lambda s, b, h, q, k: wide[q, k] * x[h],
}


@pytest.mark.parametrize("name", OWN_SCORES)
@pytest.mark.sampled(2)
def test_of_a_score(name):
    spec = changed(score=(attngen.score(OWN_SCORES[name]),), sink=True)
    agree(spec, *arrays_of(spec))


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.sampled(3)
def test_of_the_library(name, layout):
    example = SCORES[name]
    spec = example.spec(layout=layout, qk_dim=5, **VJP)
    agree(spec, *arrays_of(spec, **example.operands))


def test_a_table_that_is_read_outside_where_a_mask_hides_it():
    spec = changed(SWIN, **VJP)
    arrays, cotangents = arrays_of(spec)
    assert np.isfinite(agree(spec, arrays, cotangents)["d_relative_table"]).all()


SPECS = {
    "plain": {},
    "out alone": {"outputs": ("out",)},
    "lse alone": {"outputs": ("lse",), "sink": True},
    "lse first": {"outputs": ("lse", "out")},
    "a scale": {"scale": -2.0},
    "no groups": {"kv_heads": 4},
    "one kv head": {"kv_heads": 1},
    "causal": {"mask": masks.causal()},
    "rows without keys": {"mask": masks.causal(), "q_offset": -3},
    "rows without keys, a sink": {"mask": masks.causal(), "q_offset": -3, "sink": True},
    "a sink": {"sink": True},
    "caps of heads, temperatures of rows": {
        "score": (scores.temperature("tau", "bq"), scores.softcap("caps")),
    },
    "scores in turn": {
        "score": (scores.softcap(2.0), scores.alibi(), scores.bias(axes="hqk"), scores.softcap(3.0)),
        "kv_offset": 2,
    },
    "offsets": {"q_offset": "operand", "mask": masks.causal(), "score": (scores.alibi(),)},
    "lengths": {"kv_lengths": True, "q_lengths": True, "sink": True},
    "lengths, from the right": {
        "kv_lengths": True,
        "mask": masks.causal(),
        "q_offset": "bottom_right",
        "score": (scores.relative_buckets(),),
    },
    "half": {"dtype": "float16", "sink": True, "score": (scores.bias(dtype="bfloat16"),)},
    "any order": {"derivatives": "any", "score": (scores.softcap(2.0),)},
}  # fmt: skip
SPECS |= {
    f"a bias of {axes}": {"score": (scores.bias(axes=axes),), "mask": masks.causal()}
    for axes in ("bhqk", "hqk", "bqk", "kb", "q", "k", "h", "b")
}


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(5)
def test_of_a_spec(name, layout):
    spec = changed(layout=layout, **SPECS[name])
    arrays, cotangents = arrays_of(spec)
    if "caps" in arrays:
        arrays["caps"] = np.abs(arrays["caps"]) + 0.5
    agree(spec, arrays, cotangents)


def test_of_equal_arguments_half_goes_to_each_as_in_jax():
    bounds = attngen.operand("bounds", axes="h", dtype="float32")
    spec = changed(
        score=(
            attngen.score(lambda s, b, h, q, k: maximum(s, bounds[h]) + abs(s)),
            attngen.score(lambda s, b, h, q, k: minimum(s, 1.0 * bounds[h])),
        )
    )
    arrays, cotangents = arrays_of(spec, q=0.0, bounds=0.0)
    got = agree(spec, arrays, cotangents)
    assert got["d_bounds"].any()
    assert got["dq"].any()


@pytest.mark.parametrize("axes", ["bhqk", "hqk", "bqk", "qk", "k"])
@pytest.mark.parametrize("sink", [False, True])
def test_a_bias_of_minus_infinity_drops_the_key_and_has_no_gradient(axes, sink):
    score = (scores.temperature(), scores.bias(axes=axes))
    spec = changed(score=score, sink=sink)
    arrays, cotangents = arrays_of(spec)
    dropped = np.random.default_rng(0).random(arrays["bias"].shape) < 0.4
    dropped[..., -1] = True
    if "q" in axes:
        dropped[..., 2, :] = True  # a row without keys
    arrays["bias"] = np.where(dropped, -np.inf, arrays["bias"]).astype(np.float32)
    got = agree(spec, arrays, cotangents)
    assert (got["d_bias"][dropped] == 0).all()
    assert got["d_bias"][~dropped].any()
    by_heads = reference.by_heads(spec, got["dv"])
    assert (by_heads[:, :, -1] == 0).all()
    if "q" in axes:
        assert (got["dq"][:, :, 2] == 0).all()


def test_a_branch_that_is_not_taken_has_no_gradient_not_even_nan():
    score = attngen.score(lambda s, b, h, q, k: where(k < 4, s + log(wide[q, k]), s))
    spec = changed(score=(score,))
    arrays, cotangents = arrays_of(spec)
    positive = np.abs(arrays["wide"]) + 0.1
    want = own(spec, arrays | {"wide": positive}, cotangents)
    holes = positive.copy()
    holes[:, 4:] = [0.0, -1.0, np.nan]
    got = own(spec, arrays | {"wide": holes}, cotangents)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    assert (got["d_wide"][:, 4:] == 0).all()
    assert got["d_wide"][:, :4].all()


def test_rows_without_keys_add_nothing_whatever_they_hold():
    spec = changed(
        mask=masks.causal(),
        q_offset=-2,
        q_lengths=True,
        sink=True,
        score=(scores.bias(axes="q"), scores.temperature()),
    )
    arrays, cotangents = arrays_of(spec)
    want = agree(spec, arrays, cotangents)
    rows = np.arange(5)[None] >= arrays["q_lengths"][:, None]
    rows = rows | (np.arange(5) < 2)
    arrays["q"][rows] = np.nan
    cotangents["dout"][rows] = np.nan
    cotangents["dlse"].swapaxes(1, 2)[rows] = np.nan
    got = own(spec, arrays, cotangents)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])
    assert (got["dq"].swapaxes(1, 2)[rows] == 0).all()


def test_keys_that_are_not_there_have_no_gradient_whatever_they_hold():
    spec = changed(kv_lengths=True, mask=masks.sliding_window(2))
    _, cotangents = arrays_of(spec)
    arrays = inputs.arrays(spec, nan=False) | {"kv_lengths": np.array([5, 3])}
    for name in ("k", "v"):
        arrays[name][0, 5:] = np.inf
        arrays[name][1, 3:] = np.nan
    got = agree(spec, arrays, cotangents)
    for name in ("dk", "dv"):
        assert (got[name][0, 5:] == 0).all()
        assert (got[name][1, 3:] == 0).all()


def test_a_nan_that_is_seen_is_the_users_and_stays_where_it_is_seen():
    spec = changed(mask=masks.causal(), q_offset=0)
    arrays, cotangents = arrays_of(spec)
    clean = own(spec, arrays, cotangents)
    arrays["q"][:, 1] = np.nan  # sees keys 0 and 1
    got = own(spec, arrays, cotangents)
    for name in ("dk", "dv"):
        assert np.isnan(got[name][:, :2]).all()
        np.testing.assert_array_equal(got[name][:, 2:], clean[name][:, 2:])
    assert np.isnan(got["dq"][:, :, 1]).all()
    kept = [0, 2, 3, 4]
    np.testing.assert_array_equal(got["dq"][:, :, kept], clean["dq"][:, :, kept])


@pytest.mark.parametrize("sink", [-np.inf, -200.0, 200.0])
def test_a_sink_of_any_size(sink):
    spec = changed(sink=True)
    arrays, cotangents = arrays_of(spec, sink=sink)
    got = own(spec, arrays, cotangents)
    if sink > 0:  # the outputs vanish, lse's gradient doesn't
        arrays.pop("sink")
        spec, cotangents = changed(outputs=("lse",)), {"dlse": cotangents["dlse"]}
    want = own(
        changed(spec, sink=False),
        {n: x for n, x in arrays.items() if n != "sink"},
        cotangents,
    )
    for name in ("dq", "dk", "dv"):
        np.testing.assert_allclose(got[name], want[name], atol=1e-15)
    assert np.abs(got["d_sink"]).max() < 1e-50


def test_of_differences():
    spec = changed(
        dtype="float64",
        mask=masks.causal(),
        q_offset=-1,
        sink=True,
        score=(scores.softcap("caps"), scores.bias(axes="hqk", dtype="float64")),
    )
    arrays, cotangents = arrays_of(spec)
    arrays["caps"] = np.abs(arrays["caps"]) + 1
    arrays = {n: x.astype(np.longdouble) for n, x in arrays.items()}

    def total(arrays):
        operands = dict(arrays)
        q, k, v = (operands.pop(n) for n in "qkv")
        made = reference.attention(spec, q, k, v, operands)
        lse = np.where(np.isneginf(made["lse"]), 0, made["lse"])
        out = reference.by_heads(spec, made["out"])
        return (out * cotangents["dout"]).sum() + (lse * cotangents["dlse"]).sum()

    got = own(spec, arrays, cotangents)
    got["dq"] = reference.by_heads(spec, got["dq"])
    generator = np.random.default_rng(0)
    for name, of in slopes.gradients(spec).items():
        assert got[name].dtype == np.longdouble
        for _ in range(3):
            way = generator.standard_normal(arrays[of].shape) * 1e-5
            ahead, behind = (
                total(arrays | {of: arrays[of] + sign * way}) for sign in (1, -1)
            )
            np.testing.assert_allclose(
                (ahead - behind) / 2, (got[name] * way).sum(), rtol=1e-7, atol=1e-13
            )


SAMPLED = changed(
    kv_lengths=True,
    sink=True,
    score=(scores.bias(axes="hqk"), scores.temperature("tau", "q")),
)


def test_some_rows_are_the_whole_with_cotangents_of_zero_elsewhere():
    arrays, cotangents = arrays_of(SAMPLED)
    rows = np.array([3, 1])
    some = own(SAMPLED, arrays, cotangents, rows=rows)
    sampled = inputs.cotangents(SAMPLED, rows=rows)
    np.testing.assert_array_equal(sampled["dout"][:, rows], cotangents["dout"][:, rows])
    assert (sampled["dlse"][:, :, [0, 2, 4]] == 0).all()
    assert (sampled["dout"][:, [0, 2, 4]] == 0).all()
    whole = own(SAMPLED, arrays, sampled)
    assert (whole["dq"][:, :, [0, 2, 4]] == 0).all()
    whole["dq"] = whole["dq"][:, :, rows]
    for name in whole:
        np.testing.assert_allclose(some[name], whole[name], rtol=1e-13, atol=1e-15)


def test_how_many_rows_at_once_changes_nothing(monkeypatch):
    arrays, cotangents = arrays_of(SAMPLED)
    whole = own(SAMPLED, arrays, cotangents)
    monkeypatch.setattr("attngen.reference.ROWS", 2)
    parts = own(SAMPLED, arrays, cotangents)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "unit"), [("float32", 2.0**-24), ("bfloat16", 2.0**-9)]
)
def test_the_plain_baseline_errs_as_its_dtype_does(dtype, unit):
    spec = changed(dtype=dtype, q_len=40, kv_len=60, qk_dim=16, score=SAMPLED.score)
    arrays, cotangents = arrays_of(spec)
    exact = own(spec, arrays, cotangents)
    plain = own(spec, arrays, cotangents, rounding=reference.plain(spec))
    for name, x in exact.items():
        assert plain[name].dtype == np.float32
        error = np.abs(plain[name] - x).max() / np.abs(x).max()
        assert 0 < error < 20 * unit, name


def test_without_derivatives_there_are_none():
    arrays, cotangents = arrays_of(changed(derivatives=None))
    assert cotangents == {}
    assert own(changed(derivatives=None), arrays, {}) == {}
