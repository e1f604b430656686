"""Paged K/V in JAX: chunks of keys gathered from pages, by the rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge, kernel
from library import slowly
from refusals import refused

import attngen
from attngen import AttentionSpec, building, inputs, masks, presets, reference, scores
from attngen.errors import CallError, NotBuiltError, OperandError, PlanError

SPEC = AttentionSpec(
    batch=3, q_heads=8, kv_heads=4, q_len=3, kv_len=80, qk_dim=16, storage="paged",
    page_size=16, kv_lengths=True, mask=masks.causal(), q_offset="bottom_right",
    outputs=("out", "lse"),
)  # fmt: skip
RUNNING = {"algorithm": "running"}


def spec_of(**changes):
    return dataclasses.replace(SPEC, **changes)


# how keys are found: whole pages, a part of a page, or key by key
CASES = {
    "whole pages": (SPEC, {"k_chunk": 32}),
    "pages of a head": (SPEC, {"k_chunk": 32, "head_chunk": 1}),
    "pages of all batches": (SPEC, {"k_chunk": 32, "batch_chunk": 3}),
    "heads first": (spec_of(layout="bhtd"), {"k_chunk": 32, "head_chunk": 2}),
    "a head, heads first": (spec_of(layout="bhtd"), {"k_chunk": 48, "head_chunk": 1}),
    "a part of a page": (SPEC, {"k_chunk": 8, "batch_chunk": 1}),
    "a part, heads first": (
        spec_of(layout="bhtd"), {"k_chunk": 4, "batch_chunk": 1, "head_chunk": 2}
    ),
    "some heads, key by key": (SPEC, {"k_chunk": 32, "head_chunk": 2}),
    "chunks across pages": (SPEC, {"k_chunk": 7, "batch_chunk": 1}),
    "of all batches": (SPEC, {"k_chunk": 7, "batch_chunk": 3, "head_chunk": 2}),
    "across, heads first": (
        spec_of(layout="bhtd"), {"k_chunk": 12, "batch_chunk": 3, "head_chunk": 1}
    ),
    "odd pages": (spec_of(page_size=5, kv_len=77), {"k_chunk": 10}),
    "a last page in part": (spec_of(kv_len=77), {"k_chunk": 16}),
    "pages of one": (spec_of(page_size=1), {"k_chunk": 16}),
    "no lengths": (spec_of(kv_lengths=False, kv_len=77), {"k_chunk": 32}),
    "spare pages": (spec_of(num_pages=40), {"k_chunk": 32}),
    "one query": (spec_of(q_len=1, q_offset="operand"), {"k_chunk": 32}),
    "sixteen": (spec_of(q_len=16, sink=True), {"k_chunk": 32, "q_chunk": 5}),
    "a score": (spec_of(score=(scores.alibi(),)), {"k_chunk": 16}),
    "one head": (spec_of(q_heads=2, kv_heads=1, qk_dim=8), {"k_chunk": 32}),
    "half": (spec_of(dtype="bfloat16", v_dim=24), {"k_chunk": 32}),
}  # fmt: skip


# of each two alike one is among the default tests
RARE = {
    "a part, heads first", "of all batches", "a last page in part", "pages of one",
    "spare pages", "a score", "heads first", "one query",
}  # fmt: skip


@pytest.mark.parametrize("case", slowly(CASES, set(CASES) - RARE))
@pytest.mark.sampled(2)
def test_kernels(case):
    spec, fix = CASES[case]
    judge(spec, **RUNNING, **fix)


@pytest.mark.parametrize(
    "fix", [{"k_chunk": 16, "parts": 2}, {"k_chunk": 7, "parts": 8}]
)
def test_keys_in_parts(fix):
    judge(SPEC, algorithm="split_kv", **fix)


def test_summaries():
    judge(SPEC, algorithm="summaries", k_chunk=16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 80])
@pytest.mark.parametrize("k_chunk", [1, 5, 16, 40, 80])
@pytest.mark.parametrize("head_chunk", [1, 2, 4])
@pytest.mark.parametrize("batch_chunk", [1, 3])
def test_any_chunk_of_any_pages(layout, page_size, k_chunk, head_chunk, batch_chunk):
    fix = {"head_chunk": head_chunk, "batch_chunk": batch_chunk, "k_chunk": k_chunk}
    judge(spec_of(layout=layout, page_size=page_size), **RUNNING, **fix)


# What tables hold behind the last key.


@pytest.mark.parametrize("k_chunk", [8, 32, 7])
def test_entries_behind_the_last_key_may_be_anything(k_chunk):
    function, _ = kernel(SPEC, **RUNNING, k_chunk=k_chunk, batch_chunk=1)
    given = inputs.arrays(SPEC)
    given["kv_lengths"] = np.array([0, 17, 80], np.int32)
    used = -(-given["kv_lengths"] // SPEC.page_size)
    given["block_table"] = np.arange(15, dtype=np.int32).reshape(3, 5)
    given["k"], given["v"] = (np.nan_to_num(given[n]) for n in "kv")
    made = []
    for entry in (0, -1, 10**9, -(2**31)):
        table = given["block_table"].copy()
        for row, count in zip(table, used, strict=True):
            row[count:] = entry
        k, v = given["k"].copy(), given["v"].copy()
        k[5 + 2], v[5 + 2] = np.nan, np.nan  # a page that no sequence has
        out, lse = function(**given | {"block_table": table, "k": k, "v": v})
        made.append((np.asarray(out), np.asarray(lse)))
    assert (made[0][0][0] == 0).all()
    for out, lse in made[1:]:
        assert np.array_equal(out, made[0][0])
        assert np.array_equal(lse, made[0][1])


# Memory: never all keys.


@pytest.mark.parametrize("change", [{}, {"layout": "bhtd"}, {"dtype": "bfloat16"}])
def test_keys_are_gathered_chunk_by_chunk(change):
    spec = dataclasses.replace(SPEC, batch=2, q_len=1, kv_len=8192, qk_dim=64, **change)
    plan = attngen.plan(spec, fix={"k_chunk": 128})
    certificate = attngen.certify(plan)
    tokens = spec.batch * spec.kv_len * spec.kv_heads * spec.qk_dim
    assert certificate.temp_bytes <= plan.temp_bytes
    assert certificate.temp_bytes < 2 * tokens / 4  # bytes: an eighth of float16 ones


# What is refused.


def test_what_would_gather_all_keys_is_not_legal():
    for fix in ({"algorithm": "dense"}, {"slices": "dn"}, {"diagonal": 1}):
        with refused(PlanError):
            attngen.plan(SPEC, fix=fix)
    assert "dense would gather all of K/V" in attngen.plan(SPEC).explain()


@pytest.mark.parametrize("kind", ["vjp", "any"])
def test_derivatives_are_refused(kind):
    with refused(NotBuiltError):
        attngen.plan(spec_of(derivatives=kind))


WRONG = {
    "a page that isn't there": {"block_table": [[0, 1, 2, 3, 15]] * 3},
    "a page before the first": {"block_table": [[0, -1, 2, 3, 4]] * 3},
    "a length beyond the pages": {"kv_lengths": [80, 81, 0]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_pages_that_cannot_be_are_refused(change, monkeypatch):
    function, plan = kernel(SPEC)
    built = building.kernel(plan, attngen.emit(plan), function, None, None)
    given = inputs.arrays(SPEC)
    given["kv_lengths"] = np.array([80, 80, 80], np.int32)
    given["block_table"] = np.arange(15, dtype=np.int32).reshape(3, 5)
    built(**given)
    given |= {n: np.array(x, np.int32) for n, x in change.items()}
    with refused(OperandError):
        built(**given)
    given |= {n: jnp.asarray(given[n]) for n in ("block_table", "kv_lengths")}
    built(**given)
    monkeypatch.setenv("ATTNGEN_CHECK", "1")
    with refused(OperandError):
        built(**given)
    jax.jit(lambda t: built(**given | {"block_table": t}))(given["block_table"])


def test_attention_takes_pages(fresh):
    given = inputs.arrays(SPEC)
    q, k, v = (given[n] for n in "qkv")
    operands = {n: given[n] for n in ("block_table", "kv_lengths")}
    want = reference.attention(SPEC, q, k, v, operands)
    call = {"mask": masks.causal(), "q_offset": "bottom_right"}
    out = attngen.attention(q, k, v, **operands, **call)
    assert np.allclose(np.swapaxes(out, 1, 2), want["out"], atol=1e-5)
    with refused(CallError):
        attngen.attention(q, k, v, block_table=given["block_table"][0], **call)


def test_a_file_says_how_pages_lie():
    text = attngen.emit(attngen.plan(SPEC)).text
    assert "key i of sequence b is token i%16 of page" in text
    assert "k       [15, 16, 4, 16]" in text
    assert "in 15 pages of 16" in attngen.plan(SPEC).explain()


def test_a_preset_in_pages_plans_on_every_kind_of_target():
    spec = dataclasses.replace(presets.get("decode-llama3"), storage="paged")
    for target in ("cpu", "tpu-v5e", "h100"):
        assert attngen.plan(spec, target=target, backend="jax").algorithm != "dense"
