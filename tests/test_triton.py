"""Triton kernels compute their spec, in the interpreter; and what their files refuse."""

import ast
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from test_conformance import SPECS

import attngen
from attngen import AttentionSpec, api, inputs, masks, reference, scores
from attngen.backends.triton.candidates import pieces
from attngen.backends.triton.loader import has_gpu
from attngen.errors import BackendError, NotBuiltError, PlanError
from attngen.names import is_free

LIKE = AttentionSpec(
    batch=2, q_heads=2, kv_heads=1, q_len=70, qk_dim=32, outputs=("out", "lse")
)


def small_blocks(spec):
    """Blocks so small that few tokens make every kind of tile."""
    return {"q_chunk": 16 if spec.q_len <= 16 else 32, "k_chunk": 16}


def source_of(spec, **fix):
    return attngen.emit(attngen.plan(spec, target="h100", backend="triton", fix=fix))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name, dtype):
    spec = dataclasses.replace(SPECS[name], dtype=dtype)
    interpreted.judge(spec, **small_blocks(spec))


@pytest.mark.parametrize("name", ["causal window", "alibi", "sink", "odd dims"])
def test_bfloat16(name):
    spec = dataclasses.replace(SPECS[name], dtype="bfloat16")
    interpreted.judge(spec, **small_blocks(spec))


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


def test_a_length_that_operands_do_not_allow_is_refused():
    def mask_of(axes, text):
        ids = attngen.operand("ids", axes=axes, dtype="int32")
        return attngen.mask(eval(f"lambda b, h, q, k: {text}", {"ids": ids}))

    cases = [  # axes of ids, the mask, other sizes, what is needed
        (("b", "k"), "ids[b, q] == ids[b, k]", {"kv_len": 20}, "T <= S"),
        (("q",), "ids[k] > 0", {"q_len": 20}, "S <= T"),
        (("b", "k"), "ids[b, 30] >= ids[b, k]", {"kv_len": 20}, "S > 30"),
        (("h",), "k <= q + ids[3]", {"q_heads": 2, "kv_heads": 1}, "H > 3"),
        ((2,), "k <= q + ids[b]", {"batch": 3}, "at most"),
        ((4,), "k <= q + ids[h]", {"q_heads": 8, "kv_heads": 4}, "at most"),
    ]
    for axes, text, sizes, needed in cases:
        spec = dataclasses.replace(
            LIKE, q_heads=4, kv_heads=2, mask=mask_of(axes, text), q_offset=0
        )
        path = api.stored(source_of(spec, q_chunk=16, k_chunk=16))
        assert_equals_reference(spec, path, inputs.arrays(spec, nan=False))
        other = {"batch": 2, "q_heads": 4, "kv_heads": 2, "q_len": 70, "kv_len": 70}
        other |= sizes
        q = np.zeros((other["batch"], other["q_len"], other["q_heads"], 32), np.float32)
        k = np.zeros(
            (other["batch"], other["kv_len"], other["kv_heads"], 32), np.float32
        )
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


def test_a_file_refuses_what_its_kernel_does_not_take():
    spec = dataclasses.replace(
        LIKE, mask=masks.causal(), score=(scores.alibi("slopes"),)
    )
    path = api.stored(source_of(spec, q_chunk=32, k_chunk=32))
    good = inputs.arrays(spec)
    bad = {
        "four dimensions": {"q": good["q"][0]},
        "float16": {"k": good["k"].astype(np.float16)},
        "no offset is known": {"k": good["k"][:, :50], "v": good["v"][:, :50]},
        "kv heads": {"q": good["q"][:, :, :1]},
        "not torch.float32[2, 70, 1, 32]": {"v": good["v"][:, :, :, :16]},
        "slopes": {"slopes": good["slopes"][:1]},
    }
    for words, change in bad.items():
        with pytest.raises(interpreted.Failed, match=words.replace("[", r"\[")):
            interpreted.call(path, **good | change)


