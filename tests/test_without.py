"""Where a library isn't installed: what still works, and what to install."""

import subprocess
import sys

import pytest
from commands import CHUNKS, DONE, SMALL, WRONG

_HIDING = """
import sys
from importlib.machinery import PathFinder
found, hidden = PathFinder.find_spec, sys.argv[1].split(",")
PathFinder.find_spec = lambda name, *more: (
    None if name.partition(".")[0] in hidden else found(name, *more)
)
sys.argv[:2] = ["attngen"]
from attngen.cli import main
main()
"""
JAX = "jax,jaxlib,libtpu,jax_plugins"


@pytest.fixture
def without(process_environment, tmp_path):
    """A command in a process that lacks some modules: exit code, stdout, stderr."""

    def ask(modules, *arguments):
        ran = subprocess.run(
            [sys.executable, "-c", _HIDING, modules, *map(str, arguments)],
            env=process_environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in ran.stderr
        assert max(map(len, (ran.stdout + ran.stderr).splitlines())) <= 100
        return ran.returncode, ran.stdout, ran.stderr

    return ask


@pytest.mark.parametrize("command", ["plan", "emit"])
def test_plans_and_sources_need_no_jax(without, command):
    code, out, _ = without(JAX, command, *SMALL, "--target", "tpu-v3")
    assert code == DONE
    assert out


@pytest.mark.parametrize("command", ["build", "tune", "certify", "bench"])
def test_what_compiles_names_what_to_install(without, command):
    code, out, err = without(JAX, command, *SMALL)
    assert (code, out) == (WRONG, "")
    assert "pip install 'attngen[jax]'" in err


def test_a_file_is_not_validated_without_jax(without, emitted):
    code, out, err = without(JAX, "validate", emitted)
    assert (code, out) == (WRONG, "")
    assert "pip install 'attngen[jax]'" in err


def test_a_function_is_not_imported_where_its_target_has_no_compiler(without, tmp_path):
    (tmp_path / "own.py").write_text("print(1 / 0)")
    command = ("certify", "own:f", "--shapes", "f32[]", "--target", "tpu-v5e")
    for modules in (JAX, "libtpu"):
        code, _, err = without(modules, *command)
        assert code == WRONG
        assert "pip install 'attngen[tpu]'" in err
        assert "ZeroDivisionError" not in err


def test_a_tune_for_an_absent_target_plans_nothing_without_its_compiler(without):
    command = ("tune", *SMALL, *CHUNKS, "--target", "tpu-v3", "--json")
    code, out, err = without("libtpu", *command)
    assert (code, out) == (WRONG, "")
    assert "compiling" not in err
    assert "plan and emit work" in err
