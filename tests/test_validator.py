"""The validator: it catches what is wrong, by the rule and by nothing looser."""

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest
from judge import judge, kernel

import attngen
from attngen import AttentionSpec, api, backends, masks, validator
from attngen.errors import PlanError
from attngen.validator import largest_error, sample_rows, shrink, ulp

JAX = backends.get("jax")
SPEC = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=50,
    kv_len=70,
    qk_dim=16,
    q_offset=-5,
    mask=masks.causal(),
    outputs=("out", "lse"),
)
FIX = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}


def edited(spec, old, new, **fix):
    """The report on what is emitted with one piece of its text changed."""
    fix = FIX | {"exp": "exp"} | fix
    plan = attngen.plan(spec, target="cpu", backend="jax", fix=fix)
    source = attngen.emit(plan)
    assert old in source.text
    changed = dataclasses.replace(source, text=source.text.replace(old, new, 1))
    function = JAX.load(api.stored(changed))
    return validator.validate(spec, plan, function, to_array=JAX.array)


LENGTHS = dataclasses.replace(SPEC, kv_lengths=True)
LATE = dataclasses.replace(SPEC, q_offset=20)
SINK = dataclasses.replace(SPEC, sink=True)
LATE_ROWS = dataclasses.replace(SPEC, q_offset=-5)  # the first see no key


@pytest.mark.parametrize(
    ("spec", "old", "new"),
    [
        (SPEC, "SCALE = 0.25", "SCALE = 0.2502"),
        (SPEC, "k_index <= q_pos", "k_index < q_pos"),
        (SPEC, "full_last = jnp.clip((q_lo + 1)", "full_last = jnp.clip((q_lo + 14)"),
        (SPEC, "last = -(-q_hi // K_CHUNK)", "last = q_hi // K_CHUNK"),
        (SPEC, "jnp.where(total == 0, 1, total)", "total"),
        (LATE, "seen &= k_index >= c * K_CHUNK", "seen &= k_index >= 0"),
        (SPEC, "-jnp.inf)\n            there", "-1e30)\n            there"),
        (SPEC, "m + jnp.log(total)", "m + jnp.log(total + 1e-4)"),
        (SPEC, "rescale = jnp.exp(m - m_safe)", "rescale = jnp.ones_like(m)"),
        (SPEC, "return out_all, lse_all", "return out_all + 1e-5, lse_all"),
        (SINK, "jnp.exp(sink_at_h - m_sink)", "jnp.exp(sink_at_h - m)"),
        (SINK, "jnp.log(total))", "jnp.log(total + jnp.exp(sink_at_h - m)))"),
        (LENGTHS, "seen &= k_index < kv_length", "seen &= k_index <= kv_length"),
        (LENGTHS, "vc = jnp.where(there[..., None], vc, 0)", "vc = vc"),
    ],
)
@pytest.mark.sampled(2)
def test_a_wrong_kernel_is_caught(spec, old, new):
    assert not edited(spec, old, new).passed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("0.693147004", "0.6931"),
        ("+ coefficient", "- coefficient"),
        ("jnp.maximum(x, -127)", "jnp.maximum(x, -126)"),
        ("jnp.log2(total)) / LOG2E", "jnp.log2(total))"),
        ("rescale = jnp.exp2(m - m_safe)", "rescale = jnp.exp(m - m_safe)"),
        ("LOG2E = 1.4426950408889634", "LOG2E = 1.4426"),
    ],
)
@pytest.mark.sampled(2)
def test_a_wrong_polynomial_is_caught(old, new):
    assert not edited(LATE_ROWS, old, new, exp="polynomial").passed


def test_the_right_kernel_is_not():
    assert edited(SPEC, "SCALE", "SCALE").passed
    assert edited(LATE_ROWS, "SCALE", "SCALE", exp="polynomial").passed


def test_a_wrong_dtype_is_caught():
    function, plan = kernel(SPEC, **FIX)

    def half(**arrays):
        out, lse = function(**arrays)
        return out.astype("bfloat16"), lse

    with pytest.raises(attngen.errors.ValidationError):
        validator.validate(SPEC, plan, half, to_array=JAX.array)


def test_the_rule():
    report = judge(SPEC, **FIX)
    for check in report.checks:
        assert check.error <= 2 * check.baseline_error + check.tolerance
        assert 0 < check.baseline_error < check.tolerance
        assert check.tolerance < 1e-5


@pytest.mark.parametrize(
    ("dtype", "largest", "unit"),
    [
        (np.float32, 1.5, 2.0**-23),
        (np.float32, 5.0, 2.0**-21),
        (np.float64, 1.0, 2.0**-52),
        (np.float16, 1.0, 2.0**-10),
        (ml_dtypes.bfloat16, 3.0, 2.0**-6),
    ],
)
def test_a_unit_in_the_last_place(dtype, largest, unit):
    assert ulp(np.dtype(dtype), np.array([0.1, -largest, -np.inf])) == unit


