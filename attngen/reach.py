"""The keys that a chunk of queries can see by one alternative of a mask: an interval.

For queries at positions [q_lo, q_hi), each condition of a term is solved for k where it is of
k and q apart: lines, and quotients of k compared with anything of q. Conditions on q alone
narrow the queries; two on q and k may say more of k together (Fourier and Motzkin). What
isn't solved is left out: the interval may hold more keys than are seen, and never fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.expr import Expr, const, var, variables, walk
from attngen.extremes import TRUE, Around, both, chosen, ends, join
from attngen.linear import (
    Linear,
    affine_of,
    at_most,
    divided,
    expression,
    linear,
    number,
)
from attngen.terms import Atom, Term

Q_LO, Q_HI = var("q_lo", "int"), var("q_hi", "int")


@dataclass(frozen=True)
class Interval:
    """Keys [low, high); None: no limit."""

    low: Linear | None = None
    high: Linear | None = None


def interval(term: Term, near: int, far: int) -> Interval | None:
    """The keys for which any query of a chunk can satisfy a term; None: there are none."""
    gaps = [a.gap for a in term if a.gap is not None and _of_q_and_k(a.gap)]
    alone = [g for g in gaps if not any("k" in variables(p) for p, _ in g.parts)]
    queries, condition = _queries(alone)
    around = Around({"q": queries})
    low: Linear | None = None
    high: Linear | None = None
    constant = _without_q(gaps)
    if constant is None:
        return None
    for gap in (*gaps, *constant):
        if gap in alone:
            continue
        side, limit = _limit(gap, around)
        if side == "low":
            low = stricter(low, limit, "maximum")
        elif side == "high":
            high = stricter(high, limit, "minimum")
    if condition != TRUE:
        inside = const(far) if high is None else expression(high)
        high = linear(chosen(condition, inside, const(near)))
    return Interval(low, high)


def _of_q_and_k(gap: Linear) -> bool:
    """Whether each part of a sum is of q alone or of k alone, and no operand's."""
    return all(
        len(variables(p)) == 1
        and variables(p) <= {"q", "k"}
        and all(n.op != "load" for n in walk(p))
        for p, _ in gap.parts
    )


def is_solved(atom: Atom) -> bool:
    """Whether an interval of keys, or of queries, says all of a condition."""
    if atom.gap is None or not _of_q_and_k(atom.gap):
        return False
    if not any("k" in variables(p) for p, _ in atom.gap.parts):
        return affine_of(atom.gap) is not None
    both_ends = Around({"q": (linear(Q_LO), linear(Q_HI) - number(1))})
    return _limit(atom.gap, both_ends)[1] is not None


def _queries(alone: list[Linear]) -> tuple[tuple[Linear, Linear], Expr]:
    """The first and last query that satisfy conditions of their own, and whether any does."""
    first, last, condition = linear(Q_LO), linear(Q_HI) - number(1), TRUE
    low, high = first, last
    for gap in alone:
        line = affine_of(gap)
        if line is None:
            continue
        a, _, c = line
        if a > 0:
            most = number(-c // a)
            condition = both(condition, at_most(low, most))
            last = known(join("minimum", last, most))
        else:
            least = number(-(-c // -a))
            condition = both(condition, at_most(least, high))
            first = known(join("maximum", first, least))
    return (first, last), condition


def known(x: Linear | None) -> Linear:
    assert x is not None
    return x


def _without_q(gaps: list[Linear]) -> list[Linear] | None:
    """What pairs of lines say of k alone, as q is eliminated; None: they contradict."""
    lines = [line for g in gaps if (line := affine_of(g)) is not None and line[0]]
    found = []
    for a, b, c in lines:
        for d, e, f in lines:
            if a < 0 < d:
                k, rest = b * d - e * a, c * d - f * a
                if k == 0 and rest > 0:
                    return None
                if k:
                    found.append(Linear(((var("k"), k),), rest))
    return found


def _limit(gap: Linear, around: Around) -> tuple[str, Linear | None]:
    """The limit of k where gap <= 0: its side ("" for none), and where it is."""
    of_k = [(p, c) for p, c in gap.parts if "k" in variables(p)]
    if len(of_k) != 1:
        return "", None
    part, c = of_k[0]
    rest = gap - Linear((of_k[0],))
    if part.op == "var" and c > 0:  # k <= -rest / c
        _, most = ends(rest.times(-1), around)
        return "high", None if most is None else divided(most, c) + number(1)
    if part.op == "var":  # k >= rest / -c, rounded up
        least, _ = ends(rest, around)
        return "low", None if least is None else divided(least + number(-c - 1), -c)
    divisor = part.args[1].value if part.op == "floordiv" else None
    if not isinstance(divisor, int) or divisor <= 0 or abs(c) != 1:
        return "", None
    inner = linear(part.args[0])
    if c > 0:  # x // d <= y where x <= d y + d - 1
        return _limit(inner + rest.times(divisor) - number(divisor - 1), around)
    return _limit(rest.times(divisor) - inner, around)


def stricter(x: Linear | None, y: Linear | None, op: str) -> Linear | None:
    """The stricter of two limits, where one that is None doesn't limit."""
    return y if x is None else x if y is None else join(op, x, y)
