"""What a command costs before it does anything: time, and the modules it imports.

`attngen plan` answers in well under a second because it computes with Python's own
numbers: no array library, no template engine, no compiler is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMES = 1.5  # what a whole process may take, in those of the next line at that moment
UNIT = "sum(i * i for i in range(10_000_000))"  # 0.6 s of a processor of 2024
TRIES = 8  # of which one suffices: the first writes the bytecode, as installers do
HEAVY = {
    "jax", "jaxlib", "torch", "triton", "numpy", "ml_dtypes", "scipy", "sympy",
    "matplotlib", "jinja2", "platformdirs", "filelock",
}  # fmt: skip
COMMANDS = {
    "plan": ("plan", "--preset", "llama3-8b"),
    "plan as JSON": ("plan", "--preset", "llama3-8b", "--json"),
    "plan of all else": ("plan", "--preset", "gemma2-9b", "--budget", "64MiB"),
    "plan that fails": ("plan", "--preset", "llama3-8b", "--budget", "1"),
    "presets": ("presets",),
    "a preset": ("presets", "t5-large"),
    "targets": ("targets",),
    "help": ("--help",),
    "help of plan": ("plan", "--help"),
    "help of tune": ("tune", "--help"),
    "help of bench": ("bench", "--help"),
    "wisdom's places": ("wisdom", "dir"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_imports_nothing_heavy(arguments, process_environment):
    code = (
        "import sys\n"
        "from attngen.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print('\\nMODULES', *sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=process_environment,
    )
    line = ran.stdout.splitlines()[-1].split()
    assert line[0] == "MODULES"
    assert "attngen.cli" in line
    assert not HEAVY & set(line)


def test_importing_attngen_imports_nothing_heavy(process_environment):
    code = "import sys, attngen; print(*sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=process_environment,
    )
    assert not HEAVY & set(ran.stdout.split())


@pytest.fixture(scope="module")
def bytecode(tmp_path_factory):
    return tmp_path_factory.mktemp("bytecode")


@pytest.mark.parametrize("name", ["plan", "presets", "targets", "help"])
def test_a_whole_process_is_quick(name, process_environment, bytecode):
    environment = process_environment | {"PYTHONPYCACHEPREFIX": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def seconds(*command):
        """Of the processors' time: the machine may be busy."""
        before = os.times()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])  # children's, in user and system

    def ratio():
        unit = seconds(sys.executable, "-c", UNIT)
        ours = seconds(Path(sys.executable).parent / "attngen", *COMMANDS[name])
        return ours / unit

    assert any(ratio() < TIMES for _ in range(TRIES))
