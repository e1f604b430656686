"""Emitted files inside jax.shard_map, whose check of what varies over devices is on by default.

Each on 4 host devices in a process of its own. Gradients of what several devices have a copy
of are sums over them.
"""

import json
import subprocess
import sys
from pathlib import Path

import mapped
import pytest
from library import slowly

USUAL = (
    "running", "bfloat16, heads first", "lengths", "a list", "slopes, copied", "a sink", "dropout",
)  # fmt: skip


@pytest.mark.parametrize("case", slowly(mapped.NAMES, USUAL))
def test_a_program_of_whole_arrays(case, cache):
    ended = subprocess.run(
        [sys.executable, Path(mapped.__file__), case],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    judged = json.loads(ended.stdout.splitlines()[-1])
    for how, found in judged.items():
        assert found["passed"], f"{how}: {found['report']}"
        assert "all rows" in found["report"]
    if "alone" in (found := judged["outside"]):
        # a device's part of a gradient, beside the sum of all
        assert found["device"] <= found["alone"] + found["added"] + 256
