"""Gradients of Triton kernels, in the interpreter: of the whole library, to the reference."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from library import EXAMPLES, OFFSETS, holding, offsets_of, rotating
from test_conformance import SPECS
from test_vjp import SPECS as OWN

DTYPES = ("float32", "float16")
BLOCKS = ((16, 16), (32, 16), (16, 32))
EVERY = [(name, offset) for name in EXAMPLES for offset in offsets_of(name)]


def slowly(cases, every):
    """All but each n-th of the cases are slow."""
    return [
        case if i % every == 0 else pytest.param(*case, marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


def judge(spec, blocks=(32, 16), **fix):
    held, step = blocks
    choices = {"q_chunk": 16, "k_chunk": 16, "backward_q_chunk": held}
    return interpreted.judge(spec, **choices, backward_k_chunk=step, **fix)


def differentiated(spec, **changes):
    return dataclasses.replace(spec, derivatives="vjp", **changes)


@pytest.mark.parametrize(
    ("name", "dtype", "blocks"),
    slowly(
        [
            (name, dtype, BLOCKS[(i + j) % 3])
            for i, name in enumerate(SPECS)
            for j, dtype in enumerate(DTYPES)
        ],
        3,
    ),
)
def test_every_spec(name, dtype, blocks):
    judge(differentiated(SPECS[name], dtype=dtype), blocks)


@pytest.mark.parametrize("name", OWN)
def test_specs_of_gradients(name):
    spec = OWN[name]
    judge(dataclasses.replace(spec, dropout=0.0))


@pytest.mark.parametrize(
    ("name", "offset", "dtype"),
    slowly([(n, o, DTYPES[i % 2]) for i, (n, o) in enumerate(rotating().items())], 3),
)
def test_library(name, offset, dtype):
    spec = EXAMPLES[name].spec(q_offset=OFFSETS[offset], derivatives="vjp", dtype=dtype)
    with holding(EXAMPLES[name].operands):
        judge(spec)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "offset"), EVERY)
def test_library_with_everything(name, offset, dtype):
    changes = {"layout": "bhtd", "sink": True, "kv_lengths": True, "q_lengths": True}
    spec = EXAMPLES[name].spec(
        q_offset=OFFSETS[offset], derivatives="vjp", dtype=dtype, **changes
    )
    with holding(EXAMPLES[name].operands):
        judge(spec, (16, 32))
