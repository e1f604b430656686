"""Wide head dims in Triton: 256, 512, and MLA's 576 beside 512, on every card."""

import dataclasses
import itertools

import interpreted
import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, backends, gpus, masks, planner, scores, targets
from attngen.backends.triton import candidates
from attngen.descent import first_certified, unfit
from attngen.errors import PlanError

pytest.importorskip("triton", reason="needs attngen[triton]")

TRITON = backends.get("triton")
DIMS = {"256": (256, 256), "512": (512, 512), "576/512": (576, 512)}


def spec_of(dims, kind, q_heads=128, dtype="bfloat16"):
    """MLA's 576/512 has one kv head, and after prefill one query of many heads."""
    qk_dim, v_dim = DIMS[dims]
    common = {"qk_dim": qk_dim, "v_dim": v_dim, "dtype": dtype}
    if kind == "decode":
        kv_heads = 1 if qk_dim != v_dim else q_heads // 4
        return AttentionSpec(
            batch=8, q_heads=q_heads, kv_heads=kv_heads, q_len=1, kv_len=8192, **common
        )
    return AttentionSpec(
        q_heads=16, kv_heads=1 if qk_dim != v_dim else 16, q_len=4096,
        mask=masks.causal(), derivatives="vjp" if kind == "training" else None, **common,
    )  # fmt: skip


@pytest.mark.parametrize("target", gpus.GPUS)
@pytest.mark.parametrize("kind", ["prefill", "decode", "training"])
@pytest.mark.parametrize("dims", DIMS)
def test_every_card_has_a_plan(dims, kind, target):
    """One that the model doesn't call crowded: a thread has what its tile needs."""
    plan = attngen.plan(spec_of(dims, kind), target, "triton")
    gpu = targets.get(target).gpu
    assert candidates.crowding(plan.spec, plan.choice, gpu) < 1
    assert candidates.shared_bytes(plan.spec, plan.choice, gpu) <= gpu.shared_bytes
    assert 0 < plan.time_s < 10


@pytest.mark.parametrize("q_heads", [16, 64])
def test_decoding_takes_any_number_of_heads(q_heads):
    for target in gpus.GPUS:
        spec = spec_of("576/512", "decode", q_heads, "float16")
        assert attngen.plan(spec, target, "triton").choice["head_dim"] == "split"


def test_what_no_tile_is_small_enough_for_is_said():
    with refused(PlanError, "No plan is legal on rtx3090") as caught:
        attngen.plan(spec_of("576/512", "decode", dtype="float32"), "rtx3090", "triton")
    least = 4 * 16 * (576 + 576 + 512)  # queries, keys and values of the smallest tile
    assert f"{least} bytes of shared memory" in caught.value.got


CHOICE = {
    "algorithm": "running",
    "order": "forward",
    "head_dim": "padded",
    "loads": "pointers",
}


@pytest.mark.parametrize(
    ("target", "sizes", "spills"),
    [
        ("h100", (64, 32, 8, 2), True), ("h100", (32, 32, 8, 2), False),
        ("h100", (32, 32, 4, 2), True), ("b200", (64, 32, 8, 2), False),
        ("mi355x", (128, 16, 4, 2), True), ("mi355x", (64, 64, 4, 1), True),
        ("mi355x", (64, 32, 4, 2), False), ("mi300x", (64, 32, 4, 1), False),
    ],
)  # fmt: skip
def test_the_model_tells_what_spills_as_compiled(target, sizes, spills):
    """Head dims of 512, compiled by Triton 3.9."""
    names = ("q_chunk", "k_chunk", "num_warps", "num_stages")
    choice = CHOICE | dict(zip(names, sizes, strict=True))
    spec, gpu = spec_of("512", "prefill"), targets.get(target).gpu
    assert (candidates.crowding(spec, choice, gpu) >= 1) == spills


# The backward pass with a head dim in pieces.

SMALL = AttentionSpec(
    batch=2, q_heads=4, kv_heads=2, q_len=37, qk_dim=80, v_dim=40, mask=masks.causal(),
    outputs=("out", "lse"), derivatives="vjp",
)  # fmt: skip
PIECES = {
    "80 and 40": {"score": scores.bias(axes="hk")},
    "lse alone": {"outputs": ("lse",)},
    "96 and 48, dropout": {"qk_dim": 96, "v_dim": 48, "dropout": 0.2},
    "16 and 80, bhtd": {"qk_dim": 16, "v_dim": 80, "layout": "bhtd"},
    "20 and 80, a coarse out": {"qk_dim": 20, "v_dim": 80, "out_dtype": "float16"},
    "lengths, a sink": {"kv_lengths": True, "q_lengths": True, "sink": True},
    "576 and 512": {
        "batch": 1, "q_heads": 2, "kv_heads": 1, "q_len": 20, "kv_len": 20,
        "qk_dim": 576, "v_dim": 512, "score": scores.bias(axes="qk"),
    },
}  # fmt: skip
USUAL = ("80 and 40", "576 and 512", "lengths, a sink")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(n, d, marks=[pytest.mark.slow] * (n not in USUAL or d != usual))
        for n, usual in zip(PIECES, itertools.cycle(("float32", "bfloat16")))
        for d in ("float32", "bfloat16")
    ],
)
def test_gradients_in_pieces(name, dtype):
    spec = dataclasses.replace(SMALL, dtype=dtype, **PIECES[name])
    blocks = {"q_chunk": 16, "k_chunk": 16, "backward_q_chunk": 16}
    if (name, dtype) == ("576 and 512", "float32"):  # which has the registers for it
        blocks["target"] = "mi355x"
    interpreted.judge(
        spec, **blocks, backward_k_chunk=16, backward_head_dim="split", num_warps=4
    )


def test_pieces_are_a_choice_where_there_are_several():
    axes = TRITON.backward.space(SMALL, targets.get("a100"))["two_passes"]
    assert axes["head_dim"] == ("split", "padded")
    spec = dataclasses.replace(SMALL, qk_dim=128, v_dim=64)
    assert (
        "head_dim" not in TRITON.backward.space(spec, targets.get("a100"))["two_passes"]
    )
    plan = attngen.plan(SMALL, "a100", "triton", {"backward_head_dim": "split"})
    assert "head dim in pieces" in plan.explain().split("backward")[1]


# As the targets' compilers compile them.

COMPILED = [
    (dims, kind, target)
    for kind in ("prefill", "decode", "training")
    for dims in DIMS
    for target in ("a100", "rtx3090", "h100", "b200", "rtx5090", "mi300x", "mi355x")
]


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "kind", "target"), COMPILED)
def test_the_plan_that_build_takes_does_not_spill(dims, kind, target):
    ranked = planner.rank(spec_of(dims, kind), targets.get(target), TRITON)
    plan, _, certificate = first_certified(ranked, TRITON)
    assert unfit(certificate, plan) is None
    assert all(k["spill_bytes"] == 0 for k in certificate.every_kernel.values())
