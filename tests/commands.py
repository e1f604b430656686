"""How tests give commands, and what every command's end has in common."""

import json
import subprocess
import sys
from pathlib import Path

from click.testing import CliRunner

from attngen.cli import main

SMALL = ("--q-heads", "2", "--q-len", "40", "--qk-dim", "8")
CHUNKS = ("--fix", "q_chunk=16,k_chunk=16")
LLAMA = ("--preset", "llama3-8b")
TOML = """
q_heads = 4
q_len = 64
qk_dim = 16
outputs = ["out", "lse"]
memory_budget = "1MiB"
"""
DONE, FAILED, WRONG = 0, 1, 2


def run(*arguments, code=DONE):
    """A command in this process: (stdout, stderr). It leaves by `code`, without a trace."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def refused(kind, *arguments, code=WRONG):
    """What a command that is refused says; the same as JSON where it takes --json."""
    out, err = run(*arguments, code=code)
    assert out == ""
    said = [line for line in err.splitlines() if not line.endswith("…")]
    assert said[0].startswith(f"{kind}:")
    assert any(line.startswith("  got      ") for line in said)
    assert any(line.startswith("  needed   ") for line in said)
    out, err_json = run(*arguments, "--json", code=code)
    assert out == ""
    error = json.loads(err_json[err_json.index("{") :])
    assert error["error"] == kind
    assert all(len(line) <= 100 or _one_word(line) for line in said)
    words = " ".join(err.split())
    assert " ".join(error["what"].split()) in words
    assert " ".join(error["got"].split()) in words
    return error


def _one_word(line):
    """Whether a line can't be broken, but for what it begins with: a path, say."""
    return len(line.removeprefix("  got      ").split()) == 1


def misused(*arguments):
    """A command line that click itself refuses."""
    out, err = run(*arguments, code=WRONG)
    assert out == ""
    assert "Error: " in err


def process(*arguments, cwd, environment):
    """A command as a process of its own."""
    command = [Path(sys.executable).parent / "attngen", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True
    )


def edit(path, old, new, name="edited.py"):
    """A copy of a file with one text in place of another."""
    text = path.read_text()
    assert text.count(old) >= 1
    copy = path.with_name(name)
    copy.write_text(text.replace(old, new, 1))
    return copy
