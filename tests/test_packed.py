"""Packed storage in JAX: the lowering by the reference, and kernels by the rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge, kernel
from library import EXAMPLES, FEW, OFFSETS, PAIRS, holding, offsets_of, rotating, slowly
from refusals import refused

import attngen
from attngen import AttentionSpec, backends, building, inputs, masks, reference, scores
from attngen.backends.jax.packed import lowered
from attngen.errors import NotBuiltError, OperandError

SPEC = AttentionSpec(
    batch=4, q_heads=4, kv_heads=2, q_len=50, kv_len=70, qk_dim=16, storage="packed",
    mask=masks.causal(), q_offset="bottom_right", outputs=("out", "lse"),
)  # fmt: skip
SELF = dataclasses.replace(SPEC, kv_len=50, q_offset=None)
CHUNKS = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}
LIST = CHUNKS | {"skip": "list"}
# but masks of packed tokens, whose operands are called so
LIBRARY = [n for n, e in EXAMPLES.items() if "cu_seqlens_q" not in str(e.of)]
EVERY = [
    (name, offset) for name in LIBRARY for offset in offsets_of(name, lengths=True)
]
ONCE = {name: offset for name, offset in rotating().items() if (name, offset) in EVERY}
JOINED = [n for n in FEW if "cu_seqlens_q" not in str(PAIRS[n][0].mask)]


def packed(spec):
    return dataclasses.replace(spec, storage="packed")


def same_when_lowered(spec):
    """Whether the lowered spec means the same, to float64's accuracy."""
    given = inputs.arrays(spec)
    q, k, v = (given.pop(n) for n in "qkv")
    want = reference.attention(spec, q, k, v, given)
    if "q_offset" in given:
        given["q_offset"] = np.broadcast_to(given["q_offset"], (spec.batch,))
    got = reference.attention(lowered(spec), q[None], k[None], v[None], given)
    assert all(np.allclose(got[n], want[n], rtol=0, atol=1e-9) for n in ("out", "lse"))
    assert np.isfinite(want["lse"]).any()


# What the lowering means.


@pytest.mark.parametrize(("name", "offset"), EVERY)
def test_the_library_lowered_means_the_same(name, offset):
    spec = packed(EXAMPLES[name].spec(q_offset=OFFSETS[offset], kv_lengths=False))
    with holding(EXAMPLES[name].operands):
        same_when_lowered(spec)


@pytest.mark.parametrize("name", JOINED)
def test_pairs_lowered_mean_the_same(name):
    spec, operands = PAIRS[name]
    with holding(operands):
        same_when_lowered(packed(dataclasses.replace(spec, kv_lengths=False)))


def by_batch():
    """A mask and a score that read b as a number, and as an index beside each letter."""
    most = attngen.operand("most", axes="b", dtype="int32")
    bias = attngen.operand("bias", axes="bk", dtype="float32")
    slopes = attngen.operand("slopes", axes="bh", dtype="float32")
    mask = attngen.mask(lambda b, h, q, k: (k % 4 <= most[b]) | ((b + q) % 3 == 0))
    score = attngen.score(
        lambda s, b, h, q, k: s + bias[b, k] + slopes[b, h] * (k - q) / (b + 1)
    )
    return dataclasses.replace(SPEC, mask=mask, score=(score,))


@pytest.mark.parametrize("offset", [0, 3, "bottom_right", "operand"])
def test_what_reads_the_batch_means_the_same(offset):
    same_when_lowered(dataclasses.replace(by_batch(), q_offset=offset, kv_offset=5))


def test_positions_in_a_sequence_stay_within_32_bits():
    for offset in (None, "bottom_right", "operand"):
        spec = dataclasses.replace(SELF, q_offset=offset, score=(scores.alibi(),))
        assert attngen.plan(spec).index_dtype == "int32"


def test_only_packed_specs_are_lowered():
    dense = dataclasses.replace(SELF, storage="dense")
    assert lowered(dense) is dense
    assert lowered(SELF).shape_of("q") == (1, *SELF.shape_of("q"))


# Kernels, by the rule.

