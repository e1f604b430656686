"""A mask seen from its keys: which queries see them, told as which keys queries see.

The pass of a backward program that goes over the keys asks for each chunk of them which chunks
of queries it meets. With q and k exchanged in the mask, that is what regions.py answers.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from attngen.expr import Expr, substitute, var
from attngen.operands import Operand
from attngen.spec import AttentionSpec
from attngen.tracing import Mask

_OTHER = {"q": "k", "k": "q"}


@functools.lru_cache(maxsize=64)
def transposed(spec: AttentionSpec) -> AttentionSpec | None:
    """The spec whose queries are these keys: its mask and lengths alone.

    None where positions of queries come at run time: keys' can't.
    """
    offset = spec.static_q_offset
    if offset is None:
        return None
    mask = None if spec.mask is None else Mask(exchanged(spec.mask.expr), None)
    return dataclasses.replace(
        spec,
        q_len=spec.kv_len,
        kv_len=spec.q_len,
        q_offset=spec.kv_offset,
        kv_offset=offset,
        q_lengths=spec.kv_lengths,
        kv_lengths=spec.q_lengths,
        mask=mask,
        score=(),
        sink=False,
        dropout=0.0,
        derivatives=None,
        outputs=("out",),
        memory_budget=None,
    )


def exchanged(node: Expr) -> Expr:
    """An expression with queries and keys exchanged, also as axes of its operands."""

    def change(n: Expr) -> Expr | None:
        if n.op == "var" and n.value in _OTHER:
            return var(_OTHER[str(n.value)])
        if isinstance(n.value, Operand):
            axes = tuple(_OTHER.get(str(a), a) for a in n.value.axes)
            operand = dataclasses.replace(n.value, axes=axes)
            return Expr(n.op, tuple(map(exchanged, n.args)), n.kind, operand)
        return None

    return substitute(node, change)


# What emitted files call one and the other.
_PAIRS = (
    ("q_start", "k_start"), ("Q_CHUNK", "K_CHUNK"), ("Q_CHUNKS", "K_CHUNKS"), ("T", "S"),
    ("q_lo", "k_lo"), ("q_hi", "k_hi"), ("Q_OFFSET", "K_OFFSET"), ("i", "c"),
    ("q_lengths", "kv_lengths"), ("q_count", "kv_count"), ("key", "query"),
    ("q_length", "kv_length"), ("q_index", "k_index"), ("q_pos", "k_pos"),
)  # fmt: skip
_NAMES = {x: y for pair in _PAIRS for x, y in (pair, pair[::-1])}
_READ = re.compile(r"_at_[bhqk]+\b")  # what is read of an operand
_SWAPPED = str.maketrans("qk", "kq")
_WORD = re.compile(r"\b(" + "|".join(_NAMES) + r")\b")


def renamed(line: str) -> str:
    """A statement about queries that visit keys as one about keys that visit queries."""
    line = line.replace("_at_chunks", "_at_query_chunks")
    line = _READ.sub(lambda found: found[0].translate(_SWAPPED), line)
    return _WORD.sub(lambda found: _NAMES[found[0]], line)
