"""TPU targets: limits that agree with each other and with jax's own tables."""

import json

import pytest
from commands import run
from refusals import refused

import attngen
from attngen import compilers, presets, targets
from attngen.errors import BackendError, TargetError
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
    _, err = run("targets")
    assert "XLA:TPU isn't installed: pip install 'attngen[tpu]'" in err


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
