"""That a chunk of queries has no full tile: proofs against every pair, and what is emitted."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_regions import MASKS, spec_of

import attngen
from attngen import AttentionSpec, masks
from attngen.fullness import none_full
from attngen.regions import spans
from attngen.tiles import key_limits

BOARD = attngen.mask(lambda b, h, q, k: ((q // 4 + k // 4) % 2 == 0) | (q == k))


@settings(max_examples=200, deadline=None)
@given(MASKS, st.integers(1, 6), st.integers(1, 6), st.integers(-5, 5))
def test_where_it_is_proven_the_bounds_hold_no_full_tile(mask, q, k, offset):
    spec = spec_of(mask, q_len=24, kv_len=30, q_offset=offset)
    if none_full(spec, q, k):
        for start in range(0, 24 - q + 1, q):
            for span in spans(spec):
                _, _, low, high = key_limits(spec, span, start, q)
                assert high // k <= -(-low // k)


@pytest.mark.parametrize(
    ("mask", "chunks", "proven"),
    [
        (None, (64, 64), False),
        (masks.causal(), (64, 64), False),
        (BOARD, (64, 64), True),
        (BOARD, (1, 1), False),  # on the diagonal
        (masks.sliding_window(128) & masks.causal(), (64, 64), False),
        (masks.sliding_window(128) & masks.causal(), (128, 64), True),
        (masks.sliding_window(128) & masks.causal(), (65, 64), False),
        (masks.sliding_window(127) & masks.causal(), (65, 64), True),
    ],
)
def test_proofs(mask, chunks, proven):
    spec = AttentionSpec(q_heads=1, q_len=512, qk_dim=64, mask=mask)
    assert none_full(spec, *chunks) is proven


def loops(mask, **fix):
    spec = AttentionSpec(q_heads=2, q_len=512, qk_dim=64, dtype="float16", mask=mask)
    plan = attngen.plan(spec, "a100", "triton", {"num_warps": 4} | fix)
    return attngen.emit(plan).text.count("    for ")


def test_an_interior_that_no_tile_reaches_is_not_emitted():
    chunks = {"q_chunk": 64, "k_chunk": 64}
    assert loops(masks.causal(), **chunks) == loops(BOARD, **chunks) + 1
    window = masks.sliding_window(128) & masks.causal()
    wide = {"q_chunk": 128, "k_chunk": 64}
    assert loops(window, **chunks) == loops(window, **wide) + 1
