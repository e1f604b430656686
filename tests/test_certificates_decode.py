"""Certificates of packed and split kernels, compiled for GPUs that aren't here."""

import dataclasses

import pytest
from library import slowly

pytest.importorskip("triton", reason="needs attngen[triton]")

import attngen
from attngen import AttentionSpec, building, descent, gpus, masks, presets, targets
from attngen.reports import Certificate


@pytest.mark.parametrize("target", slowly(gpus.GPUS, ["h100"]))
def test_few_queries_are_packed_and_split_without_a_spill(target):
    """The model's own plan for Llama 3's heads; `combine` is in the certificate."""
    spec = presets.get("decode-llama3")
    plan = attngen.plan(spec, target, "triton")
    certificate = building.certify(plan, attngen.emit(plan), target)
    assert plan.choice["pack_gqa"] is True
    assert plan.choice["kv_splits"] > 1
    kernels = certificate.every_kernel
    assert set(kernels) == {"", "combine"}
    assert all(k["spill_bytes"] == 0 for k in kernels.values())
    rows = 32 * plan.choice["kv_splits"]
    assert certificate.temp_bytes == plan.temp_bytes == 4 * rows * (128 + 2)
    assert "combine: " in str(certificate)
    assert descent.unfit(certificate, plan) is None
    assert descent.bound_s(plan, certificate, targets.get(target)) > 0


@pytest.mark.parametrize("target", slowly(["h100", "a100", "mi300x"], ["h100"]))
def test_so_are_those_of_packed_sequences(target):
    spec = AttentionSpec(
        batch=8, q_heads=32, kv_heads=8, q_len=16, kv_len=2**16, qk_dim=128,
        storage="packed", dtype="bfloat16", mask=masks.causal(), q_offset="bottom_right",
    )  # fmt: skip
    plan = attngen.plan(spec, target, "triton")
    certificate = building.certify(plan, attngen.emit(plan), target)
    assert plan.choice["pack_gqa"] is True
    assert plan.choice["kv_splits"] > 1
    assert set(certificate.every_kernel) == {"", "combine"}
    assert descent.unfit(certificate, plan) is None
    rows = 32 * 16 * plan.choice["kv_splits"]
    assert certificate.temp_bytes == plan.temp_bytes == 4 * rows * (128 + 2)
    assert descent.bound_s(plan, certificate, targets.get(target)) > 0


def test_split_lse_alone_is_certified():
    spec = dataclasses.replace(
        presets.get("decode-llama3"), outputs=("lse",), sink=True
    )
    plan = attngen.plan(spec, "a100", "triton", fix={"kv_splits": 8, "pack_gqa": False})
    certificate = building.certify(plan, attngen.emit(plan), "a100")
    assert certificate.kernels["combine"]["spill_bytes"] == 0
    assert certificate.temp_bytes == 4 * 32 * 8 * 2


def test_a_spill_of_the_second_kernel_counts():
    plan = attngen.plan(presets.get("decode-llama3"), "h100", "triton")
    own = {"spill_bytes": 0, "shared_bytes": 0, "blocks_per_multiprocessor": 1}
    other = own | {"spill_bytes": 64, "registers": 255, "warps": 1}
    certificate = Certificate("h100", "ptxas", 0, kernels={"combine": other}, **own)
    assert "combine of 16 × 16 spills 64 bytes" in descent.unfit(certificate, plan)
