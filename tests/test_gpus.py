"""GPU targets: their limits agree with the data sheets' peaks, and are listed."""

import json

import pytest
from commands import run
from refusals import refused

from attngen import gpus, targets
from attngen.errors import BackendError, TargetError

# TFLOP/s of the data sheets: float16 products summed in float32, without sparsity
PEAKS = {
    "a100": 312, "rtx3090": 71, "rtx4090": 165.2, "l4": 121, "h100": 989.4,
    "h200": 989.4, "b200": 2250, "rtx5090": 209.5, "mi300x": 1307.4, "mi355x": 2516.6,
}  # fmt: skip


@pytest.mark.parametrize("name", gpus.GPUS)
def test_rates_times_clock_are_the_data_sheets_peak(name):
    gpu = gpus.GPUS[name]
    flops = 2 * gpu.matrix_fma_per_cycle * gpu.multiprocessors * gpu.clock_hz
    assert flops / 1e12 == pytest.approx(PEAKS[name], rel=0.01)


@pytest.mark.parametrize("name", gpus.GPUS)
def test_limits_are_consistent(name):
    gpu = gpus.GPUS[name]
    assert gpu.shared_bytes + gpu.reserved_bytes == gpu.shared_per_multiprocessor
    assert gpu.registers % (gpu.partitions * gpu.warp_size * gpu.register_step) == 0
    assert gpu.max_warps % gpu.partitions == 0
    assert gpu.exp_per_cycle < gpu.fma_per_cycle < gpu.matrix_fma_per_cycle
    assert 8 * 2**30 < gpu.memory_bytes < 2**40
    assert gpu.memory_bytes / gpu.bandwidth_bytes_s < 0.1


@pytest.mark.parametrize("name", [*gpus.GPUS, *gpus.REPRESENTATIVES])
def test_a_gpu_is_a_target_of_triton(name):
    target = targets.get(name)
    assert target.name == name
    assert target.gpu == gpus.GPUS[gpus.REPRESENTATIVES.get(name, name)]
    assert target.architecture == target.gpu.architecture
    if name in gpus.REPRESENTATIVES:
        assert name == f"cuda-{target.architecture}"
    assert json.loads(json.dumps(target.to_dict()))["gpu"]["warp_size"] in (32, 64)
    targets.check(target, "triton")
    targets.check(target, "another's")
    if target.kind == "cuda":
        targets.check(target, "jax")
    else:
        with refused(BackendError, name):
            targets.check(target, "jax")


def test_the_cpu_is_a_target_of_jax():
    cpu = targets.get()
    assert cpu.gpu is None
    targets.check(cpu, "jax")
    targets.check(cpu, "another's")
    with refused(BackendError, "cpu"):
        targets.check(cpu, "triton")


def test_an_architecture_alone_is_no_target():
    with refused(TargetError, "sm90"):
        targets.get("sm90")


@pytest.mark.parametrize(
    ("typed", "capability"),
    [
        ("t4", "7.5"),
        ("T4", "7.5"),
        ("sm75", "7.5"),
        ("cuda-sm_75", "7.5"),
        ("v100", "7.0"),
    ],
)
def test_a_gpu_without_matrix_instructions_in_triton_is_no_target(typed, capability):
    with refused(TargetError) as caught:
        targets.get(typed)
    assert caught.value.got == f"{typed.lower()}, compute capability {capability}"
    assert "sm80 or later" in caught.value.needed
    assert "Triton" in caught.value.needed


def test_targets_are_listed_within_100_columns():
    out, _ = run("targets")
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    for name in targets.names():
        assert sum(line.split()[:1] == [name] for line in lines) == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("H100", "h100"), ("a10", "a100"), ("RTX-4090", "rtx4090"), ("mi300", "mi300x")],
)
def test_a_target_that_is_nearly_one_is_recognised(typed, meant):
    with refused(TargetError) as caught:
        targets.get(typed)
    assert caught.value.hint == f"did you mean {meant!r}?"
    with refused(TargetError) as caught:
        targets.get("abacus")
    assert caught.value.hint is None
