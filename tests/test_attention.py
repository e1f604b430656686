"""attention(): outside a trace the first call builds; inside, it plans and emits only."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused
from small import CAUSAL, FIX, SPEC, close, normal, qkv, spec_of

import attngen
from attngen import AttentionSpec, api, masks, reference, scores
from attngen.errors import (
    BackendError,
    BudgetError,
    CallError,
    DerivativeError,
    OperandError,
    SpecError,
    TargetError,
)

# attention: outside a trace the first call builds.


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
K8 = np.ones(K.shape, np.int8)
PACKED = {f"cu_seqlens_{x}": np.array([0, 48], np.int32) for x in "qk"}
CALLS = {
    "lists": (CallError, ([[1.0]], K, V), {}),
    "three axes": (CallError, (Q[0], K, V), {}),
    "other tokens": (CallError, (Q, K, V[:, :3]), {}),
    "other batches": (CallError, (Q, K[:0], V[:0]), {}),
    "other dims": (CallError, (Q, K[..., :4], V), {}),
    "other dtypes": (CallError, (Q, K, V.astype(jnp.bfloat16)), {}),
    "offsets of q alone": (
        CallError,
        (Q[0], K[0], V[0]),
        {"cu_seqlens_q": np.array([0, 4], np.int32)},
    ),
    "packed, with a batch": (CallError, (Q, K, V), {"storage": "packed", **PACKED}),
    "paged, without a table": (CallError, (Q, K, V), {"storage": "paged"}),
    "a kv_dtype that isn't": (CallError, (Q, K, V), {"kv_dtype": "int8"}),
    "scales of nothing": (
        SpecError,
        (Q, K, V),
        {"k_scale": np.ones((1, 2, 7), np.float32)},
    ),
    "one scale": (CallError, (Q, K8, K8), {"k_scale": 1.0, "v_scale": 1.0}),
    "scales of rows of keys": (
        CallError,
        (Q, K8[0, :, 0], K8[0, :, 0]),
        {"k_scale": np.ones((1, 2, 48), np.float32)},
    ),
    "sequences of other queries": (
        OperandError,
        (Q[0], K[0], V[0]),
        {"mask": CAUSAL}
        | PACKED
        | {"cu_seqlens_q": np.array([0, 40, 48], np.int32)}
        | {"cu_seqlens_k": np.array([0, 41, 48], np.int32)},
    ),
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
    "a target": (TargetError, (Q, K, V), {"target": "abacus"}),
    "a backend": (BackendError, (Q, K, V), {"backend": "triton"}),
    "derivatives": (SpecError, (Q, K, V), {"derivatives": "some"}),
}


@pytest.mark.parametrize(("kind", "arrays", "options"), CALLS.values(), ids=CALLS)
def test_a_wrong_call_is_refused(kind, arrays, options, fresh):
    with refused(kind):
        attngen.attention(*arrays, **options)


def test_a_budget_that_nothing_is_certified_within_is_refused():
    with refused(BudgetError):
        attngen.attention(Q, K, V, memory_budget=16, fix={"algorithm": "dense"})


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
        "derivatives": (SpecError, {"derivatives": "some"}),
        "budget": (BudgetError, {"memory_budget": 16}),
        "operand": (OperandError, {"ids": Q}),
    }[name]
    with refused(kind):
        jax.jit(lambda q: attend(q, **options))(Q)


# Gradients, of what was asked for with them.


@pytest.mark.parametrize("derivatives", ["vjp", "any"])
def test_a_gradient_is_that_of_plain_attention(derivatives, traced_only):
    def loss(attend, arrays):
        return (attend(*arrays) * normal(*Q.shape, seed=9)).sum()

    def plain(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k) * SPEC.scale_value
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(s), v)

    def emitted(q, k, v):
        return attngen.attention(q, k, v, derivatives=derivatives)

    @jax.jit
    def gradients(arrays):
        ways = (plain, emitted, jax.checkpoint(emitted))
        return [jax.grad(loss, 1)(attend, arrays) for attend in ways]

    want, *others = gradients((Q, K, V))
    for got in others:
        assert all(np.allclose(x, y, atol=1e-5) for x, y in zip(got, want, strict=True))


def test_without_derivatives_there_is_no_gradient(traced_only):
    with refused(DerivativeError, match="without derivatives"):
        jax.grad(lambda q: attend(q, fix=FIX).sum())(Q)
    with refused(DerivativeError, match="without derivatives"):
        jax.jit(jax.grad(lambda q: attend(q, fix=FIX).sum()))(Q)


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
