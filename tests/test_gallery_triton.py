"""The gallery's Triton files: what is emitted now, byte for byte; judged, and compiled."""

import subprocess
import sys
from pathlib import Path

import gallery
import pytest
from library import slowly

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted

import attngen
from attngen import api, backends, building, descent, gpus, planner, targets, validator
from attngen.backends.triton.loader import target_here
from attngen.emitter import read_header
from attngen.errors import CompileError

FOLDER = gallery.FOLDER / "triton"
NAMES = tuple(gallery.TRITON)
PLAIN = tuple(n for n in NAMES if "loads" not in gallery.TRITON[n].fix)
ARCHITECTURES = (*gpus.REPRESENTATIVES, "mi300x", "mi355x")


def test_every_file_has_an_entry_and_every_entry_a_file():
    found = {p.name for p in FOLDER.iterdir() if p.name != "__pycache__"}
    assert found == {f"{name}.py" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_is_emitted_now(name):
    path = FOLDER / f"{name}.py"
    assert path.read_bytes() == gallery.triton_source(name).text.encode()
    spec, target, _ = gallery.TRITON[name]
    head = read_header(path)
    assert head.spec == spec()
    assert (head.target, head.backend) == (target, "triton")


def test_ruff_finds_nothing_with_its_own_settings():
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--isolated", "--no-cache",
             FOLDER],
            capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout


def plan_of(name):
    """In the interpreter as the file's, on a GPU as that GPU's."""
    spec, target, fix = gallery.TRITON[name]
    return interpreted.plan(spec(), target_here() or target, **fix)


# whose blocks take the interpreter longest: others are of the same kinds
LONG = {"mla_decode", "packed_training", "training_llama3_8b", "training_t5"}


@pytest.mark.parametrize("name", slowly(NAMES, set(NAMES) - LONG))
@pytest.mark.sampled(2, 1)
def test_a_smaller_spec_in_the_same_blocks_is_computed(name):
    plan, by = plan_of(name), backends.get("triton")
    small, choice = by.small(plan, rebuild=True)
    made = attngen.plan(small, target=plan.target, backend="triton", fix=choice)
    function = interpreted.program(small, api.stored(attngen.emit(made)))
    report = validator.validate(
        small, made, function, to_array=interpreted.as_it_is, time_s=0
    )
    assert report.passed, report


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_compiles_for_the_target_of_its_header_without_spills(name):
    path = FOLDER / f"{name}.py"
    plan = api.plan_of(path)
    source = attngen.emitter.Source(path.read_text(), "triton")
    certificate = building.certify(plan, source, read_header(path).target)
    assert descent.unfit(certificate, plan) is None


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture_without_spills(target):
    """The model's first plan of each, or the first down the ranking that doesn't spill."""
    by, device = backends.get("triton"), targets.get(target)
    plans = {n: planner.rank(gallery.TRITON[n].spec(), device, by) for n in PLAIN}
    firsts = [(ranked[0], attngen.emit(ranked[0])) for ranked in plans.values()]
    answers = building.certify_many(firsts, by, target)
    for (name, ranked), certificate in zip(plans.items(), answers, strict=True):
        plan = ranked[0]
        if isinstance(certificate, CompileError) or descent.unfit(certificate, plan):
            plan, _, certificate = descent.first_certified(ranked, by)
        assert certificate.spill_bytes == 0, (name, plan.choice)
        assert certificate.shared_bytes <= device.gpu.shared_bytes, (name, plan.choice)
        assert certificate.matrix_instruction or plan.spec.dtype == "float32", name
