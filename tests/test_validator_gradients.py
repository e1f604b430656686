"""The validator judges gradients as it judges outputs: what is off by a percent fails."""

import dataclasses

import jax
import numpy as np
import pytest
from plainly import dense

import attngen
from attngen import AttentionSpec, backends, building, masks, scores, validator
from attngen.errors import ValidationError

JAX = backends.get("jax")
SPEC = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=50,
    kv_len=70,
    qk_dim=16,
    q_offset=-5,  # the first rows see no key
    mask=masks.causal(),
    outputs=("out", "lse"),
    derivatives="vjp",
)
SCORED = dataclasses.replace(
    SPEC,
    sink=True,
    q_offset=20,
    score=(scores.softcap(4.0), scores.bias(axes="hqk"), scores.alibi()),
)


def plain(spec, change=None):
    """Plain attention, which JAX differentiates; change is made to its cotangents."""

    def function(q, k, v, **operands):
        found = dense(spec, q, k, v, operands)
        made = tuple(found[n] for n in spec.outputs)
        return made[0] if len(made) == 1 else made

    if change is None:
        return function

    @jax.custom_vjp
    def kernel(given):
        return function(**given)

    def forward(given):
        return kernel(given), given

    def backward(given, pulled):
        floats = {n: x for n, x in given.items() if x.dtype.kind not in "ib"}
        _, pull = jax.vjp(lambda of: function(**given | of), floats)
        (found,) = pull(pulled)
        whole = {
            n: np.zeros(x.shape, jax.dtypes.float0)
            for n, x in given.items()
            if n not in found
        }
        return (whole | found | change(given, found),)

    kernel.defvjp(forward, backward)
    return lambda **given: kernel(given)


def report_of(spec, function, **how):
    forward = dataclasses.replace(spec, derivatives=None)
    fix = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}
    plan = attngen.plan(forward, target="cpu", backend="jax", fix=fix)
    program = JAX.program(spec, function)
    return validator.validate(spec, plan, program, to_array=JAX.array, **how)


