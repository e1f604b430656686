"""benchmarks/gpu.py, which needs a GPU: what of it can be run without one, on tiny shapes."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gallery
import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from test_triton import LIKE

import attngen
from attngen import backends, inputs, masks, reference
from attngen.backends.triton import loader
from attngen.validator import largest_error

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
# torch warns where flex_attention isn't compiled
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def benchmark():
    made = importlib.util.spec_from_file_location("benchmark_of_gpus", BENCHMARK)
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module


def tiny(name):
    """A gallery entry's spec in few tokens, its limits as far as the mask allows."""
    spec, target, fix = gallery.TRITON[name]
    plan = attngen.plan(spec(), target, "triton", fix)
    return backends.get("triton").small(plan, rebuild=True)[0]


def assert_computes(spec, make):
    arrays = inputs.arrays(spec, nan=False)
    tensors = {n: loader.tensor(x, spec.dtype_of(n)) for n, x in arrays.items()}
    made = make(tensors)()
    operands = {n: x for n, x in arrays.items() if n not in ("q", "k", "v")}
    want = reference.attention(spec, *(arrays[n] for n in "qkv"), operands)
    near = 1e-5 if spec.dtype == "float32" else 3e-2
    for output, x in zip(spec.outputs, made, strict=True):
        numbers = loader.numbers(x)
        assert numbers.dtype == reference.numpy_dtype(spec.dtype_of(output))
        size = np.abs(want[output][np.isfinite(want[output])]).max()
        assert largest_error(numbers, want[output]) < near * max(1, size), output


def uncompiled(function):
    return function


@pytest.mark.parametrize("name", gallery.TRITON)
@pytest.mark.sampled(3)
def test_flex_attention_says_every_file_of_the_gallery(benchmark, name):
    spec = tiny(name)
    if spec.dropout or spec.storage != "dense" or spec.is_quantised:
        assert benchmark.flex_attention(spec, {}) is None
        return
    assert_computes(
        spec,
        lambda given: benchmark.flex_attention(
            spec, benchmark.heads_first(spec, given), uncompiled
        ),
    )


def test_sdpa_says_what_is_plain(benchmark):
    said = set()
    for name in gallery.TRITON:
        spec = tiny(name)
        call = benchmark.sdpa(spec, dict.fromkeys("qkv"))
        if call is not None:
            said.add(name)
            assert_computes(
                spec,
                lambda given, spec=spec: benchmark.sdpa(
                    spec, benchmark.heads_first(spec, given)
                ),
            )
    plain = {"llama3_8b", "llama3_8b_descriptors", "sd15_cross", "training_llama3_8b"}
    assert said == plain


def test_outputs_that_differ_are_told(benchmark):
    import torch

    spec = attngen.AttentionSpec(q_heads=2, q_len=3, qk_dim=4, mask=masks.causal())
    out = torch.zeros(1, 2, 3, 4)
    ours = torch.zeros(1, 3, 2, 4)
    assert benchmark.difference(spec, lambda: (out,), ours) == 0
    ours[0, 2, 1, 3] = 0.5
    assert benchmark.difference(spec, lambda: (out,), ours) == 0.5
    both = attngen.AttentionSpec(q_heads=2, q_len=3, qk_dim=4, outputs=("lse", "out"))
    lse = torch.full((1, 2, 3), -torch.inf)
    assert benchmark.difference(both, lambda: (lse, out), (lse, 0 * ours)) == 0


