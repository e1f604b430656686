"""derivatives="any" where a hidden value, or its slope, is infinite: against the reference.

The reference's gradients are of longdouble, and its second derivatives differences of them:
nothing of JAX's, which would have the same 0 times infinity.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from library import slowly

import attngen
from attngen import (
    AttentionSpec,
    exp,
    inputs,
    log,
    masks,
    maximum,
    minimum,
    reference,
    reference_gradients,
    scores,
    slopes,
    tanh,
    where,
)
from attngen.backends.jax.loader import load_function
from attngen.errors import ExpressionError
from attngen.singular import guarded

FIX = {"q_chunk": 4, "k_chunk": 4, "head_chunk": 1}


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def operand(name, *axes):
    return attngen.operand(name, axes=axes, dtype="float64")


BEFORE = attngen.mask(lambda b, h, q, k: k < q)
FIRST = attngen.mask(lambda b, h, q, k: k < 9)
INVERSE = attngen.score(lambda s, b, h, q, k: s / (q - k))
PAST = attngen.score(lambda s, b, h, q, k: where(k < q, s, -np.inf))
GATE, WEIGHT, HEAD = (
    operand("gate", "k"),
    operand("weight", "k"),
    operand("factor", "h"),
)
TABLE, PAIR = operand("table", 5), operand("pair", "q", "k")


def of(function):
    return attngen.score(function)


# name: mask, scores, and what operands hold at keys from 9 on
HIDDEN = {
    "a quotient": (BEFORE, (INVERSE,), {}),
    "a quotient in a window": (
        BEFORE & masks.sliding_window(5),
        (of(lambda s, b, h, q, k: s * (1 + 1 / (q - k)) / (1 - k + q)),),
        {},
    ),
    "an operand divided": (
        BEFORE,
        (of(lambda s, b, h, q, k: s + WEIGHT[k] / (q - k)),),
        {},
    ),
    "a logarithm": (BEFORE, (of(lambda s, b, h, q, k: s * log(q - k)),), {}),
    "a logarithm added": (BEFORE, (of(lambda s, b, h, q, k: s + log(q - k)),), {}),
    "a square root": (
        BEFORE,
        (of(lambda s, b, h, q, k: s * exp(log(q - k) / 2) + log(s * s + q - k)),),
        {},
    ),
    "an exponential": (
        masks.causal(),
        (of(lambda s, b, h, q, k: s * exp((k - q) * 300) + s),),
        {},
    ),
    "an exponential of an operand": (
        FIRST,
        (of(lambda s, b, h, q, k: s + exp(s + WEIGHT[k])),),
        {"weight": 1e5},
    ),
    "the logarithm of an operand": (
        FIRST,
        (of(lambda s, b, h, q, k: s + log(abs(WEIGHT[k]) + WEIGHT[k])),),
        {"weight": (0, -1)},
    ),
    "a product with an operand": (
        FIRST,
        (of(lambda s, b, h, q, k: s * WEIGHT[k]),),
        {"weight": (np.nan, np.inf)},
    ),
    "a quotient by an operand": (
        FIRST,
        (of(lambda s, b, h, q, k: s / WEIGHT[k]),),
        {"weight": (0, np.nan)},
    ),
    "two operands": (
        FIRST,
        (of(lambda s, b, h, q, k: s + GATE[k] * tanh(s * WEIGHT[k] / GATE[k])),),
        {"weight": (np.inf, np.nan), "gate": 0},
    ),
    "extremes": (
        FIRST,
        (of(lambda s, b, h, q, k: s * minimum(exp(WEIGHT[k] + s), 2) + s),),
        {"weight": 1e5},
    ),
    "a read outside a table": (
        masks.causal() & masks.sliding_window(5),
        (of(lambda s, b, h, q, k: s * TABLE[q - k]),),
        {},
    ),
    "a score that was infinite": (
        FIRST,
        (of(lambda s, b, h, q, k: s + PAIR[q, k]), scores.softcap(5.0)),
        {"pair": (np.nan, -np.inf)},
    ),
    "hidden by a later score": (None, (INVERSE, PAST), {}),
    "hidden by a later score, and by lengths": (
        None,
        (of(lambda s, b, h, q, k: s / WEIGHT[k]), INVERSE, PAST),
        {},
    ),
    "hidden by an earlier score": (
        None,
        (PAST, of(lambda s, b, h, q, k: s / HEAD[h] - s * s)),
        {},
    ),
    "a gate that is shut": (
        masks.causal(),
        (of(lambda s, b, h, q, k: s + log(GATE[k])),),
        {"gate": 0},
    ),
    "a gate that is shut, times a weight": (
        masks.causal(),
        (of(lambda s, b, h, q, k: s + abs(WEIGHT[k]) * log(GATE[k])),),
        {"gate": 0},
    ),
    "a whole head": (
        attngen.mask(lambda b, h, q, k: h < 1),
        (of(lambda s, b, h, q, k: s / (1 - h) + HEAD[h] / (1 - h)),),
        {},
    ),
    "a branch": (
        None,
        (of(lambda s, b, h, q, k: where(k < q, s / (q - k), s)),),
        {},
    ),
    "a branch, and a mask": (
        masks.causal(),
        (of(lambda s, b, h, q, k: where(k < q, s / (q - k), s)),),
        {},
    ),
    "the other branch": (
        masks.sliding_window(6),
        (of(lambda s, b, h, q, k: where((k >= q) | (s > 9), s, s * log(q - k))),),
        {},
    ),
    "branches of branches": (
        masks.causal(),
        (
            of(
                lambda s, b, h, q, k: where(
                    k < 9, where(s > 0, log(s), s) / WEIGHT[k], exp(s * WEIGHT[k])
                )
            ),
        ),
        {"weight": 0},
    ),
    "branches by head": (
        None,
        (of(lambda s, b, h, q, k: where(h < 1, s / (1 - h), s * HEAD[h])),),
        {},
    ),
}
# in the default run: of first, of second derivatives
FIRST = "branches of branches"
LENGTHS = ("hidden by a later score, and by lengths", "a product with an operand")


def spec_of(name):
    mask, score, _ = HIDDEN[name]
    return AttentionSpec(
        batch=2 if name in LENGTHS else 1, q_heads=2, kv_heads=1, q_len=12, qk_dim=3,
        dtype="float64", q_offset=0, mask=mask, score=score, outputs=("out", "lse"),
        kv_lengths=name in LENGTHS, derivatives="any",
    )  # fmt: skip


def given_of(name, spec):
    """Arrays: what operands hold is positive, but what the case has them hold at some keys."""
    given = inputs.arrays(spec)
    for own in spec.operands:
        if own.kind == "float":
            given[own.name] = np.abs(given[own.name]) + 0.5
    for own, values in HIDDEN[name][2].items():
        given[own][..., 9:] = np.resize(values, 3)
    return given


def function_of(spec, folder):
    source = attngen.emit(attngen.plan(spec, fix=FIX))
    return load_function(source.write(folder / f"{source.digest}.py"))


class Judge:
    """The loss of a kernel in what has gradients, and its gradient by the reference."""

    def __init__(self, name, folder):
        self.spec = spec = spec_of(name)
        self.given = given_of(name, spec)
        self.names = list(slopes.gradients(spec).values())
        self.at = {n: self.given[n] for n in self.names}
        self.function = function_of(spec, folder)
        generator = np.random.default_rng(1)
        self.weights = [generator.normal(size=spec.shape_of(o)) for o in spec.outputs]
        self.moved = {n: generator.normal(size=x.shape) for n, x in self.at.items()}
        for n, x in self.at.items():  # at 0 a logarithm has no difference
            self.moved[n][~np.isfinite(x) | (x == 0)] = 0

    def loss(self, at):
        outputs = self.function(
            **{n: jnp.asarray(x) for n, x in self.given.items()} | at
        )
        total = 0
        for output, weights in zip(outputs, self.weights, strict=True):
            finite = jnp.where(jnp.isfinite(output), output, 0)
            total += (jnp.sin(finite) * weights).sum()
        return total

    def gradient(self, step):
        """The reference's, moved by a step."""
        given = {
            n: x + np.longdouble(step) * self.moved[n] if n in self.moved else x
            for n, x in self.given.items()
        }
        qkv = [given.pop(n) for n in "qkv"]
        found = reference.attention(self.spec, *qkv, given)
        found["out"] = reference.by_heads(self.spec, found["out"])
        cotangents = {}
        for o, weights in zip(self.spec.outputs, self.weights, strict=True):
            finite = np.isfinite(found[o])
            slope = np.cos(np.where(finite, found[o], 0)) * weights
            cotangents[f"d{o}"] = np.where(finite, slope, 0)
        made = reference_gradients.gradients(self.spec, *qkv, given, cotangents)
        made["dq"] = reference.by_heads(self.spec, made["dq"])
        return {of: made[n] for n, of in slopes.gradients(self.spec).items()}

    def second(self):
        """The derivative of the gradient along `moved`: error 1e-12, of rounding."""
        step = np.longdouble(1e-7)
        here, there = self.gradient(-step), self.gradient(step)
        return {n: (there[n] - here[n]) / (2 * step) for n in self.names}