SPECS = {
    "causal": SPEC,
    "scored": SCORED,
    "out alone": dataclasses.replace(SCORED, outputs=("out",), layout="bhtd"),
    "lse alone": dataclasses.replace(SPEC, outputs=("lse",)),
    "any order": dataclasses.replace(SPEC, derivatives="any"),
    "q_lengths": dataclasses.replace(SPEC, q_lengths=True),
    "temperatures": dataclasses.replace(
        SPEC, score=(scores.temperature(dtype="bfloat16"),), q_offset=0
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(3)
def test_attention_that_jax_differentiates_passes(name, dtype):
    spec = dataclasses.replace(SPECS[name], dtype=dtype)
    report = report_of(spec, plain(spec))
    assert report.passed, report
    named = [*spec.outputs, *attngen.slopes.gradients(spec)]
    assert [c.name for c in report.checks] == named


@pytest.mark.parametrize("axes", ["bhqk", "bq", "k", "q", "h"])
def test_a_bias_that_jax_differentiates_passes(axes):
    """Of q, and of h, gradients are sums that are 0 but for rounding."""
    spec = dataclasses.replace(SPEC, score=(scores.bias(axes=axes),))
    report = report_of(spec, plain(spec))
    assert report.passed, report


def failed(report):
    return [c.name for c in report.checks if not c.passed]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_given_back_as_it_is_passes(dtype):
    spec = dataclasses.replace(SCORED, dtype=dtype)
    report = report_of(spec, plain(spec, lambda given, found: {}))
    assert report.passed, report


@pytest.mark.parametrize("name", ["q", "k", "v", "sink", "bias", "slopes"])
@pytest.mark.sampled(2)
def test_a_gradient_off_by_a_percent_is_caught(name):
    function = plain(SCORED, lambda given, found: {name: found[name] * 1.01})
    assert failed(report_of(SCORED, function)) == [
        f"d{'_' * (name not in 'qkv')}{name}"
    ]


@pytest.mark.parametrize(("name", "off"), [("q", 1.04), ("k", 1.04), ("v", 1.04)])
def test_in_half_precision_a_gradient_off_by_some_percents_is(name, off):
    spec = dataclasses.replace(SPEC, dtype="bfloat16")
    function = plain(spec, lambda given, found: {name: found[name] * off})
    assert failed(report_of(spec, function)) == [f"d{name}"]


LENGTHS = dataclasses.replace(SPEC, kv_lengths=True)


@pytest.mark.parametrize(
    ("spec", "name", "at", "value"),
    [
        (SPEC, "q", (0, 2), 1e-30),  # a row that sees no key
        (SPEC, "q", (0, 2), np.nan),
        (SPEC, "q", (0, 40), np.inf),
        (SPEC, "k", (1, 69), 1e-5),
        (SPEC, "v", (0, 0), np.nan),
        (LENGTHS, "k", (1, 40), 1e-30),  # a key that isn't there
        (LENGTHS, "v", (1, 69), 1e-30),
        (LENGTHS, "k", (1, 40), np.nan),
        (LENGTHS, "v", (1, 40), np.nan),
    ],
)
@pytest.mark.sampled(2)
def test_what_must_be_nothing_and_what_must_be_finite(spec, name, at, value):
    function = plain(spec, lambda given, found: {name: found[name].at[at].set(value)})
    assert failed(report_of(spec, function)) == [f"d{name}"]


def test_where_rows_are_sampled_gradients_are_whole(monkeypatch):
    monkeypatch.setattr(validator, "ELEMENTS", 8 * 70 * 20)
    rows = validator.sample_rows(SCORED, 16)
    assert 20 <= len(rows) < 50
    report = report_of(SCORED, plain(SCORED))
    assert report.passed, report
    assert f"{len(rows)} of 50 rows" in str(report)
    others = np.delete(np.arange(50), rows)

    def one_more(given, found):
        return {"q": found["q"].at[0, others[0], 1, 3].set(1e-30)}

    assert failed(report_of(SCORED, plain(SCORED, one_more))) == ["dq"]

    def a_key(given, found):
        return {"v": found["v"].at[1, 3].add(1e-3)}

    assert failed(report_of(SCORED, plain(SCORED, a_key))) == ["dv"]


def test_gradients_of_another_form_are_refused():
    def halves(**given):
        made = JAX.program(SPEC, plain(SPEC))(**given)
        return (*made[:-1], made[-1].astype("bfloat16"))

    for function in (
        halves,
        lambda **given: JAX.program(SPEC, plain(SPEC))(**given)[:4],
    ):
        forward = dataclasses.replace(SPEC, derivatives=None)
        plan = attngen.plan(forward, target="cpu", backend="jax")
        with pytest.raises(ValidationError, match="doesn't return"):
            validator.validate(SPEC, plan, function, to_array=JAX.array)


def test_what_is_validated_is_the_program_of_the_backend(tmp_path):
    forward = dataclasses.replace(SPEC, derivatives=None)
    plan = attngen.plan(forward, target="cpu", backend="jax")
    plan = dataclasses.replace(plan, spec=SPEC)
    path = tmp_path / "kernel.py"
    function = plain(SPEC, lambda given, found: {"k": found["k"] * 1.01})
    report = building.validate(plan, JAX, path, function, rebuild=False)
    assert failed(report) == ["dk"]
    assert building.validate(plan, JAX, path, plain(SPEC), rebuild=False).passed


@pytest.mark.parametrize("backward", [(256, 2048), (9000, 512), (512, 9000), (64, 128)])
def test_chunks_of_a_backward_pass_are_shrunk_as_the_others(backward):
    spec = AttentionSpec(q_heads=4, q_len=9000, qk_dim=8, mask=masks.causal())
    fix = {"algorithm": "running", "q_chunk": 512, "k_chunk": 512, "loop": "fori"}
    plan = attngen.plan(spec, fix=fix)
    small, alone = validator.shrink(spec, plan)
    named = dict(zip(("backward_q_chunk", "backward_k_chunk"), backward, strict=True))
    both = dataclasses.replace(plan, options=(*plan.options, *named.items()))
    again, choice = validator.shrink(spec, both)
    assert again == small
    assert {n: c for n, c in choice.items() if n not in named} == alone
    for name, length in zip(named, (small.q_len, small.kv_len), strict=True):
        whole = named[name] == 9000
        assert (choice[name] == length) == whole
        assert whole or 2 < choice[name] < length / 3
        assert (length % choice[name] == 0) == (9000 % named[name] == 0)