CASES = {
    "causal": (SELF, LIST),
    "chunks of one": (SELF, {"algorithm": "running", "q_chunk": 1, "k_chunk": 7}),
    "bottom right": (SPEC, LIST),
    "heads first": (dataclasses.replace(SPEC, layout="bhtd"), CHUNKS),
    "no mask": (dataclasses.replace(SPEC, mask=None, q_offset=None), LIST),
    "a sink": (dataclasses.replace(SPEC, sink=True), {"algorithm": "dense"}),
    "dropout": (dataclasses.replace(SPEC, dropout=0.3), CHUNKS),
    "reads the batch": (by_batch(), CHUNKS),
    "an offset": (dataclasses.replace(SPEC, q_offset="operand"), LIST),
    "summaries": (SPEC, CHUNKS | {"algorithm": "summaries"}),
    "parts": (SPEC, {"algorithm": "split_kv", "k_chunk": 24, "parts": 2}),
    "one sequence": (dataclasses.replace(SELF, batch=1), CHUNKS),
    "one token": (dataclasses.replace(SELF, batch=3, q_len=1, kv_len=1), {}),
    "many sequences": (dataclasses.replace(SELF, batch=40), LIST),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sampled(2)
def test_kernels(case):
    spec, fix = CASES[case]
    judge(spec, **fix)


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.sampled(6)
def test_the_library(name):
    with holding(EXAMPLES[name].operands):
        spec = EXAMPLES[name].spec(q_offset=OFFSETS[ONCE[name]])
        judge(packed(spec), **CHUNKS)


GRADIENTS = {
    "self": (dataclasses.replace(SELF, sink=True), {}),
    "by list": (SPEC, LIST | {"backward_skip": "list", "backward_q_chunk": 32}),
    "alibi": (dataclasses.replace(SPEC, score=(scores.alibi(),)), {}),
    "reads the batch": (by_batch(), {}),
    "heads first": (dataclasses.replace(SPEC, layout="bhtd", dropout=0.2), {}),
}


@pytest.mark.parametrize(
    "case", slowly(GRADIENTS, ("by list", "alibi", "reads the batch"))
)
def test_gradients(case):
    spec, fix = GRADIENTS[case]
    judge(dataclasses.replace(spec, derivatives="vjp"), **fix)


@pytest.mark.parametrize("case", slowly(["alibi", "self", "by list"], ["alibi"]))
def test_derivatives_of_any_order(case):
    spec, _ = GRADIENTS[case]
    judge(dataclasses.replace(spec, derivatives="any"), q_chunk=16, k_chunk=24)


def test_tokens_of_no_sequence_see_nothing_and_nothing_sees_them():
    """NaN in them is nowhere, not in gradients either."""
    spec = dataclasses.replace(SELF, derivatives="vjp", batch=2)
    function, _ = kernel(spec, q_chunk=16, k_chunk=24)
    q, k, v = (
        jnp.asarray(x).at[40:].set(jnp.nan)
        for n, x in inputs.arrays(spec).items()
        if n in "qkv"
    )
    offsets = jnp.array([0, 0, 40], jnp.int32)
    named = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
    (out, lse), pull = jax.vjp(lambda *a: function(*a, **named), q, k, v)
    assert (out[40:] == 0).all()
    assert (lse[:, 40:] == -jnp.inf).all()
    assert jnp.isfinite(out).all()
    for gradient in pull((jnp.ones_like(out), jnp.ones_like(lse))):
        assert (gradient[40:] == 0).all()
        assert jnp.isfinite(gradient).all()
        assert (gradient[:40] != 0).any()


# What is skipped.


def visited(spec, **named):
    """Tiles that a kernel of lists visits, and those of them that evaluate no mask."""
    plan = attngen.plan(spec, fix=LIST | {"q_chunk": 32, "k_chunk": 32})
    made = "        carry = m, total, acc\n"
    seen = "        jax.debug.callback(lambda *x: SEEN.append(x), full, visited)\n"
    text = attngen.emit(plan).text.replace(made, seen + made)
    assert seen in text
    module = {"SEEN": []}
    exec(compile(text, "counted", "exec"), module)
    given = [jnp.ones(spec.shape_of(n)) for n in "qkv"]
    jax.block_until_ready(module["attention"](*given, **named))
    jax.effects_barrier()
    counts = np.array(module["SEEN"]).sum(0)
    return int(counts[1]), int(counts[0])


def test_no_tile_is_visited_in_which_nothing_is_seen():
    n, tokens = 6, 512
    spec = AttentionSpec(
        batch=n, q_heads=1, q_len=tokens, qk_dim=8, storage="packed",
        mask=masks.causal(),
    )  # fmt: skip
    ends = np.array([0, 70, 71, 71, 300, 420, tokens], np.int32)
    named = {"cu_seqlens_q": jnp.asarray(ends), "cu_seqlens_k": jnp.asarray(ends)}
    at = np.arange(tokens)
    of = np.searchsorted(ends, at, side="right")
    sees = (of[:, None] == of) & (at[:, None] >= at)
    tiles = sees.reshape(tokens // 32, 32, tokens // 32, 32)
    want = int(tiles.any((1, 3)).sum()), int(tiles.all((1, 3)).sum())
    assert visited(spec, **named) == want
    bottom = dataclasses.replace(spec, q_offset="bottom_right")
    assert visited(bottom, **named) == want
    mask = masks.packed(n) & masks.causal()
    library = AttentionSpec(q_heads=1, q_len=tokens, qk_dim=8, mask=mask)
    assert visited(library, cu_seqlens=jnp.asarray(ends)) == want


# Files, and what is refused.


def test_an_emitted_file_says_how_tokens_lie():
    text = attngen.emit(attngen.plan(SPEC)).text
    assert "of 4 packed sequences" in text
    assert "q       [50, 4, 16]" in text
    assert "lse     [4, 50]" in text
    assert "def attention(q, k, v, *, cu_seqlens_q, cu_seqlens_k):" in text
    assert "of 4 packed sequences" in attngen.plan(SPEC).explain()


def test_shards_are_refused():
    for shards in ({"batch_shards": 2}, {"head_shards": 2}):
        with refused(NotBuiltError) as caught:
            attngen.plan(dataclasses.replace(SPEC, **shards))
        assert "shards" in caught.value.what


WRONG = {
    "doesn't begin at 0": [1, 5, 5, 20, 50],
    "falls": [0, 5, 4, 20, 50],
    "ends behind the tokens": [0, 5, 5, 20, 51],
}


@pytest.mark.parametrize("offsets", WRONG.values(), ids=WRONG)
def test_offsets_that_cannot_be_are_refused(offsets, monkeypatch):
    function, plan = kernel(SELF)
    built = building.kernel(plan, attngen.emit(plan), function, None, None)
    given = inputs.arrays(SELF)
    wrong = np.array(offsets, np.int32)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        with refused(OperandError) as caught:
            built(**given | {name: wrong})
        assert name in caught.value.what
    arrays = given | {"cu_seqlens_k": jnp.asarray(wrong)}
    built(**arrays)  # a JAX array isn't looked at, unless that is asked for
    monkeypatch.setenv("ATTNGEN_CHECK", "1")
    with refused(OperandError):
        built(**arrays)
    jax.jit(lambda x: built(**given | {"cu_seqlens_k": x}))(jnp.asarray(wrong))


def test_attention_takes_packed_arrays(fresh):
    given = inputs.arrays(SELF)
    want = reference.attention(
        SELF, *(given[n] for n in "qkv"), {n: given[n] for n in given if n not in "qkv"}
    )
    out, lse = attngen.attention(**given, mask=masks.causal(), outputs=("out", "lse"))
    assert np.allclose(np.swapaxes(out, 0, 1), want["out"][0], atol=1e-5)
    assert np.allclose(lse, want["lse"][0], atol=1e-5)


def test_the_modelled_spec_is_one_batch_of_all_tokens():
    spec = backends.get("jax").modelled(SPEC)
    assert (spec.storage, spec.batch, spec.q_len, spec.kv_len) == ("dense", 1, 50, 70)
