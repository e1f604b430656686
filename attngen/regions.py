"""What each tile is: empty, full or an edge; the bounds in closed form.

For a chunk of queries at positions [q_lo, q_hi), a mask of affine comparisons says which
keys any of them can see, [low, high), and which keys all of them see,
[full_low, full_high), as integer expressions of q_lo and q_hi. Key chunks outside the
first are empty and never visited; those inside the second need no mask. What isn't affine
(an operand, say) leaves a tile at the edge: visited, with its mask.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from attngen import expr
from attngen.expr import Expr, apply, const, var
from attngen.spec import AttentionSpec

Q_LO, Q_HI = var("q_lo", "int"), var("q_hi", "int")
_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True)
class Span:
    """Key positions, half-open, as expressions of q_lo and q_hi; None: no limit.

    `some` is False where no query sees any key, `any_full` where no key is known to be
    seen by all of them (then full_low and full_high mean nothing).
    """

    low: Expr | None = None
    high: Expr | None = None
    full_low: Expr | None = None
    full_high: Expr | None = None
    some: bool = True
    any_full: bool = True

    @property
    def limits(self) -> tuple[Expr, ...]:
        """Those that there are."""
        known = (self.low, self.high, self.full_low, self.full_high)
        return tuple(limit for limit in known if limit is not None)


EDGE = Span(any_full=False)


def analyse(spec: AttentionSpec) -> Span:
    """The span of the spec's mask, in positions; lengths are not part of it."""
    return Span() if spec.mask is None else _analyse(spec.mask.expr)


@functools.lru_cache(maxsize=128)
def _analyse(node: Expr) -> Span:
    return _span(node, negated=False)


def _span(node: Expr, *, negated: bool) -> Span:
    if node.op == "not":
        return _span(node.args[0], negated=not negated)
    if node.op in ("and", "or"):
        x, y = (_span(a, negated=negated) for a in node.args)
        return _both(x, y) if (node.op == "and") != negated else _either(x, y)
    if node.op == "const":
        return (
            Span() if bool(node.value) != negated else Span(some=False, any_full=False)
        )
    if node.op in _OPPOSITE:
        op = _OPPOSITE[node.op] if negated else node.op
        left, right = (affine(a) for a in node.args)
        if left is not None and right is not None:
            return _comparison(op, *(i - j for i, j in zip(left, right, strict=True)))
    return EDGE


def affine(node: Expr) -> tuple[int, int, int] | None:
    """(a, b, c) where the expression is a·q + b·k + c, else None."""
    if node.op == "const" and isinstance(node.value, int):
        return (0, 0, int(node.value))
    if node.op == "var" and node.value in ("q", "k"):
        return (1, 0, 0) if node.value == "q" else (0, 1, 0)
    parts = [affine(a) for a in node.args]
    if node.op not in ("add", "sub", "mul", "neg") or None in parts:
        return None
    x, y = parts[0], parts[-1]
    assert x is not None
    assert y is not None
    if node.op == "neg":
        return (-x[0], -x[1], -x[2])
    if node.op == "mul":
        if x[:2] != (0, 0):
            x, y = y, x
        return None if x[:2] != (0, 0) else (x[2] * y[0], x[2] * y[1], x[2] * y[2])
    sign = 1 if node.op == "add" else -1
    return (x[0] + sign * y[0], x[1] + sign * y[1], x[2] + sign * y[2])


def _comparison(op: str, a: int, b: int, c: int) -> Span:
    """The span of a·q + b·k + c (op) 0."""
    if op == "eq":
        return _both(_at_most(a, b, c), _at_most(-a, -b, -c))
    if op == "ne":
        return _either(_at_most(a, b, c + 1), _at_most(-a, -b, -c + 1))
    if op in ("ge", "gt"):
        a, b, c = -a, -b, -c
    return _at_most(a, b, c + 1 if op in ("lt", "gt") else c)


