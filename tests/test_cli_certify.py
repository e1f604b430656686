"""attngen certify module:function: a user's own function, from text to a certificate."""

import json
import sys

import jax
import pytest
from commands import DONE, FAILED, WRONG, process, refused, run

import attngen
from attngen import certifier, compilers, targets
from attngen.errors import CompileError
from attngen.reports import Certificate

MODULE = '''
import jax
import jax.numpy as jnp

import attngen
from attngen import masks

TARGET = "tpu-v5e"


def layer(w, x, rate=None):
    """A step of training: attention within, and its gradient."""

    def loss(w):
        q, k, v = ((x @ w[n]).reshape(*x.shape[:2], 2, 16) for n in "qkv")
        how = {"mask": masks.causal(), "derivatives": "vjp"}
        return (attngen.attention(q, k, v, **how) ** 2).mean()

    value, gradient = jax.value_and_grad(loss)(w)
    rate = 0.1 if rate is None else rate
    return jax.tree.map(lambda p, g: p - rate * g, w, gradient), value


def forward(q, k, v):
    return attngen.attention(
        q, k, v, target=TARGET, mask=masks.causal(), fix={"q_chunk": 128, "k_chunk": 128}
    )


def branch(x):
    return helper(x)


def helper(x):
    if (x > 0).all():
        return x
    return -x


class Oops(Exception):
    """No built-in error is among its bases."""


def raises(x):
    raise Oops("not today")


def leaves(x):
    raise SystemExit(3)


def large(x):
    return jnp.sort(x @ x.T)


def loud(x):
    print("printed as it is traced")
    return x


class Net:
    @staticmethod
    def apply(x):
        return x + 1
'''
LOUD = """
from steps import forward, loud

print("printed as it is imported")
"""
TREE = '{"q":"f32[32,32]","k":"f32[32,32]","v":"f32[32,32]"},f32[1,64,32]'
STEP = ("certify", "steps:layer", "--shapes", TREE)


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """A folder to work in, with the module steps; imported anew by each test."""
    (tmp_path / "steps.py").write_text(MODULE)
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "no_python.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("steps", "loud", "broken", "no_python"):
        sys.modules.pop(name, None)


def needs(target):
    missing = compilers.all_of(targets.get(target))[-1].missing
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


def test_a_training_step_is_certified_as_from_python(module):
    figures = json.loads(run(*STEP, "--json")[0])
    sys.path.insert(0, str(module))
    import steps

    w = {n: jax.ShapeDtypeStruct((32, 32), "float32") for n in "qkv"}
    x = jax.ShapeDtypeStruct((1, 64, 32), "float32")
    want = attngen.certify(steps.layer, w, x)
    for name in ("temp_bytes", "argument_bytes", "output_bytes"):
        assert figures[name] == getattr(want, name)
    assert figures["argument_bytes"] == 4 * (3 * 32 * 32 + 64 * 32)
    assert figures["fits"]


def test_the_text_says_what_it_takes_beside():
    out, _ = run("certify", "steps:Net.apply", "--shapes", "f32[8,128]")
    assert out == (
        "cpu: 0 B of temporaries (0 bytes), says XLA:CPU\n"
        "  beside 4.0 KiB of arguments and 4.0 KiB of outputs\n"
    )


def test_arguments_by_name_and_a_file_in_place_of_a_module():
    tree, x = TREE.split("},")
    out, _ = run(
        "certify", "steps.py:layer", "--shapes", tree + "}", "--shapes", f"x={x}",
        "--shapes", "rate=f32[]", "--json",
    )  # fmt: skip
    assert json.loads(out)["argument_bytes"] == 4 * (3 * 32 * 32 + 64 * 32 + 1)


def test_over_the_budget(monkeypatch):
    figures = {"argument_bytes": 1, "output_bytes": 2, "estimated_cycles": 5}
    said = Certificate("tpu-v3", "a test", 2**20, **figures)
    monkeypatch.setattr(certifier, "certify", lambda *_, **__: said)
    command = ("certify", "steps:Net.apply", "--shapes", "f32[8]", "--budget")
    assert "over" not in run(*command, "1MiB")[0]
    out, _ = run(*command, 2**20 - 1, code=FAILED)
    assert out.splitlines()[1:] == [
        "  about 5 cycles (estimated)",
        "  beside 1 B of arguments and 2 B of outputs",
        "over the budget of 1024.0 KiB by 1 B",
    ]
    out, _ = run(*command, 2**20 - 1, "--json", code=FAILED)
    assert json.loads(out)["fits"] is False


WRONG_FUNCTIONS = {
    "no module": ("nothing:f", "nothing"),
    "no file": ("nothing.py:f", "nothing.py"),
    "no function": ("steps:nothing", "steps"),
    "no attribute": ("steps:Net.nothing", "Net.nothing"),
    "no name": ("steps:", "steps"),
    "no module's name": (":f", "module"),
    "a word that is no name": ("a-b:f", "a-b"),
    "no function but text": ("steps:TARGET", "TARGET"),
    "a module that raises": ("broken:f", "broken"),
    "a module that isn't Python": ("no_python:f", "no_python"),
    "a branch": ("steps:branch", "branch"),
    "an error of its own": ("steps:raises", "raises"),
    "an exit": ("steps:leaves", "leaves"),
    "an argument too few": ("steps:forward", "forward"),
}


