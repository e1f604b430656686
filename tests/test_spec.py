"""AttentionSpec: what each field takes and refuses, and what follows from them."""

import dataclasses
import math

import numpy as np
import pytest
from refusals import refused

from attngen import masks, scores
from attngen.errors import (
    BudgetError,
    OperandError,
    SpecError,
)
from attngen.spec import BYTES, FIELDS, AttentionSpec
from attngen.tracing import mask, operand, score

SMALL = {"q_heads": 4, "q_len": 8, "qk_dim": 16}
CAUSAL = masks.causal()
SOFTCAP = scores.softcap(50.0)
DTYPES = ["float32", "bfloat16", "float16", "float64"]
SIZES = [0, -1, 2**31, 1.0, "8", True, math.inf]
TWO = np.arange(2)


def spec_of(**fields):
    return AttentionSpec(**SMALL | fields)


# Fields.

GOOD = {
    "batch": [1, 7],
    "q_heads": [4, 12],
    "kv_heads": [None, 1, 2, 4],
    "q_len": [1, 2**31 - 1],
    "kv_len": [None, 1, 1000],
    "qk_dim": [1, 40, 576],
    "v_dim": [None, 1, 128],
    "dtype": DTYPES,
    "out_dtype": [None, *DTYPES],
    "kv_dtype": [None, *DTYPES, "float8_e4m3", "int8"],
    "layout": ["bthd", "bhtd"],
    "scale": [None, 1, 0.125, -1.0, 0.0],
    "q_offset": [None, 0, -5, 7, 2**30 - 1, "bottom_right", "operand"],
    "kv_offset": [0, -4, 2**30 - 1],
    "mask": [None, CAUSAL, ~CAUSAL],
    "score": [(), (SOFTCAP,), (SOFTCAP, scores.alibi())],
    "sink": [False, True],
    "dropout": [0, 0.0, 0.1, 0.999],
    "kv_lengths": [False, True],
    "q_lengths": [False, True],
    "storage": ["dense", "packed", "paged"],
    "page_size": [16],
    "num_pages": [None],
    "kv_scale": ["head"],
    "outputs": [("out",), ("lse",), ("out", "lse"), ("lse", "out")],
    "derivatives": [None, "vjp", "any"],
    "precision": ["default", "highest"],
    "batch_shards": [1],
    "head_shards": [1, 2, 4],
    "memory_budget": [None, 1, 2**40, "64MiB", "1.5 GiB"],
}
BAD = {
    "batch": [*SIZES, None],
    "q_heads": [*SIZES, None],
    "kv_heads": [*SIZES, 3, 8],
    "q_len": [*SIZES, None],
    "kv_len": SIZES,
    "qk_dim": [*SIZES, None],
    "v_dim": SIZES,
    "dtype": ["float8_e4m3", "int32", "f32", "Float32", "", None, float],
    "out_dtype": ["int8", "float8_e4m3", "", float],
    "kv_dtype": ["int4", "", True],
    "layout": ["bhdt", "thd", "", None],
    "scale": [math.inf, math.nan, "0.125", True],
    "q_offset": [2**30, -(2**30), 0.0, "bottom_left", "top_left", "", False, (0,), TWO],
    "kv_offset": [2**30, 1.5, None, "operand", True],
    "mask": [True, "causal", lambda b, h, q, k: k <= q, SOFTCAP, [CAUSAL]],
    "score": [None, CAUSAL, (CAUSAL,), (lambda s, b, h, q, k: s,), ("softcap",), 1],
    "sink": [0, 1, None, "sink"],
    "dropout": [1, 1.0, -0.1, math.nan, None, "0.1", False],
    "kv_lengths": [0, 1, None, (3, 4)],
    "q_lengths": [0, 1, None, "operand"],
    "storage": ["ragged", "", None],
    "page_size": [*SIZES, None, 8],
    "num_pages": [*SIZES, 8, TWO],
    "kv_scale": [*SIZES, None, "page", "token", 8, TWO],
    "outputs": [(), ("out", "out"), ("grad",), "both", None, (["out"],), (1,), {"out"}],
    "derivatives": ["jvp", "", False, True],
    "precision": ["high", "float32", None],
    "batch_shards": [*SIZES, None, 2],
    "head_shards": [*SIZES, None, 3, 8],
}
BAD_BUDGETS = [0, -1, "", "64 parsecs", "-1MiB", 1.5, True, (1,)]


def each(table):
    return [
        pytest.param(field, value, id=f"{field}={value!r}"[:60].split(" at 0x")[0])
        for field, values in table.items()
        for value in values
    ]


