"""What a tile holds: whether any of its queries sees any of its keys, and whether all see all.

For the queries at positions [q_lo, q_hi) and the keys at [k_lo, k_hi), a mask becomes two
conditions in the mask language, over these ends (and those of batches and heads, where it
reads them): what a tile holds is told without looking at a single pair. Both are sound. Of
comparisons that are affine in q and k, and of all their combinations, they are exact, where
each has k, or q, by one: the pairs that satisfy several are a polygon, of which a variable
is eliminated (Fourier and Motzkin; whole numbers where its coefficients are one). The rest
is interval arithmetic (extremes.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from attngen.expr import Expr, var
from attngen.extremes import (
    FALSE,
    TRUE,
    Around,
    Ends,
    Truth,
    below,
    both,
    either,
    ends,
    inverse,
    join,
    truth,
)
from attngen.linear import Linear, affine_of, at_most, divided, linear, number
from attngen.terms import Atom, Term, alternatives

ENDS = ("q_lo", "q_hi", "k_lo", "k_hi", "b_lo", "b_hi", "h_lo", "h_hi")
Q_LO, Q_HI, K_LO, K_HI = (linear(var(n, "int")) for n in ENDS[:4])


@dataclass(frozen=True)
class Verdict:
    """Conditions on a tile: `some` query sees some key; `every` query sees every key.

    Where `some` is false the tile is empty, where `every` is true it is full; of the
    others nothing is known, and their pairs are to be looked at.
    """

    some: Expr
    every: Expr


def span_of(name: str) -> Ends:
    """Both ends, included, of a variable of a tile: [name_lo, name_hi)."""
    low, high = (linear(var(f"{name}_{end}", "int")) for end in ("lo", "hi"))
    return (low, high - number(1))


def verdict(
    mask: Expr,
    read: Callable[[Expr, Around], Ends | None] = lambda *_: None,
    told: Callable[[Expr, Around], Truth | None] = lambda *_: None,
) -> Verdict:
    """The verdict on a tile of a mask.

    Args:
        read: the ends of an integer that is read, or searched for, in an operand, over
            the tile; None where they aren't known.
        told: (always, perhaps) of a boolean that is read.
    """
    around = Around({n: span_of(n) for n in "qkbh"}, read, told)
    always, perhaps = truth(mask, around)
    if always == TRUE or perhaps == FALSE:
        return Verdict(perhaps, always)
    seen, unseen = _possible(mask, around), _possible(inverse(mask), around)
    return Verdict(
        some=perhaps if seen is None else seen,
        every=always if unseen is None else inverse(unseen),
    )


def _possible(condition: Expr, around: Around) -> Expr | None:
    """Whether any pair of the tile can satisfy a condition; None: too much to say."""
    terms = alternatives(condition)
    if terms is None:
        return None
    return functools.reduce(either, (_term(t, around) for t in terms), FALSE)


def _term(term: Term, around: Around) -> Expr:
    lines, rest = [], TRUE
    equal = _equal_parts(term)
    narrow = _narrowed(equal, around)
    for atom in term:
        line = None if atom.gap is None else affine_of(atom.gap)
        if line is not None:
            lines.append(line)
        else:
            own = atom.gap is not None and tuple(dict(atom.gap.parts)) in equal
            rest = both(rest, _perhaps(atom, around if own else narrow))
    return both(feasible(lines), rest)


def _equal_parts(term: Term) -> list[tuple[Expr, ...]]:
    """Pairs of parts, no variables, of which a term says that they are equal."""
    gaps = [atom.gap for atom in term if atom.gap is not None]
    found: list[tuple[Expr, ...]] = []
    for gap in gaps:
        parts = dict(gap.parts)
        pair = sorted(parts.values()) == [-1, 1] and gap.constant == 0
        if pair and gap.times(-1) in gaps and all(p.op != "var" for p in parts):
            found.append(tuple(parts))
    return found


def _narrowed(equal: list[tuple[Expr, ...]], around: Around) -> Around:
    """The same, where parts that are equal lie where both do."""
    parts: dict[Expr, Ends] = {}
    for pair in equal:
        (low, high), (least, most) = (ends(Linear(((p, 1),)), around) for p in pair)
        both_ends = join("maximum", low, least), join("minimum", high, most)
        parts |= dict.fromkeys(pair, both_ends)
    if not parts:
        return around
    return dataclasses.replace(around, truths={}, parts=parts)


def _perhaps(atom: Atom, around: Around) -> Expr:
    if atom.gap is None:
        assert atom.node is not None
        return truth(atom.node, around)[1]
    low, _ = ends(atom.gap, around)
    return TRUE if low is None else at_most(low, number(0))


Line = tuple[int, int, int]  # a·q + b·k + c <= 0


def feasible(lines: list[Line]) -> Expr:
    """Whether a pair of the tile satisfies all of a·q + b·k + c <= 0."""
    by_k = all(abs(b) <= 1 for _, b, _ in lines)
    by_q = all(abs(a) <= 1 for a, _, _ in lines)
    if by_k or not by_q:
        return _eliminated(lines, (Q_LO, Q_HI), (K_LO, K_HI))
    swapped = [(b, a, c) for a, b, c in lines]
    return _eliminated(swapped, (K_LO, K_HI), (Q_LO, Q_HI))


Span = tuple[Linear, Linear]  # half-open


def _eliminated(lines: list[Line], x: Span, y: Span) -> Expr:
    """The same of a·x + b·y + c <= 0, by eliminating y, then x."""
    # each: coefficient of x, and the rest: coefficient · x + rest <= |b| · y, or >=
    lower = [(a, number(c), -b) for a, b, c in lines if b < 0]
    upper = [(-a, number(-c), b) for a, b, c in lines if b > 0]
    held = [(a, number(c)) for a, b, c in lines if b == 0]
    held += [(a, low - (y[1] - number(1)).times(b)) for a, low, b in lower]
    held += [(-a, y[0].times(b) - high) for a, high, b in upper]
    for (a, low, b), (d, high, e) in itertools.product(lower, upper):
        held.append((a * e - d * b, low.times(e) - high.times(b)))
    least, most, answer = [x[0]], [x[1] - number(1)], TRUE
    for a, rest in held:  # a · x + rest <= 0
        if a == 0:
            answer = both(
                answer, TRUE if below(rest, number(0)) else at_most(rest, number(0))
            )
        elif a > 0:
            most.append(divided(rest.times(-1), a))
        else:  # x >= rest / |a|, rounded up
            least.append(divided(rest + number(-a - 1), -a))
    for i, low in enumerate(least):
        for j, high in enumerate(most):
            if i or j:
                certain = below(low, high)
                answer = both(answer, TRUE if certain else at_most(low, high))
    return answer
