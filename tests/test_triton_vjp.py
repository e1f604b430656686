"""Gradients of Triton kernels, in the interpreter: of the whole library, to the reference."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from library import EXAMPLES, OFFSETS, holding, offsets_of, rotating
from refusals import refused
from test_conformance import SPECS
from test_vjp import SPECS as OWN

import attngen
from attngen import AttentionSpec, api, inputs, masks, scores
from attngen.errors import NotBuiltError

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
    judge(OWN[name])


@pytest.mark.parametrize("dtype", [*DTYPES, "bfloat16"])
def test_dropout(dtype):
    spec = differentiated(SPECS["sink"], dropout=0.3, dtype=dtype, kv_offset=3)
    judge(spec)
    judge(dataclasses.replace(spec, kv_offset=0, layout="bhtd"), (16, 32))


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


IN_TORCH = """
import importlib.util, sys, torch
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
module = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(module)
shapes = {"q": (2, 70, 2, 32), "k": (2, 70, 1, 32), "v": (2, 70, 1, 32), "bias": (2, 70)}
given = {n: torch.randn(s).requires_grad_() for n, s in shapes.items()}
parts = [given[n] for n in ("q", "k", "v", "bias")]
torch.library.opcheck(module._attention, parts)

def loss(q, k, v, bias):
    out, lse = module.attention(q, k, v, bias=bias)
    return (out * torch.linspace(-1, 1, 32)).sum() + lse.square().sum()

def gradients(function, parts):
    return torch.autograd.grad(function(*parts), parts)

once, again = gradients(loss, parts), gradients(loss, parts)
assert all(torch.equal(x, y) for x, y in zip(once, again))
compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
assert all(torch.equal(x, y) for x, y in zip(once, gradients(compiled, parts)))

def strided(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
    view = wide[..., ::2].transpose(0, 1).clone().transpose(0, 1)
    view.copy_(x.detach())
    return view.requires_grad_()

for x, y in zip(once, gradients(loss, [*map(strided, parts[:3]), parts[3]])):
    assert torch.allclose(x, y, rtol=1e-6, atol=1e-6)

out, _ = module.attention(*parts[:3], bias=parts[3])  # lse is left as it is
assert len(torch.autograd.grad(out.sum(), parts)) == 4
only = torch.autograd.grad(module.attention(*parts[:3], bias=parts[3])[0].sum(), parts[1])
assert torch.isfinite(only[0]).all()
first = torch.autograd.grad(loss(*parts), parts, create_graph=True)
try:
    torch.autograd.grad(first[0].sum(), parts[0])
except RuntimeError as error:
    assert 'derivatives="any"' in str(error), error
    print("right")
"""


def test_torch_differentiates_it_as_one_operation():
    spec = AttentionSpec(
        batch=2, q_heads=2, kv_heads=1, q_len=70, qk_dim=32, outputs=("out", "lse"),
        mask=masks.causal(), score=scores.bias(axes="hk"), derivatives="vjp",
    )  # fmt: skip
    fix = {"q_chunk": 32, "k_chunk": 16, "backward_q_chunk": 32, "backward_k_chunk": 16}
    path = api.stored(attngen.emit(interpreted.plan(spec, **fix)))
    ran = subprocess.run(
        [sys.executable, "-c", IN_TORCH, path],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert ran.stdout.split() == ["right"], ran.stderr[-4000:]


def test_dropout_drops_the_same_weights_as_jax_whatever_the_blocks():
    """Keys that each have a value of their own tell which weights were kept."""
    spec = AttentionSpec(
        batch=2, q_heads=2, kv_heads=1, q_len=20, kv_len=64, qk_dim=16, v_dim=64,
        dropout=0.4, q_offset=5,
    )  # fmt: skip
    given = inputs.arrays(spec, nan=False)
    given["q"][:] = 0  # all weights are equal
    given["v"] = np.eye(64, dtype=np.float32)[None, :, None].repeat(2, 0)
    jax_kernel = attngen.build(spec, backend="jax")
    want = np.asarray(jax_kernel(**given)) > 0
    for kv_offset in (0, 4, 6):  # four words at a time, and one by one
        moved = dataclasses.replace(spec, kv_offset=kv_offset)
        if kv_offset:
            jax_kernel = attngen.build(moved, backend="jax")
            want = np.asarray(jax_kernel(**given)) > 0
        for k_chunk in (16, 32):
            fix = {"q_chunk": 16, "k_chunk": k_chunk}
            path = api.stored(attngen.emit(interpreted.plan(moved, **fix)))
            (out,) = interpreted.call(path, **given)
            np.testing.assert_array_equal(out > 0, want)
    assert 0.5 < want.mean() < 0.7


def test_derivatives_of_any_order_are_refused():
    spec = AttentionSpec(q_heads=1, q_len=64, qk_dim=32, derivatives="any")
    with refused(NotBuiltError, "derivatives of any order"):
        interpreted.plan(spec)