@pytest.mark.parametrize("name", ["k", "v"])
def test_strides_that_no_tensor_descriptor_takes_are_refused(name):
    spec = dataclasses.replace(LIKE, dtype="float16")
    path = api.stored(source_of(spec, loads="descriptors"))
    code = (
        "import sys, importlib.util, torch\n"
        "made = importlib.util.spec_from_file_location('emitted', sys.argv[1])\n"
        "module = sys.modules['emitted'] = importlib.util.module_from_spec(made)\n"
        "made.loader.exec_module(module)\n"
        "q, k, wide = (torch.zeros(2, 70, h, d, dtype=torch.float16)\n"
        "              for h, d in ((2, 32), (1, 32), (1, 36)))\n"
        "for odd in (wide[..., :32], wide.expand(2, 70, 1, 36)[..., 2:34],\n"
        "            torch.zeros(2, 70, 1, 64, dtype=torch.float16)[..., ::2]):\n"
        "    try: module.attention(**{'q': q, 'k': k, 'v': k} | {sys.argv[2]: odd})\n"
        "    except ValueError as error: print('multiples of 16 bytes' in str(error))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path), name],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["True"] * 3, ran.stderr[-2000:]


def test_without_a_gpu_a_call_says_so():
    spec = dataclasses.replace(LIKE, mask=masks.causal())
    code = (
        "import sys, importlib.util, torch\n"
        "made = importlib.util.spec_from_file_location('emitted', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(made)\n"
        "made.loader.exec_module(module)\n"
        "q, k = torch.zeros(2, 70, 2, 32), torch.zeros(2, 70, 1, 32)\n"
        "module.attention(q, k, k)\n"
    )
    path = api.stored(source_of(spec))
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True
    )
    assert "needs a GPU" in ran.stderr.splitlines()[-1]


def test_emitted_files_are_tidy(tmp_path):
    for i, spec in enumerate(SPECS.values()):
        source_of(spec, **small_blocks(spec)).write(tmp_path / f"file_{i}.py")
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--isolated", "--no-cache",
             tmp_path],
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout


def test_names_that_files_use_are_taken():
    for name, spec in SPECS.items():
        tree = ast.parse(source_of(spec, **small_blocks(spec)).text)
        own = {o.name for o in spec.operands}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in (
                "attention",
                "_attention",
            ):
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                inner = {
                    t.id
                    for n in ast.walk(node)
                    if isinstance(n, ast.comprehension)
                    for t in ast.walk(n.target)
                    if isinstance(t, ast.Name)
                }
                assert not {n for n in used - own - inner if is_free(n)}, name


