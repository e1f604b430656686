"""The gallery: generated/ is what is emitted now, byte for byte, and every file runs.

`make golden` emits it anew; a change of it is a change to look at in review.
"""

import dataclasses
import functools
import shutil
import subprocess
import sys
from pathlib import Path

import gallery
import jax
import pytest
from click.testing import CliRunner

import attngen
from attngen.backends.jax.loader import load_function
from attngen.cli import main
from attngen.emitter import read_header

NAMES = tuple(gallery.ENTRIES)
QUICK = (
    "checkerboard", "packed_documents", "paper_16k", "prefix_lm", "sd15_cross",
    "t5_large",
)  # fmt: skip
LARGE = tuple(name for name in NAMES if name not in QUICK)

source = functools.cache(gallery.source)


def path_of(name):
    return gallery.FOLDER / f"{name}.py"


def test_every_file_has_an_entry_and_every_entry_a_file():
    found = {p.name for p in gallery.FOLDER.glob("*.py")}
    assert found == {f"{name}.py" for name in NAMES}
    assert len(NAMES) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_is_emitted_now(name):
    assert path_of(name).read_bytes() == source(name).text.encode()


@pytest.mark.parametrize("name", NAMES)
def test_a_header_says_what_the_file_is_emitted_from(name):
    spec, budget, fix = gallery.ENTRIES[name]
    head = read_header(path_of(name))
    assert head.spec == dataclasses.replace(spec(), memory_budget=budget)
    assert fix.items() <= head.choice.items()
    assert (head.target, head.backend) == ("cpu", "jax")


def test_ruff_finds_nothing_with_its_own_settings():
    for command in (["check"], ["format", "--check"]):
        ran = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "--isolated", "--no-cache",
             *map(path_of, NAMES)],
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout


def check(*paths, code=0):
    """What `attngen emit --check` says, line by line."""
    result = CliRunner().invoke(main, ["emit", "--check", *map(str, paths)])
    assert result.exit_code == code, result.output
    return result.stdout.splitlines()


def test_emit_check_agrees():
    said = check(gallery.FOLDER)
    assert said == [f"same     {path_of(name)}" for name in sorted(NAMES)]


CHANGES = {
    "a figure of the header": (
        b" of temporaries (modelled)",
        b" of temporaries (modeled!)",
    ),
    "the license of the header": (b"It is yours", b"It is ours "),
    "the code": (b"\nSCALE = ", b"\nSCALE =  "),
    "the end": (b"}{x.shape}, not", b"}{x.shape}, nut"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_emit_check_sees_a_change_and_names_the_file(change, tmp_path):
    kept, changed = (
        Path(shutil.copy(path_of(name), tmp_path))
        for name in ("prefix_lm", "sd15_cross")
    )
    before = changed.read_bytes()
    assert before.count(change[0]) == 1
    changed.write_bytes(before.replace(*change))
    said = check(tmp_path, code=1)
    assert said == [f"same     {kept}", f"DIFFERS  {changed}"]


def judged(path):
    report = attngen.validate(path)
    assert report.passed, report
    return report


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.sampled(2)
def test_a_file_computes_its_spec(name):
    assert judged(path_of(name)).cases[0].startswith("full size")


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.sampled(4)
def test_a_large_file_takes_its_spec_and_computes_a_smaller_one(name, monkeypatch):
    spec = read_header(path_of(name)).spec
    inputs = ["q", "k", "v", *(o.name for o in spec.operands)]
    made = jax.eval_shape(
        load_function(path_of(name)),
        **{n: jax.ShapeDtypeStruct(spec.shape_of(n), spec.dtype_of(n)) for n in inputs},
    )
    made = made if isinstance(made, tuple) else (made,)
    assert [(x.shape, str(x.dtype)) for x in made] == [
        (spec.shape_of(n), spec.dtype_of(n)) for n in spec.outputs
    ]
    monkeypatch.setattr("attngen.validator.SECONDS", 0.0)
    assert judged(path_of(name)).cases[0].startswith("small: ")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_large_file_computes_its_spec(name):
    judged(path_of(name))
