"""The child process in which a target's compiler runs, from the parent's side.

A compiler can crash, hang, print, or take all memory; none of that reaches the caller's
process. One process a job: the job goes in as a JSON file, the result comes out as one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from attngen.errors import BackendError, CompileError
from attngen.reports import Certificate
from attngen.units import show_time

TIMEOUT_S = 600.0
Shape = tuple[str, Sequence[int], str]  # name, shape, dtype


def certify(
    compiler: str,
    target: str,
    *,
    shapes: Sequence[Shape],
    source: str | None = None,
    digest: str | None = None,
    exported: bytes | None = None,
    x64: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Certificate:
    """What the target's compiler says of an emitted source, or of an exported function.

    Args:
        compiler: the module whose `certify(job)` runs in the child.
        source: the text of an emitted file, or
        exported: a function that the backend has serialised.
        shapes: of the arguments, those passed by name after q, k, v.
        x64: whether 64-bit numbers are on.

    Raises:
        BackendError: the backend has no compiler here.
        CompileError: the compiler refused, crashed, ran out of memory or of time.
    """
    if not compiler:
        raise BackendError(
            "This backend has no compiler that could certify.",
            got=f"target {target}",
            needed="a compiled backend",
        )
    with tempfile.TemporaryDirectory(prefix="attngen-") as folder:
        job: dict[str, Any] = {"target": target, "shapes": list(shapes), "x64": x64}
        if source is not None:
            path = Path(folder) / "emitted.py"
            path.write_text(source, encoding="utf-8")
            job["source"] = str(path)
        if exported is not None:
            path = Path(folder) / "exported"
            path.write_bytes(exported)
            job["exported"] = str(path)
        value = run(compiler, "certify", job, timeout_s=timeout_s)
    return msgspec.convert({**value, "target": target, "digest": digest}, Certificate)


def run(
    module: str, function: str, job: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S
) -> Any:
    """Call a module's function with a job in a process of its own.

    Raises:
        CompileError: it raised, crashed, ran out of memory or of time; the three differ.
    """
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        folder = Path(name)
        whole = dict(job) | {
            "module": module,
            "function": function,
            "path": _search_path(),
        }
        (folder / "job").write_bytes(msgspec.json.encode(whole))
        command = [sys.executable, "-u", "-m", "attngen.child", "job", "result"]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise CompileError(
                    "The compiler took too long.",
                    got=f"no answer after {show_time(timeout_s)}",
                    needed="an answer within the time limit",
                    hint="raise the time limit, or fix smaller chunks",
                ) from None
            finally:
                _kill(process)
        tail = "\n".join(
            (folder / "log").read_text(errors="replace").splitlines()[-12:]
        )
        result = folder / "result"
        if not result.exists():
            raise _crash(code, tail)
        answer = msgspec.json.decode(result.read_bytes())
    if "error" in answer:
        raise CompileError(
            "The compiler refused the program.",
            got=answer["error"][:2000],
            needed="a program that the target's compiler takes",
        )
    return answer["value"]


def _crash(code: int, tail: str) -> CompileError:
    if code == -signal.SIGKILL:
        return CompileError(
            "The compiler's process was killed.",
            got="SIGKILL: most likely the machine ran out of memory",
            needed="memory for the compiler",
            hint="free memory, or ask for less at once",
        )
    return CompileError(
        "The compiler's process crashed.",
        got=f"exit code {code}\n{tail}".rstrip(),
        needed="a compiler that ends by itself",
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the child and all that it started, also where the parent is interrupted."""
    with contextlib.suppress(ProcessLookupError):  # none of them is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _search_path() -> list[str]:
    return [str(Path(p or ".").resolve()) for p in sys.path]


def _environment() -> dict[str, str]:
    package = str(Path(__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH")
    return dict(os.environ) | {
        "PYTHONPATH": package + (os.pathsep + known if known else ""),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
