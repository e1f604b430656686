"""The command line: what each command prints, its exit code, and how it refuses.

Results are on stdout, everything else on stderr. Exit code 0: done; 1: the check failed;
2: the request was wrong. No mistake of a user's ends in a traceback.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import attngen
from attngen import AttentionSpec, masks, presets, scores, targets
from attngen.cli import main
from attngen.plans import Plan
from attngen.reports import Certificate

SMALL = ("--q-heads", "2", "--q-len", "40", "--qk-dim", "8")
CHUNKS = ("--fix", "q_chunk=16,k_chunk=16")
DONE, FAILED, WRONG = 0, 1, 2


def run(*arguments, code=DONE):
    """A command in this process: (stdout, stderr). It leaves by `code`, without a trace."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def refused(kind, *arguments, code=WRONG):
    """What a command that is refused says; the same as JSON where it takes --json."""
    out, err = run(*arguments, code=code)
    assert out == ""
    said = [line for line in err.splitlines() if not line.endswith("…")]
    assert said[0].startswith(f"{kind}: ")
    assert any(line.startswith("  got      ") for line in said)
    assert any(line.startswith("  needed   ") for line in said)
    out, err_json = run(*arguments, "--json", code=code)
    assert out == ""
    error = json.loads(err_json[err_json.index("{") :])
    assert error["error"] == kind
    assert error["what"] in err
    assert error["got"].splitlines()[0] in err
    return error


def misused(*arguments):
    """A command line that click itself refuses."""
    out, err = run(*arguments, code=WRONG)
    assert out == ""
    assert "Error: " in err


