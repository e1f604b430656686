"""Dropout: the same weights are dropped as in the reference, whatever the plan."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from judge import judge, kernel
from refusals import refused

import attngen
from attngen import (
    AttentionSpec,
    inputs,
    masks,
    philox,
    reference,
    reference_gradients,
    scores,
    slopes,
)
from attngen.errors import OperandError, PlanError

BASE = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=50,
    kv_len=70,
    qk_dim=16,
    q_offset="bottom_right",
    outputs=("out", "lse"),
    dropout=0.3,
)
CAUSAL = dataclasses.replace(BASE, mask=masks.causal())
PLANS = {
    "one tile": {"algorithm": "dense"},
    "a loop": {"algorithm": "running", "q_chunk": 16, "k_chunk": 24},
    "odd chunks": {"algorithm": "running", "q_chunk": 7, "k_chunk": 5},
    "one key": {"algorithm": "running", "q_chunk": 9, "k_chunk": 1},
    "one query": {"algorithm": "running", "q_chunk": 1, "k_chunk": 70},
    "one head": {
        "algorithm": "running",
        "q_chunk": 25,
        "k_chunk": 35,
        "head_chunk": 1,
        "batch_chunk": 1,
    },
    "scores twice": {"algorithm": "running", "k_chunk": 24, "qk": "twice"},
    "keys last": {"algorithm": "running", "k_chunk": 24, "slices": "dn"},
    "unrolled": {"algorithm": "running", "k_chunk": 35, "loop": "unrolled"},
    "scanned": {"algorithm": "running", "k_chunk": 24, "loop": "scan"},
    "stacked steps": {"algorithm": "running", "q_chunk": 10, "steps": "map"},
    "parts": {"algorithm": "split_kv", "q_chunk": 16, "k_chunk": 12, "parts": 3},
    "summaries": {"algorithm": "summaries", "k_chunk": 24, "loop": "fori"},
    "mapped": {"algorithm": "summaries", "k_chunk": 14, "loop": "map"},
}
SPECS = {
    "no mask": BASE,
    "causal": CAUSAL,
    "heads before tokens": dataclasses.replace(CAUSAL, layout="bhtd"),
    "a head for each": dataclasses.replace(BASE, kv_heads=4),
    "offsets": dataclasses.replace(CAUSAL, q_offset=-9, kv_offset=-22),
    "an offset at run time": dataclasses.replace(CAUSAL, q_offset="operand"),
    "lengths": dataclasses.replace(CAUSAL, kv_lengths=True, q_lengths=True, q_offset=0),
    "documents": dataclasses.replace(
        CAUSAL, kv_len=50, q_offset=0, mask=masks.causal() & masks.documents()
    ),
    "a window": dataclasses.replace(BASE, mask=masks.sliding_window(9, 4)),
    "softcap": dataclasses.replace(CAUSAL, score=(scores.softcap(3.0),)),
    "a sink": dataclasses.replace(CAUSAL, sink=True),
    "narrow": dataclasses.replace(CAUSAL, dtype="bfloat16"),
    "lse alone": dataclasses.replace(BASE, outputs=("lse",)),
    "one query": dataclasses.replace(CAUSAL, q_len=1),
    "most": dataclasses.replace(BASE, dropout=0.9),
}
NO_GRADIENTS = ("a head for each", "documents", "a window", "one query", "most")
GRADIENTS = {
    name: dataclasses.replace(spec, derivatives="vjp")
    for name, spec in SPECS.items()
    if name not in NO_GRADIENTS
}
GRADIENTS["a bias"] = dataclasses.replace(
    GRADIENTS["causal"], score=(scores.bias(axes="hqk"),)
)
BACKWARD = {
    "by queries": {"algorithm": "by_queries", "q_chunk": 16, "k_chunk": 24},
    "by keys": {"algorithm": "by_keys", "q_chunk": 7, "k_chunk": 5},
    "two passes": {"algorithm": "two_passes", "q_chunk": 25, "k_chunk": 1},
    "twice": {"algorithm": "by_keys", "q_chunk": 16, "k_chunk": 24, "ds": "twice"},
    "delta summed": {"algorithm": "by_keys", "q_chunk": 16, "delta": "summed"},
}


def fitted(spec, plan):
    """A plan's choices, for a spec that may be smaller."""
    limits = {"q_chunk": spec.q_len, "k_chunk": spec.kv_len}
    return {n: min(v, limits.get(n, v)) for n, v in plan.items() if n in limits} | {
        n: v for n, v in plan.items() if n not in limits
    }


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.sampled(3)
def test_every_plan_drops_the_same_weights(plan):
    judge(BASE, **PLANS[plan])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(3)
