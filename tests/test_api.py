"""The pipeline: plan, emit, build, validate, certify, tune, attention, by the contract.

`plan` models, `build` certifies and validates, `attention` does either, by where it is
called. What each refuses is tested where it is checked: fields in test_spec.py, command
lines in test_cli.py, calls of a kernel in test_kernel.py.
"""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, api, certifier, files, masks, reference, scores
from attngen.backends.jax import model
from attngen.cost import Cost
from attngen.errors import (
    BackendError,
    BudgetError,
    CallError,
    FileError,
    NotBuiltError,
    OperandError,
    PlanError,
    SpecError,
    TargetError,
    ValidationError,
)
from attngen.plans import Plan
from attngen.reports import Certificate, Report

SPEC = AttentionSpec(q_heads=2, q_len=48, qk_dim=8, mask=masks.causal())
FIX = {"q_chunk": 16, "k_chunk": 16}
CAUSAL = masks.causal()


def spec_of(**changes):
    return dataclasses.replace(SPEC, **changes)


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def qkv(spec=SPEC, dtype=np.float32):
    return tuple(
        normal(*spec.shape_of(n), seed=i, dtype=dtype) for i, n in enumerate("qkv")
    )


def close(spec, out, arrays, **operands):
    """Whether an output is the reference's, to float32's accuracy."""
    want = reference.attention(spec, *map(np.asarray, arrays), operands)["out"]
    got = reference.pick(spec, "out", out, np.arange(spec.q_len))
    return np.allclose(got, want, rtol=0, atol=1e-5)


@pytest.fixture
def no_compiler(monkeypatch):
    """Whatever asks a compiler fails."""

    def run(*_, **__):
        raise AssertionError("a compiler was asked")

    monkeypatch.setattr(certifier, "run", run)


@pytest.fixture
def certificates(monkeypatch):
    """Sets what the compiler says of a plan, instead of asking one; and counts."""
    asked = []

    def say(bytes_of):
        def certify(compiler, target, *, source, digest, **_):
            asked.append(digest)
            return Certificate(target, "a test", bytes_of(source), digest=digest)

        monkeypatch.setattr(certifier, "certify", certify)
        return asked

    return say


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
        (NotBuiltError, {"target": "h100"}),
        (NotBuiltError, {"target": "cuda-sm90"}),
        (BackendError, {"backend": "abacus"}),
    ],
)
@pytest.mark.parametrize("ask", [attngen.plan, attngen.build])
def test_where_there_is_nothing_is_refused(kind, where, ask):
    with refused(kind):
        ask(SPEC, **where)


