"""The toy's certifier: it runs the function on zeros, and counts what NumPy allocates."""

from __future__ import annotations

import runpy
import time
import tracemalloc
from typing import Any

import numpy as np

from attngen.reference import numpy_dtype

LENGTHS = ("kv_lengths", "q_lengths")  # as many as there are: nothing is skipped


def certify(job: dict[str, Any]) -> dict[str, Any]:
    function = runpy.run_path(job["source"])["attention"]
    arrays = {
        name: np.full(shape, 2**30 if name in LENGTHS else 0, numpy_dtype(dtype))
        for name, shape, dtype in job["shapes"]
    }
    tracemalloc.start()
    start = time.perf_counter()
    outputs = function(**arrays)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    output_bytes = sum(x.nbytes for x in outputs)
    return {
        "compiler": f"NumPy {np.__version__}",
        "temp_bytes": peak - output_bytes,
        "argument_bytes": sum(x.nbytes for x in arrays.values()),
        "output_bytes": output_bytes,
        "compile_s": round(seconds, 3),
        "versions": {"numpy": np.__version__},
    }
