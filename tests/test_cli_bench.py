"""`attngen bench`: what it prints, and how it refuses."""

import json

import pytest
from commands import CHUNKS, LLAMA, SMALL, misused, refused, run

from attngen import bench

FEW = (*SMALL, *CHUNKS, "--rounds", "2")


@pytest.fixture(autouse=True)
def _quick(monkeypatch, certified):
    monkeypatch.setattr(bench, "SETTLE_S", 0)


def test_bench_prints_a_table():
    out, err = run("bench", *FEW, "--peers", "plain, jax.nn")
    lines = out.splitlines()
    assert lines[0] == "1 × 2 heads, 40 queries × 40 keys, dim 8, float32"
    assert max(map(len, lines)) <= 100
    names = [line.split("  ")[0] for line in lines]
    for name in ("attngen", "plain jnp", "jax.nn"):
        assert names.count(name) == 2  # in the table, and its note
    assert "checking jax.nn …" in err
    assert "round 2 of 2" in err


def test_bench_prints_json():
    out, err = run("bench", *FEW, "--peers", "plain", "--json")
    data = json.loads(out)
    assert [e["name"] for e in data["entries"]] == ["attngen", "plain jnp"]
    assert len(data["entries"][1]["samples_s"]) == 2
    assert "16 queries" in data["entries"][0]["note"]
    assert "building attngen's own …" in err


REFUSED = {
    "no spec": ("SpecError",),
    "a preset": ("PresetError", "--preset", "llama4"),
    "a target": ("TargetError", *LLAMA, "--target", "abacus"),
    "a target elsewhere": ("TargetError", *LLAMA, "--target", "h100"),
    "a TPU": ("TargetError", *LLAMA, "--target", "tpu-v5e"),
    "an older TPU": ("TargetError", *LLAMA, "--target", "tpu-v3"),
    "a backend": ("BackendError", *LLAMA, "--backend", "abacus"),
    "a peer": ("PeerError", *LLAMA, "--peers", "plain,flash"),
    "no peer": ("PeerError", *LLAMA, "--peers", ""),
    "no rounds": ("PlanError", *LLAMA, "--rounds", "0"),
    "an effort": ("PlanError", *LLAMA, "--effort", "hard"),
    "a budget": ("BudgetError", *LLAMA, "--budget", "1"),
    "a choice": ("PlanError", *LLAMA, "--fix", "tile=4"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_request_is_refused(name, no_compiler):
    kind, *arguments = REFUSED[name]
    refused(kind, "bench", *arguments)


def test_rounds_are_a_number():
    misused("bench", *SMALL, "--rounds", "many")
