"""How commands refuse: the message, the exit code, and never a traceback.

`refused` gives each command twice, for text and for --json, and expects the same of both.
"""

import json
import os

import pytest
from commands import FAILED, LLAMA, SMALL, TOML, WRONG, edit, misused, refused, run

from attngen import drawing

ON_TRITON = ("--backend", "triton", "--target", "h100")
REQUESTS = {
    "no spec": ("SpecError",),
    "preset": ("PresetError", "--preset", "llama4"),
    "target": ("TargetError", *LLAMA, "--target", "abacus"),
    "no target": ("TargetError", *LLAMA, "--target", ""),
    "JAX on AMD's GPUs": (
        "BackendError",
        *LLAMA,
        "--target",
        "mi300x",
        "--backend",
        "jax",
    ),
    "Triton on TPUs": (
        "BackendError",
        *LLAMA,
        "--target",
        "tpu-v3",
        "--backend",
        "triton",
    ),
    "TPU": ("TargetError", *LLAMA, "--target", "tpu-v1"),
    "backend": ("BackendError", *LLAMA, "--backend", "abacus"),
    "backend of the contract": ("BackendError", *LLAMA, "--backend", "triton"),
    "choice": ("PlanError", *LLAMA, "--fix", "tile=4"),
    "choices of several algorithms": ("PlanError", *LLAMA, "--fix", "parts=2,unroll=2"),
    "choice's value": ("PlanError", *LLAMA, "--fix", "q_chunk=0"),
    "choice's kind": ("PlanError", *LLAMA, "--fix", "q_chunk=many"),
    "choice's size": ("PlanError", *LLAMA, "--fix", "q_chunk=" + "9" * 5000),
    "choices that clash": ("PlanError", *LLAMA, "--fix", "algorithm=dense,q_chunk=4"),
    "no value": ("PlanError", *LLAMA, "--fix", "q_chunk"),
    "no choice": ("PlanError", *LLAMA, "--fix", ""),
    "a choice twice": ("PlanError", *LLAMA, "--fix", "loop=fori,loop=scan"),
    "algorithm": ("PlanError", *LLAMA, "--fix", "algorithm=flash"),
    "budget": ("BudgetError", *LLAMA, "--budget", "64 parsecs"),
    "budget of 0": ("BudgetError", *LLAMA, "--budget", "0"),
    "negative budget": ("BudgetError", *LLAMA, "--budget", "-1"),
    "budget of many digits": ("BudgetError", *LLAMA, "--budget", "9" * 5000),
    "budget too small": ("BudgetError", *LLAMA, "--budget", "1KiB"),
    "more than there is": ("BudgetError", *LLAMA, "--q-len", 2**31 - 1),
    "kv heads": ("SpecError", *LLAMA, "--kv-heads", "5"),
    "size": ("SpecError", *LLAMA, "--q-len", "0"),
    "unstated offset": ("SpecError", *LLAMA, "--kv-len", "100"),
    "offset": ("SpecError", *LLAMA, "--q-offset", "middle"),
    "dtype": ("SpecError", *LLAMA, "--dtype", "float8"),
    "layout": ("SpecError", *LLAMA, "--layout", "thd"),
    "scale": ("SpecError", *LLAMA, "--scale", "nan"),
    "outputs": ("SpecError", *LLAMA, "--outputs", "out,grad"),
    "precision": ("SpecError", *LLAMA, "--precision", "low"),
    "derivatives": ("NotBuiltError", *LLAMA, "--derivatives", "any", *ON_TRITON),
    "no derivatives": ("SpecError", *LLAMA, "--derivatives", "some"),
    "backward": ("PlanError", *LLAMA, "--derivatives", "vjp", "--fix", "backward=once"),
    "backward of none": ("PlanError", *LLAMA, "--fix", "backward_q_chunk=64"),
    "backward chunk": (
        "PlanError",
        *(*LLAMA, "--derivatives", "vjp", "--fix", "backward_q_chunk=0"),
    ),
    "file and preset": ("SpecError", "spec.toml", *LLAMA),
    "no file": ("FileError", "missing.toml"),
    "no emitted file": ("FileError", "missing.py"),
    "folder": ("FileError", "."),
    "too little": ("SpecError", "--q-heads", "4"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_wrong_request_is_refused(name):
    kind, *arguments = REQUESTS[name]
    refused(kind, "plan", *arguments)


@pytest.mark.parametrize("command", ["emit", "build", "certify"])
@pytest.mark.parametrize("name", ["preset", "budget too small", "derivatives"])
@pytest.mark.sampled(5)
def test_every_command_refuses_as_plan_does(name, command):
    kind, *arguments = REQUESTS[name]
    refused(kind, command, *arguments)


def test_64_bit_numbers_must_be_turned_on(certified):
    error = refused("BackendError", "build", *SMALL, "--dtype", "float64")
    assert "JAX_ENABLE_X64=1" in error["hint"]


def test_a_refusal_says_what_would_do():
    least = refused("BudgetError", "plan", *LLAMA, "--budget", "1KiB")["hint"]
    bytes_needed = least.removeprefix("raise memory_budget to ")
    assert "B temporary" in run("plan", *LLAMA, "--budget", bytes_needed)[0]
    offsets = refused("SpecError", "plan", *LLAMA, "--kv-len", "100")
    assert '"bottom_right"' in offsets["hint"]
    assert "q_offset=0" in offsets["hint"]
    assert "gemma2-9b" in refused("PresetError", "presets", "gemma-2-9b")["hint"]


FILES = {
    "syntax.toml": ("FileError", "q_heads = "),
    "deep.toml": ("FileError", "q_heads = " + "[" * 9000),
    "syntax.json": ("FileError", '{"q_heads": 4'),
    "range.json": ("FileError", '{"q_heads": 1e999}'),
    "deep.json": ("FileError", "[" * 9000),
    "list.json": ("SpecError", "[1, 2]"),
    "null.json": ("SpecError", "null"),
    "field.toml": ("SpecError", TOML + "heads = 3"),
    "type.toml": ("SpecError", TOML + "batch = 'two'"),
    "kv_heads.toml": ("SpecError", TOML + "kv_heads = 3"),
    "offset.toml": ("SpecError", TOML + "kv_len = 9\nmask = 'causal'"),
    "mask.toml": ("ExpressionError", TOML + "mask = 'diagonal'"),
    "arguments.toml": ("ExpressionError", TOML + "mask = {causal = {left = 3}}"),
    "empty.toml": ("ExpressionError", TOML + "mask = []"),
    "number.toml": ("ExpressionError", TOML + "mask = {expr = ['add', 'k', 'q']}"),
    "boolean.toml": ("ExpressionError", TOML + "score = {expr = ['le', 'k', 'q']}"),
    "if.toml": ("ExpressionError", TOML + "mask = {expr = ['if', 'k', 'q', 0]}"),
    "moved.toml": (
        "ExpressionError",
        TOML + "mask.expr = ['eq', ['load', 'ids', 'b', ['add', 'q', 1]], 3]\n"
        "mask.operands = {ids = {axes = ['b', 'k'], dtype = 'int32'}}",
    ),
    "half.toml": (
        "ExpressionError",
        TOML + "score.expr = ['load', 'x', ['div', 'q', 2]]\n"
        "score.operands = {x = {axes = [64], dtype = 'float32'}}",
    ),
    "outside.toml": (
        "OperandError",
        TOML + "score.expr = ['load', 'x', ['add', 'q', 64]]\n"
        "score.operands = {x = {axes = [64], dtype = 'float32'}}",
    ),
    "code.toml": ("ExpressionError", TOML + "mask = {expr = '__import__(\"os\")'}"),
    "name.toml": ("OperandError", TOML + "mask = {dense = {name = 'jnp'}}"),
    "injected.toml": ("OperandError", TOML + "mask = {dense = {name = 'x):\\n'}}"),
    "storage.toml": ("NotBuiltError", TOML + "storage = 'paged'\nderivatives = 'vjp'"),
    "dropout.toml": ("SpecError", TOML + "dropout = 1.0"),
    "kv_dtype.toml": ("NotBuiltError", TOML + "kv_dtype = 'float64'"),
    "budget.toml": ("BudgetError", TOML.replace("1MiB", "a lot")),
    "tight.toml": ("BudgetError", TOML.replace("1MiB", "16B")),
    "spec.yaml": ("FileError", TOML),
    "spec": ("FileError", TOML),
    "own.py": ("FileError", "x = 1"),
    "syntax.py": ("FileError", "def f(:"),
    "null.py": ("FileError", "x = '\0'"),
    "binary.toml": ("FileError", b"q_heads = 4 # \xff\xfe"),
    "binary.py": ("FileError", b"\x7fELF\x02\x01\xff"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_spec_is_refused(name, tmp_path):
    kind, content = FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(kind, "plan", path)


PICTURES = {
    "an ending": ("FileError", "mask.pdf"),
    "no ending": ("FileError", "mask"),
    "no folder": ("FileError", "missing/mask.png"),
    "a folder": ("FileError", "folder.png"),
    "nothing": ("FileError", ""),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_drawn_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    kind, path = PICTURES[name]
    refused(kind, "plan", *SMALL, "--picture", path)


def test_a_picture_without_matplotlib_is_refused_and_the_terminal_named(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "mask.png"
    error = refused("BackendError", "plan", *SMALL, "--picture", path)
    assert "pip install 'attngen[plot]'" in error["needed"]
    assert "--picture -" in error["hint"]
    assert "partial" in run("plan", *SMALL, "--picture", "-")[0]


def test_a_deep_mask_is_refused(tmp_path):
    form = '"causal"'
    for _ in range(400):
        form = f'{{"not": {form}}}'
    path = tmp_path / "deep.json"
    path.write_text(f'{{"q_heads": 4, "q_len": 64, "qk_dim": 16, "mask": {form}}}')
    refused("ExpressionError", "plan", path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path = tmp_path / "secret.toml"
    path.write_text(TOML)
    path.chmod(0)
    refused("FileError", "plan", path)


@pytest.mark.parametrize("command", [("validate",), ("emit", "--check")])
@pytest.mark.parametrize(
    "name", ["own.py", "syntax.py", "null.py", "binary.py", "missing.py", "syntax.toml"]
)
def test_a_file_that_was_not_emitted_is_refused(command, name, tmp_path):
    path = tmp_path / name
    if name in FILES:
        content = FILES[name][1]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("FileError", *command, path)
    assert name in run(*command, path, code=WRONG)[1]


HEADERS = {
    "no spec": ("spec      {", "specs     {"),
    "no JSON": ('"q_heads": 2', '"q_heads": '),
    "no such field": ('"q_heads"', '"heads"'),
    "a size": ('"q_heads": 2', '"q_heads": -2'),
    "no such choice": ('"q_chunk"', '"chunk"'),
    "an illegal choice": ('"q_chunk": 16', '"q_chunk": 41'),
    "a choice's kind": ('"q_chunk": 16', '"q_chunk": [16]'),
    "no such algorithm": ('"running"', '"flash"'),
    "no such target": ('"target": "cpu"', '"target": "abacus"'),
    "a target's kind": ('"target": "cpu"', '"target": ["cpu"]'),
    "no such backend": ('"backend": "jax"', '"backend": "abacus"'),
}


@pytest.mark.parametrize("command", [("validate",), ("emit", "--check")])
@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_broken_is_refused_with_its_file(command, name, emitted):
    path = edit(emitted, *HEADERS[name])
    error = refused("FileError", *command, path)
    assert str(path) in error["what"]


LAST = "return lax.fori_loop(0, Q_CHUNKS, queries, out_all)"
BROKEN_EDITS = {
    "an unknown name": (LAST, "return result"),
    "a raised error": (LAST, "raise KeyError(3)"),
    "another spec": ('"q_heads": 2', '"q_heads": 4'),
    "a tuple": (LAST, "return out_all, out_all"),
    "nothing": (LAST, "return None"),
    "another shape": (LAST, "return jnp.float32(0)"),
    "another dtype": (LAST, LAST + ".astype(jnp.bfloat16)"),
}


@pytest.mark.parametrize("name", BROKEN_EDITS)
def test_validate_fails_an_edit_that_does_not_run(name, emitted):
    path = edit(emitted, *BROKEN_EDITS[name])
    refused("ValidationError", "validate", path, code=FAILED)


@pytest.mark.parametrize(
    "change",
    [
        ("SCALE = ", "SCALE = 1 / 0  # "),
        ("def attention(", "def attend("),
        ("import jax.numpy as jnp", "import nowhere as jnp"),
    ],
)
def test_validate_refuses_an_edit_that_is_no_module_of_attention(change, emitted):
    refused("FileError", "validate", edit(emitted, *change))


def test_validate_sees_an_edit_of_the_same_size_and_time(emitted):
    run("validate", emitted)
    stat = emitted.stat()
    emitted.write_text(emitted.read_text().replace("SCALE = 0.35", "SCALE = 0.36"))
    os.utime(emitted, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert emitted.stat().st_size == stat.st_size
    run("validate", emitted, code=FAILED)
    assert not list(emitted.parent.rglob("*.pyc"))


@pytest.mark.parametrize(
    "place", ["", "file/inside.py", "a folder", "/proc/nothing/x.py"]
)
def test_a_place_that_cannot_be_written_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "a folder").mkdir()
    refused("FileError", "emit", *SMALL, "-o", place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a folder", "file"]


@pytest.mark.parametrize("effort", ["hard", ""])
def test_an_effort_is_refused(effort):
    refused("PlanError", "build", *SMALL, "--effort", effort)
    refused("PlanError", "tune", *SMALL, "--effort", effort)


def test_a_files_name_need_not_be_text(tmp_path):
    folder = tmp_path / "a \udcff [b] \\"
    folder.mkdir()
    path = folder / "\udcfe.py"
    assert json.loads(run("emit", *SMALL, "-o", path, "--json")[0])["path"] == str(path)
    assert json.loads(run("emit", "--check", path, "--json")[0])["same"] is True
    assert json.loads(run("validate", path, "--json")[0])[str(path)]["passed"] is True
    assert "same" in run("emit", "--check", path)[0]
    out, err = run("plan", folder / "missing.toml", "--json", code=WRONG)
    assert (out, json.loads(err)["error"]) == ("", "FileError")


def test_emit_takes_one_spec(tmp_path):
    refused("FileError", "emit", tmp_path / "a.toml", tmp_path / "b.toml")
    refused("FileError", "emit", "--check")
    refused("FileError", "emit", "--check", tmp_path)  # an empty folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("plann",),
        ("plan", "--heads", "3"),
        ("plan", *LLAMA, "--q-len", "many"),
        ("plan", *LLAMA, "--q-len"),
        ("plan", *LLAMA, "--scale", "wide"),
        ("plan", "one.toml", "two.toml"),
        ("validate",),
        ("validate", "a.py", "--seed", "x"),
    ],
    ids=" ".join,
)
def test_a_command_line_that_cannot_be_read(arguments):
    misused(*arguments)
