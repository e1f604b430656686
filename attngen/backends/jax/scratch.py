"""Bytes that XLA:CPU's own figure leaves out: the inside of library fusions.

XLA:CPU hands chains of products, reductions and exponentials to YNNPACK as one custom
fusion. What is computed between its inputs and its output lives in memory that YNNPACK
allocates, and `memory_analysis()` doesn't count it: plain attention over 4096 tokens of 8
heads reports 24 MiB and takes a gigabyte more.
"""

from __future__ import annotations

import re

from attngen.backends.jax.hlo import array_bytes

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_RESULT = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(")
_FREE = ("parameter", "constant", "bitcast", "broadcast", "iota", "get-tuple-element")


def scratch_bytes(hlo: str) -> int:
    """An upper bound of the memory inside the largest library fusion of a module.

    Args:
        hlo: the optimised module's text.
    """
    inside: dict[str, int] = {}
    name = ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[1]
            inside[name] = 0
        elif (found := _RESULT.match(line)) and not found[1] and found[4] not in _FREE:
            inside[name] += array_bytes(found[2], found[3])
    fusions = (line for line in hlo.splitlines() if "__ynn_fusion" in line)
    called = [match[1] for line in fusions if (match := _CALLS.search(line))]
    return max((inside.get(c, 0) for c in called), default=0)
