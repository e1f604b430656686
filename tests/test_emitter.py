"""Emitted files: formatted as they are, told by their headers, and free of a user's text."""

import ast
import dataclasses
import subprocess
import sys

import pytest
from gallery import ENTRIES, source
from test_conformance import CHUNKS, SPECS

import attngen
from attngen import AttentionSpec, emitter, masks, scores
from attngen.errors import AttngenError, FileError

LONG = attngen.mask(
    lambda b, h, q, k: (
        ((q * 3 + k * 5 + h * 7 + b * 11) % 13 < 6)
        | ((q // 17 + k // 19) % 23 == 4)
        | (attngen.maximum(q, k) - attngen.minimum(q, k) < 100 * (h + 1))
    )
)
NAME = "a_long_name_of_22_char"
WIDE = AttentionSpec(
    batch=4,
    q_heads=12,
    kv_heads=4,
    q_len=111,
    kv_len=222,
    qk_dim=40,
    v_dim=72,
    q_offset="operand",
    mask=LONG & masks.dense(NAME, axes="kqhb"),
    score=(
        scores.relative_buckets("another_one_of_22_long"),
        scores.bias("bias_of_a_longish_name", axes="kh"),
        scores.softcap(12.345678901234567),
    ),
    sink=True,
    kv_lengths=True,
    q_lengths=True,
    dtype="bfloat16",
    outputs=("lse", "out"),
    precision="highest",
    kv_offset=-123456,
)

PLAIN = AttentionSpec(
    batch=2, q_heads=4, kv_heads=2, q_len=64, qk_dim=16, outputs=("out", "lse")
)
CAUSAL = dataclasses.replace(
    PLAIN, mask=masks.causal(), score=(scores.alibi(), scores.bias(axes="hqk"))
)
UNUSUAL = {
    "ones": {"denominator": "ones"},
    "twice": {"qk": "twice"},
    "dn": {"slices": "dn"},
    "steps": {"steps": "map", "q_chunk": 37},
    "split_kv": {"algorithm": "split_kv", "parts": 2},
    "summaries": {"algorithm": "summaries"},
}


def texts():
    """A broad set of emitted texts, by name."""
    made = {f"gallery_{name}": source(name).text for name in ENTRIES}
    for i, (_, spec) in enumerate(SPECS.items()):
        chunks = {"q_chunk": min(16, spec.q_len), "k_chunk": min(24, spec.kv_len)}
        made[f"running_{i}"] = text(spec, CHUNKS | chunks)
        made[f"dense_{i}"] = text(spec, {"algorithm": "dense"})
    for chunk in (1, 2, 4):
        fix = {"q_chunk": 20, "k_chunk": 33, "batch_chunk": chunk, "head_chunk": chunk}
        made[f"wide_{chunk}"] = text(WIDE, fix | {"algorithm": "running"})
        low = {"product_dtype": "bfloat16", "guard": False}
        made[f"wide_low_{chunk}"] = text(WIDE, fix | low | {"algorithm": "running"})
    for name, fix in UNUSUAL.items():
        small = {"algorithm": "running", "q_chunk": 20, "k_chunk": 33} | fix
        made[f"wide_{name}"] = text(WIDE, small)
        low = {"product_dtype": "bfloat16", "scale": "scores", "guard": False}
        if name != "steps":  # needs whole chunks
            whole = {"q_chunk": 37, "k_chunk": 37, "head_chunk": 2, "batch_chunk": 2}
            made[f"wide_whole_{name}"] = text(WIDE, small | low | whole)
        made[f"plain_{name}"] = text(PLAIN, small | {"q_chunk": 16, "k_chunk": 8})
    window = dataclasses.replace(CAUSAL, mask=masks.sliding_window(30, 20), sink=True)
    for unroll in (2, 4):
        fix = {"q_chunk": 8, "k_chunk": 4, "unroll": unroll}
        made[f"unrolled_{unroll}"] = text(window, fix)
    for head_chunk in (1, 2):
        for algorithm in ("running", "split_kv", "summaries"):
            fix = {
                "algorithm": algorithm,
                "head_chunk": head_chunk,
                "denominator": "ones",
            }
            fix |= {"q_chunk": 16, "k_chunk": 8, "slices": "dn", "steps": "map"}
            made[f"several_{algorithm}_{head_chunk}"] = text(PLAIN, fix)
        fix = {"q_chunk": 16, "k_chunk": 8, "diagonal": 4, "head_chunk": head_chunk}
        for unroll in (1, 2, 4):
            name = f"diagonal_{head_chunk}_{unroll}"
            made[name] = text(CAUSAL, fix | {"unroll": unroll})
    later = dataclasses.replace(
        PLAIN, mask=~masks.causal(), layout="bhtd", precision="highest"
    )
    for name in ("running", "split_kv", "summaries"):
        fix = {"algorithm": name, "q_chunk": 1, "k_chunk": 12, "steps": "map"}
        made[f"later_{name}"] = text(later, fix | {"denominator": "ones"})
    alone = dataclasses.replace(PLAIN, outputs=("lse",))
    made["lse_alone"] = text(alone, {"algorithm": "dense"})
    made["wide_dense"] = text(WIDE, {"algorithm": "dense"})
    return made


def text(spec, fix):
    return attngen.emit(attngen.plan(spec, target="cpu", backend="jax", fix=fix)).text


@pytest.fixture(scope="module")
def emitted():
    return texts()


def ruff(*arguments):
    command = [sys.executable, "-m", "ruff", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_linter_and_a_formatter_have_nothing_to_say(emitted, tmp_path):
    for name, made in emitted.items():
        (tmp_path / f"{name}.py").write_text(made)
    found = ruff("format", "--isolated", "--diff", str(tmp_path))
    assert found.returncode == 0, found.stdout[:3000]
    found = ruff("check", "--isolated", str(tmp_path))
    assert found.returncode == 0, found.stdout[:3000]


def test_no_line_is_too_long(emitted):
    for name, made in emitted.items():
        for line in made.splitlines():
            assert len(line) <= 88, f"{name}: {line}"


def test_emitting_twice_gives_the_same(emitted):
    assert texts() == emitted


def test_a_header_tells_spec_and_choices(emitted, tmp_path):
    for name, made in emitted.items():
        path = tmp_path / f"{name}.py"
        path.write_text(made)
        head = emitter.read_header(path)
        plan = attngen.plan(head.spec, head.target, head.backend, head.choice)
        assert attngen.emit(plan).text == made


def test_an_emitted_file_imports_jax_alone(emitted):
    for made in emitted.values():
        for node in ast.walk(ast.parse(made)):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} == {"jax"}
            if isinstance(node, ast.ImportFrom):
                assert node.module in ("jax", "functools")


@pytest.mark.parametrize(
    "hostile",
    [
        "x); import os; os.system('true'",
        'x"""\nimport os',
        "import os",
        "x\n",
        "__import__",
        "eval",
        "q",
        "out_all",
        "x.y",
        "ключ",
        "",
        "a" * 100,
    ],
)
def test_hostile_names_are_refused(hostile):
    for make in (masks.documents, masks.dense, scores.alibi, scores.bias):
        with pytest.raises(AttngenError):
            make(hostile)
    data = {"expr": ["load", hostile, "b"], "operands": {hostile: {}}}
    with pytest.raises(AttngenError):
        AttentionSpec.from_dict({"q_heads": 1, "q_len": 1, "qk_dim": 1, "mask": data})


@pytest.mark.parametrize(
    "text",
    ["", "x = 1\n", '"""Nothing."""\n', '"""spec  {}\nchoices  {}\n"""\n', "def ("],
)
def test_other_files_have_no_header(text, tmp_path):
    path = tmp_path / "other.py"
    path.write_text(text)
    with pytest.raises(AttngenError) as caught:
        emitter.read_header(path)
    assert isinstance(caught.value, FileError) or "spec" in str(caught.value)


def test_a_source_is_written_whole(tmp_path):
    made = source("sd15_cross")
    path = made.write(tmp_path / "new" / "file.py")
    assert path.read_text() == made.text == str(made)
    assert len(made.digest) == 64
    assert dataclasses.replace(made, text="x").digest != made.digest


@pytest.mark.parametrize("derivatives", [None, "vjp", "any"])
def test_products_of_float32_keep_all_bits_on_gpus(derivatives):
    """XLA:GPU else makes them in TensorFloat-32, which an H200's validation refused."""
    for target, dtype, told in (
        ("h200", "float32", True),
        ("h200", "bfloat16", False),
        ("cpu", "float32", False),
        ("tpu-v5e", "float32", False),
    ):
        spec = dataclasses.replace(PLAIN, dtype=dtype, derivatives=derivatives)
        plan = attngen.plan(spec, target=target, backend="jax")
        text = attngen.emit(plan).text
        assert ("precision=lax.Precision.HIGHEST" in text) == told, target