def test_every_field_is_in_the_tables():
    assert tuple(GOOD) == FIELDS
    assert (*BAD, "memory_budget") == FIELDS


@pytest.mark.parametrize(("field", "value"), each(GOOD))
def test_a_field_takes_its_values(field, value):
    spec = spec_of(**{field: value})
    filled = {"kv_heads": "q_heads", "kv_len": "q_len", "v_dim": "qk_dim"}
    if value is None and field in filled:
        value = getattr(spec, filled[field])
    assert getattr(spec, field) == value
    assert spec == spec_of(**{field: value})
    assert hash(spec) == hash(spec_of(**{field: value}))


@pytest.mark.parametrize(("field", "value"), each(BAD))
def test_a_field_refuses_other_values(field, value):
    with refused(SpecError) as caught:
        spec_of(**{field: value})
    assert field in caught.value.got


@pytest.mark.parametrize("budget", BAD_BUDGETS)
def test_a_budget_that_is_no_size_is_refused(budget):
    with refused(BudgetError):
        spec_of(memory_budget=budget)


def test_one_score_or_output_needs_no_tuple_and_a_list_is_one():
    assert (
        spec_of(score=SOFTCAP) == spec_of(score=[SOFTCAP]) == spec_of(score=(SOFTCAP,))
    )
    assert (
        spec_of(outputs="lse") == spec_of(outputs=["lse"]) == spec_of(outputs=("lse",))
    )


def test_a_spec_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec_of().q_len = 9


def test_replace_checks_again():
    spec = spec_of(mask=CAUSAL)
    smaller = dataclasses.replace(spec, memory_budget="2MiB")
    assert smaller.budget_bytes == 2 * 2**20
    assert dataclasses.replace(smaller, memory_budget=None) == spec
    with refused(SpecError):
        dataclasses.replace(spec, kv_heads=3)
    with refused(SpecError):
        dataclasses.replace(spec, kv_len=9)


# What follows from the fields.


def test_what_is_not_said_follows():
    spec = spec_of(dtype="bfloat16")
    assert (spec.kv_heads, spec.kv_len, spec.v_dim) == (4, 8, 16)
    assert spec.repeats == 1
    assert spec.scale_value == 0.25
    assert spec.out_dtype_name == "bfloat16"
    assert spec.stats_dtype == "float32"
    assert spec.budget_bytes is None
    assert spec_of(dtype="float64").stats_dtype == "float64"
    assert spec_of(scale=2).scale_value == 2.0
    assert spec_of(kv_heads=2).repeats == 2


def test_shapes_dtypes_and_bytes():
    spec = AttentionSpec(
        batch=2, q_heads=6, kv_heads=3, q_len=5, kv_len=7, qk_dim=4, v_dim=9,
        dtype="bfloat16", out_dtype="float32", kv_dtype="int8", sink=True,
        kv_lengths=True, score=(scores.bias("extra", axes="hqk"),),
    )  # fmt: skip
    shapes = {
        "q": (2, 5, 6, 4),
        "k": (2, 7, 3, 4),
        "v": (2, 7, 3, 9),
        "out": (2, 5, 6, 9),
        "lse": (2, 6, 5),
        "kv_lengths": (2,),
        "sink": (6,),
        "extra": (6, 5, 7),
    }
    assert {name: spec.shape_of(name) for name in shapes} == shapes
    dtypes = {"q": "bfloat16", "k": "int8", "v": "int8", "out": "float32"}
    dtypes |= {"lse": "float32", "kv_lengths": "int32", "sink": "float32"}
    assert {name: spec.dtype_of(name) for name in dtypes} == dtypes
    for name in ("q", "v", "lse", "extra"):
        size = math.prod(shapes[name]) * BYTES[spec.dtype_of(name)]
        assert spec.bytes_of(name) == size
    assert spec.bytes_of("q", "lse") == spec.bytes_of("q") + spec.bytes_of("lse")


def test_the_other_layout_swaps_tokens_and_heads_but_not_of_lse():
    one, other = spec_of(layout="bthd"), spec_of(layout="bhtd")
    for name in ("q", "k", "v", "out"):
        b, t, h, d = one.shape_of(name)
        assert other.shape_of(name) == (b, h, t, d)
    assert one.shape_of("lse") == other.shape_of("lse") == (1, 4, 8)


@pytest.mark.parametrize(
    ("fields", "offset"),
    [
        ({}, 0),
        ({"q_offset": 5}, 5),
        ({"q_offset": "bottom_right"}, 0),
        ({"q_offset": "bottom_right", "kv_len": 20}, 12),
        ({"q_offset": "bottom_right", "kv_len": 3}, -5),
        ({"q_offset": "bottom_right", "kv_lengths": True}, None),
        ({"q_offset": "operand"}, None),
    ],
)
def test_the_position_of_query_0(fields, offset):
    assert spec_of(**fields).static_q_offset == offset


