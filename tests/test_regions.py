"""Regions: the bounds in closed form against every pair of query and key."""

import dataclasses

import hypothesis.strategies as st
import pytest
from brute import evaluate
from hypothesis import given, settings

import attngen
from attngen import AttentionSpec, masks
from attngen.expr import apply, const, var
from attngen.regions import analyse, spans
from attngen.tiles import chunk_limits, count_tiles, key_chunks, key_limits
from attngen.tracing import mask_of


@st.composite
def affine(draw):
    """A comparison of two affine expressions of q and k."""
    a, b = draw(st.integers(-2, 2)), draw(st.integers(-2, 2))
    left = apply(
        "add", apply("mul", const(a), var("q")), apply("mul", const(b), var("k"))
    )
    op = draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]))
    return apply(op, left, const(draw(st.integers(-25, 25))))


AWKWARD = st.sampled_from(
    [
        attngen.mask(lambda b, h, q, k: (q + k) % 3 == 0).expr,
        attngen.mask(lambda b, h, q, k: q // 4 == k // 4).expr,
        const(True),
        const(False),
    ]
)
MASKS = st.recursive(
    affine() | AWKWARD,
    lambda x: (
        st.builds(lambda a, b: apply("and", a, b), x, x)
        | st.builds(lambda a, b: apply("or", a, b), x, x)
        | st.builds(lambda a: apply("not", a), x)
    ),
    max_leaves=5,
)


def spec_of(mask, q_len=17, kv_len=23, q_offset=0, kv_offset=0):
    return AttentionSpec(
        q_heads=1,
        q_len=q_len,
        kv_len=kv_len,
        qk_dim=4,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask=mask_of(mask),
    )


def seen_by(spec, start, chunk):
    """For each key, how many queries of a chunk see it, pair by pair."""
    counts = []
    for j in range(spec.kv_len):
        at = {"b": 0, "h": 0, "k": j + spec.kv_offset}
        queries = range(start + spec.q_offset, start + spec.q_offset + chunk)
        counts.append(sum(evaluate(spec.mask.expr, at | {"q": q}, {}) for q in queries))
    return counts


def check(mask, q_chunk, start, q_offset, kv_offset):
    """No key that is seen is left out; no key that isn't seen by all is called full."""
    spec = spec_of(mask, q_offset=q_offset, kv_offset=kv_offset)
    start = min(start, spec.q_len - q_chunk)
    limits = [key_limits(spec, span, start, q_chunk) for span in spans(spec)]
    low, high, _, _ = key_limits(spec, analyse(spec), start, q_chunk)
    counts = seen_by(spec, start, q_chunk)
    for j, count in enumerate(counts):
        inside = [at for at in limits if at[0] <= j < at[1]]
        if not inside:
            assert count == 0, f"key {j} is skipped, {count} queries see it"
        assert low <= j < high or not count, f"key {j} is outside the hull"
        for _, _, full_low, full_high in inside:
            if full_low <= j < full_high:
                assert count == q_chunk, f"key {j} is called full, {count} see it"
    visits = key_chunks(limits, 3)
    visited = [c for first, _, _, last in visits for c in range(first, last)]
    assert len(visited) == len(set(visited)), "a key chunk is visited twice"
    for _, full_first, full_last, _ in visits:
        for j in range(3 * full_first, min(3 * full_last, spec.kv_len)):
            assert counts[j] == q_chunk, f"key {j} is in a full chunk"
    wanted = {c for low, high, *_ in limits for c in range(low // 3, -(-high // 3))}
    assert set(visited) == wanted


CASES = (MASKS, st.integers(1, 8), st.integers(0, 16), st.integers(-9, 9))


@settings(max_examples=300, deadline=None)
@given(*CASES, st.integers(-5, 5))
def test_empty_and_full_are_never_wrong(mask, q_chunk, start, q_offset, kv_offset):
    check(mask, q_chunk, start, q_offset, kv_offset)


@pytest.mark.slow
@settings(max_examples=8000, deadline=None)
@given(*CASES, st.integers(-5, 5))
def test_empty_and_full_are_never_wrong_in_many(
    mask, chunk, start, q_offset, kv_offset
):
    check(mask, chunk, start, q_offset, kv_offset)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(0, 10),
    st.integers(1, 8),
    st.integers(0, 16),
    st.integers(-9, 9),
)
def test_a_window_is_exact(left, right, q_chunk, start, q_offset):
    spec = spec_of(masks.sliding_window(left, right).expr, q_offset=q_offset)
    start = min(start, spec.q_len - q_chunk)
    counts = seen_by(spec, start, q_chunk)
    low, high, full_low, full_high = key_limits(spec, analyse(spec), start, q_chunk)
    some = [j for j, count in enumerate(counts) if count]
    every = [j for j, count in enumerate(counts) if count == q_chunk]
    assert list(range(low, high)) == some
    assert list(range(full_low, full_high)) == every


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        (None, (64, 0, 0)),
        (masks.causal(), (28, 8, 28)),
        (~masks.causal(), (28, 8, 28)),
        (masks.causal() & masks.sliding_window(16), (7, 14, 43)),
        (masks.prefix(16), (16, 0, 48)),
        (masks.causal() | masks.prefix(16), (31, 6, 27)),
        (masks.documents(), (0, 64, 0)),
    ],
)
def test_tiles_of_the_library(mask, counts):
    spec = AttentionSpec(q_heads=1, q_len=64, qk_dim=8, mask=mask)
    tiles = count_tiles(spec, 8, 8)
    assert (tiles.full, tiles.edge, tiles.empty) == counts
    assert tiles.total == 64


def test_a_ragged_tail_is_an_edge():
    spec = AttentionSpec(q_heads=1, q_len=20, qk_dim=8)
    tiles = count_tiles(spec, 8, 8)
    assert (tiles.full, tiles.edge, tiles.empty) == (6, 3, 0)


def test_a_sample_of_the_chunks_counts_about_the_same():
    spec = AttentionSpec(q_heads=1, q_len=2**16, qk_dim=8, mask=masks.causal())
    exact = count_tiles(spec, 16, 64)
    about = count_tiles(spec, 16, 64, exact=False)
    assert about.total == exact.total
    assert abs(about.visited - exact.visited) <= 0.01 * exact.visited


def test_a_mask_that_is_never_true_visits_nothing():
    never = dataclasses.replace(spec_of(const(True)), mask=mask_of(const(False)))
    tiles = count_tiles(never, 5, 5)
    assert tiles.visited == 0


@given(MASKS, st.integers(1, 40), st.integers(1, 9))
@settings(max_examples=60)
def test_limits_that_all_chunks_share_are_those_of_each(mask, q_len, q_chunk):
    spec = spec_of(mask, q_len=q_len)
    q_chunk = min(q_chunk, q_len)
    starts = [min(i, q_len - q_chunk) for i in range(0, q_len, q_chunk)]
    want = [
        tuple(key_limits(spec, span, start, q_chunk) for span in spans(spec))
        for start in starts
    ]
    assert chunk_limits(spec, q_chunk) == want
