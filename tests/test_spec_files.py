"""Specs in files: TOML and JSON, as they were written, and what is refused."""

import json
import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from strategies import masks as random_masks
from strategies import scores as random_scores
from test_spec import CAUSAL, IDS, SMALL, SOFTCAP, TABLE, reads, spec_of

from attngen import masks, scores
from attngen.errors import (
    ExpressionError,
    FileError,
    OperandError,
    SpecError,
)
from attngen.spec import FIELDS, AttentionSpec
from attngen.tracing import mask, score

SPECS = {
    "plain": spec_of(),
    "all fields": AttentionSpec(
        batch=2, q_heads=4, kv_heads=2, q_len=8, kv_len=20, qk_dim=16, v_dim=24,
        dtype="bfloat16", out_dtype="float32", kv_dtype="int8", layout="bhtd",
        scale=0.5, q_offset="bottom_right", kv_offset=3,
        mask=CAUSAL & (masks.sliding_window(5) | ~masks.prefix(2)),
        score=(SOFTCAP, scores.relative_buckets(bidirectional=False)), sink=True,
        dropout=0.25, kv_lengths=True, q_lengths=True, storage="paged",
        outputs=("lse", "out"), derivatives="any", precision="highest",
        memory_budget="64MiB",
    ),
    "an explicit None": spec_of(mask=masks.sliding_window(3, None)),
    "axes in a tuple": spec_of(mask=masks.dense("visible", axes=("b", "k"))),
    "a traced mask": spec_of(mask=mask(lambda b, h, q, k: IDS[b, q] == IDS[b, k])),
    "a traced score": spec_of(**reads(lambda b, h, q, k: TABLE[h, (k - q) % 6] / 3)),
    "an infinity": spec_of(
        score=score(lambda s, b, h, q, k: s + (k > q) * -math.inf),
    ),
    "NumPy's numbers": spec_of(
        scale=pytest.importorskip("numpy").float64(0.5),
        score=scores.softcap(pytest.importorskip("numpy").float64(5)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_spec_is_read_as_it_was_written(spec):
    assert AttentionSpec.from_json(spec.to_json()) == spec
    assert AttentionSpec.from_json(spec.to_json().encode()) == spec
    assert AttentionSpec.from_toml(spec.to_toml()) == spec
    assert AttentionSpec.from_dict(spec.to_dict()) == spec
    assert AttentionSpec.from_dict(spec.to_dict(defaults=False)) == spec


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_writing_is_stable_and_plain(spec):
    again = AttentionSpec.from_json(spec.to_json())
    assert again.to_json() == spec.to_json()
    assert again.to_toml() == spec.to_toml()
    assert tuple(json.loads(spec.to_json())) == FIELDS
    assert tomllib.loads(spec.to_toml()) == spec.to_dict(defaults=False)


@given(random_masks(), st.lists(random_scores(), max_size=2), st.integers(8, 20))
def test_any_mask_and_score_are_read_as_they_were_written(mask, scores, kv_len):
    spec = spec_of(kv_len=kv_len, q_offset=0, mask=mask, score=scores)
    assert AttentionSpec.from_json(spec.to_json()) == spec
    assert AttentionSpec.from_toml(spec.to_toml()) == spec


@given(random_masks())
def test_a_combination_is_read_as_it_was_written(other):
    spec = spec_of(mask=~(CAUSAL & other) | masks.sliding_window(2, 1))
    assert AttentionSpec.from_toml(spec.to_toml()) == spec


def test_the_library_is_written_by_its_names():
    spec = spec_of(mask=CAUSAL & masks.sliding_window(4), score=(SOFTCAP,))
    assert spec.to_dict()["mask"] == {
        "and": ["causal", {"sliding_window": {"left": 4}}]
    }
    assert spec.to_dict()["score"] == [{"softcap": {"cap": 50.0}}]


HAND_WRITTEN = """
q_heads = 4
q_len = 8
qk_dim = 16
mask = ["causal", {sliding_window = {left = 4}}, {not = {prefix = {length = 1}}}]
score = {softcap = {cap = 50.0}}
outputs = "lse"
"""


def test_a_list_of_masks_means_all_and_one_score_needs_no_list():
    assert AttentionSpec.from_toml(HAND_WRITTEN) == spec_of(
        mask=CAUSAL & masks.sliding_window(4) & ~masks.prefix(1),
        score=(SOFTCAP,),
        outputs=("lse",),
    )


BAD_FORMS = [
    True, 1, "causual", "softcap", [], {}, ["causal", None], {"and": []},
    {"and": "causal"}, {"causal": {"left": 1}}, {"causal": 3}, {"sliding_window": {}},
    {"sliding_window": {"left": 0}}, {"sliding_window": {"left": 4, "up": 1}},
    {"causal": {}, "prefix": {"length": 1}}, {"dense": {"axes": 3}},
    {"dense": {"axes": {"b": 1}}}, {"expr": "causal"}, {"expr": ["le", "k"]},
    {"expr": ["sub", "k", "q"]}, {"expr": ["le", "s", "q"]},
    {"expr": ["le", "k", "q"], "extra": 1}, {"expr": ["le", "k", "q"], "operands": []},
    {"expr": ["le", "k", "q"], "operands": {"ids": 3}},
    {"expr": ["le", "k", "q"], "operands": {"ids": {"axes": 3, "dtype": "int32"}}},
    {"expr": ["le", "k", "q"], "operands": {"ids": {"axes": ["b"]}}},
]  # fmt: skip


@pytest.mark.parametrize("form", BAD_FORMS, ids=repr)
def test_a_mask_in_a_file_that_can_not_be_is_refused(form):
    with refused(ExpressionError):
        AttentionSpec.from_dict(SMALL | {"mask": form})


@pytest.mark.parametrize(
    "form",
    [
        None,
        "causal",
        {"softcap": {}},
        {"softcap": {"cap": -1}},
        {"expr": ["le", "k", "q"]},
    ],
    ids=repr,
)
def test_a_score_in_a_file_that_can_not_be_is_refused(form):
    with refused(ExpressionError):
        AttentionSpec.from_dict(SMALL | {"score": form})
    with refused(ExpressionError):
        AttentionSpec.from_dict(SMALL | {"score": ["alibi", form]})


@pytest.mark.parametrize(
    "form",
    [
        {"prefix": {"length": "for"}},
        {"expr": ["eq", ["load", "ids", "b"], 1]},
        {
            "expr": ["le", "k", 1],
            "operands": {"for": {"axes": ["b"], "dtype": "int32"}},
        },
        {
            "expr": ["le", "k", 1],
            "operands": {"ids": {"axes": ["x"], "dtype": "int32"}},
        },
        {"expr": ["le", "k", 1], "operands": {"ids": {"axes": ["b"], "dtype": "int4"}}},
        {
            "expr": ["le", "k", 1],
            "operands": {"ids": {"axes": [["b"]], "dtype": "bool"}},
        },
    ],
    ids=repr,
)
def test_an_operand_in_a_file_that_can_not_be_is_refused(form):
    with refused(OperandError):
        AttentionSpec.from_dict(SMALL | {"mask": form})


def test_a_refusal_of_a_librarys_argument_is_its_own():
    with refused(ExpressionError, match=r"sliding_window's left can't be 0") as caught:
        AttentionSpec.from_dict(SMALL | {"mask": {"sliding_window": {"left": 0}}})
    assert caught.value.got == "0"


@pytest.mark.parametrize(
    "data",
    [None, [], "q_heads", SMALL | {"heads": 4}, SMALL | {1: 2}, {"q_heads": 4}, {}],
    ids=repr,
)
def test_a_table_that_is_no_spec_is_refused(data):
    with refused(SpecError):
        AttentionSpec.from_dict(data)


@pytest.mark.parametrize("text", ["", "{", "q_heads = 4", b"\xff", '{"q_heads": 4,}'])
def test_text_that_is_no_json_is_refused(text):
    with refused(FileError):
        AttentionSpec.from_json(text)


@pytest.mark.parametrize("text", ["{", "q_heads", '{"q_heads": 4}', "a = \x00"])
def test_text_that_is_no_toml_is_refused(text):
    with refused(FileError):
        AttentionSpec.from_toml(text)
