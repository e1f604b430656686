"""benchmarks/paper_gradients.py: what stands beside what, and what a row has."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import attngen
from attngen.reports import Certificate

FOLDER = Path(__file__).parent.parent / "benchmarks"
MIB = 2**20


@pytest.fixture
def gradients(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("paper_gradients")
    for name in ("paper_gradients", "paper_tables", "paper_shown"):
        sys.modules.pop(name, None)


def test_the_setup_is_the_papers(gradients):
    cell = gradients.Gradient("tpu-v3", 2**14, "attngen")
    assert cell.spec.derivatives == "vjp"
    assert cell.budgets["paper's"] == 64 * MIB
    assert cell.budgets["none"] is None


def test_standard_attention_and_the_paper_have_one_gradient(gradients):
    pytest.importorskip("jax")
    spec = attngen.AttentionSpec(q_heads=1, q_len=32, qk_dim=8, derivatives="vjp")
    values = np.random.default_rng(0).standard_normal((4, *spec.shape_of("q")))
    arrays = list(values.astype("float32"))
    one, other = (
        gradients.vjp(gradients.inference(who, spec))(*arrays)
        for who in ("standard", "paper")
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_scores_larger_than_the_memory_are_not_compiled(gradients, monkeypatch):
    monkeypatch.setattr(attngen, "certify", None)
    found = gradients.of(gradients.Gradient("tpu-v3", 2**18, "standard"))
    assert found["oom"]
    assert found["temp_bytes"] is None


def test_a_row_has_the_fastest_that_fits(gradients, monkeypatch):
    def certify_many(made, by, target):
        return [
            Certificate(target, "XLA:TPU", p.temp_bytes, estimated_cycles=10**12 // p.temp_bytes)
            for p, _ in made
        ]  # fmt: skip

    monkeypatch.setattr("attngen.building.certify_many", certify_many)
    cell = gradients.Gradient("tpu-v3", 2**14, "attngen")
    rows = gradients.of(cell)["budgets"]
    assert list(rows) == list(cell.budgets)
    for name, budget in cell.budgets.items():
        assert budget is None or rows[name]["temp_bytes"] <= budget
    times = [rows[n]["time_s"] for n in ("none", "16MiB", "4MiB")]
    assert times == sorted(times)
    assert all("planned_for" in row for row in rows.values())
