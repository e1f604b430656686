"""Turns of loops: what the plan says is what the emitted file does, counted as it runs."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import attngen
from attngen import AttentionSpec, building, inputs, masks
from attngen.backends.jax.loader import load_function
from attngen.backends.jax.turns import turns

LONG = {"q_heads": 1, "q_len": 96, "qk_dim": 4}
CHUNKS = {"q_chunk": 16, "k_chunk": 8}
WINDOW = masks.causal() & masks.sliding_window(20)


class Counting:
    """jax.lax, with a fori_loop that runs in Python and counts its turns by function."""

    def __init__(self):
        self.turns = collections.defaultdict(list)

    def __getattr__(self, name):
        return getattr(lax, name)

    def fori_loop(self, first, last, function, carry, **_):
        count = max(0, int(last) - int(first))
        self.turns[function.__name__].append(count)
        for i in range(int(first), int(last)):
            carry = function(jnp.int32(i), carry)
        return carry


def counted(plan):
    """How often each loop of an emitted file turned, in the order of its chunks."""
    spec = plan.spec
    function = load_function(building.stored(attngen.emit(plan)))
    counting = Counting()
    function.__globals__["lax"] = counting
    given = {n: jnp.asarray(x) for n, x in inputs.arrays(spec).items()}
    out = np.asarray(function(**given))
    assert np.isfinite(out).all()
    return counting.turns


@pytest.mark.parametrize(
    ("mask", "fix"),
    [
        (masks.causal(), {}),
        (WINDOW, {}),
        (WINDOW, {"k_chunk": 5}),
        (masks.causal() & masks.prefix(11), {}),
        (masks.causal(), {"unroll": 2, "k_chunk": 4}),
        (masks.causal(), {"diagonal": 8}),
        (masks.causal(), {"diagonal": 4, "unroll": 2}),
        (masks.causal(), {"algorithm": "split_kv", "parts": 3, "k_chunk": 4}),
        (masks.sliding_window(16), {"q_chunk": 7, "k_chunk": 9}),
    ],
    ids=str,
)
@pytest.mark.sampled(3)
def test_turns_are_those_of_the_emitted_loops(mask, fix):
    spec = AttentionSpec(mask=mask, **LONG)
    plan = attngen.plan(spec, fix=CHUNKS | fix)
    done = dict(counted(plan))
    chunks = sum(done.pop("queries"))
    want = turns(plan)
    for name, counts in done.items():
        loops = len(counts) // chunks
        assert len(counts) == loops * chunks
        means = [sum(counts[i::loops]) / chunks for i in range(loops)]
        listed = want.pop(name)
        # a loop of one known turn is written without a loop
        assert [x for x in listed if x in means] == means or listed == means
    assert all(x <= 1 for left in want.values() for x in left)


def test_lengths_at_run_time_are_not_known():
    spec = AttentionSpec(kv_lengths=True, **LONG)
    assert turns(attngen.plan(spec, fix=CHUNKS)) == {}
    spec = AttentionSpec(mask=masks.causal(), q_offset="operand", **LONG)
    assert turns(attngen.plan(spec, fix=CHUNKS)) == {}


def test_dense_has_no_loops():
    spec = AttentionSpec(mask=masks.causal(), **LONG)
    assert turns(attngen.plan(spec, fix={"algorithm": "dense"})) == {}
