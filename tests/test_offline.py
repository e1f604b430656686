"""Plans for GPUs that aren't here: ranked by what the compiler makes of them."""

import dataclasses

import pytest

import attngen
from attngen import AttentionSpec, masks, offline, planner, targets
from attngen.errors import PlanError, TargetError
from attngen.reports import Certificate

SPEC = AttentionSpec(
    q_heads=8, q_len=1000, qk_dim=64, dtype="float16", mask=masks.causal()
)
A100 = targets.get("a100")
KERNEL = Certificate("a100", "ptxas", 0, spill_bytes=0, shared_bytes=1024)


def plan(**fix):
    return attngen.plan(SPEC, target="a100", fix=fix)


def test_a_bound_counts_waves_tiles_and_cycles():
    made = plan(q_chunk=128, k_chunk=64, num_warps=4)
    one = dataclasses.replace(KERNEL, bound_cycles=1000.0, blocks_per_multiprocessor=2)
    assert A100.gpu.multiprocessors == 108 > 8 * 8  # a wave of one program each
    tiles = made.tiles.visited / 8
    want = pytest.approx(tiles * 1000 / A100.gpu.clock_hz)
    assert offline.bound_s(made, one, A100) == want
    twice = dataclasses.replace(one, bound_cycles=2000.0)
    assert offline.bound_s(made, twice, A100) == pytest.approx(
        2 * tiles * 1000 / A100.gpu.clock_hz
    )


@pytest.mark.parametrize(
    "change", [{"bound_cycles": None}, {"blocks_per_multiprocessor": 0}]
)
def test_what_is_not_known_is_no_bound(change):
    known = {"bound_cycles": 1.0, "blocks_per_multiprocessor": 1}
    certificate = dataclasses.replace(KERNEL, **known | change)
    assert offline.bound_s(plan(), certificate, A100) is None


def test_the_least_bound_is_taken_and_spills_are_not(monkeypatch):
    def certified(made, by, target):
        return [
            dataclasses.replace(
                KERNEL,
                bound_cycles=float(p.q_chunk * p.k_chunk),
                blocks_per_multiprocessor=1,
                spill_bytes=8 if p.choice["num_warps"] == 2 else 0,
            )
            for p, _ in made
        ]

    monkeypatch.setattr("attngen.building.certify_many", certified)
    by = attngen.backends.get("triton")
    found = offline.best(SPEC, A100, by, "measure", {})
    chosen = found[0]
    assert chosen.choice["num_warps"] != 2
    tried = planner.rank(SPEC, A100, by, {})
    assert chosen in tried
    monkeypatch.setattr(
        "attngen.building.certify_many",
        lambda made, by, target: (
            [dataclasses.replace(KERNEL, spill_bytes=8)] * len(made)
        ),
    )
    assert offline.best(SPEC, A100, by, "measure", {}) is None
    spilling = dataclasses.replace(KERNEL, spill_bytes=8)
    monkeypatch.setattr(
        "attngen.building._certified",
        lambda groups, by: [(p, None, spilling) for group in groups for p in group],
    )
    with pytest.raises(PlanError, match="No plan compiles"):
        attngen.build(SPEC, target="a100")


def test_tuning_needs_the_device():
    with pytest.raises(TargetError, match="isn't here"):
        attngen.tune(SPEC, target="a100")
