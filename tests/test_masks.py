"""The mask library: which pairs each mask lets see each other, and its algebra."""

import pytest
from brute import evaluate, seen
from hypothesis import given
from refusals import refused
from strategies import OPERANDS
from strategies import masks as random_masks

from attngen import masks
from attngen.errors import ExpressionError, OperandError
from attngen.tracing import Mask, mask

Q, K = 7, 9
PAIRS = {(q, k) for q in range(Q) for k in range(K)}


def test_causal_lets_a_query_see_itself_and_the_past():
    assert seen(masks.causal(), Q, K) == {(q, k) for q, k in PAIRS if k <= q}


@pytest.mark.parametrize("left", [1, 2, 5, 100])
def test_a_window_holds_its_own_key_and_as_many_as_it_says(left):
    window = seen(masks.causal() & masks.sliding_window(left), K, K)
    for q in range(K):
        assert sum(pair[0] == q for pair in window) == min(left, q + 1)
        assert (q, q) in window


def test_a_window_without_right_does_not_limit_the_future():
    assert seen(masks.sliding_window(3), Q, K) == {
        (q, k) for q, k in PAIRS if k > q - 3
    }


@pytest.mark.parametrize("right", [0, 1, 4])
def test_a_window_sees_as_many_after_as_right_says(right):
    expected = {(q, k) for q, k in PAIRS if q - 3 < k <= q + right}
    assert seen(masks.sliding_window(3, right), Q, K) == expected


def test_a_window_of_its_own_key_alone_is_the_diagonal():
    assert seen(masks.sliding_window(1, 0), Q, K) == {
        (q, k) for q, k in PAIRS if q == k
    }


@pytest.mark.parametrize("length", [0, 1, 4, 100])
def test_every_query_sees_the_prefix(length):
    assert seen(masks.prefix(length), Q, K) == {(q, k) for q, k in PAIRS if k < length}


def test_a_named_prefix_is_as_long_as_its_operand_says():
    by_operand = masks.prefix("prefix_lengths")
    (operand,) = by_operand.operands
    assert (operand.name, operand.axes, operand.dtype) == (
        "prefix_lengths",
        ("b",),
        "int32",
    )
    arrays = {"prefix_lengths": [2, 6]}
    for b, length in enumerate(arrays["prefix_lengths"]):
        assert seen(by_operand, Q, K, b=b, arrays=arrays) == seen(
            masks.prefix(length), Q, K
        )


def test_documents_are_blocks():
    ids = [4, 4, 4, 1, 1, 7, 7]
    expected = {(q, k) for q in range(7) for k in range(7) if ids[q] == ids[k]}
    assert seen(masks.documents(), 7, 7, arrays={"document_ids": [ids]}) == expected


@pytest.mark.parametrize("axes", ["bhqk", "qk", "k", "bk", "kq", ("h", "k")])
def test_a_dense_mask_is_its_operand(axes):
    at = {"b": 1, "h": 0, "q": 2, "k": 1}
    sizes = {"b": 2, "h": 1, "q": 3, "k": 2}

    def block(letters):
        if not letters:
            return False
        return [block(letters[1:]) for _ in range(sizes[letters[0]])]

    dense = masks.dense("visible", axes=axes)
    array = block(axes)
    assert evaluate(dense.expr, at, {"visible": array}) is False
    row = array
    for letter in axes[:-1]:
        row = row[at[letter]]
    row[at[axes[-1]]] = True
    assert evaluate(dense.expr, at, {"visible": array}) is True


# Algebra.


def test_and_or_not_are_those_of_sets():
    causal, window = masks.causal(), masks.sliding_window(3, 2)
    one, other = seen(causal, Q, K), seen(window, Q, K)
    assert seen(causal & window, Q, K) == one & other
    assert seen(causal | window, Q, K) == one | other
    assert seen(~causal, Q, K) == PAIRS - one


@given(random_masks(), random_masks())
def test_de_morgan(one, other):
    arrays = {
        "ids": [[2, 3, 5, 7]],
        "flags": [[True, False, False, True]] * 4,
        "slopes": [1.0],
        "table": [[0.0] * 8],
        "offsets": [0, 1, 3],
    }
    assert seen(~(one & other), 4, 4, arrays=arrays) == seen(
        ~one | ~other, 4, 4, arrays=arrays
    )


@given(random_masks(operands=OPERANDS[:1]))
def test_masks_are_values(one):
    assert one == Mask(one.expr, form=None)
    assert hash(one) == hash(Mask(one.expr, form=None))
    assert {o.name for o in one.operands} <= {"ids"}


def test_a_mask_equals_the_traced_one():
    assert masks.causal() == mask(lambda b, h, q, k: k <= q)
    assert masks.sliding_window(4, None) == masks.sliding_window(left=4)
    assert masks.sliding_window(4) != masks.sliding_window(5)
    assert str(masks.causal()) == "k <= q"


def test_the_library_is_known_by_its_names():
    for name, make in masks.LIBRARY.items():
        assert make.__name__ == name
        assert make.__doc__


@pytest.mark.parametrize("other", [None, 1, True, lambda b, h, q, k: k <= q])
def test_a_mask_combines_with_masks_only(other):
    with pytest.raises(TypeError):
        masks.causal() & other
    with pytest.raises(TypeError):
        masks.causal() | other


# Refusals.

REFUSED = {
    "window of 0": lambda: masks.sliding_window(0),
    "negative window": lambda: masks.sliding_window(-1),
    "window of a float": lambda: masks.sliding_window(4.0),
    "window of a bool": lambda: masks.sliding_window(True),
    "negative right": lambda: masks.sliding_window(4, -1),
    "right of a bool": lambda: masks.sliding_window(4, True),
    "negative prefix": lambda: masks.prefix(-1),
    "prefix of a float": lambda: masks.prefix(2.5),
    "prefix of None": lambda: masks.prefix(None),
    "prefix of a list": lambda: masks.prefix([1, 2]),
    "dense with a length": lambda: masks.dense(axes=("h", 32)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_arguments_that_make_no_mask_are_refused(make):
    with refused(ExpressionError):
        make()


def test_a_refusal_does_not_depend_on_what_was_made_before():
    masks.sliding_window(4, 1)  # 1 == True, 4 == 4.0: one entry in an untyped cache
    with refused(ExpressionError):
        masks.sliding_window(4, True)
    with refused(ExpressionError):
        masks.sliding_window(4.0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.prefix("for"),
        lambda: masks.documents(3),
        lambda: masks.documents("2x"),
        lambda: masks.dense("a b"),
        lambda: masks.dense(axes="bs"),
        lambda: masks.dense(axes=""),
        lambda: masks.dense(axes="qq"),
    ],
)
def test_operands_that_can_not_be_are_refused(make):
    with refused(OperandError):
        make()