def test_operands_are_those_of_the_fields_then_those_of_the_expressions():
    spec = spec_of(
        q_offset="operand",
        sink=True,
        kv_lengths=True,
        q_lengths=True,
        mask=masks.documents("ids"),
        score=(scores.alibi(), scores.bias("extra", axes="k"), scores.alibi()),
    )
    assert [(o.name, o.axes, o.dtype) for o in spec.own_operands] == [
        ("kv_lengths", ("b",), "int32"),
        ("q_lengths", ("b",), "int32"),
        ("q_offset", ("b",), "int32"),
        ("sink", ("h",), "float32"),
    ]
    assert spec.operands[:4] == spec.own_operands
    assert [o.name for o in spec.operands[4:]] == ["extra", "ids", "slopes"]
    assert spec_of().operands == ()


# The offset rule.

DIFFERENT = {"q_len": 8, "kv_len": 20}
RELATING = {
    "causal": {"mask": CAUSAL},
    "within and": {"mask": masks.prefix(4) & CAUSAL},
    "within or and not": {"mask": masks.prefix(4) | ~masks.sliding_window(3)},
    "in where": {"score": score(lambda s, b, h, q, k: s + abs(q - k))},
    "in a table's index": {"score": scores.relative_buckets()},
    "in two scores": {"score": (SOFTCAP, scores.alibi())},
}


@pytest.mark.parametrize("fields", RELATING.values(), ids=RELATING)
def test_where_lengths_differ_the_offset_must_be_said(fields):
    with refused(SpecError) as caught:
        spec_of(**DIFFERENT, **fields)
    assert "top left" in caught.value.hint
    assert "bottom_right" in caught.value.hint
    for offset in (0, 3, "bottom_right", "operand"):
        spec_of(**DIFFERENT, **fields, q_offset=offset)
    spec_of(**fields)


NOT_RELATING = {
    "no mask": {},
    "prefix": {"mask": masks.prefix(4)},
    "q and k apart": {"mask": mask(lambda b, h, q, k: (q < 3) & (k < 3))},
    "documents": {"mask": masks.documents()},
    "dense": {"mask": masks.dense()},
    "bias": {"score": scores.bias()},
    "softcap": {"score": SOFTCAP},
}


@pytest.mark.parametrize("fields", NOT_RELATING.values(), ids=NOT_RELATING)
def test_where_nothing_relates_q_to_k_no_offset_is_needed(fields):
    assert spec_of(**DIFFERENT, **fields).static_q_offset == 0


# Operands within their axes.

IDS = operand("ids", axes="bk", dtype="int32")
ROWS = operand("row_table", axes="q", dtype="int32")
TABLE = operand("table", axes=("h", 6), dtype="float32")


def reads(read):
    return {"score": score(lambda s, b, h, q, k: s + read(b, h, q, k))}


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({}, lambda b, h, q, k: IDS[b, q]),
        ({"kv_len": 20}, lambda b, h, q, k: IDS[b, q]),
        ({"batch": 3}, lambda b, h, q, k: IDS[2, k]),
        ({}, lambda b, h, q, k: IDS[b, 7]),
        ({"kv_len": 7}, lambda b, h, q, k: ROWS[k]),
        ({}, lambda b, h, q, k: TABLE[h, 5]),
        ({}, lambda b, h, q, k: TABLE[3, 0]),
        ({}, lambda b, h, q, k: TABLE[h, (q - k) % 6]),
    ],
)
def test_operands_are_read_within_their_axes(fields, read):
    assert len(spec_of(**fields, **reads(read)).operands) == 1


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"kv_len": 7}, lambda b, h, q, k: IDS[b, q]),
        ({"batch": 3}, lambda b, h, q, k: IDS[3, k]),
        ({}, lambda b, h, q, k: IDS[b, 8]),
        ({}, lambda b, h, q, k: IDS[b, -1]),
        ({"kv_len": 9}, lambda b, h, q, k: ROWS[k]),
        ({}, lambda b, h, q, k: TABLE[h, 6]),
        ({}, lambda b, h, q, k: TABLE[4, 0]),
    ],
)
def test_operands_read_outside_their_axes_are_refused(fields, read):
    with refused(OperandError):
        spec_of(**fields, **reads(read))


def test_operands_that_share_a_name_are_refused():
    with refused(OperandError):
        spec_of(mask=masks.documents("extra"), score=scores.bias("extra"))
    assert len(spec_of(mask=masks.documents(), score=()).operands) == 1
