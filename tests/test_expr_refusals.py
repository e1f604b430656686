"""What the language refuses, each with what to do instead."""

import copy
import math

import pytest
from refusals import refused

from attngen import expr, tracing
from attngen.errors import ExpressionError
from attngen.expr import apply, const, load, var
from attngen.operands import Operand
from attngen.symbols import where
from attngen.tracing import mask, operand, score

MISUSES = {
    "and": lambda s, b, h, q, k: q < k and k < 3,
    "or": lambda s, b, h, q, k: q < k or k < 3,
    "not": lambda s, b, h, q, k: not q < k,
    "if": lambda s, b, h, q, k: s if q < k else 0.0,
    "bool()": lambda s, b, h, q, k: bool(q),
    "chained": lambda s, b, h, q, k: 0 < q < k,
    "min()": lambda s, b, h, q, k: min(q, k),
    "in": lambda s, b, h, q, k: q in (1, 2),
    "int()": lambda s, b, h, q, k: int(q),
    "float()": lambda s, b, h, q, k: float(s),
    "range()": lambda s, b, h, q, k: range(q),
    "iteration": lambda s, b, h, q, k: list(q),
    "math.exp": lambda s, b, h, q, k: math.exp(s),
    "**": lambda s, b, h, q, k: s * (q - k) ** 2,
    "2 **": lambda s, b, h, q, k: s * 2**q,
    "^": lambda s, b, h, q, k: (q < k) ^ (q < 3),
    "<<": lambda s, b, h, q, k: q << 1,
    "@": lambda s, b, h, q, k: s @ s,
    "divmod": lambda s, b, h, q, k: divmod(q, 2),
    "round": lambda s, b, h, q, k: round(s),
    "float // int": lambda s, b, h, q, k: s // 2,
    "int % float": lambda s, b, h, q, k: q % 2.0,
    "& of ints": lambda s, b, h, q, k: q & 1,
    "~ of an int": lambda s, b, h, q, k: ~q,
    "where of an int": lambda s, b, h, q, k: where(q, s, 0.0),
    "/ 0": lambda s, b, h, q, k: q / 0,
    "// 0": lambda s, b, h, q, k: q // 0,
    "% 0": lambda s, b, h, q, k: q % 0,
    "NaN": lambda s, b, h, q, k: s + math.nan,
    "beyond int64": lambda s, b, h, q, k: q < 2**63,
    "None": lambda s, b, h, q, k: None,
    "a string": lambda s, b, h, q, k: s + "1",
    "a list": lambda s, b, h, q, k: [s, s],
    "a method": lambda s, b, h, q, k: q.astype(float),
    "len()": lambda s, b, h, q, k: len(q),
    "an index": lambda s, b, h, q, k: q[0],
    "a call": lambda s, b, h, q, k: s(q),
    "a dictionary": lambda s, b, h, q, k: {1: 2.0}[q],
}


@pytest.mark.parametrize("function", MISUSES.values(), ids=MISUSES)
def test_what_the_language_lacks_is_refused(function):
    with refused(ExpressionError):
        score(function)


@pytest.mark.parametrize("library", ["numpy", "jax.numpy"])
def test_where_of_an_array_library_is_refused_with_the_right_one_named(library):
    np = pytest.importorskip(library)
    with refused(ExpressionError) as caught:
        mask(lambda b, h, q, k: np.where(q < k, True, False))
    assert "attngen.where" in caught.value.hint


@pytest.mark.parametrize("library", ["numpy", "jax.numpy"])
def test_a_function_of_an_array_library_is_refused_with_the_right_one_named(library):
    np = pytest.importorskip(library)
    with refused(ExpressionError) as caught:
        score(lambda s, b, h, q, k: np.exp(s))
    assert "attngen.exp" in caught.value.hint


def test_a_branch_on_what_an_operand_holds_names_the_condition_and_where():
    ids = operand("ids", axes="bk", dtype="int32")
    with refused(ExpressionError) as caught:
        mask(lambda b, h, q, k: k <= q if ids[b, q] > 3 else k < q)
    assert caught.value.got == "ids[b, q] > 3"
    assert "attngen.where" in caught.value.hint