def test_infinities_and_nans_must_be_where_they_belong():
    want = np.array([1.0, -np.inf, np.nan])
    assert largest_error(want.copy(), want) == 0
    assert largest_error(np.array([1.0, -np.inf, 0.0]), want) is None
    assert largest_error(np.array([1.0, -1e30, np.nan]), want) is None
    assert largest_error(np.array([np.nan, -np.inf, np.nan]), want) is None
    assert largest_error(np.array([1.25, -np.inf, np.nan]), want) == 0.25


def test_few_rows_are_all_judged_and_many_are_sampled_with_the_ends_of_chunks():
    few = AttentionSpec(q_heads=1, q_len=1000, qk_dim=8)
    assert list(sample_rows(few, 64)) == list(range(1000))
    many = AttentionSpec(q_heads=32, q_len=8192, qk_dim=8)
    rows = sample_rows(many, 4096)
    assert {0, 4095, 4096, 8191} <= set(rows)
    assert len(rows) == len(set(rows)) < 100
    assert rows.min() >= 0
    assert rows.max() < 8192


LARGE = AttentionSpec(batch=4, q_heads=16, kv_heads=4, q_len=9000, qk_dim=8)
CAUSAL = {"mask": masks.causal()}
SPECS = {
    "no mask": {},
    "no ragged chunk": {"q_len": 8192, "kv_len": 8192},
    "causal": CAUSAL,
    "a window": {"mask": masks.causal() & masks.sliding_window(300)},
    "a prefix": {"mask": masks.causal() | masks.prefix(2500)},
    "documents": {"mask": masks.documents()},
    "lengths": CAUSAL | {"kv_lengths": True, "q_lengths": True},
    "fewer queries": CAUSAL | {"q_len": 5000, "q_offset": "bottom_right"},
    "more queries": CAUSAL | {"kv_len": 5000, "q_offset": "bottom_right"},
    "one query": CAUSAL | {"q_len": 1, "kv_lengths": True, "q_offset": "operand"},
    "queries at the start": CAUSAL | {"kv_len": 12000, "q_offset": 100},
    "queries before the keys": CAUSAL | {"q_offset": -4000},
    "queries at the end": CAUSAL | {"q_len": 500, "q_offset": 8600},
    "keys elsewhere": CAUSAL | {"kv_offset": 3000},
}
CHOICES = [
    {"q_chunk": 512, "k_chunk": 512},
    {"q_chunk": 9000, "k_chunk": 512, "batch_chunk": 4},
    {"q_chunk": 512, "k_chunk": 9000, "head_chunk": 4},
    {"q_chunk": 256, "k_chunk": 2048, "loop": "unrolled"},
    {"q_chunk": 256, "k_chunk": 2048, "loop": "scan"},
    {"q_chunk": 64, "k_chunk": 8, "head_chunk": 1},
]


def loops(plan):
    """The lines of an emitted file that loop, and those that take a step apart."""
    body = attngen.emit(plan).text.split('"""', 2)[2]  # without the header
    text = re.sub(r"\b\d+\b", "N", body)
    found = re.findall(r".*(?:fori_loop|scan|for c in|carry = \w+\(| step ).*", text)
    return [line.strip() for line in found]


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("name", SPECS)
def test_a_shrunken_spec_keeps_the_loops_and_every_kind_of_tile(name, choices):
    changes = {"kv_len": 9000} | SPECS[name]
    spec = dataclasses.replace(LARGE, **changes)
    fix = {"head_chunk": 2, "batch_chunk": 1, "loop": "fori"} | choices
    fix["q_chunk"] = min(fix["q_chunk"], spec.q_len)
    fix["k_chunk"] = min(fix["k_chunk"], spec.kv_len)
    try:
        plan = attngen.plan(spec, fix=fix | {"algorithm": "running"})
    except PlanError:
        return  # scan and unrolled are for loops without bounds
    small, choice = shrink(spec, plan)
    again = attngen.plan(small, fix=choice)
    assert small.q_len * small.kv_len < 1e7
    assert loops(again) == loops(plan)
    for kind in ("full", "edge", "empty"):
        assert getattr(again.tiles, kind) > 0 or getattr(plan.tiles, kind) == 0


@pytest.mark.parametrize("name", ["a window", "queries before the keys"])
def test_a_shrunken_spec_is_judged_as_any_other(name):
    spec = dataclasses.replace(LARGE, **SPECS[name])
    fix = {"algorithm": "running", "q_chunk": 512, "k_chunk": 512}
    small, choice = shrink(spec, attngen.plan(spec, fix=fix))
    judge(small, **choice)
