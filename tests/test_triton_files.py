"""Emitted Triton files as torch's users have them: what they refuse, what torch sees."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from test_conformance import SPECS
from test_triton import LIKE, small_blocks, source_of

import attngen
from attngen import api, inputs, masks, scores
from attngen.backends.triton.loader import has_gpu
from attngen.errors import BackendError
from attngen.names import is_free


def test_a_file_refuses_what_its_kernel_does_not_take():
    spec = dataclasses.replace(
        LIKE, mask=masks.causal(), score=(scores.alibi("slopes"),)
    )
    path = api.stored(source_of(spec, q_chunk=32, k_chunk=32))
    good = inputs.arrays(spec)
    bad = {
        "four dimensions": {"q": good["q"][0]},
        "float16": {"k": good["k"].astype(np.float16)},
        "no offset is known": {"k": good["k"][:, :50], "v": good["v"][:, :50]},
        "kv heads": {"q": good["q"][:, :, :1]},
        "not torch.float32[2, 70, 1, 32]": {"v": good["v"][:, :, :, :16]},
        "slopes": {"slopes": good["slopes"][:1]},
    }
    for words, change in bad.items():
        with pytest.raises(interpreted.Failed, match=words.replace("[", r"\[")):
            interpreted.call(path, **good | change)


@pytest.mark.parametrize("name", ["k", "v"])
def test_strides_that_no_tensor_descriptor_takes_are_refused(name):
    spec = dataclasses.replace(LIKE, dtype="float16")
    path = api.stored(source_of(spec, loads="descriptors"))
    code = (
        "import sys, importlib.util, torch\n"
        "made = importlib.util.spec_from_file_location('emitted', sys.argv[1])\n"
        "module = sys.modules['emitted'] = importlib.util.module_from_spec(made)\n"
        "made.loader.exec_module(module)\n"
        "q, k, wide = (torch.zeros(2, 70, h, d, dtype=torch.float16)\n"
        "              for h, d in ((2, 32), (1, 32), (1, 36)))\n"
        "for odd in (wide[..., :32], wide.expand(2, 70, 1, 36)[..., 2:34],\n"
        "            torch.zeros(2, 70, 1, 64, dtype=torch.float16)[..., ::2]):\n"
        "    try: module.attention(**{'q': q, 'k': k, 'v': k} | {sys.argv[2]: odd})\n"
        "    except ValueError as error: print('multiples of 16 bytes' in str(error))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path), name],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["True"] * 3, ran.stderr[-2000:]


def test_without_a_gpu_a_call_says_so():
    spec = dataclasses.replace(LIKE, mask=masks.causal())
    code = (
        "import sys, importlib.util, torch\n"
        "made = importlib.util.spec_from_file_location('emitted', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(made)\n"
        "made.loader.exec_module(module)\n"
        "q, k = torch.zeros(2, 70, 2, 32), torch.zeros(2, 70, 1, 32)\n"
        "module.attention(q, k, k)\n"
    )
    path = api.stored(source_of(spec))
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True
    )
    assert "needs a GPU" in ran.stderr.splitlines()[-1]


def test_emitted_files_are_tidy(tmp_path):
    for i, spec in enumerate(SPECS.values()):
        source_of(spec, **small_blocks(spec)).write(tmp_path / f"file_{i}.py")
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--isolated", "--no-cache",
             tmp_path],
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout


def test_names_that_files_use_are_taken():
    for name, spec in SPECS.items():
        tree = ast.parse(source_of(spec, **small_blocks(spec)).text)
        own = {o.name for o in spec.operands}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in (
                "attention",
                "_attention",
            ):
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                inner = {
                    t.id
                    for n in ast.walk(node)
                    if isinstance(n, ast.comprehension)
                    for t in ast.walk(n.target)
                    if isinstance(t, ast.Name)
                }
                assert not {n for n in used - own - inner if is_free(n)}, name


IN_TORCH = """
import importlib.util, sys, torch
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
module = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(module)
q, k, v = (torch.randn(2, 70, h, 32) for h in (2, 1, 1))
torch.library.opcheck(
    module._attention, (q, k, v), test_utils=("test_schema", "test_faketensor")
)
out, lse = module.attention(q, k, v)
compiled = torch.compile(lambda *a: module.attention(*a), backend="eager", fullgraph=True)
assert torch.equal(compiled(q, k, v)[0], out)

