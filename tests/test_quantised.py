"""K/V in a narrower dtype in JAX: chunks converted, scales applied, by the rule."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge
from refusals import refused

import attngen
from attngen import AttentionSpec, Report, inputs, masks, reference, scores
from attngen.errors import CallError, NotBuiltError, PlanError, SpecError
from attngen.quantisation import LARGEST

SPEC = AttentionSpec(
    batch=2, q_heads=4, kv_heads=2, q_len=9, kv_len=80, qk_dim=16, kv_dtype="int8",
    mask=masks.causal(), q_offset="bottom_right", outputs=("out", "lse"),
)  # fmt: skip
NARROW = ("int8", "float8_e4m3")
SCALES = ("head", "token", 8)
STORAGES = ("dense", "packed", "paged")
FIX = {"algorithm": "running", "k_chunk": 24}


def spec_of(**changes):
    return dataclasses.replace(SPEC, **changes)


def stored(storage, **changes):
    return spec_of(storage=storage, kv_lengths=storage != "packed", **changes)


EVERY = list(itertools.product(NARROW, SCALES, STORAGES))


@pytest.mark.parametrize(("index", "case"), list(enumerate(EVERY)), ids=str)
@pytest.mark.sampled(4)
def test_kernels(index, case):
    """Every dtype, scale and storage; of the rest something else in each."""
    kv_dtype, kv_scale, storage = case
    layout = "bhtd" if index % 4 == 0 else "bthd"
    dtype = "bfloat16" if index % 5 == 4 else "float32"
    heads = {} if index % 3 else {"head_chunk": 1}
    kind = ("running", "split_kv", "summaries")[index % 3]
    parts = {"parts": 2} if kind == "split_kv" else {}
    spec = stored(storage, kv_dtype=kv_dtype, kv_scale=kv_scale, layout=layout)
    judge(
        dataclasses.replace(spec, dtype=dtype),
        algorithm=kind,
        k_chunk=24,
        **heads,
        **parts,
    )


CASES = {
    "a block across chunks": (spec_of(kv_scale=32), FIX | {"k_chunk": 20}),
    "a block in part": (spec_of(kv_scale=7), FIX),
    "all at once": (spec_of(kv_scale="token"), FIX | {"k_chunk": 80}),
    "scores that are scaled": (SPEC, FIX | {"scale": "scores"}),
    "a head, a score": (
        spec_of(kv_scale="token", score=(scores.softcap(5.0),)), FIX | {"head_chunk": 1}
    ),
    "a sink and dropout": (spec_of(kv_scale="token", sink=True, dropout=0.2), FIX),
    "ones": (SPEC, FIX | {"denominator": "ones"}),
    "products in half": (
        spec_of(dtype="bfloat16"),
        FIX | {"product_dtype": "bfloat16", "scale": "scores"},
    ),
    "made twice": (spec_of(kv_scale="token"), FIX | {"qk": "twice"}),
    "nothing seen": (spec_of(kv_scale="token", q_offset=-5), FIX),
    "half beside float32": (spec_of(kv_dtype="bfloat16"), FIX),
    "float16 beside float32": (spec_of(kv_dtype="float16"), FIX),
    "pages in half": (stored("paged", kv_dtype="float16"), FIX | {"k_chunk": 32}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(2)
def test_forms(case):
    spec, fix = CASES[case]
    judge(spec, **fix)


def test_a_report_states_what_quantising_costs():
    report = judge(spec_of(kv_scale="token"), **FIX)
    assert [x.name for x in report.quantised] == ["out", "lse"]
    for x in report.quantised:
        assert 1e-5 < x.error < 0.1
        assert x.plain_error < 1e-5
        assert (x.kv_dtype, x.dtype) == ("int8", "float32")
    assert "K/V in int8: error" in str(report)
    assert Report.from_json(report.to_json()) == report
    assert not judge(spec_of(kv_dtype=None), **FIX).quantised
    worse = dataclasses.replace(report.quantised[0], error=None)
    assert dataclasses.replace(report, quantised=(worse,)).passed


@pytest.mark.slow
def test_finer_scales_cost_less():
    """Which the report must show, of the same K/V."""
    errors = [judge(spec_of(kv_scale=s), **FIX).quantised[0].error for s in SCALES]
    assert errors[1] < errors[0]


# Memory: never all of K/V in another dtype.


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_scale": "token"},
        {"kv_dtype": "float8_e4m3", "storage": "paged"},
        {"kv_dtype": "bfloat16"},
        {"storage": "packed", "kv_scale": 64},
    ],
    ids=str,
)
def test_chunks_are_converted_one_by_one(change):
    spec = spec_of(kv_len=8192, qk_dim=64, q_len=1, **change)
    plan = attngen.plan(spec, fix={"k_chunk": 128})
    certificate = attngen.certify(plan)
    tokens = spec.kv_len * spec.kv_heads * spec.qk_dim
    assert certificate.temp_bytes <= plan.temp_bytes
    assert certificate.temp_bytes < tokens / 4


# quantise(), attention(), and what is refused.


def test_quantise_makes_what_a_kernel_takes(fresh):
    spec = spec_of(mask=None, q_offset=None, kv_scale="token", outputs=("out",))
    generator = np.random.default_rng(0)
    q, k, v = (
        generator.standard_normal(spec.shape_of(n), dtype=np.float32) for n in "qkv"
    )
    for kv_dtype, kv_scale in itertools.product(NARROW, SCALES):
        own = dataclasses.replace(spec, kv_dtype=kv_dtype, kv_scale=kv_scale)
        made = attngen.quantise(own, k, v)
        assert np.abs(made["k"].astype(np.float32)).max() == LARGEST[kv_dtype]
        operands = {n: x for n, x in made.items() if n not in "kv"}
        want = reference.attention(own, q, made["k"], made["v"], operands)["out"]
        out = attngen.attention(q, **made)
        assert np.allclose(np.swapaxes(out, 1, 2), want, atol=1e-5)
    with refused(SpecError):
        attngen.quantise(
            dataclasses.replace(spec, kv_dtype=None, kv_scale="head"), k, v
        )
    with refused(CallError):
        attngen.quantise(spec, k[:1], v)


def test_attention_of_a_cache_in_half(fresh):
    spec = spec_of(kv_dtype="bfloat16", mask=None, q_offset=None, outputs=("out",))
    given = {n: jnp.asarray(x) for n, x in inputs.arrays(spec).items()}
    out = attngen.attention(**given)
    want = reference.attention(spec, *(np.asarray(given[n]) for n in "qkv"), {})["out"]
    assert np.allclose(np.swapaxes(out, 1, 2), want, atol=1e-5)


REFUSED = {
    "gradients": ({"derivatives": "vjp"}, {}, NotBuiltError),
    "wider K/V": ({"kv_dtype": "float64"}, {}, NotBuiltError),
    "other bits": (
        {"dtype": "float16", "kv_dtype": "bfloat16"}, {}, NotBuiltError
    ),
    "dense": ({}, {"algorithm": "dense"}, PlanError),
    "keys last": ({}, {"slices": "dn"}, PlanError),
    "no guard": ({}, {"guard": False}, PlanError),
    "ones": ({"kv_scale": "token"}, {"denominator": "ones"}, PlanError),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    change, fix, kind = REFUSED[case]
    with refused(kind):
        attngen.plan(spec_of(**change), fix=fix)


def test_a_file_says_what_is_multiplied():
    text = attngen.emit(attngen.plan(spec_of(kv_scale=16))).text
    assert "of quantised k and v" in text
    assert "SCALE_BLOCK = 16" in text
    assert "K/V in int8 by 16 tokens" in attngen.plan(spec_of(kv_scale=16)).explain()


def test_a_scale_that_is_nan_stays_with_what_sees_it():
    spec = AttentionSpec(
        batch=2, q_heads=2, q_len=3, kv_len=40, qk_dim=16, kv_lengths=True, kv_dtype="int8",
    )  # fmt: skip
    given = inputs.arrays(spec)
    given["kv_lengths"][:] = [0, 40]
    given["v_scale"][0] = np.nan
    out = np.asarray(attngen.build(spec, backend="jax")(**given))
    assert not out[0].any()
    assert np.isnan(out[1, :, 0]).all()
    assert np.isfinite(out[1, :, 1]).all()


def test_float16_keeps_small_values(monkeypatch):
    """Values of a thousandth: their scales are below what float16 holds well."""
    normal = inputs._normal
    monkeypatch.setattr(
        inputs, "_normal", lambda *a: (made := normal(*a)) | {"v": made["v"] * 1e-3}
    )
    spec = AttentionSpec(
        q_heads=2, q_len=5, kv_len=80, qk_dim=16, dtype="float16", kv_dtype="int8",
        kv_scale="token",
    )  # fmt: skip
    judge(spec, product_dtype="float16", k_chunk=20)


@pytest.mark.parametrize(
    ("kv_len", "kv_scale"), [(120, 32), (120, 30), (4, 3), (12, 5)]
)
@pytest.mark.sampled(2)
def test_a_block_of_scales_is_not_guessed(kv_len, kv_scale):
    """Of 120 tokens, blocks of 30 and of 32 have four scales."""
    spec = AttentionSpec(
        q_heads=2, q_len=4, kv_len=kv_len, qk_dim=16, kv_dtype="int8", kv_scale=kv_scale
    )
    given = inputs.arrays(spec)
    q, k, v = (given.pop(n) for n in "qkv")
    with refused(CallError, "kv_scale=…"):
        attngen.attention(q, k, v, **given)
    out = attngen.attention(q, k, v, kv_scale=kv_scale, **given)
    want = reference.attention(spec, q, k, v, given)["out"]
    got = reference.pick(spec, "out", np.asarray(out), np.arange(4))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("kv_len", "kv_scale"), [(80, 8), (13, 4), (9, 1), (7, 7)])
@pytest.mark.sampled(2)
def test_a_block_of_scales_that_is_sure_is_read(kv_len, kv_scale):
    spec = AttentionSpec(
        q_heads=2, q_len=4, kv_len=kv_len, qk_dim=16, kv_dtype="int8", kv_scale=kv_scale
    )
    given = inputs.arrays(spec)
    q, k, v = (given.pop(n) for n in "qkv")
    out = attngen.attention(q, k, v, **given)
    want = reference.attention(spec, q, k, v, given)["out"]
    got = reference.pick(spec, "out", np.asarray(out), np.arange(4))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "k",
    [np.full((1, 4, 1, 8), np.nan), np.full((1, 4, 1, 8), 1e39), np.ones((1, 4, 1, 8), int),
     np.ones((1, 4, 1, 8), complex), "k", None, [1.0]],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_quantised_is_refused(k):
    spec = AttentionSpec(q_heads=1, q_len=4, qk_dim=8, kv_dtype="int8")
    with refused(CallError, "quantised"):
        attngen.quantise(spec, k, np.ones((1, 4, 1, 8)))
