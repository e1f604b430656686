"""The child process in which a compiler runs: `python -m attngen.child JOB RESULT`.

JOB and RESULT are JSON files. A job names a module and a function of it, which takes the
job and returns plain values. What compilers print goes wherever the parent sent stdout
and stderr; the result file is written last, so that it is whole or absent.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

import msgspec

from attngen import files


def main(job_path: str, result_path: str) -> None:
    job = msgspec.json.decode(Path(job_path).read_bytes())
    sys.path[:0] = [p for p in job["path"] if p not in sys.path]
    try:
        function = getattr(importlib.import_module(job["module"]), job["function"])
        result = {"value": function(job)}
    except Exception as error:  # noqa: BLE001  the boundary: everything becomes data
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    files.write(Path(result_path), msgspec.json.encode(result).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
