"""Few queries: heads packed into a tile's rows, keys split over programs, in any mixture."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from library import slowly

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from test_conformance import SPECS

import attngen
from attngen import (
    AttentionSpec,
    api,
    backends,
    inputs,
    masks,
    planner,
    presets,
    reference,
    scores,
    targets,
)
from attngen.errors import PlanError

BASE = AttentionSpec(
    batch=2,
    q_heads=6,
    kv_heads=2,
    q_len=3,
    kv_len=75,
    qk_dim=16,
    mask=masks.causal(),
    q_offset="bottom_right",
    outputs=("out", "lse"),
)
PACKED = {"pack_gqa": True}
BOTH = {"pack_gqa": True, "kv_splits": 2}
BLOCKS = {"q_chunk": 16, "k_chunk": 16}


def like(repeats=3, **changes):
    return dataclasses.replace(BASE, q_heads=2 * repeats, **changes)


def of_score(score, **changes):
    return like(score=(score,), **changes)


SHARP = attngen.score(lambda s, b, h, q, k: attngen.where(k % 5 == 0, float("-inf"), s))
SOME = {
    "causal": like(),
    "window": like(mask=masks.causal() & masks.sliding_window(20)),
    "both sides": like(mask=masks.sliding_window(30, 2), q_offset=30),
    "streaming": like(mask=masks.streaming_llm(4, 24), q_len=5),
    "documents": dataclasses.replace(
        like(q_len=20, kv_len=20, mask=masks.documents()), q_offset=None
    ),
    "a dense mask of heads": like(mask=masks.dense(axes="hk")),
    "dense": like(mask=masks.dense(), q_len=2),
    "no mask": like(mask=None),
    "nothing seen": like(mask=attngen.mask(lambda b, h, q, k: k < -5)),
    "of heads": like(mask=attngen.mask(lambda b, h, q, k: (k + h) % 3 <= b)),
    "alibi": of_score(scores.alibi()),
    "softcap": of_score(scores.softcap(3.0)),
    "caps of heads": of_score(scores.softcap("caps")),
    "bias of heads": of_score(scores.bias(axes="hk")),
    "bias": of_score(scores.bias(axes="bhq")),
    "whole bias": of_score(scores.bias()),
    "table": of_score(scores.relative_table(75), mask=None),
    "buckets": of_score(scores.relative_buckets()),
    "a score that drops": of_score(SHARP),
    "sink": like(sink=True),
    "sink, kept natural": of_score(scores.bias(axes="hk"), sink=True),
    "lengths": like(batch=3, kv_lengths=True),
    "lengths of both": like(kv_lengths=True, q_lengths=True, q_offset=0, q_len=9),
    "query lengths": like(q_lengths=True, q_len=9),
    "offset at run time": like(q_offset="operand"),
    "before every key": like(q_offset=-2),
    "keys elsewhere": like(kv_offset=13),
    "heads first": like(layout="bhtd", sink=True),
    "odd dims": like(qk_dim=40, v_dim=72),
    "dropout": like(dropout=0.3, q_len=2),
    "out alone": like(outputs=("out",), sink=True),
    "lse alone": like(outputs=("lse",), sink=True),
    "lse first": like(outputs=("lse", "out")),
}  # fmt: skip
QUICK = {
    "window", "streaming", "documents", "of heads", "alibi", "caps of heads", "bias", "table",
    "sink, kept natural", "lengths of both", "query lengths", "offset at run time",
    "heads first", "odd dims", "dropout", "lse alone",
}  # fmt: skip


@pytest.mark.parametrize("name", slowly(SOME, QUICK))
def test_packed_and_split(name):
    interpreted.judge(SOME[name], **BLOCKS, pack_gqa=True, kv_splits=4)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fix", [PACKED, {"kv_splits": 2}, BOTH | {"kv_splits": 8}])
@pytest.mark.parametrize("name", SOME)
def test_each_alone(name, fix, dtype):
    interpreted.judge(dataclasses.replace(SOME[name], dtype=dtype), **BLOCKS, **fix)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name):
    spec = dataclasses.replace(SPECS[name], dtype="float16")
    packs = {"pack_gqa": True} if spec.repeats > 1 else {}
    for splits in (1, 4):
        interpreted.judge(spec, **BLOCKS, **packs, kv_splits=splits)


SHAPES = [
    (repeats, q_len, splits, dtype)
    for (repeats, splits), q_len, dtype in itertools.product(
        itertools.product((1, 3, 4, 8), (1, 2, 8)),
        (1, 2, 5, 16),
        ("float16", "float32"),
    )
    if repeats * splits > 1
]
FEW = {
    (1, 1, 8, "float32"), (3, 16, 1, "float16"), (3, 5, 2, "float32"), (4, 1, 8, "float16"),
    (8, 5, 1, "float32"), (8, 1, 2, "float16"),
}  # fmt: skip


@pytest.mark.parametrize(("repeats", "q_len", "splits", "dtype"), slowly(SHAPES, FEW))
def test_every_group_of_heads(repeats, q_len, splits, dtype):
    """Blocks of rows that begin within a query, splits that get no block."""
    fix = {"pack_gqa": True} if repeats > 1 else {}
    interpreted.judge(
        like(repeats, q_len=q_len, dtype=dtype), **BLOCKS, **fix, kv_splits=splits
    )


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_the_order_of_packed_rows(order):
    spec = like(q_len=16, q_offset=40)
    interpreted.judge(spec, **BLOCKS, pack_gqa=True, order=order)


def test_splits_of_listed_tiles():
    mask = masks.causal() & masks.documents()
    spec = like(batch=1, q_len=40, kv_len=40, mask=mask, q_offset=None)
    interpreted.judge(spec, **BLOCKS, skip="list", kv_splits=2)


def test_splits_by_tensor_descriptors():
    spec = like(dtype="float16", qk_dim=32)
    interpreted.judge(spec, **BLOCKS, **BOTH, head_dim="padded", loads="descriptors")


def test_positions_of_64_bits():
    mask = attngen.mask(lambda b, h, q, k: (k <= q) & ((q * 2**33 + k) % 3 != 0))
    assert "tl.int64" in emitted(like(mask=mask), **BOTH).text
    interpreted.judge(like(mask=mask), **BLOCKS, **BOTH)


def test_large_scores_are_merged_as_exactly_as_one_loop_has_them():
    spec = like(scale=40.0, mask=None)
    interpreted.judge(spec, **BLOCKS, pack_gqa=True, kv_splits=8)


def emitted(spec, **fix):
    return attngen.emit(interpreted.plan(spec, **BLOCKS, **fix))


def test_emitted_files_are_tidy(tmp_path):
    for i, (spec, fix) in enumerate(itertools.product(SOME.values(), (PACKED, BOTH))):
        emitted(spec, **fix).write(tmp_path / f"file_{i}.py")
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--isolated", "--no-cache",
             tmp_path],
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout


def test_lengths_of_none_and_one():
    spec = like(batch=4, kv_lengths=True, sink=True)
    arrays = inputs.arrays(spec, nan=False)
    path = api.stored(emitted(spec, pack_gqa=True, kv_splits=4))
    arrays["kv_lengths"] = np.array([0, 1, 2, 75], np.int32)
    for name in "kv":
        for b, count in enumerate(arrays["kv_lengths"]):
            arrays[name][b, count:] = np.nan
    out, lse = interpreted.call(path, **arrays)
    assert (out[0] == 0).all()
    assert (lse[0] == -np.inf).all()
    given = dict(arrays)
    q, k, v = (given.pop(n) for n in "qkv")
    want = reference.attention(spec, q, k, v, given)
    for name, got in (("out", out), ("lse", lse)):
        assert np.allclose(
            reference.pick(spec, name, got, np.arange(3)), want[name], atol=1e-5
        )


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_nan_matters_where_it_is_seen(name):
    spec = like(q_len=2, mask=masks.causal() & masks.sliding_window(30), q_offset=40)
    path = api.stored(emitted(spec, pack_gqa=True, kv_splits=4))
    arrays = inputs.arrays(spec)
    clean = interpreted.call(path, **arrays)
    hidden = arrays | {name: arrays[name].copy()}
    hidden[name][:, [5, 10, 43, 60]] = np.nan
    for x, y in zip(clean, interpreted.call(path, **hidden), strict=True):
        assert np.array_equal(x, y)
    seen = arrays | {name: arrays[name].copy()}
    seen[name][1, 41, 1, 0] = np.nan  # the second query's own key, of one kv head
    out, lse = interpreted.call(path, **seen)
    assert np.isnan(out[1, 1, 3:, 0]).all()
    assert np.isnan(lse[1, 3:, 1]).all() == (name == "k")
    assert np.array_equal(out[:, :, :3], clean[0][:, :, :3])
    if name == "k":  # as in any tile: a value that one row sees is multiplied in all
        assert np.array_equal(out[:, 0], clean[0][:, 0])


def test_infinite_slopes_of_one_head_of_a_group():
    """What is asked of each head before the loops is asked of all heads of a tile."""
    spec = of_score(scores.alibi("slopes"), q_len=1, kv_len=40)
    path = api.stored(emitted(spec, **BOTH))
    arrays = inputs.arrays(spec)
    arrays["slopes"] = np.array([1, np.inf, 0.5, 1, 1, 1], np.float32)
    out, _ = interpreted.call(path, **arrays)
    given = dict(arrays)
    q, k, v = (given.pop(n) for n in "qkv")
    with np.errstate(invalid="ignore"):
        want = reference.attention(spec, q, k, v, given)
    got = reference.pick(spec, "out", out, np.arange(1))
    assert np.allclose(got, want["out"], atol=1e-5, equal_nan=True)


TRAINED = dataclasses.replace(BASE, derivatives="vjp")


@pytest.mark.parametrize(
    ("spec", "fix", "words"),
    [
        (BASE, {"kv_splits": 3}, "kv_splits is one of"),
        (BASE, {"kv_splits": True}, "kv_splits is one of"),
        (BASE, {"pack_gqa": 1}, "pack_gqa is True or False"),
        (like(1), PACKED, "query heads that share a kv head"),
        (TRAINED, PACKED, "needs derivatives=None"),
        (TRAINED, {"kv_splits": 2}, "kv_splits = 2 needs derivatives=None"),
        (
            like(q_len=75, q_offset=None, mask=masks.documents()),
            PACKED | {"skip": "list"},
            "pack_gqa needs bounds",
        ),
    ],
)
def test_where_they_cannot_be(spec, fix, words):
    with pytest.raises(PlanError, match=words):
        interpreted.plan(spec, **fix)


def decode(**changes):
    return dataclasses.replace(presets.get("decode-llama3"), **changes)


def test_few_programs_are_split_and_packed():
    for batch, q_len, kv_len in itertools.product(
        (1, 2, 4), (1, 4, 16), (8192, 131072)
    ):
        spec = decode(batch=batch, q_len=q_len, kv_len=kv_len)
        plan = attngen.plan(spec, "h100", "triton")
        assert plan.choice["pack_gqa"] is True
        assert plan.choice["kv_splits"] > 1
        kv_s = spec.bytes_of("k", "v") / 3350e9
        assert kv_s < plan.time_s < 1.35 * kv_s + 10e-6
        rows = batch * 32 * q_len
        assert plan.temp_bytes == 4 * rows * plan.choice["kv_splits"] * (128 + 2)


def test_many_programs_are_not_split():
    many = attngen.plan(decode(batch=256, kv_len=8192), "h100", "triton").choice
    assert many["pack_gqa"] is True
    assert many.get("kv_splits", 1) == 1
    long = dataclasses.replace(presets.get("llama3-8b"))
    assert not {"pack_gqa", "kv_splits"} & set(
        attngen.plan(long, "h100", "triton").choice
    )


def test_splits_stay_within_the_budget():
    for budget in ("600KiB", "100KiB", "1KiB"):
        spec = decode(memory_budget=budget)
        plan = attngen.plan(spec, "h100", "triton")
        assert plan.temp_bytes <= spec.budget_bytes
    assert plan.choice["kv_splits"] == 1


def test_near_plans_differ_in_one_choice_said_or_unsaid():
    by, target = backends.get("triton"), targets.get("h100")
    for spec in (decode(), presets.get("llama3-8b")):
        plan = attngen.plan(spec, "h100", "triton")
        found = planner.near(spec, target, by, plan.choice)
        assert any(p.choice.get("kv_splits", 1) > 1 for p in found)
        assert len({str(sorted(p.choice.items())) for p in found}) == len(found)
        for other in found:
            planner.check(other, target, by)


def test_tiles_of_packed_rows_are_counted_as_they_are_visited():
    spec = decode(q_len=5, kv_len=1000, mask=masks.causal(), q_offset=100)
    fix = {"q_chunk": 16, "k_chunk": 16, "pack_gqa": True}
    plan = attngen.plan(spec, "h100", "triton", fix=fix)
    # rows of queries 0 to 3 see keys up to 103, those of query 4 up to 104
    assert plan.tiles.visited == 7 + 7
    assert plan.tiles.full == 6 + 6
    assert plan.tiles.total == 2 * 63
    assert plan.flop == 8 * 14 * 2 * 16 * 16 * 256


def test_a_plan_keeps_them_in_json_and_in_its_file():
    plan = attngen.plan(decode(), "h100", "triton", fix={"kv_splits": 8, **PACKED})
    again = attngen.Plan.from_json(plan.to_json())
    assert again == plan
    text = attngen.emit(again).text
    assert "heads packed · 8 splits of the keys" in text
    assert "KV_SPLITS = tl.constexpr(8)" in text
    assert "atomic" not in text


def test_the_default_said_or_unsaid_is_one_kernel():
    """Where a choice isn't considered it isn't said, unless it is fixed."""
    spec = presets.get("llama3-8b")
    plain = attngen.plan(spec, "h100", "triton")
    said = attngen.plan(spec, "h100", "triton", fix={"kv_splits": 1, "pack_gqa": False})
    assert said.choice == plain.choice | {"pack_gqa": False, "kv_splits": 1}
    texts = [attngen.emit(x).text.split('"""', 2)[2] for x in (plain, said)]
    assert texts[0] == texts[1]
