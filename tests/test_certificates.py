"""Certificates: what is certified, and that it is what the compiler says and memory shows.

XLA in the child process says of a program what it says in this one, with the memory that
its own figure leaves out.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, certifier, masks
from attngen.backends.jax.scratch import scratch_bytes
from attngen.errors import BackendError, CallError, CompileError, TargetError
from attngen.kernel import Kernel
from attngen.reports import Certificate


def here(function, *shapes, **named):
    """Figures of a compiler in this process: temporaries, inputs, outputs."""
    compiled = jax.jit(function).lower(*shapes, **named).compile()
    memory = compiled.memory_analysis()
    scratch = scratch_bytes(compiled.as_text())
    return (
        memory.temp_size_in_bytes + scratch,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
    )


def figures(certificate):
    return (
        certificate.temp_bytes,
        certificate.argument_bytes,
        certificate.output_bytes,
    )


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


SPEC = AttentionSpec(
    q_heads=4, kv_heads=2, q_len=70, qk_dim=16, dtype="bfloat16", kv_lengths=True,
    mask=masks.causal(), outputs=("out", "lse"),
)  # fmt: skip
FIX = {"q_chunk": 32, "k_chunk": 16}


def test_a_kernel_has_the_certificate_of_its_source():
    kernel = attngen.build(SPEC, fix=FIX)
    inputs = {n: shape(*SPEC.shape_of(n), dtype=SPEC.dtype_of(n)) for n in "qkv"}
    inputs["kv_lengths"] = shape(1, dtype="int32")
    certificate = kernel.certificate
    assert certificate.target == "cpu"
    assert certificate.digest == kernel.source.digest
    assert figures(certificate) == here(kernel.function, **inputs)
    assert certificate.argument_bytes == SPEC.bytes_of(*inputs)
    assert certificate.spill_bytes is None
    assert certificate.estimated_cycles is None
    assert certificate.compile_s > 0
    assert certificate.versions["jax"] == jax.__version__


def test_a_kernel_and_its_plan_are_one_program(monkeypatch):
    asked = []

    def certify(*given, **named):
        asked.append((given, named))
        return Certificate("cpu", "a test", 1)

    monkeypatch.setattr(certifier, "certify", certify)
    made = attngen.plan(SPEC, fix=FIX)
    source = attngen.emit(made)
    kernel = Kernel(SPEC, made, source, None, None, function=None)
    attngen.certify(made)
    attngen.certify(kernel)
    attngen.certify(kernel, target="cpu")
    assert asked[0] == asked[1] == asked[2]
    assert asked[0][1]["source"] == source.text


def training_step(parameters, batch):
    """One step of a small network: pytrees in, pytrees out."""

    def loss(p):
        hidden = jnp.tanh(batch["x"] @ p["w"] + p["b"][0])
        return jnp.mean((hidden @ p["w"].T - batch["y"]) ** 2)

    value, gradient = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient), value


def test_a_function_of_the_users_own_is_certified():
    parameters = {"w": shape(64, 128), "b": [shape(128)]}
    batch = {"x": shape(256, 64), "y": np.zeros((256, 64), np.float32)}
    certificate = attngen.certify(training_step, parameters, batch)
    batch["y"] = shape(256, 64)
    assert figures(certificate) == here(training_step, parameters, batch)
    assert certificate.digest is None
    jitted = attngen.certify(jax.jit(training_step), parameters, batch)
    assert figures(jitted) == figures(certificate)


def test_arguments_of_every_dtype():
    def f(key, x, flags, count):
        return jnp.where(flags, x + jax.random.normal(key, x.shape), count)

    arguments = (
        jax.random.key(0),
        jnp.ones((8,), jnp.bfloat16),
        np.ones(8, bool),
        np.int32(3),
    )
    certificate = attngen.certify(f, *arguments)
    assert certificate.output_bytes == 8 * 4


def test_attention_within_a_users_function_is_certified():
    def layer(x):
        q, k, v = jnp.split(x, 3, -1)
        return attngen.attention(q, k, v, mask=masks.causal(), fix=FIX).sum((1, 2))

    certificate = attngen.certify(layer, shape(1, 64, 2, 24))
    assert 0 < certificate.temp_bytes < 2**20


@pytest.mark.parametrize(
    ("kind", "ask"),
    [
        (CallError, lambda: attngen.certify(3)),
        (CallError, lambda: attngen.certify(jnp.sin, 3.0)),
        (CallError, lambda: attngen.certify(jnp.sin, {"x": "y"})),
        (TargetError, lambda: attngen.certify(jnp.sin, shape(3), target="abacus")),
        (BackendError, lambda: attngen.certify(jnp.sin, shape(3), target="mi300x")),
        (BackendError, lambda: attngen.certify(attngen.plan(SPEC), target="mi355x")),
    ],
)
def test_what_cannot_be_certified_is_refused(kind, ask):
    with refused(kind):
        ask()


def test_a_program_that_the_compiler_refuses():
    with refused(CompileError) as caught:
        certifier.certify(
            "attngen.backends.jax.compiler",
            "cpu",
            shapes=[(name, (2, 2), "float32") for name in "qkv"],
            source="def attention(q, k, v):\n    return missing\n",
        )
    assert "NameError" in caught.value.got


# A certificate counts what a process then takes.

DENSE = AttentionSpec(q_heads=8, q_len=2048, qk_dim=64)
MEASURE = """
import sys
import jax, jax.numpy as jnp, numpy as np
from attngen.backends.jax.loader import load
from pathlib import Path

