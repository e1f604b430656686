"""The score library: each score against its paper's formula."""

import math

import pytest
from brute import evaluate
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused

from attngen import scores
from attngen.errors import ExpressionError, OperandError
from attngen.tracing import score

HERE = {"b": 0, "h": 0, "q": 0, "k": 0}


def at(score, arrays=None, **place):
    return evaluate(score.expr, HERE | place, arrays)


@given(st.floats(-1e6, 1e6), st.sampled_from([0.5, 30.0, 50]))
def test_softcap_is_its_formula_and_stays_within_the_cap(s, cap):
    capped = at(scores.softcap(cap), s=s)
    assert capped == float(cap) * math.tanh(s / cap)
    assert abs(capped) <= cap


@pytest.mark.parametrize(("h", "slope"), [(0, 0.5), (1, 0.25)])
def test_alibi_falls_linearly_with_the_distance(h, slope):
    arrays = {"slopes": [0.5, 0.25]}
    for q, k in [(5, 5), (5, 2), (2, 5)]:
        biased = at(scores.alibi(), arrays, h=h, q=q, k=k, s=3.0)
        assert biased == 3.0 + slope * (k - q)


@pytest.mark.parametrize("axes", ["bhqk", "hqk", "k", "bk", ("q", "k")])
def test_a_bias_is_added_as_it_is(axes):
    sizes = {"b": 1, "h": 2, "q": 3, "k": 4}
    place = {"b": 0, "h": 1, "q": 2, "k": 1}

    def block(letters, coordinates=()):
        if letters:
            length = sizes[letters[0]]
            return [block(letters[1:], (*coordinates, i)) for i in range(length)]
        return float(sum(i * 10**n for n, i in enumerate(reversed(coordinates))))

    biased = at(scores.bias("extra", axes=axes), {"extra": block(axes)}, s=0.5, **place)
    digits = "".join(str(place[letter]) for letter in axes)
    assert biased == 0.5 + int(digits)


def test_a_bias_has_the_dtype_asked_for():
    (operand,) = scores.bias("extra", axes="hqk", dtype="bfloat16").operands
    assert (operand.name, operand.axes) == ("extra", ("h", "q", "k"))
    assert operand.dtype == "bfloat16"


# T5's relative buckets.


def t5_bucket(relative_position, bidirectional, num_buckets, max_distance):
    """T5's rule (arXiv 1910.10683; transformers, modeling_t5.py), in floats."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        if relative_position > 0:
            bucket += num_buckets
        distance = abs(relative_position)
    else:
        distance = -min(relative_position, 0)
    max_exact = num_buckets // 2
    if distance < max_exact:
        return bucket + distance
    far = math.log(distance / max_exact) / math.log(max_distance / max_exact)
    return bucket + min(
        max_exact + int(far * (num_buckets - max_exact)), num_buckets - 1
    )


@pytest.mark.parametrize(
    ("buckets", "max_distance", "bidirectional"),
    [(32, 128, True), (32, 128, False), (64, 256, True), (8, 20, False), (4, 2, True)],
)
def test_relative_buckets_are_t5s(buckets, max_distance, bidirectional):
    table = {"relative_bias": [[float(n) for n in range(buckets)]]}
    bias = scores.relative_buckets(
        "relative_bias", buckets, max_distance, bidirectional
    )
    for distance in range(-300, 301):
        expected = t5_bucket(distance, bidirectional, buckets, max_distance)
        assert at(bias, table, q=400, k=400 + distance, s=0.0) == expected


def test_relative_buckets_use_every_bucket():
    table = {"relative_bias": [[float(n) for n in range(32)]]}
    bias = scores.relative_buckets()
    used = {at(bias, table, q=200, k=k, s=0.0) for k in range(401)}
    # Bucket 16 would be a key after the query at distance 0, which there is none of.
    assert used == set(range(32)) - {16}


def test_a_relative_bias_is_its_heads():
    table = {"relative_bias": [[0.0] * 32, [1.0] * 32]}
    assert at(scores.relative_buckets(), table, h=1, s=0.25) == 1.25
    (operand,) = scores.relative_buckets().operands
    assert operand.axes == ("h", 32)


# Values and refusals.


def test_a_score_equals_the_traced_one():
    slope = scores.alibi().operands[0]
    assert slope.axes == ("h",)
    assert scores.softcap(50) == scores.softcap(50.0)
    assert scores.softcap(50.0) != scores.softcap(30.0)
    assert score(lambda s, b, h, q, k: s * 2) == score(lambda s, b, h, q, k: s * 2.0)
    assert str(score(lambda s, b, h, q, k: s * 2)) == "s * 2.0"


def test_the_library_is_known_by_its_names():
    for name, make in scores.LIBRARY.items():
        assert make.__name__ == name
        assert make.__doc__


REFUSED = {
    "cap of 0": lambda: scores.softcap(0),
    "negative cap": lambda: scores.softcap(-50.0),
    "infinite cap": lambda: scores.softcap(math.inf),
    "NaN cap": lambda: scores.softcap(math.nan),
    "cap of a bool": lambda: scores.softcap(True),
    "bias with a length": lambda: scores.bias(axes=("h", 32)),
    "axes in a list": lambda: scores.bias(axes=["h", "q"]),
    "3 buckets": lambda: scores.relative_buckets(buckets=3),
    "negative buckets": lambda: scores.relative_buckets(buckets=-32),
    "buckets of a float": lambda: scores.relative_buckets(buckets=32.0),
    "a near max_distance": lambda: scores.relative_buckets(max_distance=8),
    "max_distance of a string": lambda: scores.relative_buckets(max_distance="128"),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_arguments_that_make_no_score_are_refused(make):
    with refused(ExpressionError):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: scores.alibi("for"),
        lambda: scores.alibi(3),
        lambda: scores.softcap("50"),
        lambda: scores.bias("a b"),
        lambda: scores.bias(axes="hh"),
        lambda: scores.bias(dtype="int8"),
        lambda: scores.relative_buckets("2x"),
    ],
)
def test_operands_that_can_not_be_are_refused(make):
    with refused(OperandError):
        make()
