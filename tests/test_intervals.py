"""Intervals: they hold every value; divisors, indices and widths are proven with them."""

import hypothesis.strategies as st
import pytest
import strategies
from brute import evaluate
from hypothesis import given, settings
from refusals import refused

import attngen
from attngen import AttentionSpec, masks, scores
from attngen.errors import ExpressionError, OperandError
from attngen.intervals import examine, interval
from attngen.regions import analyse

BASE = {"q_heads": 2, "q_len": 8, "qk_dim": 4}
ENV = {"b": (0, 1), "h": (0, 3), "q": (-3, 6), "k": (0, 7)}
CORNERS = [
    {"b": b, "h": h, "q": q, "k": k}
    for b in (0, 1)
    for h in (0, 3)
    for q in (-3, 0, 2, 6)
    for k in (0, 3, 7)
]


def holds(node, arrays=None):
    low, high = interval(node, ENV)
    for at in CORNERS:
        value = evaluate(node, at, arrays, at | {"q": at["q"] + 3})
        slack = 1e-9 * max(1.0, abs(value)) if node.kind == "float" else 0
        assert low - slack <= value <= high + slack


@settings(max_examples=300, deadline=None)
@given(strategies.expressions("int", operands=()))
def test_integers_lie_within(node):
    holds(node)


@settings(max_examples=300, deadline=None)
@given(strategies.expressions("bool", operands=()))
def test_truth_lies_within(node):
    holds(node)


@settings(max_examples=200, deadline=None)
@given(strategies.expressions("float", operands=(), compare_floats=True))
def test_floats_lie_within(node):
    holds(node)


def filled(operand, number):
    """An operand that holds one number everywhere."""
    values = number
    for axis in reversed(operand.axes):
        values = [values] * (axis if isinstance(axis, int) else 10)
    return values


@settings(max_examples=200, deadline=None)
@given(
    strategies.expressions("int"), st.integers(-(2**30) + 1, 2**30 - 1), st.booleans()
)
def test_whatever_the_operands_hold(node, number, flag):
    values = {"bool": flag, "int": number, "float": float(number)}
    holds(node, {o.name: filled(o, values[o.kind]) for o in strategies.OPERANDS})


def spec(mask=None, score=None, **changes):
    return AttentionSpec(
        **BASE | changes,
        mask=None if mask is None else attngen.mask(mask),
        score=() if score is None else (attngen.score(score),),
    )


def test_integers_that_leave_int32_are_computed_in_int64():
    far = spec(lambda b, h, q, k: q * 10**9 < k * 10**9)
    assert examine(far).index_dtype == "int64"
    assert examine(spec(lambda b, h, q, k: q * 10**6 < k)).index_dtype == "int32"


def test_integers_that_leave_int64_are_refused():
    with refused(ExpressionError):
        examine(spec(lambda b, h, q, k: q * 10**18 * 100 < k))


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: q % k == 0,
        lambda b, h, q, k: q // (k - 3) == 0,
        lambda b, h, q, k: q % (h - b) == 0,
    ],
)
def test_a_divisor_that_can_be_zero_is_refused(mask):
    with refused(ExpressionError):
        examine(spec(mask))


def test_a_divisor_that_is_never_zero_is_taken():
    examine(spec(lambda b, h, q, k: q % (k + 1) == 0))
    examine(spec(lambda b, h, q, k: q // attngen.maximum(k - 3, 1) == 0))


TABLE = attngen.operand("table", axes=("h", 5), dtype="float32")
ROWS = attngen.operand("rows_of_q", axes=(8,), dtype="float32")
WHOLE = attngen.operand("whole", axes=(5,), dtype="int32")


def test_an_index_that_leaves_its_axis_for_sure_is_refused():
    with refused(OperandError):
        examine(spec(score=lambda s, b, h, q, k: s + TABLE[h, k + 9]))
    with refused(OperandError):
        examine(spec(score=lambda s, b, h, q, k: s + TABLE[h, k]))


def test_an_index_that_may_leave_an_integers_axis_is_refused():
    with refused(OperandError):
        examine(spec(lambda b, h, q, k: WHOLE[k - q] == 0))
    examine(spec(lambda b, h, q, k: WHOLE[(k - q) % 5] == 0))


def test_q_alone_is_an_index_wherever_it_stands():
    for offset in (100, "operand"):
        examine(spec(score=lambda s, b, h, q, k: s + ROWS[q], q_offset=offset))


def test_bounds_that_leave_int32_are_computed_in_int64():
    far = spec(lambda b, h, q, k: q - 2 * 10**9 < k + 2 * 10**9)
    assert examine(far).index_dtype == "int32"
    assert examine(far, analyse(far).limits).index_dtype == "int64"


def test_a_score_that_float32_cannot_hold_drops_its_key():
    def drops(least, **changes):
        def function(s, b, h, q, k):
            return attngen.where(k > 3, s, least)

        return examine(spec(score=function, **changes)).drops_keys

    assert not drops(-1e30)
    assert not drops(-3.4028235e38)  # what float32's least number is written as
    assert drops(-1e39)
    assert not drops(-1e39, dtype="float64")


def test_scores_one_after_the_other_drop_a_key_together():
    halfway = attngen.score(lambda s, b, h, q, k: s - 3e38)
    assert not examine(AttentionSpec(**BASE, score=(halfway,))).drops_keys
    assert examine(AttentionSpec(**BASE, score=(halfway, halfway))).drops_keys


def test_which_scores_can_drop_a_key():
    def drops(*score, **own):
        return examine(AttentionSpec(**BASE, score=score)).drops_keys

    assert not drops()
    assert not drops(scores.softcap(3.0))
    assert drops(scores.bias())
    infinite = attngen.score(
        lambda s, b, h, q, k: attngen.where(k > 3, s, -float("inf"))
    )
    assert drops(infinite)
    assert not examine(AttentionSpec(**BASE, mask=masks.causal())).drops_keys
