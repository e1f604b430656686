"""A spec from the command line: files in every form, presets, and options over them."""

import dataclasses
import json

import pytest
from commands import TOML, run

import attngen
from attngen import AttentionSpec, masks, presets, scores


def spec_of(*arguments):
    """The spec that `plan` is given by a command line."""
    return AttentionSpec.from_dict(
        json.loads(run("plan", *arguments, "--json")[0])["spec"]
    )


FORMS = {
    'mask = "causal"': {"mask": masks.causal()},
    "mask = {sliding_window = {left = 9}}": {"mask": masks.sliding_window(9)},
    'mask = ["causal", {sliding_window = {left = 9}}]': {
        "mask": masks.causal() & masks.sliding_window(9)
    },
    'mask = {or = ["causal", {prefix = {length = 5}}]}': {
        "mask": masks.causal() | masks.prefix(5)
    },
    'mask = {not = {prefix = {length = "lengths"}}}': {
        "mask": ~masks.prefix("lengths")
    },
    "mask = {expr = ['le', 'k', 'q']}": {
        "mask": attngen.mask(lambda b, h, q, k: k <= q)
    },
    "[mask.sliding_window]\nleft = 9\nright = 2": {"mask": masks.sliding_window(9, 2)},
    "score = {softcap = {cap = 50}}": {"score": (scores.softcap(50),)},
    'score = [{softcap = {cap = 50.0}}, "alibi"]': {
        "score": (scores.softcap(50.0), scores.alibi())
    },
    'score = {bias = {name = "extra", axes = ["h", "q", "k"]}}': {
        "score": (scores.bias("extra", axes="hqk"),)
    },
}


@pytest.mark.parametrize(("text", "fields"), FORMS.items(), ids=FORMS)
def test_a_toml_file_is_a_spec(text, fields, tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text(TOML + text)
    assert spec_of(path) == AttentionSpec(
        q_heads=4, q_len=64, qk_dim=16, outputs=("out", "lse"),
        memory_budget="1MiB", **fields,
    )  # fmt: skip


def test_an_emitted_file_is_a_spec(emitted):
    assert spec_of(emitted) == AttentionSpec(q_heads=2, q_len=40, qk_dim=8)


def test_options_change_a_spec():
    base = dataclasses.replace(presets.get("llama3-8b"), q_len=64, kv_len=64)
    assert spec_of("--preset", "llama3-8b", "--q-len", 64) == base
    assert spec_of(
        "--preset", "llama3-8b", "--q-len", 64, "--batch", 3, "--dtype", "float32",
        "--layout", "bhtd", "--scale", "0.5", "--kv-lengths", "--sink", "--outputs",
        "lse, out", "--precision", "highest", "--out-dtype", "float32", "--kv-offset",
        "-3", "--q-offset", "-7", "--budget", "1GiB",
    ) == dataclasses.replace(
        base, batch=3, dtype="float32", layout="bhtd", scale=0.5, kv_lengths=True,
        sink=True, outputs=("lse", "out"), precision="highest", out_dtype="float32",
        kv_offset=-3, q_offset=-7, memory_budget="1GiB",
    )  # fmt: skip
    assert not spec_of("--preset", "gpt-oss-20b", "--no-sink").sink


def test_what_was_equal_stays_equal():
    def sizes(*arguments):
        spec = spec_of(*arguments)
        return spec.q_len, spec.kv_len, spec.q_heads, spec.kv_heads

    assert sizes("--preset", "sd15-self", "--q-len", 100) == (100, 100, 8, 8)
    assert sizes("--preset", "sd15-cross", "--q-len", 100) == (100, 77, 8, 8)
    assert sizes("--preset", "sd15-self", "--kv-len", 100) == (4096, 100, 8, 8)
    assert sizes("--preset", "sd15-self", "--q-heads", 2) == (4096, 4096, 2, 2)
    both = ("--q-len", 100, "--kv-len", 9, "--q-offset", "bottom_right")
    assert sizes("--preset", "llama3-8b", *both) == (100, 9, 32, 8)


STORED = {
    "--storage packed": {"storage": "packed"},
    "--storage paged --page-size 8 --num-pages 40": {
        "storage": "paged",
        "page_size": 8,
        "num_pages": 40,
    },
    "--kv-dtype int8 --kv-scale token": {"kv_dtype": "int8", "kv_scale": "token"},
    "--kv-dtype float8_e4m3 --kv-scale 16": {
        "kv_dtype": "float8_e4m3",
        "kv_scale": 16,
    },
}


@pytest.mark.parametrize("options", STORED)
def test_storage_has_options(options):
    sizes = ["--batch", "2", "--q-heads", "2", "--q-len", "32", "--qk-dim", "8"]
    want = AttentionSpec(batch=2, q_heads=2, q_len=32, qk_dim=8, **STORED[options])
    assert spec_of(*sizes, *options.split()) == want
