"""The command line: what each command prints, where, and its exit code.

Results are on stdout, everything else on stderr. Exit code 0: done; 1: the check failed;
2: the request was wrong. Specs are test_cli_specs.py's, mistakes test_cli_refusals.py's.
"""

import dataclasses
import json

import pytest
from commands import CHUNKS, DONE, FAILED, SMALL, WRONG, edit, process, run

import attngen
from attngen import AttentionSpec, presets, targets
from attngen.plans import Plan
from attngen.reports import Certificate


def test_help_names_every_command():
    out, _ = run("--help")
    for name in ("plan", "emit", "build", "validate", "certify", "targets", "presets"):
        assert f"\n  {name} " in out
        assert run(name, "--help")[0].startswith("Usage: ")
    for name in ("tune", "bench", "wisdom"):
        assert f"\n  {name} " in out
        assert run(name, "--help")[0].startswith("Usage: ")
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
@pytest.mark.sampled(3)
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


def test_emit_says_that_a_gpus_plan_is_not_certified(tmp_path):
    out, err = run("emit", *SMALL, "--target", "a100")
    assert out.startswith('"""')
    assert "not certified" in err
    assert "a100" in err
    path = tmp_path / "new.py"
    assert "not certified" in run("emit", *SMALL, "--target", "a100", "-o", path)[1]
    assert "certified" not in run("emit", *SMALL, "-o", path)[1]


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
    assert out == f"{said}\nover the budget of 1024.0 KiB by 1 B\n"
    out, _ = run("certify", *SMALL, "--budget", 2**20 - 1, "--json", code=FAILED)
    assert json.loads(out)["fits"] is False


def test_certify_compiles_a_file_as_it_is(certified, emitted):
    path = edit(emitted, "SCALE = 0.35", "SCALE = 0.36", "edited.py")
    digest = attngen.emitter.Source(path.read_text(), "jax").digest
    data = json.loads(run("certify", path, "--json")[0])
    assert (data["digest"], data["fits"]) == (digest, True)
    out, _ = run("certify", path, "--budget", 2**20 - 1, code=FAILED)
    assert out.endswith("over the budget of 1024.0 KiB by 1 B\n")
    for option in (("--q-len", 5), ("--fix", "q_chunk=5"), ("--backend", "jax")):
        _, err = run("certify", path, *option, code=2)
        assert "options are of a spec, not of a file" in err


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
    out, _ = run("targets")
    assert "cpu" in out
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
@pytest.mark.sampled(3, 1)
def test_a_preset_is_printed_as_a_spec_file(name, tmp_path):
    for suffix, flag in (("toml", ()), ("json", ("--json",))):
        path = tmp_path / f"spec.{suffix}"
        path.write_text(run("presets", name, *flag)[0])
        out, _ = run("plan", path, "--derivatives", "none", "--json")
        spec = dataclasses.replace(presets.get(name), derivatives=None)
        assert AttentionSpec.from_dict(json.loads(out)["spec"]) == spec


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