def test_an_index_that_cannot_be_is_named_with_what_it_is_part_of():
    ids = operand("ids", axes="bk", dtype="int32")
    table = operand("table", axes=("h", 64), dtype="float32")
    with refused(ExpressionError) as caught:
        mask(lambda b, h, q, k: ids[b, q + 1] == 3)
    assert caught.value.got == "q + 1, in ids[b, q + 1]"
    assert "an axis of its own length" in caught.value.hint
    with refused(ExpressionError) as caught:
        score(lambda s, b, h, q, k: s + table[h, (q - k) / 2])
    assert caught.value.got == "(q - k) / 2.0, a float, in table[h, (q - k) / 2.0]"
    assert "//" in caught.value.hint


def test_python_finds_no_protocols_in_symbols():
    ids = operand("ids", axes="bk", dtype="int32")
    for symbol in (ids, ids[0, 0]):
        assert not hasattr(symbol, "__array_interface__")
        assert copy.copy(symbol) is not None


def test_a_captured_array_is_refused_and_operand_is_named():
    np = pytest.importorskip("numpy")
    slopes = np.ones(4)
    with refused(ExpressionError) as caught:
        score(lambda s, b, h, q, k: s + slopes)
    assert "attngen.operand" in caught.value.hint


IDS_UNINDEXED = {
    "==": lambda ids, q: ids == 3,
    "!=": lambda ids, q: ids != 3,
    "== itself": lambda ids, q: ids == ids,
    "== q": lambda ids, q: ids == q,
    "q +": lambda ids, q: q + ids < 3,
    "not": lambda ids, q: not ids,
    "in": lambda ids, q: 3 in ids,
    "sum": lambda ids, q: sum(ids) < 3,
    "alone": lambda ids, q: ids,
    "len()": lambda ids, q: len(ids) > q,
    "a method": lambda ids, q: ids.max() > q,
}


@pytest.mark.parametrize("function", IDS_UNINDEXED.values(), ids=IDS_UNINDEXED)
def test_an_operand_without_index_is_refused(function):
    ids = operand("ids", axes="bk", dtype="int32")
    with refused(ExpressionError):
        mask(lambda b, h, q, k: function(ids, q))


@pytest.mark.parametrize("axis", "bhqk")
@pytest.mark.parametrize("letter", "bhqks")
def test_an_axis_is_read_at_its_letter_and_tokens_at_either(axis, letter):
    x = Operand("x", (axis,), "int32")
    if letter == axis or {letter, axis} == {"q", "k"}:
        assert expr.variables(load(x, (var(letter),))) == {letter}
    else:
        with refused(ExpressionError):
            load(x, (var(letter),))


@pytest.mark.parametrize(
    "index",
    [
        lambda b, h, q, k: (b,),
        lambda b, h, q, k: (b, k, k),
        lambda b, h, q, k: (b, k + 1),
        lambda b, h, q, k: (h, k),
        lambda b, h, q, k: (b, h),
        lambda b, h, q, k: (b, 1.0),
        lambda b, h, q, k: (b, q < k),
        lambda b, h, q, k: (b, slice(None)),
    ],
)
def test_a_lettered_axis_is_indexed_by_its_letter_or_a_number_alone(index):
    ids = operand("ids", axes="bk", dtype="int32")
    with refused(ExpressionError):
        mask(lambda *at: ids[index(*at)] == 0)


@pytest.mark.parametrize("make", [mask, score])
def test_the_function_has_the_right_arguments(make):
    with refused(ExpressionError):
        make(lambda q, k: q < k)
    with refused(ExpressionError):
        make(3)


def test_a_mask_is_a_condition_and_a_score_is_a_number():
    with refused(ExpressionError):
        mask(lambda b, h, q, k: q - k)
    with refused(ExpressionError):
        score(lambda s, b, h, q, k: q < k)
    with refused(ExpressionError):
        tracing.mask_of(apply("lt", var("s"), const(0.0)))
    assert score(lambda s, b, h, q, k: 0).expr == const(0.0)


def test_a_mask_is_not_true_or_false():
    causal = mask(lambda b, h, q, k: k <= q)
    with refused(ExpressionError):
        bool(causal)
    with refused(ExpressionError):
        causal and causal  # noqa: B018
