"""Packed and paged storage and quantised K/V in Triton, in the interpreter."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from library import EXAMPLES, OFFSETS, holding, offsets_of, rotating
from refusals import refused

import attngen
from attngen import AttentionSpec, api, inputs, masks, reference, scores
from attngen.backends.triton.loader import has_gpu
from attngen.errors import NotBuiltError, PlanError

SPEC = AttentionSpec(
    batch=3, q_heads=4, kv_heads=2, q_len=40, kv_len=56, qk_dim=32, mask=masks.causal(),
    q_offset="bottom_right", outputs=("out", "lse"),
)  # fmt: skip
PAGED = {"storage": "paged", "kv_lengths": True}
STORED = {
    "dense": {},
    "packed": {"storage": "packed"},
    "small pages": {**PAGED, "page_size": 4},
    "odd pages": {**PAGED, "page_size": 7},
    "large pages": {**PAGED, "page_size": 64},
    "pages of blocks": {**PAGED, "page_size": 16, "num_pages": 30},
    "all keys": {"storage": "paged", "page_size": 16},  # the last page has some
}
PLAIN = {"plain": {}}
NARROW = {
    f"{dtype} of {scale}": {"kv_dtype": dtype, "kv_scale": scale}
    for dtype in ("int8", "float8_e4m3")
    for scale in ("head", "token", 4)
}
OTHERWISE = {"layout": "bhtd", "sink": True, "dropout": 0.2, "dtype": "float16"}
MATRIX = [
    (stored, narrow, other)
    for stored, fields in STORED.items()
    for narrow, more in (PLAIN | NARROW).items()
    for other in (False, True)
    if (stored, narrow) != ("dense", "plain")
    and not (stored == "odd pages" and more.get("kv_scale") == 4)
]


def judge(spec, q_chunk=16, k_chunk=16, **fix):
    return interpreted.judge(spec, q_chunk=q_chunk, k_chunk=k_chunk, **fix)


@pytest.mark.parametrize(("stored", "narrow", "other"), MATRIX)
@pytest.mark.sampled(7)
def test_every_storage(stored, narrow, other):
    fields = STORED[stored] | (PLAIN | NARROW)[narrow] | (OTHERWISE if other else {})
    judge(dataclasses.replace(SPEC, **fields), k_chunk=32 if other else 16)


def _fits(name, offset, stored):
    own = stored == "packed" and "cu_seqlens_q" in str(EXAMPLES[name].of)
    return not own and offset in offsets_of(name, lengths=True)


LIBRARY = [
    (name, offset, stored)
    for name, offset in rotating().items()
    for stored in ("packed", "odd pages")
    if _fits(name, offset, stored)
]


@pytest.mark.parametrize(("name", "offset", "stored"), LIBRARY)
@pytest.mark.sampled(7)
def test_library(name, offset, stored):
    spec = EXAMPLES[name].spec(q_offset=OFFSETS[offset], **STORED[stored])
    with holding(EXAMPLES[name].operands):
        judge(spec)


@pytest.mark.parametrize(
    "narrow", ["int8 of head", "int8 of token", "float8_e4m3 of 4"]
)
def test_bfloat16_queries(narrow):
    fields = STORED["small pages"] | NARROW[narrow]
    judge(dataclasses.replace(SPEC, dtype="bfloat16", **fields))


@contextlib.contextmanager
def small_values():
    """Values of a thousandth: their scales are below what float16 holds well."""
    normal = inputs._normal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            inputs, "_normal", lambda *a: (made := normal(*a)) | {"v": made["v"] * 1e-3}
        )
        yield


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("narrow", ["int8 of token", "float8_e4m3 of 4"])
def test_float16_keeps_small_values(narrow, splits):
    spec = dataclasses.replace(SPEC, dtype="float16", **NARROW[narrow])
    with small_values():
        judge(spec, kv_splits=splits)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_scale_that_is_nan_stays_with_what_sees_it(splits):
    spec = AttentionSpec(
        batch=2, q_heads=2, q_len=3, kv_len=40, qk_dim=16, kv_lengths=True, kv_dtype="int8",
    )  # fmt: skip
    given = inputs.arrays(spec)
    given["kv_lengths"][:] = [0, 40]
    given["v_scale"][0] = np.nan
    fix = {"q_chunk": 16, "k_chunk": 16, "kv_splits": splits}
    path = api.stored(attngen.emit(interpreted.plan(spec, **fix)))
    (out,) = interpreted.call(path, **given)
    assert not out[0].any()
    assert np.isnan(out[1, :, 0]).all()
    assert np.isfinite(out[1, :, 1]).all()


OPEN_PAGES = {
    "no offset": {"q_len": 18, "mask": masks.causal()},
    "blocks of a mask": {
        "q_len": 16, "kv_len": 18, "q_offset": 0, "mask": masks.block_sparse((2, 2), 9)
    },
    "a bias of keys": {"q_len": 18, "mask": masks.causal(), "score": scores.bias(axes="hk")},
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN_PAGES)
def test_pages_that_end_behind_the_last_key(name):
    judge(AttentionSpec(q_heads=1, qk_dim=16, page_size=4, **PAGED, **OPEN_PAGES[name]))


DECODE = [
    (stored, narrow, packs, splits)
    for stored in ("dense", "odd pages", "large pages")
    for narrow in ("plain", "int8 of head", "float8_e4m3 of token")
    for packs, splits in ((True, 4), (False, 2), (True, 1))
    if (stored, narrow) != ("dense", "plain")
]


@pytest.mark.parametrize(("stored", "narrow", "packs", "splits"), DECODE)
@pytest.mark.sampled(4)
def test_decoding(stored, narrow, packs, splits):
    fields = STORED[stored] | (PLAIN | NARROW)[narrow] | {"kv_lengths": True}
    fields |= OTHERWISE | {"score": scores.alibi()} if splits == 4 else {}
    spec = dataclasses.replace(SPEC, q_heads=6, q_len=3, kv_len=90, **fields)
    judge(spec, pack_gqa=packs, kv_splits=splits)


# packed sequences whose heads are packed into tiles, whose keys are split
PACKED_DECODE = {
    "one query": {"q_len": 3},
    "few": {"q_len": 11, "kv_len": 200},
    "no queries left": {"q_len": 2, "batch": 4},
    "many": {"q_len": 90, "kv_len": 120, "mask": None},
    "seven heads": {"q_heads": 7, "kv_heads": 1},
    "top left": {"q_offset": 0, "dtype": "float16"},
    "run time": {"q_offset": "operand"},
    "window": {"mask": masks.causal() & masks.sliding_window(9), "v_dim": 20},
    "documents": {"mask": masks.documents(), "q_len": 56},
    "otherwise": OTHERWISE | {"score": (scores.alibi(), scores.softcap(3.0))},
    "keys": {"score": scores.bias(axes="hk"), "outputs": ("lse",)},
    "table": {"score": scores.relative_table(56), "sink": True, "outputs": ("out",)},
    "pairs": {"score": scores.bias(axes="bhqk")},
    "int8 of head": NARROW["int8 of head"] | {"layout": "bhtd", "sink": True},
    "float8 of token": NARROW["float8_e4m3 of token"] | {"outputs": ("out",)},
    "int8 of 4": NARROW["int8 of 4"],
    "one sequence": {"batch": 1, "q_len": 5},
    "far": {"q_offset": 2**30 - 1, "kv_offset": 1 - 2**30, "score": scores.alibi()},
}
GROUPS = {"packed": (True, 1), "split": (False, 4), "both": (True, 8)}


@pytest.mark.parametrize("how", GROUPS)
@pytest.mark.parametrize("name", PACKED_DECODE)
@pytest.mark.sampled(4)
def test_decoding_of_packed_sequences(name, how):
    packs, splits = GROUPS[how]
    spec = dataclasses.replace(SPEC, storage="packed", **PACKED_DECODE[name])
    judge(spec, pack_gqa=packs, kv_splits=splits)


def test_offsets_of_packed_rows():
    """Empty sequences, some without keys, tokens behind the last offset."""
    spec = AttentionSpec(
        batch=6, q_heads=6, kv_heads=2, q_len=50, kv_len=140, qk_dim=16,
        storage="packed", mask=masks.causal(), q_offset="bottom_right",
        outputs=("out", "lse"),
    )  # fmt: skip
    for offsets in (
        ([0, 0, 1, 17, 17, 40, 44], [0, 9, 9, 40, 100, 101, 130]),
        ([0, 50, 50, 50, 50, 50, 50], [0, 140, 140, 140, 140, 140, 140]),
        ([0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]),
        ([0, 1, 2, 18, 19, 40, 47], [0, 1, 2, 3, 4, 5, 140]),
    ):
        given = inputs.arrays(spec)
        given["cu_seqlens_q"][:], given["cu_seqlens_k"][:] = offsets
        plan = interpreted.plan(
            spec, q_chunk=16, k_chunk=16, pack_gqa=True, kv_splits=4
        )
        path = api.stored(attngen.emit(plan))
        operands = {n: x for n, x in given.items() if n not in ("q", "k", "v")}
        want = reference.attention(spec, given["q"], given["k"], given["v"], operands)
        out, lse = interpreted.call(path, **given)
        np.testing.assert_allclose(out.transpose(1, 0, 2), want["out"][0], 1e-4, 1e-5)
        np.testing.assert_allclose(lse, want["lse"][0], 1e-4, 1e-5)


BACKWARD = {
    "plain": {},
    "top left": {"q_offset": 0, "dtype": "float16"},
    "run time": {"q_offset": "operand"},
    "window": {"q_offset": 3, "mask": masks.causal() & masks.sliding_window(7)},
    "otherwise": OTHERWISE,
    "slopes": {"score": (scores.alibi(), scores.softcap(3.0)), "outputs": ("out",)},
    "table": {"score": scores.relative_table(56)},
    "keys": {"score": scores.bias(axes="hk"), "outputs": ("lse",)},
    "queries": {"score": scores.bias(axes="qh"), "mask": masks.documents()},
    "one": {"batch": 1, "mask": None},
}


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.sampled(3, 1)
def test_gradients_of_packed_sequences(name):
    spec = dataclasses.replace(
        SPEC, storage="packed", qk_dim=16, v_dim=16, derivatives="vjp", **BACKWARD[name]
    )
    judge(spec, backward_q_chunk=32, backward_k_chunk=16)


@pytest.mark.parametrize("axes", ["hqk", "bk"])
def test_gradients_that_packed_sequences_have_not(axes):
    spec = dataclasses.replace(
        SPEC, storage="packed", derivatives="vjp", score=scores.bias(axes=axes)
    )
    with refused(NotBuiltError, "packed"):
        interpreted.plan(spec)


@pytest.mark.parametrize("fields", [PAGED, {"kv_dtype": "int8"}], ids=str)
def test_caches_have_no_gradients(fields):
    with refused(NotBuiltError, "a cache isn't trained"):
        interpreted.plan(dataclasses.replace(SPEC, derivatives="vjp", **fields))


@pytest.mark.parametrize("target", ["a100", "h100"])
@pytest.mark.sampled(2)
def test_numbers_of_float8_e4m3_by_their_bits(target):
    """As GPUs read them that have no instruction for it: every one of the 256."""
    spec = AttentionSpec(
        q_heads=256, kv_heads=1, q_len=1, kv_len=256, qk_dim=16, kv_dtype="float8_e4m3",
        dtype="float16", score=scores.bias(axes="hk"),
    )  # fmt: skip
    given = inputs.arrays(spec)
    every = np.arange(256, dtype=np.uint8).view(given["v"].dtype)
    numbers = every.astype(np.float32)
    given["k"][:] = 0
    given["bias"] = np.where(np.eye(256), 0, -np.inf).astype(np.float32)  # one key each
    given["v"][:] = every[None, :, None, None]
    given["v_scale"][:] = 1
    path = api.stored(attngen.emit(interpreted.plan(spec, target, pack_gqa=False)))
    (out,) = interpreted.call(path, **given)
    seen = np.isfinite(numbers)  # a NaN is in the tiles of others
    np.testing.assert_array_equal(out[0, 0, seen, 0], numbers[seen])
    if target == "a100":  # Triton's interpreter takes the others' for 480
        assert np.isnan(out[0, 0, ~seen]).all()


# What is refused.


def changed(spec, **values):
    """Arrays of a spec with some entries set: name=(index, value)."""
    given = inputs.arrays(spec)
    for name, (index, value) in values.items():
        given[name][index] = value
    return given


PACKED = dataclasses.replace(SPEC, storage="packed")
PAGES = dataclasses.replace(SPEC, **STORED["small pages"])
SAME = dataclasses.replace(PACKED, kv_len=40, q_offset=None)  # of each sequence
BAD_VALUES = {
    "offsets that fall": (PACKED, {"cu_seqlens_q": (1, 39)}),
    "offsets beyond q": (PACKED, {"cu_seqlens_q": (-1, 41)}),
    "offsets beyond k": (PACKED, {"cu_seqlens_k": (-1, 57)}),
    "a first offset": (PACKED, {"cu_seqlens_k": (0, 1)}),
    "a page too far": (PAGES, {"block_table": ((0, 1), 42)}),
    "a page below": (PAGES, {"block_table": ((0, 0), -1)}),
    "lengths beyond pages": (PAGES, {"kv_lengths": (1, 57)}),
    "other queries than keys": (SAME, {"cu_seqlens_q": (1, 1), "cu_seqlens_k": (1, 2)}),
}


@pytest.mark.skipif(has_gpu(), reason="a GPU is asked only in the check mode")
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused_where_the_host_knows_them(name):
    spec, values = BAD_VALUES[name]
    path = api.stored(attngen.emit(interpreted.plan(spec, q_chunk=16, k_chunk=16)))
    interpreted.call(path, **inputs.arrays(spec))
    word = "other queries" if spec is SAME else next(iter(values))
    with pytest.raises(interpreted.Failed, match=word):
        interpreted.call(path, **changed(spec, **values))


SHAPES = {
    "a scale too many": ("int8", "token", {"k_scale": (3, 2, 57)}),
    "scales of heads for tokens": ("int8", "token", {"v_scale": (2,)}),
    "scales of tokens for heads": ("int8", "head", {"v_scale": (3, 2, 56)}),
    "blocks of another size": ("float8_e4m3", 4, {"k_scale": (3, 2, 7)}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_scales_of_another_shape_are_refused(name):
    dtype, scale, shapes = SHAPES[name]
    spec = dataclasses.replace(SPEC, kv_dtype=dtype, kv_scale=scale)
    path = api.stored(attngen.emit(interpreted.plan(spec, q_chunk=16, k_chunk=16)))
    given = inputs.arrays(spec)
    (which,) = shapes
    given[which] = np.ones(shapes[which], np.float32)
    with pytest.raises(interpreted.Failed, match=f"{which} is torch.float32"):
        interpreted.call(path, **given)


WRONG = {
    "no sequence": (PACKED, {"cu_seqlens_q": np.zeros(1, np.int32)}, "no sequence"),
    "other sequences": (PACKED, {"cu_seqlens_k": np.zeros(3, np.int32)}, "cu_seqlens_k is"),
    "a batch": (PACKED, {"q": np.zeros((1, 40, 4, 32), np.float32)}, "three dimensions"),
    "a table for each": (PAGES, {"block_table": np.zeros(3, np.int32)}, "1 dimensions"),
    "a table of few": (PAGES, {"block_table": np.zeros((2, 14), np.int32)}, "block_table is"),
    "other pages": (PAGES, {"k": np.zeros((42, 5, 2, 32), np.float32)}, "k is"),
    "wide keys": (
        dataclasses.replace(SPEC, kv_dtype="int8"),
        {"k": np.zeros((3, 56, 2, 32), np.float32)},
        "k is torch.float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_refused(name):
    spec, arrays, word = WRONG[name]
    path = api.stored(attngen.emit(interpreted.plan(spec, q_chunk=16, k_chunk=16)))
    with pytest.raises(interpreted.Failed, match=word):
        interpreted.call(path, **(inputs.arrays(spec) | arrays))


@pytest.mark.parametrize(
    ("fields", "fix", "word"),
    [
        (PAGED, {"loads": "descriptors"}, "paged"),
        ({"kv_dtype": "int8"}, {"loads": "descriptors"}, "dtype of q"),
        (PAGED | {"mask": masks.documents()}, {"skip": "list"}, "paged storage"),
    ],
    ids=str,
)
def test_choices_that_storage_has_not(fields, fix, word):
    with refused(PlanError, word):
        interpreted.plan(dataclasses.replace(SPEC, **fields), "h100", **fix)


CHECK_MODE = """
import importlib.util, os, sys, torch
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
module = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(module)
module._check = lambda *a, **b: None  # which asks for a GPU

class Launched:
    def __getitem__(self, grid):
        return lambda *args, **options: print("launched")

module.forward = Launched()
q, k = torch.zeros(1, 1, 4, 64), torch.zeros(3, 8, 2, 64)
table = torch.tensor([[7, 0]], dtype=torch.int32)
try:
    module._attention(q, k, k, torch.tensor([9], dtype=torch.int32), table)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("mode", "said"),
    [("0", "launched"), ("1", "block_table[0, 0] is 7, not one of 3 pages")],
)
def test_the_check_mode_looks_at_values_before_a_launch(mode, said):
    spec = AttentionSpec(
        q_heads=4, kv_heads=2, q_len=1, kv_len=16, qk_dim=64, storage="paged", page_size=8,
        kv_lengths=True,
    )  # fmt: skip
    path = api.stored(attngen.emit(interpreted.plan(spec, "h100")))
    kept = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", CHECK_MODE, str(path)],
        capture_output=True, text=True, env=kept | {"ATTNGEN_CHECK": mode},
    )  # fmt: skip
    assert ran.stdout.strip() == said, ran.stderr[-2000:]
