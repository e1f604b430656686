"""The tiles that emitted loops visit: those that the plan counts, each once."""

import collections
import dataclasses
import sys

import hypothesis.strategies as st
import jax
import pytest
from hypothesis import assume, given, settings
from judge import kernel
from test_regions import MASKS

import attngen
from attngen import AttentionSpec, api, backends, inputs, masks
from attngen.backends.jax.loader import load_function
from attngen.lists import skips
from attngen.skipping import sees_nothing
from attngen.tiles import count_tiles
from attngen.tracing import mask_of

backends.register("numpy", "toy_backend")

BASE = AttentionSpec(q_heads=1, q_len=11, kv_len=14, qk_dim=2, q_offset=2)
LIBRARY = [
    None,
    masks.causal(),
    ~masks.causal(),
    masks.sliding_window(1),  # its full part begins inside the ragged last chunk
    masks.sliding_window(3, 0),
    masks.causal() & masks.sliding_window(4),
    masks.causal() | masks.prefix(5),
    masks.causal() | masks.dense("flags", axes="k"),
    masks.prefix(0),
]


def visited(spec, **fix):
    """How often a JAX file calls `edge` and `interior`, run without a compiler."""
    plan = attngen.plan(spec, target="cpu", fix={"algorithm": "running"} | fix)
    path = api.stored(attngen.emit(plan))
    function, calls = load_function(path), collections.Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_filename == str(path):
            calls[frame.f_code.co_name] += 1

    with jax.disable_jit():
        sys.setprofile(count)
        try:
            function(**inputs.arrays(spec))
        finally:
            sys.setprofile(None)
    return plan.tiles, calls


@pytest.mark.parametrize("chunks", [(4, 5), (5, 4), (11, 14)])
@pytest.mark.parametrize("mask", LIBRARY, ids=str)
@pytest.mark.sampled(4)
def test_jax_visits_the_tiles_that_are_counted(mask, chunks):
    if chunks == (11, 14) and mask == masks.prefix(0):
        pytest.skip("a tile alone is visited, whatever it holds")
    spec = dataclasses.replace(BASE, mask=mask)
    fix = {"skip": "bounds"} if skips(spec) else {}
    tiles, calls = visited(spec, q_chunk=chunks[0], k_chunk=chunks[1], **fix)
    assert (calls["interior"], calls["edge"]) == (tiles.full, tiles.edge)


@pytest.mark.parametrize("chunks", [(4, 5), (5, 4)])
@pytest.mark.parametrize(
    "mask", [m for m in LIBRARY if m is not None and m.operands], ids=str
)
def test_a_list_visits_at_most_what_is_counted(mask, chunks):
    spec = dataclasses.replace(BASE, mask=mask)
    fix = {"q_chunk": chunks[0], "k_chunk": chunks[1], "skip": "list"}
    tiles, calls = visited(spec, **fix)
    assert calls["interior"] + calls["edge"] <= tiles.visited
    assert calls["interior"] >= tiles.full


@pytest.mark.parametrize("loop", ["scan", "unrolled"])
@pytest.mark.parametrize("mask", [None, masks.dense()], ids=str)
def test_other_loops_visit_as_many(mask, loop):
    spec = dataclasses.replace(BASE, mask=mask)
    tiles, calls = visited(spec, q_chunk=4, k_chunk=5, loop=loop)
    assert (calls["interior"], calls["edge"]) == (tiles.full, tiles.edge)


@settings(max_examples=100, deadline=None)
@given(MASKS, st.sampled_from([1, 2, 5]), st.integers(1, 14), st.integers(-9, 9))
def test_the_toy_backend_visits_the_tiles_that_are_counted(mask, q_chunk, k_chunk, at):
    spec = dataclasses.replace(BASE, q_len=10, mask=mask_of(mask), q_offset=at)
    assume(not sees_nothing(spec))  # then a plan counts nothing, whatever bounds say
    function, plan = kernel(spec, "numpy", q_chunk=q_chunk, k_chunk=k_chunk)
    calls = []
    names = function.__wrapped__.__globals__
    add = names["_add"]
    names["_add"] = lambda *tile: (calls.append(tile), add(*tile))[1]
    function(**inputs.arrays(spec))
    tiles = count_tiles(spec, q_chunk, k_chunk)
    assert plan.tiles.visited == len(calls)
    assert plan.tiles == tiles


def test_queries_beyond_their_lengths_visit_nothing():
    spec = dataclasses.replace(BASE, q_len=12, q_lengths=True, kv_lengths=True)
    arrays = inputs.arrays(spec)
    _, calls = visited(spec, q_chunk=4, k_chunk=5)
    rows, keys = -(-arrays["q_lengths"][0] // 4), -(-arrays["kv_lengths"][0] // 5)
    assert calls["interior"] + calls["edge"] == rows * keys
