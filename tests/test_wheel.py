"""The built wheel: it holds all that it needs, and works where the repository isn't."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import attngen
from attngen import presets

ROOT = Path(__file__).parent.parent
PACKAGE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "attngen").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
TEMPLATES = {
    str(Path("attngen") / path.relative_to(ROOT))
    for path in (ROOT / "templates").rglob("*")
    if path.is_file()
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built once, from the repository, with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run(
        [*command, "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def run(unpacked, tmp_path, process_environment):
    """Python in another folder that finds the unpacked wheel and not the repository."""
    code = (
        "import sys\n"
        f"sys.path[:] = [{str(unpacked)!r}] + [p for p in sys.path if p != ''"
        f" and not p.startswith({str(ROOT)!r} + '/attngen') and p != {str(ROOT)!r}]\n"
        f"import attngen\n"
        f"assert attngen.__file__.startswith({str(unpacked)!r}), attngen.__file__\n"
    )

    def run(more, *arguments):
        ran = subprocess.run(
            [sys.executable, "-c", code + more, *arguments],
            cwd=tmp_path,
            env=process_environment | {"PYTHONPATH": str(unpacked)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return run


def test_it_holds_the_package_the_templates_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    held = {n for n in names if n.startswith("attngen/")}
    assert held == PACKAGE | TEMPLATES
    assert "attngen/py.typed" in held
    assert any(n.endswith("running.py.jinja") for n in held)
    rest = {n.split("/", 1)[0] for n in names - held}
    assert rest == {f"attngen-{attngen.__version__}.dist-info"}


def test_its_metadata_are_the_projects(unpacked):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (found,) = importlib.metadata.distributions(path=[str(unpacked)])
    assert found.metadata["Name"] == "attngen"
    assert found.version == attngen.__version__
    assert found.metadata["Requires-Python"] == project["requires-python"]
    assert found.metadata["License-Expression"] == "Apache-2.0"
    assert found.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    extras = set(found.metadata.get_all("Provides-Extra"))
    assert extras == set(project["optional-dependencies"])
    required = [r for r in found.requires if "extra ==" not in r]
    assert len(required) == len(project["dependencies"])
    assert not any(r.startswith(("jax", "torch", "triton")) for r in required)
    (script,) = found.entry_points
    assert (script.group, script.name, script.value) == (
        "console_scripts", "attngen", "attngen.cli:main",
    )  # fmt: skip


CLI = "from attngen.cli import main\nmain(sys.argv[1:])\n"


@pytest.mark.parametrize("name", ["llama3-8b", "t5-large"])
def test_it_emits_what_the_repository_emits(name, run):
    here = attngen.emit(attngen.plan(presets.get(name))).text
    assert run(CLI, "emit", "--preset", name) == here


def test_it_plans_lists_and_checks(run, tmp_path):
    assert run(CLI, "plan", "--preset", "gemma2-9b").startswith("8192 queries")
    assert "sd15-cross" in run(CLI, "presets")
    small = ("--q-heads", "1", "--q-len", "16", "--qk-dim", "8")
    run(CLI, "emit", *small, "-o", "a.py")
    assert run(CLI, "emit", "--check", "a.py") == "same     a.py\n"
    assert os.listdir(tmp_path) == ["a.py"]


def test_it_builds_a_kernel(run):
    """With the compiler's process, which has to find the same package."""
    code = (
        "spec = attngen.AttentionSpec(q_heads=1, q_len=16, qk_dim=8)\n"
        "kernel = attngen.build(spec)\n"
        "print(kernel.report.passed, kernel.certificate.temp_bytes > 0)\n"
    )
    assert run(code) == "True True\n"