def strided(x):
    wide = torch.full((2, 4, 33, 141), torch.nan)
    view = wide[:, :x.shape[2], :32, 1::2].permute(0, 3, 1, 2)
    view.copy_(x)
    return view

if sys.argv[2] == "descriptors":
    strided = torch.clone
again = module.attention(*map(strided, (q, k, v)))
assert torch.equal(again[0], out) and torch.equal(again[1], lse)
print("right")
"""


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_torch_takes_it_as_one_operation_with_any_strides(loads):
    spec = dataclasses.replace(LIKE, mask=masks.causal())
    path = api.stored(source_of(spec, q_chunk=32, k_chunk=32, loads=loads))
    ran = subprocess.run(
        [sys.executable, "-c", IN_TORCH, str(path), loads],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["right"], ran.stderr[-2000:]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_kernel_is_built_with_its_certificate_and_says_that_it_cannot_be_called():
    spec = dataclasses.replace(LIKE, mask=masks.causal(), dtype="float16")
    kernel = attngen.build(spec, target="a100", fix={"q_chunk": 64, "k_chunk": 32})
    assert kernel.report.passed
    assert kernel.certificate.temp_bytes == kernel.certificate.spill_bytes == 0
    assert kernel.certificate.matrix_instruction.startswith("HMMA")
    with pytest.raises(BackendError, match="can't be called here"):
        kernel(None, None, None)
    assert attngen.validate(kernel).passed


OFFSETS = """
import importlib.util, sys, torch, numpy as np
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
m = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(m)
q, k, v = (torch.randn(2, n, h, 32) for n, h in ((5, 2), (40, 1), (40, 1)))
want = m.attention(q, k, v, q_offset=torch.full((2,), 35, dtype=torch.int32))[0]
for offset in (35, np.int64(35), torch.tensor(35), torch.tensor(35, dtype=torch.int32)):
    assert torch.equal(m.attention(q, k, v, q_offset=offset)[0], want)
compiled = torch.compile(
    lambda *a, o: m.attention(*a, q_offset=o)[0], backend="eager", fullgraph=True
)
assert torch.equal(compiled(q, k, v, o=35), want)
for offset in (1.5, [1, 2], torch.tensor(1.7), 2**31, -(2**31), None):
    try:
        m.attention(q, k, v, q_offset=offset)
    except (TypeError, ValueError):
        print("refused")
"""


def test_what_q_offset_takes():
    spec = dataclasses.replace(
        LIKE, q_len=5, kv_len=40, mask=masks.causal(), q_offset="operand"
    )
    path = api.stored(source_of(spec, q_chunk=16, k_chunk=16))
    ran = subprocess.run(
        [sys.executable, "-c", OFFSETS, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["refused"] * 6, ran.stderr[-2000:]


COPIES = """
import importlib.util, sys, torch
def load(path):
    made = importlib.util.spec_from_file_location(path[-12:-3], path)
    module = sys.modules[path[-12:-3]] = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module
q, k, v = (torch.randn(2, 70, h, 32) for h in (2, 1, 1))
own = load(sys.argv[1])
before = own.attention(q, k, v)[0]
edited = load(sys.argv[2])
print(torch.equal(own.attention(q, k, v)[0], before))
print(torch.equal(edited.attention(q, k, v)[0], before))
"""


def test_an_edited_copy_leaves_the_first_as_it_is(tmp_path):
    text = source_of(LIKE, q_chunk=32, k_chunk=32).text
    first, second = tmp_path / "a_first.py", tmp_path / "an_edited.py"
    first.write_text(text)
    second.write_text(
        text.replace("SCALE_LOG2 = tl.constexpr(", "SCALE_LOG2 = tl.constexpr(2 * ")
    )
    ran = subprocess.run(
        [sys.executable, "-c", COPIES, str(first), str(second)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["True", "False"], ran.stderr[-2000:]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_file_is_validated_where_its_path_is_relative(tmp_path, monkeypatch):
    source_of(LIKE, q_chunk=32, k_chunk=32).write(tmp_path / "here.py")
    monkeypatch.chdir(tmp_path)
    assert attngen.validate("here.py").passed
