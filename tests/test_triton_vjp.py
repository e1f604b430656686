"""Gradients of Triton kernels, in the interpreter: of the whole library, to the reference."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from library import EXAMPLES, OFFSETS, holding, offsets_of, rotating, slowly
from refusals import refused
from test_conformance import SPECS
from test_vjp import SPECS as OWN

import attngen
from attngen import AttentionSpec, api, inputs, masks, scores
from attngen.backends.jax.loader import load_function
from attngen.errors import NotBuiltError
from attngen.symbols import where

DTYPES = ("float32", "float16")
BLOCKS = ((16, 16), (32, 16), (16, 32))
EVERY = [
    (name, offset) for name in EXAMPLES for offset in offsets_of(name, lengths=True)
]


def judge(spec, blocks=(32, 16), **fix):
    held, step = blocks
    choices = {"q_chunk": 16, "k_chunk": 16, "backward_q_chunk": held}
    return interpreted.judge(spec, **choices, backward_k_chunk=step, **fix)


def differentiated(spec, **changes):
    return dataclasses.replace(spec, derivatives="vjp", **changes)


@pytest.mark.parametrize(
    ("name", "dtype", "blocks"),
    [
        (name, dtype, BLOCKS[(i + j) % 3])
        for i, name in enumerate(SPECS)
        for j, dtype in enumerate(DTYPES)
    ],
)
@pytest.mark.sampled(13)
def test_every_spec(name, dtype, blocks):
    judge(differentiated(SPECS[name], dtype=dtype), blocks)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.sampled(4, 2)
def test_specs_of_gradients(name):
    judge(OWN[name])


@pytest.mark.parametrize("dtype", slowly([*DTYPES, "bfloat16"], ["float16"]))
def test_dropout(dtype):
    spec = differentiated(SPECS["sink"], dropout=0.3, dtype=dtype, kv_offset=3)
    judge(spec)
    judge(dataclasses.replace(spec, kv_offset=0, layout="bhtd"), (16, 32))


@pytest.mark.parametrize(
    ("name", "offset", "dtype"),
    [(n, o, DTYPES[i % 2]) for i, (n, o) in enumerate(rotating().items())],
)
@pytest.mark.sampled(11, 2)
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


def biased(**fields):
    given = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 37, "qk_dim": 16}
    given |= {"outputs": ("out", "lse"), "derivatives": "vjp"}
    return AttentionSpec(**given | fields)


def reading(name, axes, read, dtype="float32"):
    """A score of each function, which all read the same operand."""
    operand = attngen.operand(name, axes=axes, dtype=dtype)
    return tuple(
        attngen.score(lambda s, b, h, q, k, f=f: f(operand, s, b, h, q, k))
        for f in read
    )


FAR = 2**30 - 1
ROWS = reading(
    "by_query", ("b", "h", "q", 5), [lambda x, s, b, h, q, k: s + x[b, h, q, k // 8]]
)
ODD = {
    "entries of each query": biased(
        score=ROWS, mask=masks.causal(), q_lengths=True, dtype="float16"
    ),
    "entries of each key": biased(
        score=reading(
            "by_key", ("k", 3, 2), [lambda x, s, b, h, q, k: s + x[k, (q // 4) % 3, k % 2]]
        ),
        mask=masks.causal(), kv_lengths=True, layout="bhtd",
    ),
    "a long name, read by two scores": biased(
        q_len=20,
        score=reading(
            "relative_bias_all_head", ("h", 40),
            [
                lambda x, s, b, h, q, k: s + 2 * x[h, k - q + 20],
                lambda x, s, b, h, q, k: s * x[h, k - q + 20],
            ],
        ),
    ),
    "axes exchanged, of 16 bits": biased(
        score=reading(
            "kq", ("k", "h", "q"), [lambda x, s, b, h, q, k: s + x[k, h, q]], "bfloat16"
        ),
        dtype="float16",
    ),
    "a bias, dropout, lengths": biased(
        score=scores.bias(axes="bqk"), dropout=0.2, kv_lengths=True, q_lengths=True
    ),
    "far positions": biased(
        mask=masks.sliding_window(9), q_offset=FAR, kv_offset=FAR
    ),
    "out is coarser than q": biased(out_dtype="float16", sink=True, mask=masks.causal()),
    "a sink beside low scores": biased(
        sink=True,
        score=attngen.score(lambda s, b, h, q, k: where(k < q - 3, s, -10000.0)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.sampled(3)
def test_odd(name):
    judge(ODD[name])


def test_a_sink_takes_no_part_in_lse():
    """However large it is: its weight beside the keys' would be infinite."""
    spec = biased(outputs=("lse",), sink=True)
    given = inputs.arrays(spec, nan=False)
    given["sink"][:] = (500, -500, 0, 90)
    given["dlse"] = np.ones((2, 4, 37), np.float32)
    choices = {"q_chunk": 16, "k_chunk": 16, "backward_q_chunk": 32}
    path = api.stored(attngen.emit(interpreted.plan(spec, **choices)))
    lse, *made = interpreted.program(spec, path)(**given)
    assert np.isfinite(lse).all()
    assert all(np.isfinite(x).all() for x in made)
    assert not made[-1].any()


@pytest.mark.parametrize(
    ("axes", "read", "what"),
    [
        (("b", "q", "k"), lambda x, s, b, h, q, k: s + x[b, q, q], "two axes"),
        ((2, "q", "k"), lambda x, s, b, h, q, k: s + x[b % 2, q, k], "computed"),
    ],
)
def test_gradients_that_have_no_place_are_refused(axes, read, what):
    spec = biased(score=reading("x", axes, [read]))
    with refused(NotBuiltError, what):
        interpreted.plan(spec)
    interpreted.plan(dataclasses.replace(spec, derivatives=None))


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

taken = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts[:3]]
dout, dlse = torch.randn(2, 32, 70, 2).permute(0, 2, 3, 1), torch.randn(2, 70, 2).mT
kept = [x.detach() for x in (*module._attention(*taken, parts[3]),)]
taken = [x.detach() for x in (*taken, parts[3])]
made = torch.library.opcheck(
    module._gradients, [*taken, *kept[2:], dout, dlse], test_utils=("test_faketensor",)
)

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
for size in ((0, 70), (2, 0)):  # no batch, or no tokens
    none = [torch.randn(*size, *s[2:]) for s in shapes.values()]
    none[3] = torch.randn(2, size[1])
    none = [x.requires_grad_() for x in none]
    assert not any(x.any() for x in gradients(loss, none))
bad = [x.detach().clone() for x in parts]
bad[0][1, 5, 0, 3] = torch.nan  # reaches the gradients, and hides from none
assert gradients(loss, [x.requires_grad_() for x in bad])[0][1, 5, 0].isnan().all()
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
    for kv_offset in (0, 4, 6):  # four words at a time, and one by one
        moved = dataclasses.replace(spec, kv_offset=kv_offset)
        in_jax = attngen.plan(moved, backend="jax", fix={"algorithm": "dense"})
        function = load_function(api.stored(attngen.emit(in_jax)))
        want = np.asarray(function(**given)) > 0
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


def test_more_gradients_than_a_line_has_room_for():
    score = (scores.alibi(), scores.bias(axes="hk"))
    judge(differentiated(SPECS["sink"], score=score, q_offset=0))