def _at_most(a: int, b: int, c: int) -> Span:
    """The span of a·q + b·k + c <= 0."""
    if b == 0:
        if a == 0:
            return Span() if c <= 0 else Span(some=False, any_full=False)
        return EDGE  # whether a query sees anything depends on the query alone
    if b > 0:  # k < (-a·q - c) // b + 1
        return Span(
            high=_extreme(-a, b - c, b, largest=True),
            full_high=_extreme(-a, b - c, b, largest=False),
        )
    # k >= ceil((a·q + c) / -b)
    return Span(
        low=_extreme(a, c - b - 1, -b, largest=False),
        full_low=_extreme(a, c - b - 1, -b, largest=True),
    )


def _extreme(a: int, c: int, divisor: int, *, largest: bool) -> Expr:
    """The largest or smallest value of (a·q + c) // divisor for q in [q_lo, q_hi)."""
    if a == 0:
        return const(c // divisor)
    if (a > 0) == largest:
        at, c = Q_HI, c - a  # q = q_hi - 1
    else:
        at = Q_LO
    value = at if a == 1 else apply("mul", at, const(a))
    if c:
        value = apply("add" if c > 0 else "sub", value, const(abs(c)))
    return value if divisor == 1 else apply("floordiv", value, const(divisor))


def _join(op: str, x: Expr | None, y: Expr | None) -> Expr | None:
    """min or max of two limits, where one that is None doesn't limit."""
    if x is None or y is None or x == y:
        return y if x is None else x
    if x.op == y.op == "const":
        pick = min if op == "minimum" else max
        return const(pick(x.value, y.value))  # type: ignore[type-var,arg-type]
    return apply(op, x, y)


def _both(x: Span, y: Span) -> Span:
    return Span(
        low=_join("maximum", x.low, y.low),
        high=_join("minimum", x.high, y.high),
        full_low=_join("maximum", x.full_low, y.full_low),
        full_high=_join("minimum", x.full_high, y.full_high),
        some=x.some and y.some,
        any_full=x.any_full and y.any_full,
    )


def _either(x: Span, y: Span) -> Span:
    """The hull of what is seen; of what is full, a part that is one interval."""
    if not x.some or not y.some:
        return y if not x.some else x
    low = None if x.low is None or y.low is None else _join("minimum", x.low, y.low)
    high = (
        None if x.high is None or y.high is None else _join("maximum", x.high, y.high)
    )
    full = y if not x.any_full else x
    full_low, full_high = full.full_low, full.full_high
    if x.any_full and y.any_full:
        if x.full_low == y.full_low:
            unlimited = x.full_high is None or y.full_high is None
            full_high = (
                None if unlimited else _join("maximum", x.full_high, y.full_high)
            )
        elif x.full_high == y.full_high:
            unlimited = x.full_low is None or y.full_low is None
            full_low = None if unlimited else _join("minimum", x.full_low, y.full_low)
    return Span(low, high, full_low, full_high, True, x.any_full or y.any_full)


@dataclass(frozen=True)
class Tiles:
    """How many tiles of one head are full, on an edge, or empty and never visited."""

    full: int
    edge: int
    empty: int

    @property
    def visited(self) -> int:
        return self.full + self.edge

    @property
    def total(self) -> int:
        return self.full + self.edge + self.empty


_INTEGER: dict[str, Callable[..., int]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "floordiv": lambda x, y: x // y,
    "minimum": min,
    "maximum": max,
}


def _evaluate(node: Expr, q_lo: int, q_hi: int) -> int:
    if node.op == "const":
        return int(node.value)  # type: ignore[arg-type]
    if node.op == "var":
        return q_lo if node.value == "q_lo" else q_hi
    return _INTEGER[node.op](*(_evaluate(a, q_lo, q_hi) for a in node.args))


Limits = tuple[int, int, int, int]


def key_limits(spec: AttentionSpec, span: Span, q_start: int, q_chunk: int) -> Limits:
    """low, high, full_low, full_high of one chunk of queries, as key indices.

    Lengths and offsets that come at run time are taken at their largest. low may lie
    beyond the keys, where the loops end before they begin.
    """
    n, shift = spec.kv_len, spec.kv_offset
    if not span.some:
        return (0, 0, 0, 0)
    static = spec.static_q_offset
    q_lo = q_start + (spec.kv_len - spec.q_len if static is None else static)

    def at(limit: Expr | None, otherwise: int) -> int:
        if limit is None:
            return otherwise
        return max(0, _evaluate(limit, q_lo, q_lo + q_chunk) - shift)

    low, high = at(span.low, 0), min(n, at(span.high, n))
    if not span.any_full:
        return (low, high, low, low)
    return (low, high, min(n, at(span.full_low, 0)), min(n, at(span.full_high, n)))


SAMPLES = 512


def chunk_limits(
    spec: AttentionSpec, span: Span, q_chunk: int, *, exact: bool = True
) -> list[Limits]:
    """The limits of each chunk of queries, whatever the key chunks are.

    Args:
        exact: False looks at no more than about 512 chunks, evenly spaced.
    """
    chunks = -(-spec.q_len // q_chunk)
    step = 1 if exact else max(1, chunks // SAMPLES)
    looked_at = range(step // 2, chunks, step)
    bounds = (span.low, span.high, span.full_low, span.full_high)
    if not any(b is not None and expr.variables(b) for b in bounds):  # all are alike
        return [key_limits(spec, span, 0, q_chunk)] * len(looked_at)
    starts = (min(i * q_chunk, spec.q_len - q_chunk) for i in looked_at)
    return [key_limits(spec, span, start, q_chunk) for start in starts]


def key_chunks(limits: Limits, k_chunk: int) -> tuple[int, int, int, int]:
    """first, full_first, full_last, last of the key chunks that a chunk of queries visits.

    [first, last) hold what any of the queries sees, [full_first, full_last) only what all do.
    """
    low, high, full_low, full_high = limits
    first = low // k_chunk
    last = max(first, -(-high // k_chunk))
    full_first = min(max(-(-full_low // k_chunk), first), last)
    return first, full_first, min(max(full_high // k_chunk, full_first), last), last


def count_tiles(
    spec: AttentionSpec,
    span: Span,
    q_chunk: int,
    k_chunk: int,
    *,
    exact: bool = True,
    limits: list[Limits] | None = None,
) -> Tiles:
    """The tiles of one head, as the emitted loops visit them.

    Args:
        exact: as for `chunk_limits`; what isn't looked at is taken to be alike.
        limits: of the chunks of queries, where they are known.
    """
    if limits is None:
        limits = chunk_limits(spec, span, q_chunk, exact=exact)
    full = edge = 0
    for own, alike in Counter(limits).items():
        first, full_first, full_last, last = key_chunks(own, k_chunk)
        full += alike * (full_last - full_first)
        edge += alike * (last - first - (full_last - full_first))
    q_chunks, k_chunks = -(-spec.q_len // q_chunk), -(-spec.kv_len // k_chunk)
    if len(limits) < q_chunks:
        full, edge = (round(x * q_chunks / len(limits)) for x in (full, edge))
    return Tiles(full, edge, q_chunks * k_chunks - full - edge)


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
    span, static = analyse(spec), spec.static_q_offset
    high, full = span.high, span.full_high
    limits = high is not None and full is not None and span.any_full
    if not limits or span.low or span.full_low or static is None or not span.some:
        return False
    assert high is not None
    assert full is not None
    if spec.kv_lengths or spec.q_lengths or not (_by_one(high) and _by_one(full)):
        return False
    first = _evaluate(high, static, static + 1) - spec.kv_offset
    return (
        first == _evaluate(full, static, static + 1) - spec.kv_offset
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


def largest_constant(spec: AttentionSpec) -> int:
    """The largest integer that a mask or score names: how far its structure reaches."""
    found = [
        abs(n.value)
        for root in spec.expressions
        for n in expr.walk(root)
        if n.op == "const" and isinstance(n.value, int)
    ]
    return max(found, default=0)
