"""Triton kernels compute their spec, in the interpreter; and what their files refuse."""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from refusals import refused
from test_conformance import SPECS

import attngen
from attngen import AttentionSpec, api, inputs, masks, reference
from attngen.backends.triton.candidates import pieces
from attngen.errors import NotBuiltError, PlanError
from attngen.names import is_free

LIKE = AttentionSpec(
    batch=2, q_heads=2, kv_heads=1, q_len=70, qk_dim=32, outputs=("out", "lse")
)


def small_blocks(spec):
    """Blocks so small that few tokens make every kind of tile."""
    return {"q_chunk": 16 if spec.q_len <= 16 else 32, "k_chunk": 16}


def source_of(spec, **fix):
    return attngen.emit(interpreted.plan(spec, **fix))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(5)
def test_every_spec(name, dtype):
    spec = dataclasses.replace(SPECS[name], dtype=dtype)
    interpreted.judge(spec, **small_blocks(spec))


@pytest.mark.parametrize("name", ["causal window", "alibi", "sink", "odd dims"])
def test_bfloat16(name):
    spec = dataclasses.replace(SPECS[name], dtype="bfloat16")
    interpreted.judge(spec, **small_blocks(spec))


def test_weights_are_rounded_to_bfloat16_as_gpus_do():
    """A float32 output shows it; in paper-16k, say."""
    spec = AttentionSpec(
        q_heads=1, q_len=323, qk_dim=64, dtype="bfloat16", out_dtype="float32"
    )
    interpreted.judge(spec, q_chunk=128, k_chunk=128)


