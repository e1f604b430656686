"""Which keys a chunk of queries visits: bounds of the key loops in closed form.

For queries at positions [q_lo, q_hi), each of the mask's alternatives (terms.py) says which
keys any of the queries can see: an interval [low, high), as integer expressions of q_lo and
q_hi. Those that meet become one; what is left is one interval, or a few in order: the first
tokens apart from a window, say. In the same way the opposite of the mask says which keys some
query doesn't see; between these lie those that all see, [full_low, full_high). Key chunks
outside the first are empty and never visited; those inside the second need no mask.

A condition on the query alone, or on an operand, limits nothing here: its tiles are at the
edge, visited with their mask. What verdicts.py says of single tiles tells more.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

from attngen.expr import Expr, walk
from attngen.extremes import below, inverse, join
from attngen.linear import (
    Linear,
    expression,
    linear,
)
from attngen.reach import Interval, interval, known, stricter
from attngen.spec import AttentionSpec
from attngen.terms import Term, alternatives

MOST = 3  # intervals that are kept apart
LONGEST = 2**24  # keys, of kernels whose lengths are known at run time only


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


NOTHING = Span(some=False, any_full=False)


def analyse(spec: AttentionSpec) -> Span:
    """The span of the spec's mask, in positions, all of its intervals in one.

    Lengths are not part of it.
    """
    found = spans(spec)
    if len(found) == 1:
        return found[0]
    first, last = found[0], found[-1]
    full = next((s for s in reversed(found) if s.any_full), last)
    high = functools.reduce(_farther, (s.high for s in found))
    return Span(
        first.low,
        high,
        full.full_low,
        full.full_high,
        True,
        any(s.any_full for s in found),
    )


def _farther(x: Expr | None, y: Expr | None) -> Expr | None:
    if x is None or y is None:
        return None
    return expression(known(join("maximum", linear(x), linear(y))))


def spans(spec: AttentionSpec, ends: tuple[int, int] | None = None) -> tuple[Span, ...]:
    """Each of the mask's intervals, in order: no key of one is before the one before it.

    Args:
        ends: of the positions that keys can have; None: from kv_offset on.
    """
    if spec.mask is None:
        return (Span(),)
    if ends is not None:
        return _spans(spec.mask.expr, ends, _samples(spec))
    near = spec.kv_offset
    far = near + max(spec.kv_len, LONGEST)
    return _spans(spec.mask.expr, (near, far), _samples(spec))


def _samples(spec: AttentionSpec) -> tuple[int, ...]:
    """Positions of a few queries, by which intervals are compared where proof isn't needed."""
    static = spec.static_q_offset
    first = spec.kv_len - spec.q_len if static is None else static
    return (first, first + spec.q_len // 2, first + spec.q_len - 1)


@functools.lru_cache(maxsize=128)
def _spans(
    mask: Expr, ends_of_keys: tuple[int, int], at: tuple[int, ...]
) -> tuple[Span, ...]:
    terms = alternatives(mask)
    seen = [Interval()] if terms is None else _intervals(terms, ends_of_keys)
    opposite = alternatives(inverse(mask))
    unseen = [Interval()] if opposite is None else _intervals(opposite, ends_of_keys)
    if not seen:
        return (NOTHING,)
    return tuple(_span(group, unseen, at) for group in _grouped(seen, at))


def _intervals(
    terms: tuple[Term, ...], ends_of_keys: tuple[int, int]
) -> list[Interval]:
    found = (interval(term, *ends_of_keys) for term in terms)
    return list(dict.fromkeys(i for i in found if i is not None))


# Intervals that meet become one.


def _grouped(seen: list[Interval], at: tuple[int, ...]) -> list[Interval]:
    left = list(seen)
    while (pair := _joinable(left, at)) is not None:
        x, y = pair
        low = None if x.low is None or y.low is None else join("minimum", x.low, y.low)
        high = (
            None
            if x.high is None or y.high is None
            else join("maximum", x.high, y.high)
        )
        left = [i for i in left if i not in pair] + [Interval(low, high)]
    return sorted(left, key=functools.cmp_to_key(_order))


def _order(x: Interval, y: Interval) -> int:
    return -1 if _starts_first(x, y) else 1


def _joinable(
    found: list[Interval], at: tuple[int, ...]
) -> tuple[Interval, Interval] | None:
    """Two that are to become one; of too many the two that are closest."""
    pairs = [(x, y) for i, x in enumerate(found) for y in found[i + 1 :]]
    for x, y in pairs:
        ordered = _starts_first(x, y) or _starts_first(y, x)
        if x.low == y.low or not ordered or max(_gaps(x, y, at)) <= 0:
            return x, y
    if len(found) <= MOST:
        return None
    return min(pairs, key=lambda pair: max(_gaps(pair[0], pair[1], at)))


def _starts_first(x: Interval, y: Interval) -> bool:
    """Whether x is proven to begin no later than y, for whatever chunk of queries."""
    if x.low is None or y.low is None:
        return x.low is None
    return below(x.low, y.low)


def _gaps(x: Interval, y: Interval, at: tuple[int, ...]) -> list[int]:
    """How many keys lie between two, for a few single queries."""
    found = []
    for q in at:
        first, second = sorted((_numbers(x, q), _numbers(y, q)))
        found.append(second[0] - first[1] if second[1] > second[0] else 0)
    return found


FAR = 2**62


def _numbers(x: Interval, q: int) -> tuple[int, int]:
    low = -FAR if x.low is None else evaluate(expression(x.low), q, q + 1)
    return low, FAR if x.high is None else evaluate(expression(x.high), q, q + 1)


# Between what isn't seen.


def _span(own: Interval, unseen: list[Interval], at: tuple[int, ...]) -> Span:
    """The interval, and what of it all queries see: sound whichever side of it each lies."""
    low: Linear | None = None
    high: Linear | None = None
    any_full = True
    for other in unseen:
        if other.low is None and other.high is None:
            any_full = False
        elif _is_left(own, other, at):
            low = stricter(low, other.high, "maximum")
        else:
            high = stricter(high, other.low, "minimum")
    first, last, full_first, full_last = (
        None if x is None else expression(x) for x in (own.low, own.high, low, high)
    )
    return Span(first, last, full_first, full_last, any_full=any_full)


def _is_left(own: Interval, other: Interval, at: tuple[int, ...]) -> bool:
    """Whether what isn't seen leaves more of an interval on its right."""
    if other.low is None or other.high is None:
        return other.low is None
    if own.high is not None and below(own.high, other.low):
        return False
    if own.low is not None and below(other.high, own.low):
        return True
    left = right = 0
    for q in at:
        (low, high), (first, last) = _numbers(own, q), _numbers(other, q)
        left += max(0, min(first, high) - low)
        right += max(0, high - max(last, low))
    return right > left


# Numbers, and what the planner asks of a region.

_NUMBERS: dict[str, Callable[..., int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "abs": abs,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "minimum": min,
    "maximum": max,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "not": lambda x: not x,
    "where": lambda c, x, y: x if c else y,
    "int": int,
}


def evaluate(limit: Expr, q_lo: int, q_hi: int) -> int:
    """A limit's value for one chunk of queries."""
    return compiled(limit)(q_lo, q_hi)


def compiled(limit: Expr) -> Callable[[int, int], int]:
    """`evaluate` as a function of q_lo and q_hi, for very many chunks."""
    if limit.op == "const":
        value = int(limit.value)  # type: ignore[arg-type]
        return lambda q_lo, q_hi: value
    if limit.op == "var":
        if limit.value == "q_lo":
            return lambda q_lo, q_hi: q_lo
        return lambda q_lo, q_hi: q_hi
    apply, parts = _NUMBERS[limit.op], [compiled(a) for a in limit.args]
    if len(parts) == 2:
        x, y = parts
        return lambda q_lo, q_hi: apply(x(q_lo, q_hi), y(q_lo, q_hi))
    return lambda q_lo, q_hi: apply(*(part(q_lo, q_hi) for part in parts))


def largest_constant(spec: AttentionSpec) -> int:
    """The largest integer that a mask or score names: how far its structure reaches."""
    found = [
        abs(n.value)
        for root in spec.expressions
        for n in walk(root)
        if n.op == "const" and isinstance(n.value, int)
    ]
    return max(found, default=0)