def test_every_spec_drops_the_weights_of_the_reference(name):
    judge(SPECS[name], **fitted(SPECS[name], PLANS["a loop"]))


@pytest.mark.parametrize("name", ["causal", "offsets", "lengths", "documents"])
def test_chunks_that_are_skipped_change_nothing(name):
    judge(SPECS[name], **PLANS["odd chunks"])


def test_steps_down_a_diagonal_drop_the_same_weights():
    spec = dataclasses.replace(BASE, q_len=96, kv_len=96, mask=masks.causal())
    fix = {"algorithm": "running", "q_chunk": 32, "k_chunk": 16, "diagonal": 8}
    judge(spec, **fix)


def test_tiles_of_a_list_drop_the_same_weights():
    fix = PLANS["odd chunks"] | {"skip": "list", "loop": "fori"}
    judge(SPECS["documents"], **fix)


def test_a_column_of_ones_would_sum_what_is_left():
    with refused(PlanError) as caught:
        attngen.plan(BASE, fix={"algorithm": "running", "denominator": "ones"})
    assert "dropout" in str(caught.value)


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.sampled(4, 1)
def test_the_backward_pass_drops_the_same_weights(name):
    gradients_are_right(GRADIENTS[name], **BACKWARD["by queries"])


@pytest.mark.parametrize("way", BACKWARD)
@pytest.mark.sampled(2)
def test_so_does_every_way_back(way):
    gradients_are_right(GRADIENTS["causal"], **BACKWARD[way])


def gradients_are_right(spec, **fix):
    """Whether gradients are the reference's, to some units of float32 or of the dtype."""
    from attngen import backends

    way = fix.pop("algorithm")
    fix = {f"backward_{n}": v for n, v in fitted(spec, fix).items()}
    fix["backward"] = way
    function, _ = kernel(spec, **fix)
    by = backends.get("jax")
    given, pulled = inputs.arrays(spec), inputs.cotangents(spec)
    of = slopes.cotangents(spec)
    made = by.program(spec, function)(
        **{
            n: by.array(x, spec.dtype_of(of.get(n, n)))
            for n, x in (given | pulled).items()
        }
    )
    found = dict(zip(slopes.gradients(spec), made[len(spec.outputs) :], strict=True))
    q, k, v = (given.pop(n) for n in "qkv")
    want = reference_gradients.gradients(spec, q, k, v, given, pulled)
    tolerance = 2e-5 if spec.dtype == "float32" else 2e-2
    for name, x in found.items():
        x = np.asarray(x, np.float64)
        if name == "dq":
            x = reference.by_heads(spec, x)
        assert np.abs(x - want[name]).max() <= tolerance * np.abs(want[name]).max()


def test_a_report_judges_gradients_with_dropout():
    spec = dataclasses.replace(
        GRADIENTS["narrow"], q_len=128, kv_len=128, dropout=0.1, outputs=("out",)
    )
    report = judge(spec)
    assert {c.name for c in report.checks} == {"out", "dq", "dk", "dv"}


def arrays_of(spec):
    return {n: jnp.asarray(x) for n, x in inputs.arrays(spec).items()}


def test_a_seed_gives_the_same_bits_again_and_another_seed_others():
    function, _ = kernel(CAUSAL, **PLANS["a loop"])
    given = arrays_of(CAUSAL)
    first, again = function(**given)[0], function(**given)[0]
    assert (first == again).all()
    other = given | {"seed": given["seed"] ^ 1}
    assert not (function(**other)[0] == first).all()


def test_lse_is_of_all_weights():
    function, _ = kernel(CAUSAL, **PLANS["a loop"])
    given = arrays_of(CAUSAL)
    plain, _ = kernel(dataclasses.replace(CAUSAL, dropout=0.0), **PLANS["a loop"])
    want = plain(**{n: x for n, x in given.items() if n != "seed"})[1]
    assert np.allclose(function(**given)[1], want, rtol=0, atol=1e-6)


def test_the_mean_over_seeds_is_attention_without_dropout():
    spec = dataclasses.replace(CAUSAL, outputs=("out",), dropout=0.2)
    function, _ = kernel(spec, **PLANS["a loop"])
    given = arrays_of(spec)
    del given["seed"]
    seeds = [philox.seed_words(n) for n in range(400)]
    made = np.array([function(**given, seed=s) for s in seeds])
    plain, _ = kernel(dataclasses.replace(spec, dropout=0.0), **PLANS["a loop"])
    away = (made.mean(0) - plain(**given)) / (made.std(0) / 20 + 1e-6)
    assert abs(away).max() < 6
    assert abs(away.std() - 1) < 0.1


