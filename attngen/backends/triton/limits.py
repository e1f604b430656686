"""For which lengths the indices of an emitted file's reads are proven."""

from __future__ import annotations

from attngen.expr import operands, walk
from attngen.intervals import Interval, domain, proven
from attngen.spec import AttentionSpec

LONGEST = 2**24  # tokens, whatever the spec's own lengths


def wide(spec: AttentionSpec) -> dict[str, Interval]:
    """Where variables can lie for any lengths up to LONGEST."""
    env = domain(spec)
    low, high = env["q"]
    if spec.q_offset == "bottom_right":
        low, high = -LONGEST, LONGEST
    return env | {
        "b": (0, LONGEST),
        "h": (0, LONGEST),
        "q": (low, high + LONGEST),
        "k": (spec.kv_offset, spec.kv_offset + LONGEST),
        "q_index": (0, LONGEST),
        "k_index": (0, LONGEST),
    }


def limited(spec: AttentionSpec) -> bool:
    """Whether a read is inside its operand only for the spec's own lengths.

    Reads of floats outside are NaN; integers and truth values have nothing of the kind.
    """
    env = wide(spec)
    return any(
        node.op == "load" and node.kind != "float" and not proven(node, env)
        for root in spec.expressions
        for node in walk(root)
    )


def is_exact(spec: AttentionSpec) -> bool:
    """Whether a file's sequences all have the spec's kv_len keys at most, not their pages'.

    Where pages end behind it, and that isn't told by kv_lengths, or matters to a read.
    """
    if spec.storage != "paged" or spec.kv_len % spec.page_size == 0:
        return False
    reads = {axis for o in operands(*spec.expressions) for axis in o.axes}
    return not spec.kv_lengths or "k" in reads or limited(spec)
