"""Triton: scores of −inf drop keys, whichever operand makes them; guards only where needed."""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted

import attngen
from attngen import AttentionSpec, api, inputs, masks, reference, scores

LIKE = AttentionSpec(
    batch=2, q_heads=2, kv_heads=1, q_len=70, qk_dim=32, q_offset=0,
    outputs=("out", "lse"),
)  # fmt: skip


def of(name, axes, f):
    """A score that reads one operand of float32."""
    values = attngen.operand(name, axes=axes, dtype="float32")
    return attngen.score(lambda s, b, h, q, k: f(s, values, b, h, q, k))


def near(q, k):
    return attngen.minimum(attngen.maximum(k - q + 10, 0), 20)


# name → (score, whether interiors go without guards)
SCORES = {
    "slopes": (scores.alibi("x"), True),
    "heads": (of("x", "h", lambda s, x, b, h, q, k: s + x[h]), True),
    "temperatures": (of("x", "bh", lambda s, x, b, h, q, k: s * x[b, h]), True),
    "rows": (of("x", "bq", lambda s, x, b, h, q, k: s + x[b, q]), True),
    "table": (of("x", ("h", 21), lambda s, x, b, h, q, k: s + x[h, near(q, k)]), True),
    "keys": (of("x", "bk", lambda s, x, b, h, q, k: s + x[b, k]), False),
    "bias": (scores.bias("x"), False),
    "powers": (of("x", "h", lambda s, x, b, h, q, k: s - attngen.exp(x[h])), False),
    "two": (
        of("x", "h", lambda s, x, b, h, q, k: s * x[h] + attngen.maximum(x[h], -1.0)),
        True,
    ),
}


def source_of(score, mask=None, **fix):
    spec = dataclasses.replace(LIKE, score=(score,), mask=mask)
    fix = {"q_chunk": 32, "k_chunk": 16} | fix
    return spec, attngen.emit(attngen.plan(spec, "h100", "triton", fix))


@pytest.mark.parametrize("name", SCORES)
def test_interiors_go_without_guards_where_a_look_before_the_loops_will_do(name):
    score, without = SCORES[name]
    text = source_of(score)[1].text
    assert ("UNSEEN=False" in text) == without
    assert text.count("there = tl.max(") == (1 if without else 2)
    assert ("tame" in text) == without


def check(spec, path, arrays):
    with np.errstate(all="ignore"):
        given = dict(arrays)
        want = reference.attention(spec, *(given.pop(n) for n in "qkv"), given)
    found = interpreted.call(path, **arrays)
    rows = np.arange(spec.q_len)
    for name, x in zip(spec.outputs, found, strict=True):
        got = reference.pick(spec, name, x, rows)
        assert np.allclose(got, want[name], atol=2e-5, equal_nan=True), name


VALUES = (0.5, -math.inf, -1e30)  # the last is finite, but huge


@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["all", "causal"])
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.sampled(7)
def test_what_an_operand_makes_minus_infinite_is_not_there(name, mask):
    spec, source = source_of(SCORES[name][0], mask)
    path = api.stored(source)
    arrays = inputs.arrays(spec)
    plain = arrays["x"].copy()
    for value in VALUES:
        x = plain.copy()
        x.reshape(-1)[1::3] = value  # here and there
        check(spec, path, arrays | {"x": x})
        x[..., x.shape[-1] // 2 :] = value
        check(spec, path, arrays | {"x": x})


@pytest.mark.parametrize("name", ["heads", "rows", "table", "keys", "bias"])
def test_a_nan_in_values_that_scores_hide_from_all_queries_does_not_matter(name):
    spec, source = source_of(SCORES[name][0])
    arrays = inputs.arrays(spec)
    hidden = arrays["x"].copy()
    if name in ("heads", "rows"):
        hidden[...] = -np.inf  # no key is there
    elif name == "table":
        hidden[:, 20] = -np.inf  # from the tenth key after a query on
    else:
        hidden[..., 40:] = -np.inf
    arrays = arrays | {"x": hidden, "v": arrays["v"].copy()}
    if name == "table":
        spec = dataclasses.replace(spec, q_len=30)
        arrays["q"] = arrays["q"][:, :30]
    arrays["v"][:, 0 if name in ("heads", "rows") else 42 :] = np.nan
    out, lse = interpreted.call(api.stored(source), **arrays)
    assert np.isfinite(out).all()
    if name in ("heads", "rows"):
        assert (out == 0).all()
        assert (lse == -np.inf).all()
    check(spec, api.stored(source), arrays)


def test_rows_that_a_bias_hides_whole_are_zero():
    spec, source = source_of(scores.bias("x"))
    arrays = inputs.arrays(spec)
    arrays["x"] = arrays["x"].copy()
    arrays["x"][:, :, ::2] = -np.inf
    out, lse = interpreted.call(api.stored(source), **arrays)
    assert (out[:, ::2] == 0).all()
    assert (lse[:, :, ::2] == -np.inf).all()
    assert np.isfinite(lse[:, :, 1::2]).all()
    check(spec, api.stored(source), arrays)


LEAST = float(np.finfo(np.float32).min)  # with which masks are often written
HIDING = {
    "a constant": attngen.score(lambda s, b, h, q, k: attngen.where(k < 40, LEAST, s)),
    "a sum": attngen.score(lambda s, b, h, q, k: s + attngen.where(k < 40, LEAST, 0.0)),
    "bias": SCORES["keys"][0],
}


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("mask", [None, masks.causal()], ids=["all", "causal"])
@pytest.mark.parametrize("name", HIDING)
@pytest.mark.sampled(5)
def test_keys_of_the_least_finite_score_are_there(name, mask, sink):
    """Where a row has no others they share it; else they weigh nothing."""
    spec = dataclasses.replace(LIKE, score=(HIDING[name],), mask=mask, sink=sink)
    fix = {"q_chunk": 32, "k_chunk": 16}
    path = api.stored(attngen.emit(attngen.plan(spec, "h100", "triton", fix)))
    arrays = inputs.arrays(spec)
    if name == "bias":
        arrays |= {"x": np.full_like(arrays["x"], LEAST)}
        check(spec, path, arrays)
        arrays["x"][:, 40:] = 0.5
    check(spec, path, arrays)