@pytest.mark.parametrize("dim", [40, 72, 80, 96, 192])
@pytest.mark.parametrize("head_dim", ["split", "padded"])
def test_every_head_dim(dim, head_dim):
    spec = dataclasses.replace(LIKE, qk_dim=dim, v_dim=dim // 2, mask=masks.causal())
    if head_dim == "split" and len(pieces(dim, "split")) == 1:
        pytest.skip("one piece")
    interpreted.judge(spec, q_chunk=16, k_chunk=32, head_dim=head_dim, num_warps=4)


DESCRIBED = (
    "plain", "causal window", "ragged", "alibi", "softcap", "lengths", "query lengths",
    "offset of lengths", "sink", "bhtd", "prefix", "no keys",
)  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", [n for n in SPECS if n in DESCRIBED])
@pytest.mark.sampled(4)
def test_tensor_descriptors(name, dtype):
    spec = dataclasses.replace(SPECS[name], dtype=dtype)
    fix = small_blocks(spec) | {"head_dim": "padded", "loads": "descriptors"}
    interpreted.judge(spec, **fix)


def test_a_head_dim_between_powers_of_two_is_described_with_zeros():
    spec = dataclasses.replace(LIKE, qk_dim=72, v_dim=40, dtype="float16")
    interpreted.judge(
        spec, q_chunk=16, k_chunk=32, head_dim="padded", loads="descriptors"
    )


@pytest.mark.parametrize(
    ("target", "spec", "fix", "words"),
    [
        ("a100", LIKE, {}, "a100 has no tensor descriptors"),
        ("mi300x", LIKE, {}, "mi300x has no tensor descriptors"),
        ("h100", dataclasses.replace(LIKE, v_dim=33), {}, "multiples of 16"),
        (
            "h100",
            dataclasses.replace(LIKE, qk_dim=80),
            {"head_dim": "split"},
            "one piece",
        ),
    ],
)
def test_where_tensor_descriptors_cannot_be(target, spec, fix, words):
    fixed = {"loads": "descriptors"} | fix
    with pytest.raises(PlanError, match=words):
        attngen.plan(spec, target=target, backend="triton", fix=fixed)


FAR = 3_000_000
B = 2**30 - 1
THOUSANDS = attngen.mask(
    lambda b, h, q, k: (1000 * k <= 1000 * q) & (1000 * k > 1000 * q - 8000)
)
SLOPE = attngen.mask(lambda b, h, q, k: 2 * k <= 3 * q)


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
@pytest.mark.parametrize(
    ("mask", "q_offset", "kv_offset"),
    [
        (THOUSANDS, FAR, FAR),
        (THOUSANDS, -FAR, -FAR),
        (masks.causal(), B, -B),
        (masks.causal(), -B, B),
        (SLOPE, B, B),
        (SLOPE, -B, -B),
    ],
)
def test_limits_of_far_positions_have_64_bits(mask, q_offset, kv_offset, loads):
    spec = dataclasses.replace(LIKE, mask=mask, q_offset=q_offset, kv_offset=kv_offset)
    interpreted.judge(spec, q_chunk=16, k_chunk=16, loads=loads)


def test_lengths_beyond_the_keys_place_the_last_query_beyond_them():
    spec = AttentionSpec(
        q_heads=2, q_len=25, kv_len=43, qk_dim=16, q_offset="bottom_right",
        mask=masks.causal(), kv_lengths=True, outputs=("out", "lse"),
    )  # fmt: skip
    path = api.stored(source_of(spec, q_chunk=16, k_chunk=16))
    arrays = inputs.arrays(spec, nan=False)
    for length in (0, 20, 43, 44, 143):
        given = arrays | {"kv_lengths": np.array([length], np.int32)}
        assert_equals_reference(spec, path, given)


def assert_equals_reference(spec, path, given):
    operands = {n: x for n, x in given.items() if n not in ("q", "k", "v")}
    want = reference.attention(spec, given["q"], given["k"], given["v"], operands)
    for name, x in zip(spec.outputs, interpreted.call(path, **given), strict=True):
        y = want[name]  # heads first
        y = y.transpose(0, 2, 1, 3) if name == "out" and spec.layout == "bthd" else y
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_nan_where_nobody_looks_never_matters(loads):
    even = attngen.score(lambda s, b, h, q, k: attngen.where(k % 2 == 0, s, -math.inf))
    nothing = attngen.mask(lambda b, h, q, k: (k <= q - 5) & (k >= q - 3))
    for spec, hidden in (
        (dataclasses.replace(LIKE, score=(even,)), slice(1, None, 2)),
        (dataclasses.replace(LIKE, mask=nothing), slice(None)),
    ):
        path = api.stored(source_of(spec, q_chunk=16, k_chunk=16, loads=loads))
        clean = inputs.arrays(spec, nan=False)
        given = {n: x.copy() for n, x in clean.items()}
        given["k"][:, hidden] = given["v"][:, hidden] = np.nan
        outputs = (interpreted.call(path, **arrays) for arrays in (clean, given))
        for x, y in zip(*outputs, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("axes", "text", "sizes", "needed"),
    [
        (("b", "k"), "ids[b, q] == ids[b, k]", {"kv_len": 20}, "T <= S"),
        (("q",), "ids[k] > 0", {"q_len": 20}, "S <= T"),
        (("b", "k"), "ids[b, 30] >= ids[b, k]", {"kv_len": 20}, "S > 30"),
        (("h",), "k <= q + ids[3]", {"q_heads": 2, "kv_heads": 1}, "H > 3"),
        ((2,), "k <= q + ids[b]", {"batch": 3}, "at most"),
        ((4,), "k <= q + ids[h]", {"q_heads": 8, "kv_heads": 4}, "at most"),
    ],
)
@pytest.mark.sampled(2)
def test_a_length_that_operands_do_not_allow_is_refused(axes, text, sizes, needed):
    ids = attngen.operand("ids", axes=axes, dtype="int32")
    mask = attngen.mask(eval(f"lambda b, h, q, k: {text}", {"ids": ids}))
    spec = dataclasses.replace(LIKE, q_heads=4, kv_heads=2, mask=mask, q_offset=0)
    path = api.stored(source_of(spec, q_chunk=16, k_chunk=16))
    assert_equals_reference(spec, path, inputs.arrays(spec, nan=False))
    other = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 70, "kv_len": 70}
    other |= sizes
    q = np.zeros((other["batch"], other["q_len"], other["q_heads"], 32), np.float32)
    k = np.zeros((other["batch"], other["kv_len"], other["kv_heads"], 32), np.float32)
    lengths = {"b": other["batch"], "h": other["q_heads"], "q": other["q_len"]}
    lengths["k"] = other["kv_len"]
    ids = np.zeros([lengths.get(a, a) for a in axes], np.int32)
    with pytest.raises(interpreted.Failed, match=needed.replace(">", "[>]")):
        interpreted.call(path, q=q, k=k, v=k, ids=ids)