@pytest.mark.parametrize(
    "change",
    [
        {"derivatives": "vjp"},
        {"derivatives": "any"},
        {"dropout": 0.1},
        {"storage": "packed"},
        {"storage": "paged"},
        {"kv_dtype": "int8"},
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
    "a spec that isn't built": {"spec": spec_of(dropout=0.5)},
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


# build: the budget is the compiler's to confirm.


def test_a_kernel_is_certified_and_validated():
    kernel = attngen.build(spec_of(memory_budget="64KiB"), fix=FIX)
    assert kernel.report.passed
    assert kernel.report.max_error < 1e-5
    assert 0 < kernel.certificate.temp_bytes <= 2**16
    assert kernel.certificate.digest == kernel.source.digest
    assert kernel.source == attngen.emit(kernel.plan)
    arrays = qkv()
    assert close(SPEC, kernel(*arrays), arrays)


def test_one_budget_less_and_it_is_refused(certificates):
    certificates(lambda source: 4096)
    assert attngen.build(spec_of(memory_budget=2**16)).certificate.temp_bytes == 4096
    assert attngen.build(spec_of(memory_budget=2**30)).certificate.temp_bytes == 4096
    certificates(lambda source: 2**16 + 1)
    with refused(BudgetError):
        attngen.build(spec_of(memory_budget=2**16), fix=FIX)


@pytest.fixture
def lying_model(monkeypatch):
    """A model that counts scores, not bytes: only the certificate tells."""

    def cost(spec, target, choice, tiles):
        scores = choice["q_chunk"] * choice["k_chunk"] * choice["head_chunk"]
        return Cost(temp_bytes=scores, time_s=1.0 / scores)

    monkeypatch.setattr(model, "cost", cost)


def chunk_of(source):
    """The bytes of scores of a tile: from the file's own words."""
    if "K_CHUNK" not in source:
        return 2 * 48 * 48 * 4
    line = next(n for n in source.splitlines() if n.startswith("Q_CHUNK, K_CHUNK = "))
    q_chunk, k_chunk = line.split("#")[0].split("=")[1].split(",")
    return int(q_chunk) * int(k_chunk) * 4


def test_build_goes_down_the_ranking_until_one_is_certified(lying_model, certificates):
    asked = certificates(chunk_of)
    spec = spec_of(memory_budget=8 * 1024)
    fastest = attngen.plan(spec)
    assert chunk_of(attngen.emit(fastest).text) > 8 * 1024
    kernel = attngen.build(spec)
    assert kernel.certificate.temp_bytes <= 8 * 1024
    assert kernel.plan != fastest
    assert kernel.report.passed
    assert asked[0] == attngen.emit(fastest).digest
    assert asked[-1] == kernel.source.digest
    assert len(asked) > 1


def test_when_nothing_is_certified_the_least_is_named_and_does(
    lying_model, certificates
):
    certificates(lambda source: 1000 + chunk_of(source))
    spec = spec_of(memory_budget=100)
    with refused(BudgetError) as caught:
        attngen.build(spec)
    assert "1004 bytes, certified" in caught.value.needed
    assert "1 queries × 1 keys" in caught.value.needed
    assert caught.value.hint == "raise memory_budget to 1004"
    kernel = attngen.build(dataclasses.replace(spec, memory_budget=1004))
    assert kernel.certificate.temp_bytes == 1004
    assert (kernel.plan.q_chunk, kernel.plan.k_chunk) == (1, 1)


def test_no_budget_takes_the_fastest(lying_model, certificates):
    asked = certificates(lambda source: 2**50)
    kernel = attngen.build(SPEC)
    assert kernel.plan == attngen.plan(SPEC)
    assert len(asked) == 1


def test_the_least_budget_of_a_plan_is_named_and_does():
    with refused(BudgetError) as caught:
        attngen.plan(spec_of(memory_budget=1))
    assert "modelled" in caught.value.needed
    least = int(caught.value.hint.removeprefix("raise memory_budget to "))
    assert attngen.plan(spec_of(memory_budget=least)).temp_bytes <= least
    with refused(BudgetError):
        attngen.plan(spec_of(memory_budget=least - 1))


def test_a_kernel_that_computes_something_else_is_not_returned(
    monkeypatch, certificates
):
    certificates(lambda source: 1)
    emit = api.emit

    def wrong(plan):
        source = emit(plan)
        return dataclasses.replace(
            source, text=source.text.replace("\nSCALE = ", "\nSCALE = 2 * ")
        )

    monkeypatch.setattr(api, "emit", wrong)
    with refused(ValidationError) as caught:
        attngen.build(SPEC, fix=FIX)
    assert "FAILED" in caught.value.got


@pytest.mark.parametrize(
    ("kind", "effort"),
    [(NotBuiltError, "measure"), (NotBuiltError, "patient"), (PlanError, "hard")],
)
def test_efforts_that_are_not_there(kind, effort):
    with refused(kind):
        attngen.build(SPEC, effort=effort)
    with refused(kind):
        attngen.attention(*qkv(), effort=effort)


def test_tune_is_not_built():
    with refused(NotBuiltError) as caught:
        attngen.tune(SPEC, effort="patient")
    assert "build(spec, fix=" in caught.value.hint


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


# attention: outside a trace the first call builds.


@pytest.fixture
def fresh(monkeypatch, certificates):
    """attention() as in a new process, with certificates of nothing; what was certified."""
    api._kernel_of.cache_clear()
    yield certificates(lambda source: 1)
    api._kernel_of.cache_clear()


def test_attention_builds_once(fresh):
    arrays = qkv()
    out = attngen.attention(*arrays, mask=CAUSAL)
    assert close(SPEC, out, arrays)
    assert len(fresh) == 1
    again = attngen.attention(*arrays, mask=masks.causal())
    assert len(fresh) == 1
    assert np.array_equal(out, again)
    attngen.attention(*arrays, mask=CAUSAL, memory_budget="1MiB")
    assert len(fresh) == 2


def test_attention_takes_numpy_arrays(fresh):
    arrays = tuple(np.asarray(x) for x in qkv())
    out = attngen.attention(*arrays, mask=CAUSAL)
    assert isinstance(out, jax.Array)
    assert close(SPEC, out, arrays)


def test_fields_reach_the_spec(fresh):
    spec = AttentionSpec(
        batch=2, q_heads=4, kv_heads=2, q_len=5, kv_len=9, qk_dim=8, v_dim=16,
        layout="bhtd", scale=0.5, mask=CAUSAL, score=(scores.softcap(5.0),),
        q_offset="bottom_right", outputs=("lse", "out"),
    )  # fmt: skip
    arrays = qkv(spec)
    lse, out = attngen.attention(
        *arrays, layout="bhtd", scale=0.5, mask=CAUSAL, score=scores.softcap(5.0),
        q_offset="bottom_right", outputs=["lse", "out"], fix={"algorithm": "dense"},
    )  # fmt: skip
    assert close(spec, out, arrays)
    want = reference.attention(spec, *map(np.asarray, arrays), {})["lse"]
    assert np.allclose(lse, want, atol=1e-5)


def test_lengths_offsets_and_sinks_may_be_arrays(fresh):
    spec = spec_of(
        batch=2, q_len=4, kv_len=48, kv_lengths=True, q_lengths=True, sink=True,
        q_offset="operand",
    )  # fmt: skip
    arrays = qkv(spec)
    operands = {
        "kv_lengths": np.array([30, 48], np.int32),
        "q_lengths": np.array([4, 3], np.int32),
        "sink": np.array([0.5, -1.0], np.float32),
    }
    for offset in (np.array([20, 44], np.int32), jnp.int32(20), np.int32(20)):
        given = operands | {"q_offset": offset}
        out = attngen.attention(*arrays, mask=CAUSAL, **given)
        assert close(spec, out, arrays, **given)
    assert len(fresh) == 1
    static = attngen.attention(*arrays, mask=CAUSAL, q_offset=20, **operands)
    assert np.allclose(static, out, atol=1e-5)


def test_operands_are_passed_by_name(fresh):
    ids = attngen.operand("ids", axes="bk", dtype="int32")
    same = attngen.mask(lambda b, h, q, k: ids[b, q] == ids[b, k])
    spec = spec_of(mask=same)
    arrays = qkv(spec)
    value = np.sort(np.arange(48, dtype=np.int32) % 3)[None]
    out = attngen.attention(*arrays, mask=same, ids=value)
    assert close(spec, out, arrays, ids=value)


Q, K, V = qkv()
CALLS = {
    "lists": (CallError, ([[1.0]], K, V), {}),
    "three axes": (CallError, (Q[0], K, V), {}),
    "other tokens": (CallError, (Q, K, V[:, :3]), {}),
    "other batches": (CallError, (Q, K[:0], V[:0]), {}),
    "other dims": (CallError, (Q, K[..., :4], V), {}),
    "other dtypes": (CallError, (Q, K, V.astype(jnp.bfloat16)), {}),
    "integers": (SpecError, [x.astype(jnp.int32) for x in (Q, K, V)], {}),
    "an empty batch": (SpecError, (Q[:0], K[:0], V[:0]), {}),
    "kv heads": (SpecError, (jnp.tile(Q, (1, 1, 2, 1))[:, :, :3], K, V), {}),
    "an unstated offset": (SpecError, (Q[:, :3], K, V), {"mask": CAUSAL}),
    "a layout": (SpecError, (Q, K, V), {"layout": "thd"}),
    "a function as mask": (SpecError, (Q, K, V), {"mask": lambda b, h, q, k: k <= q}),
    "an array as mask": (SpecError, (Q, K, V), {"mask": np.ones((48, 48), bool)}),
    "a set of outputs": (SpecError, (Q, K, V), {"outputs": {"out"}}),
    "a list of lengths": (SpecError, (Q, K, V), {"kv_lengths": [48]}),
    "lengths of a dtype": (OperandError, (Q, K, V), {"kv_lengths": np.array([48])}),
    "lengths of a shape": (OperandError, (Q, K, V), {"kv_lengths": jnp.array([4, 8])}),
    "lengths unsaid": (OperandError, (Q, K, V), {"kv_lengths": True}),
    "an unknown option": (OperandError, (Q, K, V), {"causal": True}),
    "an operand too many": (OperandError, (Q, K, V), {"ids": Q}),
    "what arrays say": (OperandError, (Q, K, V), {"q_len": 48}),
    "a missing operand": (OperandError, (Q, K, V), {"mask": masks.documents()}),
    "a budget": (BudgetError, (Q, K, V), {"memory_budget": "a lot"}),
    "a tight budget": (BudgetError, (Q, K, V), {"memory_budget": 16}),
    "a target": (TargetError, (Q, K, V), {"target": "abacus"}),
    "a backend": (BackendError, (Q, K, V), {"backend": "triton"}),
    "derivatives": (NotBuiltError, (Q, K, V), {"derivatives": "vjp"}),
}


@pytest.mark.parametrize(("kind", "arrays", "options"), CALLS.values(), ids=CALLS)
def test_a_wrong_call_is_refused(kind, arrays, options, fresh):
    with refused(kind):
        attngen.attention(*arrays, **options)


def test_float64_needs_64_bit_numbers(fresh):
    arrays = [np.asarray(x, np.float64) for x in (Q, K, V)]
    with refused(BackendError) as caught:
        attngen.attention(*arrays, mask=CAUSAL)
    assert "jax_enable_x64" in caught.value.hint


# attention inside a trace: planned and emitted, nothing else.


@pytest.fixture
def traced_only(monkeypatch, no_compiler):
    """attention() as in a new process, in which nothing may be compiled or validated."""

    def validate(*_, **__):
        raise AssertionError("a kernel was validated")

    monkeypatch.setattr("attngen.validator.validate", validate)
    api._kernel_of.cache_clear()
    yield
    api._kernel_of.cache_clear()


def attend(q, k=K, v=V, **options):
    return attngen.attention(q, k, v, mask=CAUSAL, **options)


TRANSFORMS = {
    "jit": jax.jit(attend),
    "jit of a closure": lambda q: jax.jit(lambda: attend(Q))(),
    "jit of operands alone": lambda q: jax.jit(lambda n: attend(Q, kv_lengths=n))(
        jnp.array([48])
    ),
    "checkpoint": jax.jit(jax.checkpoint(attend)),
    "vmap": lambda q: jax.vmap(attend)(q[None])[0],
    "vmap of all": lambda q: jax.vmap(attend)(q[None], K[None], V[None])[0],
    "vmap in jit": lambda q: jax.jit(jax.vmap(attend))(q[None])[0],
    "scan": lambda q: jax.lax.scan(lambda c, x: (c, attend(x)), 0, q[None])[1][0],
    "a budget": jax.jit(lambda q: attend(q, memory_budget="64KiB")),
    "chunks": jax.jit(lambda q: attend(q, fix=FIX)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_a_trace_nothing_is_compiled_or_validated(name, traced_only):
    assert close(SPEC, TRANSFORMS[name](Q), (Q, K, V))


def test_outside_a_trace_it_would_be(traced_only):
    with pytest.raises(AssertionError, match="a compiler was asked"):
        attend(Q)


def test_a_trace_leaves_the_first_eager_call_to_build(fresh):
    jax.jit(lambda: attend(Q))()
    jax.jit(attend)(Q)
    assert fresh == []
    attend(Q)
    assert len(fresh) == 1


@pytest.mark.parametrize("name", ["derivatives", "budget", "operand"])
def test_inside_a_trace_a_wrong_call_is_refused_as_outside(name, traced_only):
    kind, options = {
        "derivatives": (NotBuiltError, {"derivatives": "vjp"}),
        "budget": (BudgetError, {"memory_budget": 16}),
        "operand": (OperandError, {"ids": Q}),
    }[name]
    with refused(kind):
        jax.jit(lambda q: attend(q, **options))(Q)


# Gradients of a kernel that was made without: JAX's own, which are right or an error.


@pytest.mark.parametrize(
    "fix",
    [{"algorithm": "dense"}, {"q_chunk": 48, "k_chunk": 16, "loop": "scan"}],
    ids=str,
)
def test_a_gradient_without_derivatives_is_jaxs_own(fix, traced_only):
    def loss(attend, arrays):
        return (attend(*arrays) * normal(*Q.shape, seed=9)).sum()

    def plain(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k) * SPEC.scale_value
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)

    def emitted(q, k, v):
        return attngen.attention(q, k, v, fix=fix)

    @jax.jit
    def gradients(arrays):
        ways = (plain, emitted, jax.checkpoint(emitted))
        return [jax.grad(loss, 1)(attend, arrays) for attend in ways]

    want, *others = gradients((Q, K, V))
    for got in others:
        assert all(np.allclose(x, y, atol=1e-5) for x, y in zip(got, want, strict=True))


def test_a_loop_that_skips_has_no_reverse_gradient_yet(traced_only):
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.grad(lambda q: attend(q, fix=FIX).sum())(Q)


# 64-bit numbers, in a process that has them.

WIDE = """
import jax, numpy as np, attngen
from attngen import AttentionSpec, masks
jax.config.update("jax_enable_x64", True)

spec = AttentionSpec(q_heads=2, q_len=40, qk_dim=8, dtype="float64",
                     mask=masks.causal(), outputs=("out", "lse"))
kernel = attngen.build(spec, fix={"q_chunk": 16, "k_chunk": 16})
assert kernel.report.passed and 0 < kernel.report.max_error < 1e-13, kernel.report
q, k, v = (np.random.default_rng(i).standard_normal((1, 40, 2, 8)) for i in range(3))
out, lse = kernel(q, k, v)
assert out.dtype == lse.dtype == np.float64
again = jax.jit(lambda q: attngen.attention(q, k, v, mask=masks.causal()))(q)
assert again.dtype == np.float64 and np.abs(out - again).max() < 1e-14

far = attngen.mask(lambda b, h, q, k: (q * q * q - k * k * k) % 7 != 3)
spec = AttentionSpec(q_heads=1, q_len=24, qk_dim=8, q_offset=2**20, mask=far)
plan = attngen.plan(spec, fix={"q_chunk": 16, "k_chunk": 16})
assert plan.index_dtype == "int64"
report = attngen.validate(attngen.emit(plan))
assert report.passed, report
print("done")
"""


def test_float64_and_int64_where_jax_has_them(process_environment):
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", WIDE],
        env=process_environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "done\n"


def test_int64_positions_need_64_bit_numbers(certificates):
    certificates(lambda source: 1)
    far = attngen.mask(lambda b, h, q, k: (q * q * q - k * k * k) % 7 != 3)
    spec = AttentionSpec(q_heads=1, q_len=24, qk_dim=8, q_offset=2**20, mask=far)
    assert attngen.plan(spec).index_dtype == "int64"
    with refused(BackendError) as caught:
        attngen.build(spec)
    assert "jax_enable_x64" in caught.value.hint
