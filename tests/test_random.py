"""Random specs in random plans, through both backends, by the reference."""

import hypothesis.strategies as st
import programs
import pytest
import strategies
from hypothesis import HealthCheck, assume, given, settings
from judge import kernel
from strategies import OPERANDS

from attngen import AttentionSpec, backends, masks, scores, validator
from attngen.backends.jax.candidates import bounded, products
from attngen.errors import AttngenError
from attngen.intervals import examine
from attngen.lists import skips
from attngen.regions import analyse

backends.register("numpy", "toy_backend")

MASKS = [
    masks.causal(),
    masks.sliding_window(3),
    masks.sliding_window(2, 1),
    masks.causal() & masks.sliding_window(3),
    masks.causal() | masks.prefix(3),
    masks.prefix("prefix_lengths"),
    masks.dense("flags_of_all"),
    masks.dense("flags_of_two", "kq"),
    masks.packed(3),
    masks.streaming_llm(1, 3),
    masks.strided(3),
    masks.neighborhood((3, 4), (3, 1)),
    masks.shifted_windows((3, 4), 2, 1),
    masks.longformer(1, "tokens_of_all"),
]
SCORES = [
    scores.softcap(3.0),
    scores.alibi("alibi_slopes"),
    scores.bias("bias_of_all"),
    scores.bias("bias_of_two", "kh"),
    scores.relative_buckets("near", buckets=8, max_distance=9),
    scores.relative_buckets("past", buckets=6, max_distance=9, bidirectional=False),
    scores.alibi(heads=6),
    scores.decay("rates", grid=(3, 4)),
]


def reading(operands):
    """Strategies of masks and of scores. Built once: building them costs most here."""
    library, traced = st.sampled_from(MASKS), strategies.masks(operands=operands)
    both = st.builds(lambda x, y: x & y, library, traced)
    either = st.builds(lambda x, y: x | y, library, traced)
    score = st.sampled_from(SCORES) | strategies.scores(operands=operands)
    return st.none() | library | traced | both | either, score


READING = {operands: reading(operands) for operands in ((), OPERANDS)}


@st.composite
def specs(draw):
    """Small specs. Where operands are read, an axis k is read at q: q_len <= kv_len."""
    operands = OPERANDS if draw(st.booleans()) else ()
    q_len = draw(st.integers(1, 13))
    kv_len = q_len + draw(st.integers(0 if operands else 1 - q_len, 7))
    kv_heads, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    masks_of, score = READING[operands]
    mask = draw(masks_of)
    if mask is not None and mask.operands:
        kv_len = max(q_len, kv_len)
    return AttentionSpec(
        batch=draw(st.integers(1, 3)),
        q_heads=kv_heads * repeats,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        qk_dim=draw(st.sampled_from([1, 3, 8])),
        v_dim=draw(st.sampled_from([1, 4, 8])),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        out_dtype=draw(st.sampled_from([None, None, "float32", "bfloat16"])),
        layout=draw(st.sampled_from(["bthd", "bhtd"])),
        scale=draw(st.sampled_from([None, -0.5, 2.0])),
        q_offset=draw(
            st.sampled_from([0, "bottom_right", "operand"]) | st.integers(-6, 9)
        ),
        kv_offset=draw(st.sampled_from([0, 0, -4, 3])),
        mask=mask,
        score=tuple(draw(st.lists(score, max_size=2))),
        sink=draw(st.booleans()),
        kv_lengths=draw(st.booleans()),
        q_lengths=draw(st.booleans()),
        outputs=draw(st.permutations(["out", "lse"])),
        precision=draw(st.sampled_from(["default", "highest"])),
    )


@st.composite
def jax_plans(draw, spec):
    fix = {"product_dtype": draw(st.sampled_from(products(spec)))}
    if draw(st.integers(0, 5)) == 0:
        return fix | {"algorithm": "dense"}
    k_chunk = draw(st.integers(1, spec.kv_len))
    loops = ["fori"]
    if not bounded(spec) or k_chunk == spec.kv_len:
        loops += ["scan"] + ["unrolled"] * (spec.kv_len <= 16 * k_chunk)
    parts = [[n for n in (1, 2, 3) if x % n == 0] for x in (spec.kv_heads, spec.batch)]
    if skips(spec):
        fix["skip"] = draw(st.sampled_from(["list", "bounds"]))
        if k_chunk == spec.kv_len:
            fix["skip"] = "bounds"
        if fix["skip"] == "list":
            loops = ["fori"]
    return fix | {
        "algorithm": "running",
        "q_chunk": draw(st.integers(1, spec.q_len)),
        "k_chunk": k_chunk,
        "head_chunk": draw(st.sampled_from(parts[0])),
        "batch_chunk": draw(st.sampled_from(parts[1])),
        "loop": draw(st.sampled_from(loops)),
        "guard": draw(st.booleans()),
    }


@st.composite
def toy_plans(draw, spec):
    q_chunk, k_chunk = (draw(st.integers(1, n)) for n in (spec.q_len, spec.kv_len))
    return {"q_chunk": q_chunk, "k_chunk": k_chunk}


def computes(spec, seed, backend, fix):
    programs.forget()
    function, plan = kernel(spec, backend, **fix)
    to_array = backends.get(backend).array
    check_near(validator.validate(spec, plan, function, to_array=to_array, seed=seed))


def check_near(report):
    """Close to the reference: within 50 times what the rule allows.

    Random scores multiply small errors by large numbers, and few elements may flatter the
    plain baseline; what is wrong is wrong by far more.
    """
    for check in report.checks:
        assert check.error is not None, report
        assert check.error <= 50 * check.tolerance + 1e-5, report


def is_taken(spec):
    """Whether the spec can be computed without 64-bit numbers, which JAX has turned off."""
    try:
        ranges = examine(spec, analyse(spec).limits)
    except AttngenError:
        return False
    return ranges.index_dtype == "int32"


def random_specs(examples, backend):
    plans = jax_plans if backend == "jax" else toy_plans
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, suppress_health_check=quiet)
    @given(specs(), st.integers(0, 3), st.data())
    def check(spec, seed, data):
        assume(is_taken(spec))
        computes(spec, seed, backend, data.draw(plans(spec)))

    return check


test_jax_computes_random_specs = random_specs(15, "jax")
test_the_toy_backend_computes_random_specs = random_specs(150, "numpy")
test_jax_computes_many_random_specs = pytest.mark.slow(random_specs(1000, "jax"))
test_the_toy_backend_computes_many_random_specs = pytest.mark.slow(
    random_specs(3000, "numpy")
)
