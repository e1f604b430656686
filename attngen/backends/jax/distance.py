"""Masks by the distance of a key from its query, which needs no positions in each element.

k - q is `away`, the distance within the tile, less `shift`, how far the tile's first query lies
from its first key: `k <= q` becomes `away <= shift`, where only the right side changes from
tile to tile, and is a number.
"""

from __future__ import annotations

from attngen.expr import COMPARISONS, Expr, apply, const, var, walk
from attngen.intervals import domain, interval
from attngen.linear import affine
from attngen.spec import AttentionSpec

AWAY, SHIFT = var("away", "int"), var("shift", "int")
_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le", "eq": "eq", "ne": "ne"}


def has_distance(mask: Expr) -> bool:
    """Whether some comparison of a mask relates k to q by one."""
    return _distance(mask) is not None or any(has_distance(a) for a in mask.args)


def overflows(spec: AttentionSpec) -> bool:
    """Whether a number of a mask by distance can leave int32; its offset is known."""
    env = domain(spec)
    (q_low, q_high), (k_low, k_high) = env["q"], env["k"]
    env |= {
        "away": (-spec.q_len, spec.kv_len),
        "shift": (q_low - k_high, q_high - k_low),
    }
    assert spec.mask is not None
    found = (
        interval(n, env) for n in walk(by_distance(spec.mask.expr)) if n.kind == "int"
    )
    return any(low < -(2**31) or high > 2**31 - 1 for low, high in found)


def by_distance(mask: Expr) -> Expr:
    """The same mask, with such comparisons in terms of `away` and `shift`."""
    found = _distance(mask)
    if found is not None:
        return found
    if not mask.args or mask.op not in ("and", "or", "not"):
        return mask
    return apply(mask.op, *(by_distance(a) for a in mask.args))


def _distance(node: Expr) -> Expr | None:
    """k - q + c (op) 0 as away (op) shift - c; None where the node is none of these."""
    if node.op not in COMPARISONS:
        return None
    left, right = (affine(a) for a in node.args)
    if left is None or right is None:
        return None
    a, b, c = (i - j for i, j in zip(left, right, strict=True))
    if (a, b) not in ((-1, 1), (1, -1)):
        return None
    op = node.op
    if b == -1:
        op, c = _MIRRORED[op], -c
    limit = SHIFT
    if c:
        limit = apply("sub" if c > 0 else "add", SHIFT, const(abs(c)))
    return apply(op, AWAY, limit)
