"""Scores of −inf: which operands could make one, and what is asked of them before the loops.

A key whose score is −inf isn't there, which an interior tile would have to ask of each score.
Where only slopes, tables or temperatures could do that, which a program reads before its
loops, it asks these once: if all are finite, and not huge, no score is −inf. Else all of its
tiles are taken as edges, which ask.

Scores are multiplied by log2(e), which takes the lowest that are finite beyond float32, too
(masks are often written so, with the least float). Where interiors ask of each score, only
differences to the maximum are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from attngen.backends.triton.tile_code import Writer, power_of_two
from attngen.dtypes import FLOAT32_LIMIT
from attngen.expr import Expr, variables, walk
from attngen.intervals import TAME, Interval, drops_keys
from attngen.operands import Operand
from attngen.spec import AttentionSpec

MOST = 4096  # values of an operand that a program looks at
LIMIT = f"{TAME:.0e}".replace("e+0", "e")


@dataclass(frozen=True)
class Guards:
    """Of the scores of one kernel.

    Args:
        edge, interior: whether a score of such a tile can be −inf before it is masked, or
            be so by the factor log2(e).
        lines: statements that define `tame`, where interiors need it.
    """

    edge: bool = False
    interior: bool = False
    lines: tuple[str, ...] = ()


def guards(writer: Writer, env: Mapping[str, Interval]) -> Guards:
    """What a writer's interior tiles, which it has written, needn't ask of each score."""
    spec = writer.spec
    if not overflows(spec, env):
        return Guards()
    reads = [n for score in spec.score for n in walk(score.expr) if n.op == "load"]
    floats = dict.fromkeys(n for n in reads if n.kind == "float")
    most = MOST // power_of_two(writer.heads)
    needed = [n for n in floats if _outside(n) or _whole(n, most) is not None]
    if overflows(spec, env, frozenset(needed)):
        return Guards(edge=True, interior=True)
    for node in tuple(needed):
        rest = [n for n in needed if n != node]
        if not overflows(spec, env, frozenset(rest)):
            needed = rest
    lines = ["# whether no score can be -inf: what could make one so is finite"]
    for i, node in enumerate(needed):
        text = _values(node, writer, most, lines)
        lines.append(f"tame {'&=' if i else '='} {text}")
    return Guards(edge=True, lines=tuple(lines))


def overflows(
    spec: AttentionSpec, env: Mapping[str, Interval], tame: Collection[Expr] = ()
) -> bool:
    """Whether a score, times log2(e), can be −inf. See `drops_keys`."""
    return drops_keys(spec, env, tame, FLOAT32_LIMIT * math.log(2))


def _outside(node: Expr) -> bool:
    """Whether a read is made before the loops."""
    return not variables(node) & {"k", "s"}


def _whole(node: Expr, most: int) -> int | None:
    """The axis of a read that is looked at whole, if that and the others' indices do."""
    assert isinstance(node.value, Operand)
    pairs = list(zip(node.value.axes, node.args, strict=True))
    varied = [i for i, (_, index) in enumerate(pairs) if variables(index) - {"b", "h"}]
    plain = all(
        index.op in ("var", "const") or i in varied
        for i, (_, index) in enumerate(pairs)
    )
    if len(varied) != 1 or not plain:
        return None
    axis = pairs[varied[0]][0]
    return varied[0] if isinstance(axis, int) and axis <= most else None


def _values(node: Expr, writer: Writer, most: int, lines: list[str]) -> str:
    """Whether all values of a read are tame, as text; statements that it needs first."""
    if _outside(node):
        name = writer.name(node)
        if not writer.varies(node):
            return f"tl.abs({name}) <= {LIMIT}"
    else:
        axis = _whole(node, most)
        assert axis is not None
        name = writer.read_whole(node, axis, lines)
    return f"tl.min((tl.abs({name}) <= {LIMIT}).to(tl.int32)) > 0"