def test_where_a_gpu_is_here_the_conformance_matrix_is_compiled_for_it(monkeypatch):
    """Its tensors go there, and no interpreter computes: here the file then refuses them."""
    there = "import torch\ntorch.Tensor.cuda = lambda self: self\n"
    monkeypatch.setattr(interpreted, "_SERVER", there + interpreted._SERVER)
    anew = functools.cache(interpreted._server.__wrapped__)
    monkeypatch.setattr(interpreted, "_server", anew)
    monkeypatch.setattr(interpreted, "has_gpu", lambda: True)
    monkeypatch.setattr(interpreted, "target_here", lambda: "a100")
    fix = {"q_chunk": 16, "k_chunk": 16}
    assert interpreted.plan(LIKE, **fix).target == "a100"
    with pytest.raises(interpreted.Failed, match="this kernel needs a GPU"):
        interpreted.judge(LIKE, **fix)
    with pytest.raises(pytest.skip.Exception, match="a100 has no tensor descriptors"):
        interpreted.plan(LIKE, loads="descriptors", **fix)
    monkeypatch.setattr(interpreted, "target_here", lambda: "h200")
    assert interpreted.plan(LIKE, loads="descriptors", **fix).target == "h200"


FAKED = """
import runpy, sys, time
import torch
sys.path.insert(0, sys.argv[1])
import gallery
from attngen import timing
from attngen.backends.triton import loader

class Event:
    def __init__(self, enable_timing): pass
    def record(self): self.at = time.perf_counter()
    def elapsed_time(self, end): return 1e3 * (end.at - self.at)

loader.DRIVERS = ("/",)
timing.USELESS = 1e9  # other tests run beside this one
torch.version.hip = None
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "NVIDIA A100-SXM4-80GB"
torch.cuda.get_device_capability = lambda: (8, 0)
torch.cuda.synchronize = lambda: None
torch.cuda.Event = Event
torch.Tensor.cuda = lambda self: self
torch_compile = torch.compile

def eager(function, **given):
    if "backend" in given:  # flex_attention itself, where it isn't compiled
        return torch_compile(function, **given)
    def call(*args, **named):
        torch.cuda.is_available = lambda: False  # it would ask more of the device
        try:
            return function(*args, **named)
        finally:
            torch.cuda.is_available = lambda: True
    return call

torch.compile = eager
gallery.TRITON = {
    "few": gallery.Entry(
        lambda: gallery.dataclasses.replace(
            gallery.causal_alibi(), q_heads=2, kv_heads=2, q_len=24, kv_len=24, qk_dim=16,
            v_dim=16, dtype="float16",
        ), "a100", {"q_chunk": 16, "k_chunk": 16, "num_warps": 1, "num_stages": 1,
                    "order": "forward", "head_dim": "padded"},
    ),
    "llama3_8b_descriptors": gallery.TRITON["llama3_8b_descriptors"],
}
import pathlib
source = pathlib.Path(sys.argv[2]).read_text()
names = {"__name__": "__main__", "__file__": sys.argv[3]}
sys.argv = [sys.argv[2], "--rounds", "3", "--seconds", "5"]
exec(compile(source, "gpu.py", "exec"), names)
"""


@pytest.mark.slow
def test_the_whole_command_on_a_device_that_is_faked(tmp_path):
    """Planned, certified, validated, tuned and timed: by the interpreter as the GPU."""
    (tmp_path / "results").mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", FAKED, Path(__file__).parent, BENCHMARK,
         tmp_path / "gpu.py"],
        capture_output=True, text=True, timeout=500,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.startswith("few ")
    assert "flex_attention" in ran.stdout
    found = json.loads((tmp_path / "results" / "gpu_a100.json").read_text())
    assert found["device"] == "NVIDIA A100-SXM4-80GB"
    assert set(found["kernels"]) == {"few"}  # a100 has no tensor descriptors
    row = found["kernels"]["few"]
    assert row["report"]["passed"]
    assert row["report"]["ran"] == "on NVIDIA A100-SXM4-80GB"
    assert row["certificate"]["matrix_instruction"].startswith("HMMA")
    assert row["left_out"] == {}
    assert np.isfinite(row["largest_difference"]["flex_attention"])
    assert row["largest_difference"]["flex_attention"] < 0.01
    assert {len(x) for x in row["samples_s"].values()} == {3}