def process(*arguments, cwd, environment):
    """A command as a process of its own."""
    command = [Path(sys.executable).parent / "attngen", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def emitted(tmp_path):
    """A small emitted file."""
    path = tmp_path / "small.py"
    run("emit", *SMALL, *CHUNKS, "-o", path)
    return path


@pytest.fixture
def certified(monkeypatch):
    """Certificates of a megabyte, without a compiler."""

    def certify(compiler, target, *, digest, **_):
        return Certificate(target, compiler, temp_bytes=2**20, digest=digest)

    monkeypatch.setattr("attngen.certifier.certify", certify)


def edit(path, old, new, name="edited.py"):
    """A copy of a file with one text in place of another."""
    text = path.read_text()
    assert text.count(old) >= 1
    copy = path.with_name(name)
    copy.write_text(text.replace(old, new, 1))
    return copy


# What each command prints.


def test_help_names_every_command():
    out, _ = run("--help")
    for name in ("plan", "emit", "build", "validate", "certify", "targets", "presets"):
        assert f"\n  {name} " in out
        assert run(name, "--help")[0].startswith("Usage: ")
    for name in ("tune", "bench", "wisdom"):
        assert f"\n  {name} " in out
        assert "Not built yet" in run(name, "--help")[0]
    assert run("-h")[0] == out


def test_the_version():
    assert attngen.__version__ in run("--version")[0]


def test_plan_is_the_plans_explanation_or_its_json():
    spec = AttentionSpec(q_heads=2, q_len=40, qk_dim=8)
    made = attngen.plan(spec, fix={"q_chunk": 16, "k_chunk": 16})
    out, err = run("plan", *SMALL, *CHUNKS)
    assert (out, err) == (made.explain() + "\n", "")
    out, err = run("plan", *SMALL, *CHUNKS, "--json")
    assert Plan.from_json(out) == made
    assert err == ""


@pytest.mark.parametrize("name", presets.names())
def test_every_presets_plan_fits_100_columns(name):
    out, _ = run("plan", "--preset", name, "--derivatives", "none")
    assert all(len(line) <= 100 for line in out.splitlines())
    out, _ = run("plan", "--preset", name, "--derivatives", "none", "--budget", "64MiB")
    assert all(len(line) <= 100 for line in out.splitlines())
    assert "budget 64.0 MiB" in out


def test_emit_is_the_source(tmp_path):
    spec = AttentionSpec(q_heads=2, q_len=40, qk_dim=8)
    made = attngen.emit(attngen.plan(spec))
    assert run("emit", *SMALL) == (made.text, "")
    out, _ = run("emit", *SMALL, "--json")
    assert json.loads(out) == {"text": made.text, "digest": made.digest, "path": None}
    path = tmp_path / "folder" / "new.py"
    out, err = run("emit", *SMALL, "-o", path)
    assert (out, err) == ("", f"wrote {path}\n")
    assert path.read_text() == made.text
    out, _ = run("emit", *SMALL, "-o", path, "--json")
    assert json.loads(out)["path"] == str(path)


def test_emit_check_says_which_files_differ(emitted):
    other = edit(emitted, "SCALE = 0.3535533905932738", "SCALE = 0.3535533905932737")
    out, err = run("emit", "--check", emitted)
    assert (out, err) == (f"same     {emitted}\n", "")
    out, _ = run("emit", "--check", emitted, other, code=FAILED)
    assert out == f"same     {emitted}\nDIFFERS  {other}\n"
    out, _ = run("emit", "--check", emitted.parent, "--json", code=FAILED)
    assert json.loads(out) == {
        "same": False,
        "files": {str(other): False, str(emitted): True},
    }


def test_build_prints_plan_certificate_and_report(tmp_path):
    path = tmp_path / "built.py"
    out, err = run("build", *SMALL, *CHUNKS, "-o", path)
    assert "chosen    running · 16 queries × 16 keys" in out
    assert "\ncertified cpu: " in out
    assert "\nvalidated passed: full size, all rows\n" in out
    beside = tmp_path / "built.certificate.json"
    assert f"wrote {path} and {beside}" in err
    assert run("emit", "--check", path)[0] == f"same     {path}\n"
    certificate = Certificate.from_json(beside.read_text())
    assert certificate.temp_bytes is not None
    text = path.read_text()
    assert certificate.digest == attngen.emitter.Source(text, "jax").digest


def test_build_as_json(certified):
    out, _ = run("build", *SMALL, "--budget", "1MiB", "--json")
    data = json.loads(out)
    assert set(data) == {"plan", "report", "certificate", "digest", "path"}
    assert data["report"]["passed"] is True
    assert Plan.from_dict(data["plan"]).spec.memory_budget == "1MiB"
    assert data["certificate"]["temp_bytes"] == 2**20
    assert data["certificate"]["digest"] == data["digest"]
    assert data["path"] is None


def test_certify_says_what_the_compiler_says():
    out, _ = run("certify", *SMALL, *CHUNKS, "--json")
    data = json.loads(out)
    assert data.pop("fits") is True
    assert data["compiler"] == "XLA:CPU"
    assert data["spill_bytes"] is None
    assert data["estimated_cycles"] is None


def test_certify_fails_where_the_certificate_is_over_the_budget(certified):
    said = "cpu: 1.0 MiB of temporaries (1048576 bytes), says attngen.backends.jax.compiler"
    assert run("certify", *SMALL, "--budget", 2**20)[0] == f"{said}\n"
    out, _ = run("certify", *SMALL, "--budget", 2**20 - 1, code=FAILED)
    assert out == f"{said}: over the budget\n"
    out, _ = run("certify", *SMALL, "--budget", 2**20 - 1, "--json", code=FAILED)
    assert json.loads(out)["fits"] is False


WRONG_EDITS = {
    "number.py": ("SCALE = 0.35", "SCALE = 0.36"),
    "forgotten.py": (" * rescale[..., None]", ""),
    "nan.py": ("return m_new, ", "return m_new * jnp.nan, "),
}


def test_validate_judges_files_edited_or_not(emitted):
    edits = [edit(emitted, *change, name) for name, change in WRONG_EDITS.items()]
    out, err = run("validate", emitted, *edits, code=FAILED)
    assert out.startswith(f"{emitted}: passed: full size, all rows\n")
    assert all(f"{path}: FAILED" in out for path in edits)
    assert err.splitlines() == [f"validating {p} …" for p in (emitted, *edits)]


def test_validate_as_json(emitted):
    path = edit(emitted, *WRONG_EDITS["nan.py"], "with [red] brackets.py")
    out, _ = run("validate", path, "--seed", "3", "--json", code=FAILED)
    report = json.loads(out)[str(path)]
    assert report["passed"] is False
    assert report["max_error"] is None  # JSON has no infinity
    assert [c["name"] for c in report["checks"]] == ["out"]


def test_targets_and_presets():
    out, err = run("targets")
    assert "cpu" in out
    assert err.startswith("planned: tpu-v2")
    out, _ = run("targets", "--json")
    assert [t["name"] for t in json.loads(out)] == list(targets.names())
    out, _ = run("presets")
    assert all(name in out for name in presets.names())
    assert all(len(line) <= 100 for line in out.splitlines())
    assert "[h, q, k]" in out  # of a source: no markup
    out, _ = run("presets", "--json")
    listed = json.loads(out)
    assert list(listed) == list(presets.names())
    assert listed["t5-large"]["source"] == presets.source("t5-large")


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_printed_as_a_spec_file(name, tmp_path):
    for suffix, flag in (("toml", ()), ("json", ("--json",))):
        path = tmp_path / f"spec.{suffix}"
        path.write_text(run("presets", name, *flag)[0])
        out, _ = run("plan", path, "--derivatives", "none", "--json")
        spec = dataclasses.replace(presets.get(name), derivatives=None)
        assert AttentionSpec.from_dict(json.loads(out)["spec"]) == spec


# A spec from files and options.


def spec_of(*arguments):
    """The spec that `plan` is given by a command line."""
    return AttentionSpec.from_dict(
        json.loads(run("plan", *arguments, "--json")[0])["spec"]
    )


TOML = """
q_heads = 4
q_len = 64
qk_dim = 16
outputs = ["out", "lse"]
memory_budget = "1MiB"
"""
FORMS = {
    'mask = "causal"': {"mask": masks.causal()},
    "mask = {sliding_window = {left = 9}}": {"mask": masks.sliding_window(9)},
    'mask = ["causal", {sliding_window = {left = 9}}]': {
        "mask": masks.causal() & masks.sliding_window(9)
    },
    'mask = {or = ["causal", {prefix = {length = 5}}]}': {
        "mask": masks.causal() | masks.prefix(5)
    },
    'mask = {not = {prefix = {length = "lengths"}}}': {
        "mask": ~masks.prefix("lengths")
    },
    "mask = {expr = ['le', 'k', 'q']}": {
        "mask": attngen.mask(lambda b, h, q, k: k <= q)
    },
    "[mask.sliding_window]\nleft = 9\nright = 2": {"mask": masks.sliding_window(9, 2)},
    "score = {softcap = {cap = 50}}": {"score": (scores.softcap(50),)},
    'score = [{softcap = {cap = 50.0}}, "alibi"]': {
        "score": (scores.softcap(50.0), scores.alibi())
    },
    'score = {bias = {name = "extra", axes = ["h", "q", "k"]}}': {
        "score": (scores.bias("extra", axes="hqk"),)
    },
}


@pytest.mark.parametrize(("text", "fields"), FORMS.items(), ids=FORMS)
def test_a_toml_file_is_a_spec(text, fields, tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(TOML + text)
    assert spec_of(path) == AttentionSpec(
        q_heads=4, q_len=64, qk_dim=16, outputs=("out", "lse"),
        memory_budget="1MiB", **fields,
    )  # fmt: skip


def test_an_emitted_file_is_a_spec(emitted):
    assert spec_of(emitted) == AttentionSpec(q_heads=2, q_len=40, qk_dim=8)


def test_options_change_a_spec():
    base = dataclasses.replace(presets.get("llama3-8b"), q_len=64, kv_len=64)
    assert spec_of("--preset", "llama3-8b", "--q-len", 64) == base
    assert spec_of(
        "--preset", "llama3-8b", "--q-len", 64, "--batch", 3, "--dtype", "float32",
        "--layout", "bhtd", "--scale", "0.5", "--kv-lengths", "--sink", "--outputs",
        "lse, out", "--precision", "highest", "--out-dtype", "float32", "--kv-offset",
        "-3", "--q-offset", "-7", "--budget", "1GiB",
    ) == dataclasses.replace(
        base, batch=3, dtype="float32", layout="bhtd", scale=0.5, kv_lengths=True,
        sink=True, outputs=("lse", "out"), precision="highest", out_dtype="float32",
        kv_offset=-3, q_offset=-7, memory_budget="1GiB",
    )  # fmt: skip
    assert not spec_of("--preset", "gpt-oss-20b", "--no-sink").sink


def test_what_was_equal_stays_equal():
    def sizes(*arguments):
        spec = spec_of(*arguments)
        return spec.q_len, spec.kv_len, spec.q_heads, spec.kv_heads

    assert sizes("--preset", "sd15-self", "--q-len", 100) == (100, 100, 8, 8)
    assert sizes("--preset", "sd15-cross", "--q-len", 100) == (100, 77, 8, 8)
    assert sizes("--preset", "sd15-self", "--kv-len", 100) == (4096, 100, 8, 8)
    assert sizes("--preset", "sd15-self", "--q-heads", 2) == (4096, 4096, 2, 2)
    both = ("--q-len", 100, "--kv-len", 9, "--q-offset", "bottom_right")
    assert sizes("--preset", "llama3-8b", *both) == (100, 9, 32, 8)


# How it refuses.

LLAMA = ("--preset", "llama3-8b")
REQUESTS = {
    "no spec": ("SpecError",),
    "preset": ("PresetError", "--preset", "llama4"),
    "target": ("TargetError", *LLAMA, "--target", "abacus"),
    "target of the contract": ("NotBuiltError", *LLAMA, "--target", "h100"),
    "TPU": ("NotBuiltError", *LLAMA, "--target", "tpu-v5e"),
    "backend": ("BackendError", *LLAMA, "--backend", "abacus"),
    "backend of the contract": ("BackendError", *LLAMA, "--backend", "triton"),
    "choice": ("PlanError", *LLAMA, "--fix", "tile=4"),
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
    "derivatives": ("NotBuiltError", *LLAMA, "--derivatives", "vjp"),
    "a preset's derivatives": ("NotBuiltError", "--preset", "alphafold-pair"),
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
    "code.toml": ("ExpressionError", TOML + "mask = {expr = '__import__(\"os\")'}"),
    "name.toml": ("OperandError", TOML + "mask = {dense = {name = 'jnp'}}"),
    "injected.toml": ("OperandError", TOML + "mask = {dense = {name = 'x):\\n'}}"),
    "storage.toml": ("NotBuiltError", TOML + "storage = 'paged'"),
    "dropout.toml": ("NotBuiltError", TOML + "dropout = 0.1"),
    "kv_dtype.toml": ("NotBuiltError", TOML + "kv_dtype = 'int8'"),
    "any.toml": ("NotBuiltError", TOML + "derivatives = 'any'"),
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


@pytest.mark.parametrize(
    ("kind", "effort"),
    [
        ("PlanError", "hard"),
        ("PlanError", ""),
        ("NotBuiltError", "measure"),
        ("NotBuiltError", "patient"),
    ],
)
def test_an_effort_is_refused(kind, effort):
    refused(kind, "build", *SMALL, "--effort", effort)


@pytest.mark.parametrize("name", ["tune", "bench", "wisdom"])
def test_what_is_not_built_says_so(name):
    refused("NotBuiltError", name)
    refused(
        "NotBuiltError", name, "show", "--preset", "llama3-8b", "--effort", "patient"
    )


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


# As processes of their own.


def test_stdout_stderr_and_exit_code_of_a_process(tmp_path, process_environment):
    def attngen(*arguments):
        return process(*arguments, cwd=tmp_path, environment=process_environment)

    done = attngen("build", *SMALL, *CHUNKS, "-o", "a.py", "--json")
    assert (done.returncode, json.loads(done.stdout)["path"]) == (DONE, "a.py")
    assert done.stderr == (
        "certifying and validating …\nwrote a.py and a.certificate.json\n"
    )
    text = (tmp_path / "a.py").read_text()
    (tmp_path / "b.py").write_text(text.replace("SCALE = 0.35", "SCALE = 0.36"))
    failed = attngen("emit", "--check", "a.py", "b.py")
    assert (failed.returncode, failed.stderr) == (FAILED, "")
    assert failed.stdout == "same     a.py\nDIFFERS  b.py\n"
    wrong = attngen("plan", "--preset", "llama4", "--json")
    assert (wrong.returncode, wrong.stdout) == (WRONG, "")
    assert json.loads(wrong.stderr)["error"] == "PresetError"
