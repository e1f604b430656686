"""What of a spec can be said in the words of a library's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attngen import expr
from attngen.expr import Expr
from attngen.linear import affine
from attngen.spec import AttentionSpec


@dataclass(frozen=True)
class Band:
    """low <= k − q <= high of indices; None: no limit, also where all keys are within it."""

    low: int | None = None
    high: int | None = None


def band(spec: AttentionSpec) -> Band | None:
    """The mask as a band of indices; None where it is another mask.

    Only a conjunction of comparisons of q and k, at offsets known before the call.
    """
    if spec.mask is None:
        return Band()
    if spec.static_q_offset is None:
        return None
    low, high = -spec.q_len, spec.kv_len
    shift = (
        spec.static_q_offset - spec.kv_offset
    )  # k − q of positions to that of indices
    for term in _terms(spec.mask.expr):
        limits = _limits(term)
        if limits is None:
            return None
        low = max(low, limits.low + shift) if limits.low is not None else low
        high = min(high, limits.high + shift) if limits.high is not None else high
    return Band(
        None if low <= 1 - spec.q_len else low,
        None if high >= spec.kv_len - 1 else high,
    )


def _terms(node: Expr) -> Iterator[Expr]:
    if node.op == "and":
        for a in node.args:
            yield from _terms(a)
    else:
        yield node


def _limits(node: Expr) -> Band | None:
    """The limits of k − q that one comparison sets."""
    sides = (
        [affine(a) for a in node.args] if node.op in ("lt", "le", "gt", "ge") else []
    )
    if not sides or sides[0] is None or sides[1] is None:
        return None
    a, b, c = (x - y for x, y in zip(sides[0], sides[1], strict=True))
    if a + b != 0 or abs(b) != 1:
        return None
    strict = node.op in ("lt", "gt")
    below = node.op in ("lt", "le")  # b · (k − q) + c below 0
    limit = -c * b
    if below == (b == 1):
        return Band(high=limit - strict)
    return Band(low=limit + strict)


def added(spec: AttentionSpec) -> tuple[Expr, ...] | None:
    """What the scores add to s; None where one does anything else to it."""
    terms = []
    for score in spec.score:
        root = score.expr
        sides = root.args if root.op == "add" else ()
        others = [x for x in sides if not (x.op == "var" and x.value == "s")]
        if len(others) != 1 or "s" in expr.variables(others[0]):
            return None
        terms.append(others[0])
    return tuple(terms)
