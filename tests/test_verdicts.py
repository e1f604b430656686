"""Verdicts on tiles against every pair of query and key: never wrong, and exact for lines."""

import hypothesis.strategies as st
import pytest
from brute import evaluate
from hypothesis import given, settings
from strategies import FLAGS, IDS, expressions, masks

import attngen
from attngen import masks as library
from attngen.expr import apply, const, var
from attngen.extremes import UNKNOWN
from attngen.linear import number
from attngen.tracing import mask_of
from attngen.verdicts import verdict

ARRAYS = {
    "ids": [[(3 * i) // 7 for i in range(40)], [i % 5 for i in range(40)]],
    "flags": [[(i * j) % 3 == 1 for j in range(40)] for i in range(40)],
}
TILES = st.tuples(*[st.integers(0, 30)] * 2, *[st.integers(1, 9)] * 2)
HEADS = st.tuples(st.integers(0, 1), st.integers(1, 2), st.integers(0, 3))


def pairs(mask, tile, heads=(0, 1, 0), shift=0):
    """What the mask says of each pair of a tile, batch and head; shift: of positions."""
    q, k, n, m = tile
    b, batches, h = heads
    for batch in range(b, min(2, b + batches)):
        for i in range(q, q + n):
            for j in range(k, k + m):
                at = {"b": batch, "h": h, "q": i + shift, "k": j + shift}
                index = {"b": batch, "h": h, "q": i, "k": j}
                yield bool(evaluate(mask.expr, at, ARRAYS, index))


def told(mask, tile, heads=(0, 1, 0), shift=0, read=lambda *_: None):
    """(some, every) by the verdict."""
    q, k, n, m = tile
    b, batches, h = heads
    at = {"q_lo": q + shift, "q_hi": q + n + shift, "k_lo": k + shift}
    at |= {"k_hi": k + m + shift, "b_lo": b, "b_hi": min(2, b + batches)}
    at |= {"h_lo": h, "h_hi": h + 1}
    found = verdict(mask.expr, read)
    return tuple(bool(evaluate(x, at)) for x in (found.some, found.every))


def check(mask, tile, heads, shift):
    """Nothing that is seen is called empty, nothing that isn't is called full."""
    q, k, n, m = tile
    ids = [ARRAYS["ids"][b] for b in range(heads[0], min(2, heads[0] + heads[1]))]

    def read(node, _):  # as the emitted code knows it
        if node.op != "load" or node.value != IDS:
            return None
        b, at = node.args
        rows = ids if b.op == "var" else [ARRAYS["ids"][b.value]]
        first, count = {"q": (q, n), "k": (k, m)}.get(at.value, (0, 1))
        values = [x for row in rows for x in row[first : first + count]]
        if at.op == "const":
            values = [row[at.value] for row in rows]
        return (number(min(values)), number(max(values)))

    some, every = told(mask, tile, heads, shift, read)
    known = list(pairs(mask, tile, heads, shift))
    assert some or not any(known), "called empty"
    assert not every or all(known), "called full"
    blind, sure = told(mask, tile, heads, shift)
    assert (some, True) <= (blind, True)
    assert blind or not any(known)
    assert not sure or all(known)


INTEGERS = masks(operands=(IDS, FLAGS), depth=3)
CASES = (INTEGERS, TILES, HEADS, st.integers(-9, 9))


@settings(max_examples=400, deadline=None)
@given(*CASES)
def test_verdicts_are_never_wrong(mask, tile, heads, shift):
    check(mask, tile, heads, shift)


@pytest.mark.slow
@settings(max_examples=20000, deadline=None)
@given(*CASES)
def test_verdicts_are_never_wrong_in_many(mask, tile, heads, shift):
    check(mask, tile, heads, shift)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(masks(compare_floats=True, operands=(IDS, FLAGS), depth=4), *CASES[1:])
def test_deep_verdicts_are_never_wrong_in_many(mask, tile, heads, shift):
    check(mask, tile, heads, shift)


@st.composite
def line(draw):
    """A comparison of two affine expressions; k has the coefficient -1, 0 or 1."""
    a, b = draw(st.integers(-3, 3)), draw(st.integers(-1, 1))
    left = apply(
        "add", apply("mul", const(a), var("q")), apply("mul", const(b), var("k"))
    )
    op = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
    return apply(op, left, const(draw(st.integers(-30, 30))))


LINES = st.recursive(
    line(),
    lambda x: (
        st.builds(lambda a, b: apply("and", a, b), x, x)
        | st.builds(lambda a, b: apply("or", a, b), x, x)
        | st.builds(lambda a: apply("not", a), x)
    ),
    max_leaves=4,
)


def exact(mask, tile, shift):
    known = list(pairs(mask, tile, shift=shift))
    assert told(mask, tile, shift=shift) == (any(known), all(known))


@settings(max_examples=400, deadline=None)
@given(LINES, TILES, st.integers(-9, 9))
def test_lines_and_their_combinations_are_exact(node, tile, shift):
    exact(mask_of(node), tile, shift)


@pytest.mark.slow
@settings(max_examples=20000, deadline=None)
@given(LINES, TILES, st.integers(-9, 9))
def test_lines_and_their_combinations_are_exact_in_many(node, tile, shift):
    exact(mask_of(node), tile, shift)


WINDOW_AND_GLOBAL = attngen.mask(
    lambda b, h, q, k: (abs(q - k) <= 3) | (k < 2) | (q < 2)
)
EXACT = {
    "causal": library.causal(),
    "window": library.causal() & library.sliding_window(5),
    "two sides": library.sliding_window(4, 3),
    "first and window": library.causal()
    & (library.prefix(3) | library.sliding_window(5)),
    "window and global": WINDOW_AND_GLOBAL,
    "prefix": library.prefix(7) | library.causal(),
    "neither": ~library.causal() & ~library.prefix(9),
    "blocks": attngen.mask(lambda b, h, q, k: q // 8 == k // 8),
    "every third": attngen.mask(lambda b, h, q, k: (q - k) % 3 == 0),
    "ends of rows": attngen.mask(lambda b, h, q, k: k % 4 == 3),
}


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=100, deadline=None)
@given(TILES)
def test_masks_of_the_field_are_exact(name, tile):
    exact(EXACT[name], tile, 0)


def test_what_floats_say_is_not_trusted():
    third = attngen.mask(lambda b, h, q, k: q / 3.0 < k)
    found = verdict(third.expr)
    assert (found.some, found.every) == (const(True), const(False))


def test_reads_that_are_not_known_are_either():
    reads = attngen.operand("x", axes="bk", dtype="int32")
    mask = attngen.mask(lambda b, h, q, k: (reads[b, k] > 3) & (k <= q))
    found = verdict(mask.expr, lambda *_: UNKNOWN)
    at = {"q_lo": 4, "q_hi": 8, "k_lo": 0, "k_hi": 4}
    assert evaluate(found.some, at) is True
    assert evaluate(found.every, at) is False
    assert evaluate(found.some, at | {"k_lo": 8, "k_hi": 12}) is False


@given(expressions("bool", operands=(), depth=2))
@settings(max_examples=50, deadline=None)
def test_a_condition_and_its_opposite_are_opposite(node):
    tile = (3, 5, 4, 6)
    mask, other = mask_of(node), mask_of(apply("not", node))
    some, every = told(mask, tile)
    assert told(other, tile) == (not every, not some)
