"""Operands: their names, axes, dtypes and shapes."""

import pytest
from refusals import refused

from attngen import expr
from attngen.errors import OperandError
from attngen.expr import load, var
from attngen.operands import OPERAND_DTYPES, Operand
from attngen.tracing import operand

BAD_NAMES = ["for", "None", "q", "k", "v", "attention", "jnp"]
BAD_NAMES += ["", "2x", "a-b", "a b", "x" * 33, "größe", "_x", "a_at_b", None, 3]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_operand_has_a_free_identifier_for_a_name(name):
    with refused(OperandError):
        operand(name, axes="b", dtype="int32")


@pytest.mark.parametrize("name", ["for", "_x", "a_at_b"])
def test_the_name_that_the_refusal_proposes_is_free(name):
    with refused(OperandError) as caught:
        operand(name, axes="b", dtype="int32")
    proposed = next(w.strip(",") for w in caught.value.hint.split() if "_values" in w)
    assert operand(proposed, axes="b", dtype="int32").operand.name == proposed


@pytest.mark.parametrize(
    "axes",
    ["", "x", "s", "bb", "bkb", ("h", 0), ("h", -1), ("h", True), ("h", 2.0), None],
)
def test_an_axis_is_a_letter_or_a_length(axes):
    with refused(OperandError):
        operand("ids", axes=axes, dtype="int32")


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float", "", None, ["int32"]])
def test_an_operand_has_a_dtype_of_the_language(dtype):
    with refused(OperandError):
        operand("ids", axes="b", dtype=dtype)


@pytest.mark.parametrize("dtype", OPERAND_DTYPES)
def test_the_kind_of_an_operand_is_its_dtypes(dtype):
    kind = {"b": "bool", "i": "int", "f": "float"}
    kind = "float" if dtype == "bfloat16" else kind[dtype[0]]
    assert Operand("x", ("b",), dtype).kind == kind


def test_the_shape_of_an_operand_follows_the_lengths():
    lengths = {"b": 2, "h": 3, "q": 5, "k": 7}
    assert Operand("x", ("h", 32, "q"), "float32").shape(lengths) == (3, 32, 5)


def test_two_operands_of_one_name_are_refused():
    one = load(Operand("x", ("b",), "int32"), (var("b"),))
    other = load(Operand("x", ("h",), "int32"), (var("h"),))
    assert expr.operands(one, one) == (one.value,)
    with refused(OperandError):
        expr.operands(one, other)
