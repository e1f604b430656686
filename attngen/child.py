"""The child process in which a compiler runs: `python -m attngen.child JOB RESULT`.

JOB and RESULT are JSON files. A job names a module and a function of it, which takes each
of its `jobs` in turn and returns plain values. What compilers print goes wherever the parent
sent stdout and stderr; the result file is replaced whole after each, so that a crash loses
only the answer that it kept from being given.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import msgspec

from attngen import files


def main(job_path: str, result_path: str) -> None:
    whole = msgspec.json.decode(Path(job_path).read_bytes())
    sys.path[:0] = [p for p in whole["path"] if p not in sys.path]
    results = []
    for job in whole["jobs"]:
        try:
            module = importlib.import_module(whole["module"])
            results.append({"value": getattr(module, whole["function"])(job)})
        except Exception as error:  # noqa: BLE001  the boundary: everything becomes data
            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
        files.write(Path(result_path), msgspec.json.encode(results).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
