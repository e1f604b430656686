"""Conditions as alternatives: an OR of ANDs of comparisons, each of integers `sum <= 0`.

What isn't a comparison of integers (a read of a boolean, a comparison of floats) stays as it
is. Comparisons with minima, maxima, absolute values and choices are split into these, where
they depend on the key.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.expr import COMPARISONS, Expr, apply, const, variables
from attngen.extremes import inverse
from attngen.linear import Linear, linear, number

MOST = 24  # alternatives, and comparisons of each


@dataclass(frozen=True)
class Atom:
    """One condition: `gap <= 0`, or, where that is None, a boolean expression."""

    gap: Linear | None = None
    node: Expr | None = None


Term = tuple[Atom, ...]


class TooManyError(Exception):
    """A condition has more alternatives than are worth looking at."""


def alternatives(node: Expr) -> tuple[Term, ...] | None:
    """The terms of which one holds where the condition does; None: too many."""
    try:
        return tuple(_terms(node))
    except TooManyError:
        return None


def _terms(node: Expr) -> list[Term]:
    if node.op == "const":
        return [()] if node.value else []
    if node.op == "not":
        inner = node.args[0]
        turned = inverse(inner)
        if turned.op != "not":
            return _terms(turned)
        if inner.op == "where":
            c, x, y = inner.args
            return _terms(apply("where", c, inverse(x), inverse(y)))
        return [(Atom(node=node),)]
    if node.op == "or":
        return _any(*(_terms(a) for a in node.args))
    if node.op == "and":
        return _all(*(_terms(a) for a in node.args))
    if node.op == "where":
        c, x, y = node.args
        return _any(_all(_terms(c), _terms(x)), _all(_terms(inverse(c)), _terms(y)))
    if node.op in COMPARISONS and node.args[0].kind == "int":
        return _comparison(node)
    if node.op in ("eq", "ne") and node.args[0].kind == "bool":
        x, y = node.args if node.op == "eq" else (node.args[0], inverse(node.args[1]))
        same = _all(_terms(x), _terms(y))
        return _any(same, _all(_terms(inverse(x)), _terms(inverse(y))))
    return [(Atom(node=node),)]


def _any(*terms: list[Term]) -> list[Term]:
    found = list(dict.fromkeys(t for each in terms for t in each))
    if len(found) > MOST:
        raise TooManyError
    return found


def _all(x: list[Term], y: list[Term]) -> list[Term]:
    if len(x) * len(y) > MOST:
        raise TooManyError
    found = []
    for a in x:
        for b in y:
            joined = tuple(dict.fromkeys(a + b))
            if len(joined) > MOST:
                raise TooManyError
            found.append(joined)
    return list(dict.fromkeys(found))


def _comparison(node: Expr) -> list[Term]:
    gap = linear(node.args[0]) - linear(node.args[1])
    if node.op in ("eq", "ne") and any(p.op == "mod" for p, _ in gap.parts):
        return [(Atom(node=node),)]
    if node.op == "eq":
        return _all(_at_most_zero(gap), _at_most_zero(gap.times(-1)))
    if node.op == "ne":
        below = _at_most_zero(gap + number(1))
        return _any(below, _at_most_zero(gap.times(-1) + number(1)))
    if node.op in ("ge", "gt"):
        gap = gap.times(-1)
    return _at_most_zero(gap + number(1) if node.op in ("lt", "gt") else gap)


def _at_most_zero(gap: Linear) -> list[Term]:
    """gap <= 0, split where a part of it is one of two numbers."""
    for part, coefficient in gap.parts:
        if "k" not in variables(part):  # followed from end to end as it is
            continue
        rest = gap - Linear(((part, coefficient),))
        if part.op in ("minimum", "maximum", "abs"):
            x, y = _two(part)
            either = (part.op == "minimum") == (coefficient > 0)
            joined = _any if either else _all
            pairs = [_at_most_zero(rest + v.times(coefficient)) for v in (x, y)]
            return joined(*pairs)
        if part.op == "where":
            c, a, b = part.args
            pairs = [_at_most_zero(rest + linear(v).times(coefficient)) for v in (a, b)]
            return _any(_all(_terms(c), pairs[0]), _all(_terms(inverse(c)), pairs[1]))
        if part.op == "int":  # 1 where a condition holds
            c = part.args[0]
            pairs = [_at_most_zero(rest + number(n * coefficient)) for n in (1, 0)]
            return _any(_all(_terms(c), pairs[0]), _all(_terms(inverse(c)), pairs[1]))
    if gap.is_constant():
        return _terms(const(gap.constant <= 0))
    return [(Atom(gap=gap),)]


def _two(part: Expr) -> tuple[Linear, Linear]:
    """The two numbers that a minimum, a maximum or an absolute value is one of."""
    x = linear(part.args[0])
    return (x, x.times(-1)) if part.op == "abs" else (x, linear(part.args[1]))
