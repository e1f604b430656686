"""The pipeline by the contract: plan, emit, validate, tune, and the cache.

build is test_build.py's, attention test_attention.py's, certify test_certificates.py's.
What each refuses is tested where it is checked: fields in test_spec.py, command lines in
test_cli_refusals.py, calls of a kernel in test_kernel.py.
"""

import dataclasses
import json

import pytest
from refusals import refused
from small import CAUSAL, FIX, SPEC, close, qkv, spec_of

import attngen
from attngen import files
from attngen.errors import (
    BackendError,
    FileError,
    NotBuiltError,
    PlanError,
    TargetError,
)
from attngen.plans import Plan
from attngen.reports import Report

# plan, emit.


def test_a_plan_is_a_value():
    made = attngen.plan(SPEC)
    assert made == attngen.plan(SPEC, target="cpu", backend="jax")
    assert made.spec == SPEC
    assert (made.target, made.backend) == ("cpu", "jax")
    assert Plan.from_json(made.to_json()) == made
    assert str(made) == made.explain()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.q_chunk = 3


def test_planning_compiles_nothing_and_writes_nothing(no_compiler, monkeypatch):
    def write(*_):
        raise AssertionError("something was written")

    monkeypatch.setattr(files, "write", write)
    attngen.emit(attngen.plan(SPEC))


def test_fix_decides():
    made = attngen.plan(SPEC, fix=FIX)
    assert (made.algorithm, made.q_chunk, made.k_chunk) == ("running", 16, 16)
    assert set(made.fixed) == {"q_chunk", "k_chunk"}
    assert attngen.plan(SPEC, fix=made.choice).choice == made.choice
    assert attngen.plan(SPEC, fix={"algorithm": "dense"}).algorithm == "dense"
    assert attngen.plan(SPEC, fix={}) == attngen.plan(SPEC)


@pytest.mark.parametrize(
    "fix",
    [
        {"tile": 3},
        {"q_chunk": 0},
        {"q_chunk": 49},
        {"q_chunk": 16.0},
        {"q_chunk": True},
        {"q_chunk": [16]},
        {"q_chunk": None},
        {"algorithm": "flash"},
        {"algorithm": ["running"]},
        {"algorithm": "dense", "q_chunk": 16},
        {"loop": "while"},
        {"head_chunk": 3},
        {"product_dtype": "bfloat16"},
        {"guard": "yes"},
        {3: 4},
    ],
    ids=repr,
)
def test_a_choice_that_cannot_be_fixed_is_refused(fix):
    with refused(PlanError):
        attngen.plan(SPEC, fix=fix)
    with refused(PlanError):
        attngen.attention(*qkv(), mask=CAUSAL, fix=fix)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        (TargetError, {"target": "abacus"}),
        (TargetError, {"target": "tpu-v1"}),
        (BackendError, {"backend": "abacus"}),
        (BackendError, {"target": "tpu-v3", "backend": "triton"}),
    ],
)
@pytest.mark.parametrize("ask", [attngen.plan, attngen.build])
def test_where_there_is_nothing_is_refused(kind, where, ask):
    with refused(kind):
        ask(SPEC, **where)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "paged", "derivatives": "vjp"},
        {"kv_dtype": "int8", "derivatives": "any"},
        {"kv_dtype": "float64"},
    ],
    ids=str,
)
@pytest.mark.parametrize("ask", [attngen.plan, attngen.build])
def test_what_is_not_built_says_so(change, ask):
    with refused(NotBuiltError) as caught:
        ask(spec_of(**change))
    assert caught.value.hint


def test_an_emitted_file_is_what_was_planned(tmp_path):
    source = attngen.emit(attngen.plan(SPEC, fix=FIX))
    path = source.write(tmp_path / "new" / "attention.py")
    assert path.read_text() == source.text == str(source)
    assert attngen.emit(attngen.plan(SPEC, fix=FIX)) == source
    namespace = {}
    exec(source.text, namespace)
    arrays = qkv()
    assert close(SPEC, namespace["attention"](*arrays), arrays)


