"""Tiles skipped by several intervals and by lists: in JAX and Triton against the reference."""

import collections
import dataclasses
import sys

import jax
import numpy as np
import pytest
from judge import judge, kernel

import attngen
from attngen import AttentionSpec, inputs, masks
from attngen.lists import skips
from attngen.regions import spans

BASE = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=61,
    kv_len=61,
    qk_dim=16,
    outputs=("out", "lse"),
)
LAST = masks.sliding_window(9)
IDS = attngen.operand("ids", axes="bhk", dtype="int32")
FLAGS = attngen.operand("flags", axes="kb", dtype="bool")
PLACES = attngen.operand("places", axes="q", dtype="int32")
SPANS = {
    "first and window": masks.causal() & (LAST | masks.prefix(3)),
    "window and global": attngen.mask(
        lambda b, h, q, k: (abs(q - k) <= 5) | (k < 3) | (q < 3)
    ),
    "apart": ~masks.sliding_window(12, 9),
    "three": attngen.mask(
        lambda b, h, q, k: (k < 2) | ((q - k >= 20) & (q - k < 24)) | (abs(q - k) < 3)
    ),
    "rows of an image": attngen.mask(lambda b, h, q, k: abs(q // 8 - k // 8) <= 1),
    "of some queries": attngen.mask(lambda b, h, q, k: (q >= 30) & (k <= q)),
    "half as many": attngen.mask(lambda b, h, q, k: (k <= 2 * q) & (k > q)),
}
LISTS = {
    "documents": masks.documents(),
    "causal documents": masks.documents() & masks.causal(),
    "of each head": attngen.mask(lambda b, h, q, k: IDS[b, h, k] == IDS[b, h, q]),
    "flags": attngen.mask(lambda b, h, q, k: FLAGS[k, b] & (k <= q)),
    "no flags": attngen.mask(lambda b, h, q, k: ~FLAGS[k, b] | (k == q)),
    "places": attngen.mask(lambda b, h, q, k: abs(PLACES[q] - k) < 9),
    "prefix": masks.prefix("known") | masks.causal(),
    "board": attngen.mask(lambda b, h, q, k: (q // 8 + k // 8) % 2 == 0),
    "dilated": attngen.mask(lambda b, h, q, k: ((q - k) % 24 == 0) & (k <= q)),
    "heads": masks.causal()
    & attngen.mask(lambda b, h, q, k: k > q - attngen.where(h < 2, 6, 40)),
    "packed": masks.packed(3),
    "blocks": masks.block_sparse((9, 9), 8),
    "blocks of heads": masks.block_sparse((5, 9), (16, 8), axes="bh"),
    "tree": masks.tree(),
    "marked": masks.longformer(4, "marked"),
    "neighbourhood": masks.neighborhood((8, 8), 3),
    "one document's id": attngen.mask(lambda b, h, q, k: IDS[0, h, 5] == IDS[b, 1, k]),
}
HOW = {
    "": {},
    "offset": {"q_len": 40, "q_offset": 21},
    "bottom right": {"q_len": 23, "q_offset": "bottom_right"},
    "operand": {"q_len": 16, "q_offset": "operand"},
    "lengths": {"kv_lengths": True, "q_lengths": True},
    "lengths' offset": {"kv_lengths": True, "q_offset": "bottom_right", "q_len": 33},
    "shifted keys": {"kv_offset": 7, "q_offset": 7},
}
# an index that may be outside, an integer that may be large: offsets come at run time
UNPROVEN = [
    (name, how)
    for name in ("blocks", "blocks of heads", "neighbourhood")
    for how in ("operand", "lengths' offset")
]
CHUNKS = ({"q_chunk": 16, "k_chunk": 8}, {"q_chunk": 5, "k_chunk": 7})


def spec_of(mask, how):
    return dataclasses.replace(BASE, mask=mask, **HOW[how])


def cases(found):
    for i, name in enumerate(found):
        for j, how in enumerate(HOW):
            if (name, how) in UNPROVEN:
                continue
            usual = not ((i + j) % len(HOW) or i % 2)
            marks = [] if usual else [pytest.mark.slow]
            yield pytest.param(name, how, marks=marks, id=f"{name}, {how}")


@pytest.mark.parametrize(("name", "how"), [*cases(SPANS)])
def test_intervals_in_jax(name, how):
    spec = spec_of(SPANS[name], how)
    with jax.enable_x64(
        name == "half as many"
    ):  # of an offset at run time 2 * q may be far
        judge(spec, algorithm="running", **CHUNKS[len(name + how) % 2])


@pytest.mark.parametrize(("name", "how"), [*cases(LISTS)])
@pytest.mark.sampled(2)
def test_lists_in_jax(name, how):
    spec = spec_of(LISTS[name], how)
    judge(spec, algorithm="running", skip="list", **CHUNKS[len(name + how) % 2])


@pytest.mark.parametrize(("name", "how"), [*cases(SPANS | LISTS)])
@pytest.mark.sampled(2)
def test_in_triton(name, how):
    interpreted = pytest.importorskip("interpreted")
    mask = (SPANS | LISTS)[name]
    fix = {"q_chunk": 16, "k_chunk": 16}
    if name in LISTS:
        fix["skip"] = "list"
    interpreted.judge(spec_of(mask, how), **fix)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_is_offered(name):
    spec = spec_of(LISTS[name], "")
    assert skips(spec) == {"skip": ("bounds", "list")}


def test_a_list_is_taken_where_operands_decide_and_there_are_many_keys():
    spec = AttentionSpec(q_heads=2, q_len=8192, qk_dim=32, mask=masks.documents())
    assert attngen.plan(spec, target="cpu").choice["skip"] == "list"
    assert attngen.plan(spec, target="h100", backend="triton").choice["skip"] == "list"
    few = dataclasses.replace(spec, q_len=64, kv_len=64)
    assert attngen.plan(few, target="cpu").choice.get("skip", "bounds") == "bounds"


def test_intervals_are_kept_apart():
    counts = {n: len(spans(spec_of(m, ""))) for n, m in SPANS.items()}
    assert counts["first and window"] == counts["apart"] == 2
    assert counts["window and global"] == 2
    assert counts["three"] == 3
    assert counts["rows of an image"] == counts["of some queries"] == 1


@pytest.mark.parametrize("chunks", [{"q_chunk": 4, "k_chunk": 8}, CHUNKS[1]])
@pytest.mark.sampled(2)
def test_a_list_visits_what_its_values_say(chunks):
    """Each tile that holds a pair, and none that holds none where ids rise."""
    spec = dataclasses.replace(BASE, batch=1, mask=masks.documents())
    ids = np.repeat(np.arange(8), 8)[None, : spec.kv_len].astype(np.int32)
    function, plan = kernel(spec, algorithm="running", skip="list", **chunks)
    arrays = inputs.arrays(spec) | {"document_ids": ids}
    same = ids[0][:, None] == ids[0][None, :]
    q, k = plan.q_chunk, plan.k_chunk
    starts = [min(i, spec.q_len - q) for i in range(0, spec.q_len, q)]
    wanted = sum(
        same[i : i + q, j : j + k].any() for i in starts for j in range(0, 61, k)
    )
    calls = collections.Counter()

    def count(frame, event, argument):
        if event == "call" and frame.f_code.co_name in ("interior", "edge"):
            calls[frame.f_code.co_name] += 1

    with jax.disable_jit():
        sys.setprofile(count)
        try:
            function(**arrays)
        finally:
            sys.setprofile(None)
    assert calls["interior"] + calls["edge"] == wanted
    assert calls["interior"] > 0 or plan.q_chunk == 5


def _found():
    """Masks whose lists were wrong once, or crashed, with what made them so."""
    offsets = attngen.operand("offsets", axes=(4,), dtype="int32")
    table = attngen.operand("table", axes=(8,), dtype="int32")
    pairs = attngen.operand("pairs", axes="qk", dtype="int32")
    rows = attngen.operand("of_rows", axes="q", dtype="int32")
    blocks = attngen.operand("blocks", axes=(4, 8, 8), dtype="bool")
    search = attngen.searchsorted
    return {
        "two searches": lambda b, h, q, k: (
            (search(offsets, q) == search(offsets, k))
            | (search(offsets, q - 4) == search(offsets, k))
        ),
        "a number and an expression": lambda b, h, q, k: (
            table[q % 8] + table[0] > table[k % 8]
        ),
        "two axes": lambda b, h, q, k: (pairs[0, k] == 1) | (pairs[k, 0] == 2),
        "queries' numbers at keys": lambda b, h, q, k: rows[q] >= rows[k],
        "a table of more heads": lambda b, h, q, k: blocks[h, q // 8, k // 8],
        "always": lambda b, h, q, k: (k % 1 >= 0) | (k <= q),
        "never": lambda b, h, q, k: (k % 1 < 0) & (k <= q),
    }


@pytest.mark.parametrize("name", _found())
def test_what_was_wrong_once(name):
    interpreted = pytest.importorskip("interpreted")
    kv_len = 48 if name == "queries' numbers at keys" else 64
    spec = AttentionSpec(
        q_heads=2, q_len=64, kv_len=kv_len, qk_dim=16, q_offset=0,
        mask=attngen.mask(_found()[name]), outputs=("out", "lse"),
    )  # fmt: skip
    for skip in skips(spec).get("skip", (None,)):
        fix = {} if skip is None else {"skip": skip}
        judge(spec, algorithm="running", q_chunk=8, k_chunk=8, **fix)
        interpreted.judge(spec, q_chunk=16, k_chunk=16, **fix)


def test_operands_have_other_names_than_the_launcher_s_own():
    for name in ("query", "tiles", "kv_end"):
        with pytest.raises(attngen.errors.OperandError):
            masks.documents(name)


def test_a_list_in_triton_is_counted_in_bytes():
    spec = AttentionSpec(q_heads=2, q_len=2**16, qk_dim=64, mask=masks.documents())
    fix = {"q_chunk": 128, "k_chunk": 128, "skip": "list"}
    plan = attngen.plan(spec, target="h100", backend="triton", fix=fix)
    assert plan.temp_bytes > 512 * 512 * 20
    small = dataclasses.replace(spec, memory_budget="1MiB")
    with pytest.raises(attngen.errors.BudgetError):
        attngen.plan(small, target="h100", backend="triton", fix=fix)