function = load(Path(sys.argv[1]))
q, k, v = (np.full((1, 2048, 8, 64), 0.1, np.float32) for _ in range(3))
q, k, v = (jax.block_until_ready(jnp.asarray(x)) for x in (q, k, v))
compiled = function.lower(q, k, v).compile()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from now's
status = Path("/proc/self/status")
read = lambda: dict(n.split(":", 1) for n in status.read_text().splitlines())
start = int(read()["VmRSS"].removesuffix("kB"))
out = jax.block_until_ready(compiled(q, k, v))
end = int(read()["VmHWM"].removesuffix("kB"))
print((end - start) * 1024 - out.nbytes)
"""


def test_dense_attention_takes_no_more_than_is_certified(tmp_path, process_environment):
    plan = attngen.plan(DENSE, fix={"algorithm": "dense"})
    certificate = attngen.certify(plan)
    square = 8 * 2048 * 2048 * 4
    assert certificate.temp_bytes > square
    path = attngen.emit(plan).write(tmp_path / "dense.py")
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, path],
        env=process_environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert square / 2 < int(measured.stdout) <= certificate.temp_bytes + 2**22


HLO = """\
HloModule jit_attention, is_scheduled=true

%inside (parameter: f32[8,4], parameter.1: bf16[4,8]) -> f32[8,8] {
  %parameter = f32[8,4]{1,0} parameter(0)
  %parameter.1 = bf16[4,8]{1,0} parameter(1)
  %convert = f32[4,8]{1,0} convert(%parameter.1)
  %dot = f32[8,8]{1,0:T(8,128)} dot(%parameter, %convert), lhs_contracting_dims={1}
  %mask = pred[8,8]{1,0} broadcast(%parameter), dimensions={}
  %is = pred[8,8]{1,0} compare(%dot, %dot), direction=EQ
  ROOT %exponential = f32[8,8]{1,0} exponential(%dot)
}

%outside (parameter.2: f32[8,8]) -> f32[] {
  %parameter.2 = f32[8,8]{1,0} parameter(0)
  %large = f32[1000,1000]{1,0} negate(%parameter.2)
  ROOT %reduce = f32[] reduce(%large, %parameter.2), to_apply=%outside
}

ENTRY %main (q: f32[8,4], k: bf16[4,8]) -> f32[8,8] {
  %q = f32[8,4]{1,0} parameter(0)
  %k = bf16[4,8]{1,0} parameter(1)
  FUSION
}
"""
YNN = (
    "ROOT %f = f32[8,8]{1,0} fusion(%q, %k), kind=kCustom, calls=%inside, "
    'backend_config={"fusion_config":{"kind":"__ynn_fusion"}}'
)
LOOP = "ROOT %f = f32[] fusion(%q), kind=kLoop, calls=%outside"


def test_scratch_is_what_a_library_fusion_holds_between_input_and_output():
    inside = 4 * 8 * 4 + 8 * 8 * 4 + 8 * 8  # convert, dot, compare
    assert scratch_bytes(HLO.replace("FUSION", YNN)) == inside
    assert scratch_bytes(HLO.replace("FUSION", YNN + "\n  " + YNN)) == inside
    assert (
        scratch_bytes(HLO.replace("FUSION", YNN.replace("%inside", "inside"))) == inside
    )


@pytest.mark.parametrize("text", [HLO, HLO.replace("FUSION", LOOP), "", "no HLO"])
def test_no_library_fusion_no_scratch(text):
    assert scratch_bytes(text) == 0


def test_a_certificate_is_data():
    certificate = attngen.certify(jnp.sin, shape(3))
    assert Certificate.from_json(certificate.to_json()) == certificate
    unknown = dataclasses.replace(certificate, temp_bytes=None)
    assert Certificate.from_json(unknown.to_json()) == unknown
    assert "unknown" in str(unknown)