@pytest.mark.parametrize(
    "change", [{"dtype": "float64"}, {"derivatives": "vjp"}, {"dropout": 0.1}]
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


def test_a_plan_with_any_choice_fixed_is_explained():
    chosen = attngen.plan(LIKE, target="h100", backend="triton").choice
    for name, value in chosen.items():
        fixed = attngen.plan(LIKE, target="h100", backend="triton", fix={name: value})
        assert f"fixed: {name}" in fixed.explain()


IN_TORCH = """
import importlib.util, sys, torch
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
module = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(module)
q, k, v = (torch.randn(2, 70, h, 32) for h in (2, 1, 1))
torch.library.opcheck(
    module._attention, (q, k, v), test_utils=("test_schema", "test_faketensor")
)
out, lse = module.attention(q, k, v)
compiled = torch.compile(lambda *a: module.attention(*a), backend="eager", fullgraph=True)
assert torch.equal(compiled(q, k, v)[0], out)

def strided(x):
    wide = torch.full((2, 4, 33, 141), torch.nan)
    view = wide[:, :x.shape[2], :32, 1::2].permute(0, 3, 1, 2)
    view.copy_(x)
    return view

if sys.argv[2] == "descriptors":
    strided = torch.clone
again = module.attention(*map(strided, (q, k, v)))
assert torch.equal(again[0], out) and torch.equal(again[1], lse)
print("right")
"""


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_torch_takes_it_as_one_operation_with_any_strides(loads):
    spec = dataclasses.replace(LIKE, mask=masks.causal())
    path = api.stored(source_of(spec, q_chunk=32, k_chunk=32, loads=loads))
    ran = subprocess.run(
        [sys.executable, "-c", IN_TORCH, str(path), loads],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["right"], ran.stderr[-2000:]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_kernel_is_built_with_its_certificate_and_says_that_it_cannot_be_called():
    spec = dataclasses.replace(LIKE, mask=masks.causal(), dtype="float16")
    kernel = attngen.build(spec, target="a100", fix={"q_chunk": 64, "k_chunk": 32})
    assert kernel.report.passed
    assert kernel.certificate.temp_bytes == kernel.certificate.spill_bytes == 0
    assert kernel.certificate.matrix_instruction.startswith("HMMA")
    with pytest.raises(BackendError, match="can't be called here"):
        kernel(None, None, None)
    assert attngen.validate(kernel).passed


OFFSETS = """
import importlib.util, sys, torch, numpy as np
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
m = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(m)
q, k, v = (torch.randn(2, n, h, 32) for n, h in ((5, 2), (40, 1), (40, 1)))
want = m.attention(q, k, v, q_offset=torch.full((2,), 35, dtype=torch.int32))[0]
for offset in (35, np.int64(35), torch.tensor(35), torch.tensor(35, dtype=torch.int32)):
    assert torch.equal(m.attention(q, k, v, q_offset=offset)[0], want)
compiled = torch.compile(
    lambda *a, o: m.attention(*a, q_offset=o)[0], backend="eager", fullgraph=True
)
assert torch.equal(compiled(q, k, v, o=35), want)
for offset in (1.5, [1, 2], torch.tensor(1.7), 2**31, -(2**31), None):
    try:
        m.attention(q, k, v, q_offset=offset)
    except (TypeError, ValueError):
        print("refused")
"""


def test_what_q_offset_takes():
    spec = dataclasses.replace(
        LIKE, q_len=5, kv_len=40, mask=masks.causal(), q_offset="operand"
    )
    path = api.stored(source_of(spec, q_chunk=16, k_chunk=16))
    ran = subprocess.run(
        [sys.executable, "-c", OFFSETS, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["refused"] * 6, ran.stderr[-2000:]


COPIES = """
import importlib.util, sys, torch
def load(path):
    made = importlib.util.spec_from_file_location(path[-12:-3], path)
    module = sys.modules[path[-12:-3]] = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return module
q, k, v = (torch.randn(2, 70, h, 32) for h in (2, 1, 1))
own = load(sys.argv[1])
before = own.attention(q, k, v)[0]
edited = load(sys.argv[2])
print(torch.equal(own.attention(q, k, v)[0], before))
print(torch.equal(edited.attention(q, k, v)[0], before))
"""


def test_an_edited_copy_leaves_the_first_as_it_is(tmp_path):
    text = source_of(LIKE, q_chunk=32, k_chunk=32).text
    first, second = tmp_path / "a_first.py", tmp_path / "an_edited.py"
    first.write_text(text)
    second.write_text(
        text.replace("SCALE_LOG2 = tl.constexpr(", "SCALE_LOG2 = tl.constexpr(2 * ")
    )
    ran = subprocess.run(
        [sys.executable, "-c", COPIES, str(first), str(second)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert ran.stdout.split() == ["True", "False"], ran.stderr[-2000:]


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_file_is_validated_where_its_path_is_relative(tmp_path, monkeypatch):
    source_of(LIKE, q_chunk=32, k_chunk=32).write(tmp_path / "here.py")
    monkeypatch.chdir(tmp_path)
    assert attngen.validate("here.py").passed


KEYS = """
import importlib.util, json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
module = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(module)
kernel = module.forward
gpu = make_backend(GPUTarget("cuda", 90, 32))
bind = jit.create_function_from_signature(kernel.signature, kernel.params, gpu)
keys = []

class Launched:
    def __getitem__(self, grid):
        def launch(*args, **options):
            _, specialised, options = bind(*args, **options)
            keys.append(jit.compute_cache_key({}, specialised, options))
        return launch

module.forward = Launched()
for b, t, s, offset in json.loads(sys.argv[2]):
    q, k, v = (torch.zeros(b, n, h, 64, dtype=torch.float16)
               for n, h in ((t, 4), (s, 2), (s, 2)))
    lengths = torch.full((b,), s - 1, dtype=torch.int32)
    module._attention(q, k, v, lengths, torch.full((b,), offset, dtype=torch.int32))
print(len(keys), len(set(keys)))
"""


@pytest.mark.parametrize("loads", ["pointers", "descriptors"])
def test_a_new_length_batch_or_offset_compiles_nothing(loads):
    spec = AttentionSpec(
        q_heads=4, kv_heads=2, q_len=100, kv_len=100, qk_dim=64, dtype="float16",
        mask=masks.causal(), kv_lengths=True, q_offset="operand",
    )  # fmt: skip
    path = api.stored(source_of(spec, loads=loads))
    calls = [(1, 100, 100, 0), (2, 16, 1600, 7), (1, 1, 4097, 4096), (3, 2048, 33, 0)]
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", KEYS, str(path), str([list(c) for c in calls])],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.stdout.split() == ["4", "1"], ran.stderr[-2000:]