EDITS = {
    "a chunk beyond the length": {"q_chunk": 4096},
    "an algorithm": {"algorithm": "flash"},
    "a template of another kind": {"algorithm": "_shared"},
    "no options": {"options": ()},
    "an option of no backend": {"options": (("warps", 4),)},
    "a spec that isn't built": {"spec": spec_of(storage="paged", derivatives="vjp")},
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_plan_that_was_made_wrong_is_not_emitted(change):
    made = dataclasses.replace(attngen.plan(SPEC, fix=FIX), **change)
    with refused(NotBuiltError if "spec" in change else PlanError):
        attngen.emit(made)


@pytest.mark.parametrize("name", ["product_dtype", "loop", "guard"])
def test_no_text_of_a_plan_becomes_code(name):
    data = attngen.plan(SPEC, fix=FIX).to_dict()
    data["options"][name] = "float32)\nimport os; os.abort("
    with refused(PlanError):
        attngen.emit(Plan.from_dict(data))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("q_chunk", "16"),
        ("q_chunk", None),
        ("index_dtype", "int32); import os"),
        ("drops_keys", "yes"),
        ("options", [1]),
        ("tiles", 3),
        ("alternatives", [{"choice": 3}]),
        ("surplus", 1),
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(field, value):
    data = attngen.plan(SPEC).to_dict() | {field: value}
    with refused(FileError):
        Plan.from_json(json.dumps(data))
    with refused(FileError):
        Plan.from_json("{")
    with refused(FileError):
        Plan.from_json("[]")


# validate: a kernel, a source, a file.


def test_validate_takes_a_kernel_a_source_and_a_file(tmp_path, certificates):
    certificates(lambda source: 1)
    kernel = attngen.build(SPEC, fix=FIX)
    path = kernel.source.write(tmp_path / "a.py")
    assert attngen.validate(kernel) == kernel.report
    assert attngen.validate(kernel.source) == kernel.report
    other = attngen.validate(str(path), seed=5)
    assert other.passed
    assert other != kernel.report
    assert Report.from_json(other.to_json()) == other


def test_a_failed_report_is_data_too(tmp_path):
    text = attngen.emit(attngen.plan(SPEC, fix=FIX)).text
    path = tmp_path / "a.py"
    path.write_text(text.replace("\nSCALE = ", "\nSCALE = jnp.nan * "))
    report = attngen.validate(path)
    assert not report.passed
    assert report.max_error == float("inf")
    assert report.checks[0].error is None
    assert Report.from_json(report.to_json()) == report
    assert "FAILED" in str(report)


def test_a_slow_file_that_was_edited_is_judged_all_the_same(tmp_path, monkeypatch):
    """It can't be made anew at a smaller size."""
    monkeypatch.setattr("attngen.validator.SECONDS", 0.0)
    source = attngen.emit(attngen.plan(SPEC, fix=FIX))
    report = attngen.validate(source)
    assert report.passed
    assert all(case.startswith("small: ") for case in report.cases)
    path = tmp_path / "edited.py"
    path.write_text(source.text + "# edited\n")
    report = attngen.validate(path)
    assert report.passed
    assert report.cases == ("full size, all rows",)


# The cache: what is loaded is what was emitted.


def test_kernels_are_cached_by_their_digest(cache, certificates):
    certificates(lambda source: 1)
    kernel = attngen.build(SPEC, fix=FIX)
    path = cache / "kernels" / f"{kernel.source.digest}.py"
    assert path.read_text() == kernel.source.text


@pytest.mark.parametrize(
    "content", [b"raise SystemExit('tampered')", b"\xff\xfe", b""], ids=repr
)
def test_a_cached_file_that_was_changed_is_not_run(content, cache, certificates):
    certificates(lambda source: 1)
    source = attngen.emit(attngen.plan(SPEC, fix=FIX))
    path = cache / "kernels" / f"{source.digest}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert attngen.build(SPEC, fix=FIX).report.passed
    assert path.read_text() == source.text


def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path, monkeypatch, certificates
):
    certificates(lambda source: 1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNGEN_CACHE", str(tmp_path / "file"))
    with refused(FileError) as caught:
        attngen.build(SPEC, fix=FIX)
    assert "ATTNGEN_CACHE" in caught.value.hint


def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNGEN_CACHE", str(tmp_path))
    assert files.cache_folder() == tmp_path
    monkeypatch.delenv("ATTNGEN_CACHE")
    assert files.cache_folder().name == "attngen"