def test_pieces_cover_a_head_dim_with_little_padding():
    for dim in range(1, 600):
        for how in ("split", "padded"):
            made = pieces(dim, how)
            ends = [start + width for start, width in made]
            assert [start for start, _ in made] == [0, *ends[:-1]]
            assert ends[-1] >= dim > made[-1][0]
            assert all(width >= 16 and width & (width - 1) == 0 for _, width in made)
        assert sum(w for _, w in pieces(dim, "split")) <= max(16, dim * 4 / 3 + 16)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("q_chunk", "k_chunk"), [(16, 64), (64, 16), (128, 128)])
def test_blocks_and_order(q_chunk, k_chunk, order):
    spec = dataclasses.replace(
        LIKE,
        mask=masks.causal() & masks.sliding_window(40),
        q_len=150,
        kv_len=150,
        dtype="float16",
    )
    interpreted.judge(spec, q_chunk=q_chunk, k_chunk=k_chunk, order=order)


def test_negative_positions_floor():
    """Triton's // and % truncate, the language's floor."""
    mask = attngen.mask(
        lambda b, h, q, k: ((q - k) // 3 % 2 == 0) | ((q - k) % -5 < -2)
    )
    score = attngen.score(lambda s, b, h, q, k: s - 0.1 * ((k - q) // 7))
    interpreted.judge(
        dataclasses.replace(LIKE, mask=mask, score=(score,)), q_chunk=32, k_chunk=32
    )


def test_positions_of_64_bits():
    mask = attngen.mask(lambda b, h, q, k: (q * 2**33 + k) % 3 != 0)
    spec = dataclasses.replace(LIKE, mask=mask)
    assert "tl.int64" in source_of(spec).text
    interpreted.judge(spec, q_chunk=32, k_chunk=32)


@pytest.mark.parametrize(
    "index",
    [lambda q, k: q // 3, lambda q, k: k // 3, lambda q, k: q, lambda q, k: k],
    ids=["rows", "keys", "bare rows", "bare keys"],
)
def test_what_is_read_outside_a_table_is_nan(index):
    """As the reference has it; bare positions leave the table in longer calls only."""
    table = attngen.operand("table", axes=("h", 20), dtype="float32")
    score = attngen.score(lambda s, b, h, q, k: s + table[h, index(q, k)])
    spec = dataclasses.replace(LIKE, q_len=20, kv_len=20, score=(score,))
    path = api.stored(source_of(spec, q_chunk=32, k_chunk=16))
    long = dataclasses.replace(LIKE, q_len=70, kv_len=70)
    arrays = inputs.arrays(long) | {"table": np.ones((2, 20), np.float32)}
    out, lse = interpreted.call(path, **arrays)
    position = np.arange(70)
    inside = index(position, 0 * position) < 20
    if (index(0 * position, position) >= 20).any():
        inside[:] = False  # every query sees a key that is read outside
    assert np.isfinite(lse[:, :, inside]).all()
    assert np.isnan(lse[:, :, ~inside]).all()
    assert np.isnan(out[:, ~inside]).all()


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize("end", ["q", "k"])
def test_no_tile_reads_a_table_beyond_the_last_token(end, dtype):
    """Indices are proven for tokens that are there; a ragged tile has more of them."""
    table = attngen.operand("table", axes=(20, "h"), dtype=dtype)
    other = attngen.operand("other", axes=("h", 20), dtype="int32")
    index = {
        "q": (lambda q, k: q, lambda q, k: 19 - q, lambda q, k: (2 * q + 1) // 2),
        "k": (lambda q, k: k, lambda q, k: 19 - k, lambda q, k: (k - q + 19) // 2),
    }[end]
    for at in index:
        mask = attngen.mask(
            lambda b, h, q, k, at=at: table[at(q, k), h] + other[h, at(q, k)] > 1
        )
        spec = dataclasses.replace(LIKE, q_len=20, kv_len=20, mask=mask, q_offset=0)
        interpreted.judge(spec, q_chunk=16, k_chunk=16)


def test_lengths_may_differ_where_no_mask_relates_them():
    mask = attngen.mask(lambda b, h, q, k: (q < 40) & (k > 3))
    spec = dataclasses.replace(LIKE, mask=mask, kv_len=50)
    interpreted.judge(spec, q_chunk=32, k_chunk=32)


def test_operands_may_have_ordinary_names():
    for name in ("x", "name", "shape", "s_1", "program", "rows"):
        if not is_free(name):
            continue
        operand = attngen.operand(name, axes="bhqk", dtype="float16")
        score = attngen.score(lambda s, b, h, q, k, o=operand: s + o[b, h, q, k])
        interpreted.judge(
            dataclasses.replace(LIKE, score=(score,)), q_chunk=32, k_chunk=32
        )


def call(spec, arrays, path):
    return interpreted.call(path, **arrays)


def rows_of(spec, arrays):
    given = dict(arrays)
    q, k, v = (given.pop(n) for n in "qkv")
    return reference.attention(spec, q, k, v, given)


def test_one_file_takes_any_batch_heads_and_lengths():
    spec = dataclasses.replace(LIKE, mask=masks.causal(), q_offset="bottom_right")
    path = api.stored(source_of(spec, q_chunk=32, k_chunk=16))
    for batch, heads, q_len, kv_len in [(1, 1, 5, 9), (3, 2, 33, 100), (2, 3, 64, 64)]:
        other = dataclasses.replace(
            spec, batch=batch, kv_heads=heads, q_heads=2 * heads, q_len=q_len,
            kv_len=kv_len,
        )  # fmt: skip
        arrays = inputs.arrays(other)
        out, lse = interpreted.call(path, **arrays)
        want = rows_of(other, arrays)
        rows = np.arange(q_len)
        assert np.allclose(
            reference.pick(other, "out", out, rows), want["out"], atol=1e-5
        )
        assert np.allclose(
            reference.pick(other, "lse", lse, rows), want["lse"], atol=1e-5
        )


def test_a_nan_in_a_key_that_nobody_sees_does_not_matter():
    for mask in (
        masks.causal(),
        attngen.mask(lambda b, h, q, k: (k <= q) & (k % 7 != 6)),
    ):
        spec = dataclasses.replace(LIKE, mask=mask, q_len=50, kv_len=90, q_offset=0)
        path = api.stored(source_of(spec, q_chunk=32, k_chunk=16))
        arrays = inputs.arrays(spec)
        clean = interpreted.call(path, **arrays)
        hidden = [
            j for j in range(90) if j >= 50 or (mask != masks.causal() and j % 7 == 6)
        ]
        for name in ("k", "v"):
            arrays[name] = arrays[name].copy()
            arrays[name][:, hidden] = np.nan
        for x, y in zip(clean, interpreted.call(path, **arrays), strict=True):
            assert np.array_equal(x, y)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float64"},
        {"derivatives": "any"},
        {"storage": "paged", "derivatives": "vjp"},
    ],
)
def test_what_is_not_built_says_so(change):
    with pytest.raises(NotBuiltError):
        attngen.plan(
            dataclasses.replace(LIKE, **change), target="h100", backend="triton"
        )


@pytest.mark.parametrize(
    ("fix", "words"),
    [
        ({"q_chunk": 48}, "q_chunk is one of"),
        ({"num_warps": 3}, "num_warps is one of"),
        ({"q_chunk": 256, "num_warps": 1}, "registers a thread"),
        ({"order": "sideways"}, "order is one of"),
        ({"loads": "slowly"}, "loads is one of"),
    ],
)
def test_illegal_choices_have_reasons(fix, words):
    with pytest.raises(PlanError, match=words):
        attngen.plan(LIKE, target="h100", backend="triton", fix=fix)


def test_a_head_dim_that_nothing_holds_is_refused_as_such():
    spec = dataclasses.replace(LIKE, qk_dim=1000, v_dim=900)
    with refused(PlanError, match="No plan is legal on l4") as caught:
        attngen.plan(spec, target="l4", backend="triton")
    assert "head dims 1000 and 900, float32: tiles need" in caught.value.got


def test_a_plan_with_any_choice_fixed_is_explained():
    chosen = attngen.plan(LIKE, target="h100", backend="triton").choice
    for name, value in chosen.items():
        fixed = attngen.plan(LIKE, target="h100", backend="triton", fix={name: value})
        assert f"fixed: {name}" in fixed.explain()