@pytest.mark.parametrize(
    ("name", "named"), WRONG_FUNCTIONS.values(), ids=WRONG_FUNCTIONS
)
def test_a_wrong_function_is_refused(name, named):
    error = refused("FunctionError", "certify", name, "--shapes", "f32[8]")
    assert named in error["what"]


def test_what_it_raises_is_said_with_where_in_the_users_file():
    error = refused("FunctionError", "certify", "steps:branch", "--shapes", "f32[8]")
    first, *where = error["got"].splitlines()
    assert first.startswith("TracerBoolConversionError: ")
    assert [line.partition(":")[2].partition(",")[2] for line in where] == [
        " in branch: return helper(x)",
        " in helper: if (x > 0).all()",
    ]
    error = refused("FunctionError", "certify", "steps:raises", "--shapes", "f32[8]")
    assert error["got"].startswith("Oops: not today\nsteps.py:")


def test_the_arguments_that_are_needed_are_said():
    error = refused("FunctionError", "certify", "steps:forward", "--shapes", "f32[8]")
    assert "float32[8]" in error["got"]
    assert "'k'" in error["got"]
    assert error["needed"] == "forward(q, k, v)"


def test_what_attngen_refuses_inside_is_said_as_elsewhere():
    arguments = "f32[8],f32[8],f32[8]"
    refused("CallError", "certify", "steps:forward", "--shapes", arguments)


@pytest.mark.parametrize(
    "options",
    [("--q-len", 3), ("--preset", "llama3-8b"), ("--fix", "q_chunk=1"), ("--sink",),
     ("--backend", "jax")],
    ids=str,
)  # fmt: skip
def test_what_is_said_of_a_spec_is_refused(options):
    refused("SpecError", "certify", "steps:forward", *options)


def test_other_wrong_requests():
    refused("SpecError", "certify", "--preset", "llama3-8b", "--shapes", "f32[8]")
    refused("ShapeError", "certify", "steps:raises", "--shapes", "f32[8")
    refused("BackendError", "certify", "steps:Net.apply", "--shapes", "f64[8]")
    refused("BackendError", "certify", "steps:Net.apply", "--shapes", "c128[8]")
    refused("BudgetError", *STEP, "--budget", "a lot")
    refused("TargetError", *STEP, "--target", "abacus")


@needs("tpu-v5e")
def test_attention_for_a_tpu_within_a_function():
    heads = ",".join(["bf16[1,512,2,64]"] * 3)
    command = ("certify", "steps:forward", "--shapes", heads, "--target", "tpu-v5e")
    figures = json.loads(run(*command, "--json")[0])
    assert figures["compiler"] == "XLA:TPU"
    assert figures["argument_bytes"] == 3 * 2 * 2 * 512 * 64
    assert 0 < figures["on_chip_bytes"] + figures["temp_bytes"] < 2**22


@pytest.mark.parametrize(
    ("target", "has"),
    [pytest.param("tpu-v5e", "15.8 GiB", marks=needs("tpu-v5e")),
     pytest.param("h100", "74.5 GiB", marks=needs("h100"))],
)  # fmt: skip
@pytest.mark.sampled(2)
def test_a_program_that_does_not_fit_the_device(target, has):
    command = ("certify", "steps:large", "--shapes", "f32[150000,64]")
    error = refused("CompileError", *command, "--target", target)
    assert error["what"] == "The program doesn't fit the device's memory."
    need = float(error["got"].removeprefix("a program that needs ").split()[0])
    assert 2 * 4 * 150_000**2 < need * 2**30 < 4 * 4 * 150_000**2
    assert error["needed"] == f"at most {has}"


@pytest.mark.parametrize(
    ("said", "got"),
    {
        "RESOURCE_EXHAUSTED: HLO temporaries (2.50G) exceeds available HBM (15.75G).":
            "a program that needs 2.5 GiB",
        "RESOURCE_EXHAUSTED: memory required (512) exceeds available HBM (256)":
            "a program that needs 512 B",
        "RESOURCE_EXHAUSTED: in memory space vmem. Used 24.00M of 16.00M vmem.":
            "a program that needs 24.0 MiB",
        "RESOURCE_EXHAUSTED: some day, other words": "RESOURCE_EXHAUSTED: some day, other words",
    }.items(),
)  # fmt: skip
def test_the_compilers_words_for_a_program_that_does_not_fit(said, got):
    with pytest.raises(CompileError, match="doesn't fit the device") as caught:
        certifier._value({"error": said})
    assert caught.value.got == got


def test_what_it_prints_is_no_result(module, process_environment):
    command = ("certify", "loud:loud", "--shapes", "f32[8]", "--json")
    ended = process(*command, cwd=module, environment=process_environment)
    assert ended.returncode == DONE
    assert json.loads(ended.stdout)["argument_bytes"] == 32
    assert "printed as it is imported\nprinted as it is traced" in ended.stderr
    command = ("certify", "loud:forward", "--shapes", "f32[8]", "--json")
    ended = process(*command, cwd=module, environment=process_environment)
    assert ended.returncode == WRONG
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
