"""Masks whose limits move with the query, one by one: causal, a window."""

from __future__ import annotations

import math

from attngen.expr import Expr
from attngen.linear import affine
from attngen.regions import analyse, evaluate, spans
from attngen.spec import AttentionSpec


def hull_is_seen(spec: AttentionSpec) -> bool:
    """Whether each key between a chunk's low and high is seen by one of its queries.

    So it is where the mask is a conjunction of limits that are constant, or move with the
    query one by one (causal, a window), unless these leave nothing between them.
    """
    if spec.q_lengths:
        return False  # limits are of all queries, also of those that aren't there
    if spec.mask is None:
        return True
    moving = _moving(spec.mask.expr) if _moves_by_one(spec.mask.expr) else None
    if moving is None:
        return False
    lower = max((c for side, c in moving if side == "low"), default=-math.inf)
    upper = min((c for side, c in moving if side == "high"), default=math.inf)
    return lower <= upper


def _moving(node: Expr) -> list[tuple[str, int]]:
    """Limits q + c of k, both ends included, of a conjunction that moves by one."""
    if node.op == "and":
        return [limit for a in node.args for limit in _moving(a)]
    left, right = (affine(a) for a in node.args)
    assert left is not None
    assert right is not None
    a, b, c = (x - y for x, y in zip(left, right, strict=True))
    if a == 0:
        return []
    most = node.op in ("lt", "le")
    strict = int(node.op in ("lt", "gt"))
    if b < 0:
        c, most = -c, not most
    return [("high", -c - strict)] if most else [("low", -c + strict)]


def _moves_by_one(node: Expr) -> bool:
    if node.op == "and":
        return all(_moves_by_one(a) for a in node.args)
    if node.op not in ("lt", "le", "gt", "ge"):
        return False
    left, right = (affine(a) for a in node.args)
    if left is None or right is None:
        return False
    a, b = left[0] - right[0], left[1] - right[1]
    return abs(b) == 1 and a in (0, -b)


def rises(spec: AttentionSpec, q_chunk: int, k_chunk: int) -> bool:
    """Whether each query sees one key more than the one before, from a chunk's start on.

    Then the edge tiles of a chunk of queries are a triangle below a diagonal: its first
    query sees the first key of it, the last all of them. All chunks must be whole.
    """
    if len(spans(spec)) != 1:
        return False
    span, static = analyse(spec), spec.static_q_offset
    high, full = span.high, span.full_high
    limits = high is not None and full is not None and span.any_full
    if not limits or span.low or span.full_low or static is None or not span.some:
        return False
    assert high is not None
    assert full is not None
    if spec.kv_lengths or spec.q_lengths or not (_by_one(high) and _by_one(full)):
        return False
    first = evaluate(high, static, static + 1) - spec.kv_offset
    return (
        first == evaluate(full, static, static + 1) - spec.kv_offset
        and spec.q_len % q_chunk == q_chunk % k_chunk == (first - 1) % k_chunk == 0
        and first >= 1
        and first - 1 + spec.q_len <= spec.kv_len
        and k_chunk > 1
    )


def _by_one(limit: Expr) -> bool:
    """Whether a limit is a position of a query and a constant."""
    parts = (limit,) if limit.op == "var" else limit.args
    ops = sorted(x.op for x in parts)
    if limit.op == "sub" and parts[1].op == "var":
        return False
    return ops == ["var"] or (limit.op in ("add", "sub") and ops == ["const", "var"])
