"""The library through the whole pipeline: what is emitted for each mask, score and pairing."""

import dataclasses

import interpreted
import numpy as np
import pytest
from judge import judge
from library import (
    EXAMPLES,
    FEW,
    OFFSETS,
    PAIRS,
    SPEC,
    SWIN,
    holding,
    offsets_of,
    rotating,
    slowly,
)

import attngen
from attngen import inputs, reference

pytest.importorskip("triton", reason="needs attngen[triton]")

JAX = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}
TRITON = {"q_chunk": 32, "k_chunk": 16}
EVERY = [(name, offset) for name in EXAMPLES for offset in offsets_of(name)]
ONCE = rotating()


def spec_of(name, offset):
    return EXAMPLES[name].spec(q_offset=OFFSETS[offset])


@pytest.mark.parametrize(("name", "offset"), ONCE.items())
@pytest.mark.sampled(4)
def test_jax(name, offset):
    with holding(EXAMPLES[name].operands):
        judge(spec_of(name, offset), **JAX)


@pytest.mark.parametrize(("name", "offset"), ONCE.items())
@pytest.mark.sampled(4, 1)
def test_triton(name, offset):
    with holding(EXAMPLES[name].operands):
        interpreted.judge(spec_of(name, offset), **TRITON)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "offset"), EVERY)
def test_jax_with_every_offset(name, offset):
    spec = dataclasses.replace(spec_of(name, offset), layout="bhtd", sink=True)
    with holding(EXAMPLES[name].operands):
        judge(spec, algorithm="running", q_chunk=7, k_chunk=11)
        judge(spec, algorithm="dense")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "offset"), EVERY)
def test_triton_with_every_offset(name, offset):
    spec = dataclasses.replace(spec_of(name, offset), dtype="float16")
    with holding(EXAMPLES[name].operands):
        interpreted.judge(spec, q_chunk=16, k_chunk=32)


@pytest.mark.parametrize("name", slowly(PAIRS, FEW))
@pytest.mark.parametrize("backend", ["jax", "triton"])
@pytest.mark.sampled(3)
def test_pairs(name, backend):
    spec, operands = PAIRS[name]
    with holding(operands):
        if backend == "jax":
            judge(spec, **JAX)
        else:
            interpreted.judge(spec, **TRITON)


@pytest.mark.parametrize("entries", [5, 40])  # few are compared, more are sorted by JAX
def test_searches_count_whatever_the_order(entries):
    of = attngen.operand("entries", axes=(entries,), dtype="int32")

    def seen(b, h, q, k):
        after = attngen.searchsorted(of, k // 2) + attngen.searchsorted(of, 3)
        return attngen.searchsorted(of, q + 1) * 2 >= after

    spec = dataclasses.replace(SPEC, mask=attngen.mask(seen))
    mixed = np.random.default_rng(1).integers(0, 60, entries).astype(np.int32)
    with holding({"entries": mixed}):
        judge(spec, **JAX)
        interpreted.judge(spec, **TRITON)


@pytest.mark.parametrize("backend", ["jax", "triton"])
def test_a_table_of_a_window_under_its_mask(backend):
    if backend == "jax":
        judge(SWIN, **JAX)
    else:
        interpreted.judge(SWIN, **TRITON)


def test_some_queries_see_nothing():
    """Among the examples, which is what kernels easily get wrong."""
    empty = []
    for name, offset in ONCE.items():
        spec = spec_of(name, offset)
        with holding(EXAMPLES[name].operands):
            given = inputs.arrays(spec)
        q, k, v = (given.pop(n) for n in ("q", "k", "v"))
        lse = reference.attention(spec, q, k, v, given)["lse"]
        empty += [name] if (lse == float("-inf")).any() else []
    assert len(empty) >= 5