def close(found, wanted, tolerance):
    for name, want in wanted.items():
        have = np.asarray(found[name])
        assert np.isfinite(want).all(), name
        assert np.isfinite(have).all(), name
        scale = max(np.abs(want).max(), 1e-3)
        assert np.abs(have - want).max() <= tolerance * scale, name


@pytest.mark.parametrize("name", slowly(HIDDEN, [FIRST]))
def test_gradients_are_those_of_the_reference(name, tmp_path):
    judge = Judge(name, tmp_path)
    wanted = judge.gradient(0)
    close(jax.jit(jax.grad(judge.loss))(judge.at), wanted, 1e-12)
    along = jax.jit(lambda at: jax.jvp(judge.loss, (at,), (judge.moved,))[1])(judge.at)
    want = sum((wanted[n] * judge.moved[n]).sum() for n in judge.names)
    assert abs(float(along) - want) <= 1e-11 * max(abs(want), 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", HIDDEN)
def test_second_derivatives_are_those_of_the_reference(name, tmp_path):
    judge = Judge(name, tmp_path)

    def forward_over_reverse(at):
        return jax.jvp(jax.grad(judge.loss), (at,), (judge.moved,))[1]

    def along(at):
        found = jax.grad(judge.loss)(at)
        return sum((found[n] * judge.moved[n]).sum() for n in judge.names)

    wanted = judge.second()
    for derivative in (forward_over_reverse, jax.grad(along)):
        close(jax.jit(derivative)(judge.at), wanted, 1e-9)


# Which are guarded, and how it is written.


def text_of(spec):
    return attngen.emit(attngen.plan(spec, fix=FIX)).text


@pytest.mark.parametrize(
    "score",
    [
        (scores.alibi(),),
        (scores.alibi(heads=2), scores.softcap(30.0)),
        (scores.softcap("caps"),),
        (scores.relative_buckets(),),
        (scores.temperature(),),
        (of(lambda s, b, h, q, k: s / maximum(q - k, 1) + log(1 + abs(s))),),
        (of(lambda s, b, h, q, k: where(k < q, s * HEAD[h], s)),),
    ],
    ids=("alibi", "softcap", "caps", "t5", "temperature", "bounded", "a branch"),
)
def test_what_is_always_finite_is_not_guarded(score):
    spec = dataclasses.replace(
        spec_of("a quotient"), mask=masks.causal(), score=score, outputs=("out",)
    )
    assert guarded(spec) == tuple(s.expr for s in score)
    text = text_of(spec)
    assert "harmless" not in text
    assert "seen=True" not in text
    assert "live" not in text


def test_a_guard_is_written_once_and_says_why():
    text = text_of(spec_of("an operand divided"))
    assert "jnp.where(live, " in text
    assert text.count("harmless") == 1
    branch = text_of(spec_of("branches by head"))
    assert "s / jnp.where(h_index < 1, jnp.float64(1 - h_index), 1.0)" in branch
    assert "live" not in branch


def test_what_is_too_deep_with_guards_is_an_error_that_says_what_to_do():
    def deep(s, b, h, q, k):
        for _ in range(200):
            s = 1 / s
        return s

    spec = dataclasses.replace(spec_of("a quotient"), score=(of(deep),))
    with pytest.raises(ExpressionError, match=r"guards included"):
        guarded(spec)
