"""The child process in which a target's compiler runs, from the parent's side.

A compiler can crash, hang, print, or take all memory; none of that reaches the caller's
process. Jobs go in as a JSON file, results come out as one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from attngen import interrupts
from attngen.errors import BackendError, CompileError
from attngen.reports import Certificate
from attngen.units import show_bytes, show_time

TIMEOUT_S = 600.0
POLL_S = 0.2  # between looks whether this thread is stopped
Shape = tuple[str, Sequence[int], str]  # name, shape, dtype


@dataclass(frozen=True)
class Program:
    """An emitted source to certify.

    Args:
        shapes: of the arguments, those passed by name after q, k, v.
        source: its text.
        digest: of the text.
        x64: whether 64-bit numbers are on.
        facts: what the backend's compiler is told beside: plain values.
    """

    shapes: Sequence[Shape]
    source: str
    digest: str | None = None
    x64: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)


def certify(
    compiler: str,
    target: str,
    *,
    shapes: Sequence[Shape],
    source: str | None = None,
    digest: str | None = None,
    exported: bytes | None = None,
    x64: bool = False,
    facts: Mapping[str, Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Certificate:
    """What the target's compiler says of an emitted source, or of an exported function.

    Args:
        compiler: the module whose `certify(job)` runs in the child.
        shapes, source, digest, x64, facts: see `Program`; or
        exported: a function that the backend has serialised.

    Raises:
        BackendError: the backend has no compiler here.
        CompileError: the compiler refused, crashed, ran out of memory or of time.
    """
    _check(compiler, target)
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        folder = Path(name)
        job = {"target": target, "shapes": list(shapes), "x64": x64} | dict(facts or {})
        if source is not None:
            job["source"] = _file(folder / "emitted.py", source.encode())
        if exported is not None:
            job["exported"] = _file(folder / "exported", exported)
        value = run(compiler, "certify", job, timeout_s=timeout_s)
    return _certificate(value, target, digest)


def certify_many(
    compiler: str,
    target: str,
    programs: Sequence[Program],
    *,
    timeout_s: float = TIMEOUT_S,
) -> list[Certificate | CompileError]:
    """What `certify` returns or raises for each of some programs, with few processes.

    One process takes them in turn, for at most timeout_s in all; where it crashes or is
    late, another goes on behind the program that it was at. Fewer where this thread is
    stopped (see interrupts.py).

    Raises:
        BackendError: the backend has no compiler here.
    """
    _check(compiler, target)
    found: list[Certificate | CompileError] = []
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        folder = Path(name)
        jobs = [
            {
                "target": target,
                "shapes": list(p.shapes),
                "x64": p.x64,
                "source": _file(folder / f"emitted_{i}.py", p.source.encode()),
            }
            | dict(p.facts)
            for i, p in enumerate(programs)
        ]
        while len(found) < len(jobs):
            rest = jobs[len(found) :]
            answers, ended = _run(compiler, "certify", rest, timeout_s)
            for answer in answers:
                digest = programs[len(found)].digest
                try:
                    found.append(_certificate(_value(answer), target, digest))
                except CompileError as error:
                    found.append(error)
            if interrupts.stopped():
                break
            if ended is not None:
                found.append(ended)
    return found


def _check(compiler: str, target: str) -> None:
    if not compiler:
        raise BackendError(
            "This backend has no compiler that could certify.",
            got=f"target {target}",
            needed="a compiled backend",
        )


def _file(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def _certificate(value: Any, target: str, digest: str | None) -> Certificate:
    return msgspec.convert({**value, "target": target, "digest": digest}, Certificate)


def run(
    module: str,
    function: str,
    job: Mapping[str, Any],
    *,
    timeout_s: float = TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Call a module's function with a job in a process of its own.

    Args:
        environment: more variables for that process.

    Raises:
        CompileError: it raised, doesn't fit the device, crashed, or the compiler ran out of
            memory or of time; all of these differ.
    """
    answers, ended = _run(module, function, [job], timeout_s, environment)
    if ended is not None:
        raise ended
    return _value(answers[0])


def _value(answer: Mapping[str, Any]) -> Any:
    if "error" not in answer:
        return answer["value"]
    said: str = answer["error"]
    if TOO_LARGE in said:
        raise _too_large(said)
    raise CompileError(
        "The compiler refused the program.",
        got=said[:2000],
        needed="a program that the target's compiler takes",
    )


# XLA's word for a program that needs more memory than the device has; two ways to go on
TOO_LARGE = "RESOURCE_EXHAUSTED"
_NEEDS = re.compile(
    r"\(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)"
)
_USES = re.compile(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) ")


def _too_large(said: str) -> CompileError:
    found = _NEEDS.search(said) or _USES.search(said)
    got, needed = said[:2000], "a program that fits the device's memory"
    if found:
        need, has = (
            show_bytes(int(float(number) * 2 ** (10 * " KMGT".index(unit or " "))))
            for number, unit in (found.group(1, 2), found.group(3, 4))
        )
        got, needed = f"a program that needs {need}", f"at most {has}"
    return CompileError(
        "The program doesn't fit the device's memory.",
        got=got,
        needed=needed,
        hint="smaller batches or lengths, fewer values kept for the gradient, or a larger "
        "device",
    )


def _run(
    module: str,
    function: str,
    jobs: Sequence[Mapping[str, Any]],
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], CompileError | None]:
    """The answers to some jobs from one process; how it ended, if before the last."""
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        folder = Path(name)
        whole = {
            "jobs": jobs,
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
                env=_environment() | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                code = _ended(process, timeout_s)
            finally:
                _kill(process)
        result = folder / "result"
        answers = msgspec.json.decode(result.read_bytes()) if result.exists() else []
        if len(answers) == len(jobs):
            return answers, None
        tail = "\n".join(
            (folder / "log").read_text(errors="replace").splitlines()[-12:]
        )
        return answers, _late(timeout_s) if code is None else _crash(code, tail)


def _ended(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Its exit code; None where it takes longer, or this thread is stopped."""
    end = time.monotonic() + timeout_s
    while not interrupts.stopped():
        left = end - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, POLL_S)))
        except subprocess.TimeoutExpired:
            if left <= POLL_S:
                break
    return None


def _late(timeout_s: float) -> CompileError:
    return CompileError(
        "The compiler took too long.",
        got=f"no answer after {show_time(timeout_s)}",
        needed="an answer within the time limit",
        hint="fewer loops unrolled, or smaller chunks; or once more on a less busy machine",
    )


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
    kept = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    return kept | {
        "PYTHONPATH": package + (os.pathsep + known if known else ""),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
