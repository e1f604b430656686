"""TPU targets: limits that agree with each other and with jax's own tables."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from commands import run
from refusals import refused

import attngen
from attngen import building, compilers, presets, targets
from attngen.errors import BackendError, InternalError, TargetError, TimingError
from attngen.reports import Certificate
from attngen.tpus import TPUS

SPEC = presets.get("paper-16k")


@pytest.mark.parametrize("name", TPUS)
def test_limits_are_consistent(name):
    tpu = TPUS[name]
    assert 0.6e9 < tpu.clock_hz < 2.3e9
    assert tpu.peak_flop_s == pytest.approx(tpu.flop_per_cycle * tpu.clock_hz)
    assert tpu.memory_bytes / tpu.bandwidth_bytes_s < 0.1
    assert tpu.vmem_bytes < tpu.memory_bytes / 100
    assert tpu.topology.replace("tpu7x", "v7x").startswith(tpu.generation)


@pytest.mark.parametrize("name", TPUS)
def test_limits_are_those_that_jax_knows(name):
    info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    known = getattr(info, "_get_tpu_info_impl", None)
    if known is None:
        pytest.skip("this jax tells the limits of no TPU that isn't here")
    tpu = TPUS[name]
    version = info.chip_version_from_device_kind(tpu.kind)
    chip = known(version, tpu.cores)
    assert tpu.vmem_bytes == chip.vmem_capacity_bytes * tpu.cores
    assert tpu.matrix_side == chip.mxu_column_size
    # v2 and v3: jax rounds the peak of a chip up
    assert tpu.peak_flop_s == pytest.approx(
        chip.bf16_ops_per_second * tpu.cores, rel=0.15
    )
    assert tpu.bandwidth_bytes_s == pytest.approx(
        chip.mem_bw_bytes_per_second * tpu.cores, rel=0.15
    )
    assert 0.85 < tpu.memory_bytes / (chip.hbm_capacity_bytes * tpu.cores) < 1.01


@pytest.mark.parametrize("name", TPUS)
def test_a_tpu_is_a_target_of_jax(name):
    target = targets.get(name)
    assert target.name == name
    assert target.kind == "tpu"
    assert json.loads(json.dumps(target.to_dict()))["tpu"]["generation"] == name[4:]
    targets.check(target, "jax")
    targets.check(target, "another's")
    with refused(BackendError, name):
        targets.check(target, "triton")


def test_there_is_no_other_tpu():
    with refused(TargetError, "tpu-v1"):
        targets.get("tpu-v1")


def test_a_compiler_that_is_missing_is_named_with_what_still_works(monkeypatch):
    there = compilers._is_there
    monkeypatch.setattr(compilers, "_is_there", lambda m: m != "libtpu" and there(m))
    plan = attngen.plan(SPEC, target="tpu-v3")
    assert "def attention(" in attngen.emit(plan).text
    for ask in (
        lambda: attngen.certify(plan),
        lambda: attngen.build(SPEC, target="tpu-v3"),
        lambda: attngen.certify(len, target="tpu-v3"),
    ):
        with refused(BackendError, "tpu-v3") as caught:
            ask()
        assert "libtpu" in caught.value.got
        assert "pip install 'attngen[tpu]'" in caught.value.needed
        assert "modelled" in caught.value.hint
    out, _ = run("targets")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "XLA:TPU isn't installed: pip install 'attngen[tpu]'" in lines
    assert "XLA:CPU is installed: pip install 'attngen[jax]'" in lines


def test_a_libtpu_that_does_not_match_jax_is_named(monkeypatch):
    monkeypatch.setattr(compilers, "_is_there", lambda m: True)
    monkeypatch.setattr(compilers, "_wanted_libtpu", lambda: "0.0.7.*")
    versions = {"libtpu": "0.0.42.1", "jax": "0.10.2"}
    monkeypatch.setattr(compilers, "installed", lambda names: versions)
    with refused(BackendError, "libtpu") as caught:
        compilers.check(targets.get("tpu-v3"), "jax")
    assert "libtpu 0.0.42.1, jax 0.10.2" in caught.value.got
    assert "0.0.7.*" in caught.value.needed
    versions["libtpu"] = "0.0.7.3"
    compilers.check(targets.get("tpu-v3"), "jax")


def test_jax_itself_says_which_libtpu_it_takes():
    wanted = compilers._wanted_libtpu()
    assert wanted is not None
    assert wanted[0].isdigit()


def test_a_plan_says_that_tpus_round_float32():
    spec = attngen.AttentionSpec(q_heads=1, q_len=64, qk_dim=8)
    said = "unless precision"
    assert said in attngen.plan(spec, target="tpu-v5e").explain()
    assert said not in attngen.plan(spec).explain()
    assert said not in attngen.plan(SPEC, target="tpu-v5e").explain()
    exact = dataclasses.replace(spec, precision="highest")
    assert said not in attngen.plan(exact, target="tpu-v5e").explain()


def test_an_estimate_below_the_hardwares_bound_is_an_internal_error():
    plan = attngen.plan(SPEC, target="tpu-v5e")
    bound = plan.flop / TPUS["tpu-v5e"].flop_per_cycle
    target = targets.get("tpu-v5e")
    for cycles in (None, int(bound) + 1):
        known = Certificate("tpu-v5e", "a test", 0, estimated_cycles=cycles)
        assert building.plausible(known, plan, target) is known
    low = Certificate("tpu-v5e", "a test", 0, estimated_cycles=int(bound / 2))
    with pytest.raises(InternalError, match="below"):
        building.plausible(low, plan, target)


def test_a_kernel_of_an_absent_target_is_traced_and_not_called(certified):
    spec = attngen.AttentionSpec(q_heads=2, q_len=32, qk_dim=8)
    kernel = attngen.build(spec, target="tpu-v3")
    q = jnp.ones(spec.shape_of("q"))
    with refused(BackendError, "can't be called here") as caught:
        kernel(q, q, q)
    assert "tpu-v3" in caught.value.needed
    lowered = jax.jit(lambda q: kernel(q, q, q)).lower(q)
    assert lowered.out_info.shape == spec.shape_of("out")
    assert str(kernel.report).startswith("passed on this machine's processor")
    assert attngen.build(spec)(q, q, q).shape == spec.shape_of("out")


libtpu = pytest.mark.skipif(
    bool(compilers.of(targets.get("tpu-v3"), "jax").missing), reason="no libtpu"
)


@libtpu
@pytest.mark.parametrize("name", TPUS)
@pytest.mark.sampled(3)
def test_every_version_certifies(name):
    spec = attngen.AttentionSpec(
        q_heads=1, q_len=1024, qk_dim=64, dtype="bfloat16", mask=attngen.masks.causal()
    )
    plan = attngen.plan(spec, target=name, fix={"q_chunk": 256, "k_chunk": 256})
    made = attngen.certify(plan)
    assert made.compiler == "XLA:TPU"
    assert made.temp_bytes < 2**23
    assert made.argument_bytes >= spec.bytes_of("q", "k", "v")
    bound = plan.flop / TPUS[name].flop_per_cycle
    assert bound < made.estimated_cycles < 500 * bound
    assert "libtpu" in made.versions


@libtpu
def test_standard_attention_takes_what_the_paper_says():
    # Rabe & Staats, table 2: 1 GB at 2^14 on a TPU v3
    spec = dataclasses.replace(SPEC, memory_budget=None)
    plan = attngen.plan(spec, target="tpu-v3", fix={"algorithm": "dense"})
    made = attngen.certify(plan)
    assert 2**30 <= made.temp_bytes < 1.01 * 2**30
    assert made.estimated_cycles == pytest.approx(9.91e6, rel=0.02)


@libtpu
def test_the_papers_case_in_two_mebibytes():
    spec = dataclasses.replace(SPEC, memory_budget=None)
    fix = {"q_chunk": 4096, "k_chunk": 16384, "qk": "twice", "denominator": "ones"}
    made = attngen.certify(attngen.plan(spec, target="tpu-v3", fix=fix))
    assert made.temp_bytes <= 2**21
    assert made.estimated_cycles <= 0.55 * 9.91e6


@libtpu
def test_noise_of_the_compiler_stays_in_its_process(capfd):
    attngen.certify(
        lambda x: x + 1, jax.ShapeDtypeStruct((8, 128), "float32"), target="tpu-v5e"
    )
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.skipif(
    bool(compilers.of(targets.get("h100"), "jax").missing), reason="no CUDA plug-in"
)
def test_jax_is_certified_for_nvidias_gpus():
    spec = attngen.AttentionSpec(q_heads=1, q_len=4096, qk_dim=64, dtype="bfloat16")
    fix = {"q_chunk": 512, "k_chunk": 1024}
    made = attngen.certify(attngen.plan(spec, target="h100", backend="jax", fix=fix))
    assert made.compiler == "XLA:GPU"
    assert 0 < made.temp_bytes < 2**25
    assert made.estimated_cycles is None
    with refused(TimingError, "nothing of time"):
        attngen.tune(spec, target="h100", backend="jax")
