"""A built kernel: what it takes and returns, what it refuses, what a call costs."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, certifier, masks, scores
from attngen.backends import jax as backend
from attngen.errors import CallError, OperandError
from attngen.kernel import Kernel
from attngen.plans import Plan
from attngen.reports import Certificate, Report

SPEC = AttentionSpec(
    batch=2, q_heads=4, kv_heads=2, q_len=6, kv_len=20, qk_dim=8, v_dim=4,
    mask=masks.causal(), score=(scores.alibi(),), q_offset="operand", kv_lengths=True,
    sink=True, outputs=("out", "lse"),
)  # fmt: skip
OPERANDS = {
    "q_offset": jnp.array([3, 14], jnp.int32),
    "kv_lengths": jnp.array([20, 9], jnp.int32),
    "sink": jnp.linspace(-1, 1, 4),
    "slopes": jnp.linspace(0.1, 0.4, 4),
}
SHAPES = {"q": (2, 6, 4, 8), "k": (2, 20, 2, 8), "v": (2, 20, 2, 4)}


def kernel_of(spec, **fix):
    """A kernel as inside a trace: neither certified nor validated."""
    made = attngen.plan(spec, fix=fix)
    source = attngen.emit(made)
    function = backend.BACKEND.load(attngen.api.stored(source))
    return Kernel(spec, made, source, None, None, function)


def arrays(**changes):
    generator = np.random.default_rng(0)
    made = {n: generator.standard_normal(s, np.float32) for n, s in SHAPES.items()}
    return {n: jnp.asarray(x) for n, x in made.items()} | changes


@pytest.fixture(scope="module")
def kernel(cache):
    return kernel_of(SPEC, algorithm="dense")


def test_it_has_all_that_is_known_of_it(monkeypatch):
    said = Certificate("cpu", "a test", temp_bytes=1)
    monkeypatch.setattr(
        certifier, "certify_many", lambda *given: [said] * len(given[2])
    )
    spec = AttentionSpec(q_heads=1, q_len=8, qk_dim=4)
    built = attngen.build(spec)
    assert isinstance(built, Kernel)
    assert built.spec == spec
    assert built.plan == attngen.plan(spec)
    assert built.source == attngen.emit(built.plan)
    assert built.certificate == said
    assert built.report.passed
    assert str(built) == built.plan.explain()
    assert Plan.from_json(built.plan.to_json()) == built.plan
    assert Report.from_json(built.report.to_json()) == built.report
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.plan = None


def test_it_returns_the_specs_outputs(kernel):
    out, lse = kernel(**arrays(), **OPERANDS)
    assert (out.shape, out.dtype) == ((2, 6, 4, 4), np.float32)
    assert (lse.shape, lse.dtype) == ((2, 4, 6), np.float32)
    swapped = kernel_of(dataclasses.replace(SPEC, outputs=("lse", "out")))
    lse_first, out_second = swapped(**arrays(), **OPERANDS)
    assert np.allclose(lse_first, lse, atol=1e-5)
    assert np.allclose(out_second, out, atol=1e-5)
    alone = kernel_of(dataclasses.replace(SPEC, outputs=("lse",)))
    assert np.allclose(alone(**arrays(), **OPERANDS), lse, atol=1e-5)


def test_arrays_by_position_or_name_of_jax_or_numpy(kernel):
    want = kernel(**arrays(), **OPERANDS)
    by_position = kernel(*arrays().values(), **OPERANDS)
    of_numpy = kernel(
        *map(np.asarray, arrays().values()),
        **{n: np.asarray(x) for n, x in OPERANDS.items()},
    )
    for got in (by_position, of_numpy):
        assert all(np.array_equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("offset", [3, np.int32(3), jnp.int32(3), jnp.array([3, 3])])
def test_an_offset_is_one_for_all_or_one_a_batch(kernel, offset):
    want, _ = kernel(**arrays(), **OPERANDS | {"q_offset": np.array([3, 3], np.int32)})
    got, _ = kernel(**arrays(), **OPERANDS | {"q_offset": offset})
    assert np.array_equal(got, want)


def test_a_loop_over_positions_compiles_once(kernel):
    kernel(**arrays(), **OPERANDS | {"q_offset": 3})
    compiled = kernel.function._cache_size()
    for offset in range(4, 9):
        kernel(**arrays(), **OPERANDS | {"q_offset": offset})
    assert kernel.function._cache_size() == compiled


WRONG_ARRAYS = {
    "a list": [1.0],
    "nothing": None,
    "a number": 3.0,
    "an axis too few": jnp.zeros((2, 20, 2)),
    "another length": jnp.zeros((2, 21, 2, 8)),
    "another layout": jnp.zeros((2, 2, 20, 8)),
    "query heads": jnp.zeros((2, 20, 4, 8)),
    "another dtype": jnp.zeros((2, 20, 2, 8), jnp.bfloat16),
    "doubles": np.zeros((2, 20, 2, 8)),
    "integers": np.zeros((2, 20, 2, 8), np.int32),
}


@pytest.mark.parametrize("value", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS)
def test_an_array_that_is_not_the_specs_is_refused(kernel, value):
    with refused(CallError) as caught:
        kernel(**arrays(k=value), **OPERANDS)
    assert caught.value.what.startswith("k ")
    assert caught.value.needed == "float32[2, 20, 2, 8] (bthd)"


WRONG_OPERANDS = {
    "missing": {"slopes": None},
    "too many": {"bias": jnp.zeros(3)},
    "another name": {"slopes": None, "slope": jnp.zeros(4)},
    "another shape": {"slopes": jnp.zeros(3)},
    "another dtype": {"slopes": jnp.zeros(4, jnp.float16)},
    "a list": {"slopes": [1.0, 2.0, 3.0, 4.0]},
    "a scalar": {"sink": 1.0},
    "a scalar length": {"kv_lengths": np.int32(3)},
    "wide lengths": {"kv_lengths": np.array([3, 4])},
    "a wide offset": {"q_offset": np.int64(3)},
    "a huge offset": {"q_offset": 2**40},
    "a true offset": {"q_offset": True},
    "a float offset": {"q_offset": 3.0},
    "a vector of offsets": {"q_offset": np.zeros(3, np.int32)},
}


@pytest.mark.parametrize("change", WRONG_OPERANDS.values(), ids=WRONG_OPERANDS)
def test_an_operand_that_is_not_the_specs_is_refused(kernel, change):
    given = {n: x for n, x in (OPERANDS | change).items() if x is not None}
    with refused(OperandError):
        kernel(**arrays(), **given)


def test_an_emitted_function_checks_its_arguments_too(kernel):
    """It is used without attngen."""
    namespace = {}
    exec(kernel.source.text, namespace)
    with pytest.raises(TypeError, match=r"k is float32\(2, 21, 2, 8\), not"):
        namespace["attention"](**arrays(k=jnp.zeros((2, 21, 2, 8))), **OPERANDS)
    wrong = OPERANDS | {"slopes": jnp.zeros(4, jnp.float16)}
    with pytest.raises(TypeError, match="slopes is float16"):
        namespace["attention"](**arrays(), **wrong)


def test_it_composes_with_transforms(kernel):
    want, _ = kernel(**arrays(), **OPERANDS)
    q, k, v = arrays().values()

    def call(q):
        return kernel(q, k, v, **OPERANDS)[0]

    for got in (
        jax.jit(call)(q),
        jax.vmap(call)(jnp.stack([q, q]))[1],
        jax.jit(jax.checkpoint(call))(q),
    ):
        assert np.allclose(got, want, atol=1e-6)
    with refused(CallError):
        jax.jit(call)(q[:1])


def test_a_call_costs_little_beyond_the_jitted_function():
    """At most 50 µs: medians of interleaved calls, the best of several rounds."""
    kernel = kernel_of(AttentionSpec(q_heads=2, q_len=16, qk_dim=8, sink=True))
    q, sink = jnp.ones((1, 16, 2, 8)), jnp.ones(2)

    def seconds(function):
        start = time.perf_counter()
        function(q, q, q, sink=sink)
        return time.perf_counter() - start

    def overhead():
        pairs = [(seconds(kernel), seconds(kernel.function)) for _ in range(300)]
        ours, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
        return ours - plain

    seconds(kernel)
    assert any(overhead() < 50e-6 for _ in range(5))


def test_attention_finds_its_kernel_in_little_time(monkeypatch):
    said = Certificate("cpu", "a test", temp_bytes=1)
    monkeypatch.setattr(certifier, "certify", lambda *_, **__: said)
    mask = masks.causal()
    q = jnp.ones((1, 16, 2, 8))
    kernel = attngen.build(AttentionSpec(q_heads=2, q_len=16, qk_dim=8, mask=mask))
    attngen.attention(q, q, q, mask=mask)

    def seconds(function, **options):
        start = time.perf_counter()
        function(q, q, q, **options)
        return time.perf_counter() - start

    def overhead():
        pairs = [
            (seconds(attngen.attention, mask=mask), seconds(kernel.function))
            for _ in range(300)
        ]
        ours, plain = (statistics.median(times) for times in zip(*pairs, strict=True))
        return ours - plain

    assert any(overhead() < 50e-6 for _ in range(5))