def test_shards_of_a_ring_drop_as_the_whole():
    spec = AttentionSpec(
        q_heads=2, q_len=64, qk_dim=16, dropout=0.3, outputs=("out", "lse")
    )
    q, k, v, seed = (arrays_of(spec)[n] for n in ("q", "k", "v", "seed"))
    whole = kernel(spec, k_chunk=24)[0](q, k, v, seed=seed)[0]
    for start in (0, 32):
        out, weight = 0, 0
        for first in (0, 32):
            part = dataclasses.replace(
                spec, q_len=32, kv_len=32, q_offset=start, kv_offset=first
            )
            at, keys = slice(start, start + 32), slice(first, first + 32)
            made, lse = kernel(part)[0](q[:, at], k[:, keys], v[:, keys], seed=seed)
            share = jnp.exp(lse.swapaxes(1, 2)[..., None])
            out, weight = out + made * share, weight + share
        assert np.allclose(out / weight, whole[:, at], rtol=0, atol=1e-5)


# The seed.

SMALL = AttentionSpec(q_heads=1, q_len=32, qk_dim=8, dropout=0.5)


@pytest.fixture(scope="module")
def built():
    return attngen.build(SMALL, fix={"algorithm": "running"})


def test_a_seed_may_be_a_number(built):
    q, k, v = (arrays_of(SMALL)[n] for n in "qkv")
    given = jax.random.key_data(jax.random.key(42))
    want = built(q, k, v, seed=given)
    assert (built(q, k, v, seed=42) == want).all()
    made = attngen.attention(q, k, v, dropout=0.5, seed=42)
    assert np.allclose(made, want, rtol=0, atol=1e-6)
    traced = jax.jit(lambda s: attngen.attention(q, k, v, dropout=0.5, seed=s))(given)
    assert np.allclose(traced, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "seed",
    [
        np.zeros(2, np.int32),
        np.zeros(3, np.uint32),
        np.uint32(1),
        -1,
        2**64,
        1.5,
        True,
        None,
    ],
    ids=str,
)
def test_a_seed_that_is_none_says_what_is_needed(built, seed):
    q, k, v = (arrays_of(SMALL)[n] for n in "qkv")
    with refused(OperandError) as caught:
        built(q, k, v, seed=seed)
    assert "uint32[2]" in caught.value.needed
    assert "key_data" in caught.value.hint


def test_a_seed_is_asked_for(built):
    q, k, v = (arrays_of(SMALL)[n] for n in "qkv")
    with refused(OperandError) as caught:
        built(q, k, v)
    assert "seed" in caught.value.needed


def test_an_emitted_file_checks_its_seed():
    space = {}
    exec(attngen.emit(attngen.plan(SMALL)).text, space)
    q, k, v = (arrays_of(SMALL)[n] for n in "qkv")
    with pytest.raises(TypeError, match="seed is int32"):
        space["attention"](q, k, v, seed=jnp.zeros(2, jnp.int32))


def test_operands_of_ones_own_have_no_such_dtype():
    with refused(OperandError):
        attngen.operand("bits", axes="k", dtype="uint32")
    with refused(OperandError):
        attngen.operand("seed", axes="k", dtype="int32")


def test_a_seed_has_no_gradient():
    spec = GRADIENTS["causal"]
    assert "d_seed" not in slopes.gradients(spec)
    assert spec.operands[-1].kind == "int"


def test_there_is_no_seed_without_dropout():
    spec = dataclasses.replace(BASE, dropout=0.0)
    assert not spec.operands
    assert "seed" not in inputs.arrays(spec)


# Files and commands.


def test_a_spec_with_dropout_goes_to_files_and_back():
    assert AttentionSpec.from_json(CAUSAL.to_json()) == CAUSAL
    assert AttentionSpec.from_toml(CAUSAL.to_toml()) == CAUSAL


def test_the_command_line_takes_it(tmp_path):
    spec = tmp_path / "spec.toml"
    spec.write_text(SMALL.to_toml())
    path = tmp_path / "attention.py"
    run("emit", spec, "-o", path)
    text = path.read_text()
    assert "with dropout" in text
    assert "DROPOUT = 0.5" in text
    run("validate", path)
    run("emit", "--check", path)
    given = ("--q-heads", 1, "--q-len", 32, "--qk-dim", 8, "--dropout", 0.5)
    assert run("emit", *given)[0] == text


def test_peers_do_not_drop_what_attngen_drops():
    from attngen import peers

    for name in peers.names():
        assert "dropout" in peers.refuse(peers.get(name), SMALL)
