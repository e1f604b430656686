"""Three-valued interval arithmetic in the language itself: the least and the greatest value
that an expression takes in a tile, as expressions of the tile's ends.

Of an integer that is a sum (linear.py) with an end unknown as None; of a truth value the pair
(always, perhaps): whether it holds for all pairs of the tile, and whether it can for any. Each
is sound, whatever the operands hold: `always` is never true where the value isn't always so,
`perhaps` never false where it can be. Floats aren't followed, since their rounding is the
target's: what compares them may be either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attngen.expr import COMPARISONS, READS, Expr, apply, const, convert
from attngen.linear import Linear, at_most, divided, expression, linear, number

Ends = tuple[Linear | None, Linear | None]
Truth = tuple[Expr, Expr]  # always, perhaps
TRUE, FALSE = const(True), const(False)
EITHER: Truth = (FALSE, TRUE)
UNKNOWN: Ends = (None, None)


@dataclass(frozen=True)
class Around:
    """Where variables lie, and what is known of reads of operands.

    Args:
        variables: the ends of each, both included.
        read: the ends of what is read, or searched for, in an operand of integers; None.
        told: the truth of what is read in one of booleans; None.
        truths, parts: what was found: the same node may be read in many places.
    """

    variables: Mapping[str, Ends]
    read: Callable[[Expr, Around], Ends | None] = lambda *_: None
    told: Callable[[Expr, Around], Truth | None] = lambda *_: None
    truths: dict[Expr, Truth] = field(default_factory=dict, compare=False)
    parts: dict[Expr, Ends] = field(default_factory=dict, compare=False)


# Conditions, without what is constant.


def both(x: Expr, y: Expr) -> Expr:
    if FALSE in (x, y):
        return FALSE
    if x in (TRUE, y):
        return y
    return x if y == TRUE else apply("and", x, y)


def either(x: Expr, y: Expr) -> Expr:
    if TRUE in (x, y):
        return TRUE
    if x in (FALSE, y):
        return y
    return x if y == FALSE else apply("or", x, y)


_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


def _remainder(gap: Linear) -> tuple[Linear, int, int] | None:
    """(x, m, r) of a gap that is 0 where x % m == r, else None."""
    if len(gap.parts) != 1:
        return None
    part, coefficient = gap.parts[0]
    if part.op != "mod" or part.args[1].op != "const" or abs(coefficient) != 1:
        return None
    period = int(part.args[1].value)  # type: ignore[arg-type]
    rest = -gap.constant * coefficient
    return (linear(part.args[0]), period, rest) if 0 <= rest < period else None


def inverse(x: Expr) -> Expr:
    """Not x; of comparisons of integers the opposite one."""
    if x.op == "const":
        return const(not x.value)
    if x.op == "not":
        return x.args[0]
    if x.op in _OPPOSITE and x.args[0].kind == "int":
        return _opposite(x.op, *(linear(a) for a in x.args))
    if x.op in ("eq", "ne") and x.args[0].kind == "bool":
        return apply(_OPPOSITE[x.op], *x.args)
    if x.op in ("and", "or"):
        joined = either if x.op == "and" else both
        return joined(*(inverse(a) for a in x.args))
    return apply("not", x)


def _opposite(op: str, x: Linear, y: Linear) -> Expr:
    if op in ("eq", "ne"):
        return apply(_OPPOSITE[op], expression(x), expression(y))
    if op in ("ge", "gt"):
        x, y = y, x
    return at_most(y if op in ("lt", "gt") else y + number(1), x)


def chosen(condition: Expr, x: Expr, y: Expr) -> Expr:
    """x where the condition holds, else y."""
    if condition.op == "const":
        return x if condition.value else y
    return x if x == y else apply("where", condition, x, y)


# Truth values.


def truth(node: Expr, around: Around) -> Truth:
    """(always, perhaps) of a boolean expression."""
    if node not in around.truths:
        around.truths[node] = _truth(node, around)
    return around.truths[node]


def _truth(node: Expr, around: Around) -> Truth:
    if node.op == "const":
        value = const(bool(node.value))
        return (value, value)
    if node.op == "load":
        return around.told(node, around) or EITHER
    if node.op == "not":
        always, perhaps = truth(node.args[0], around)
        return (inverse(perhaps), inverse(always))
    if node.op in ("and", "or"):
        x, y = (truth(a, around) for a in node.args)
        joined = both if node.op == "and" else either
        return (joined(x[0], y[0]), joined(x[1], y[1]))
    if node.op == "where":
        c, x, y = (truth(a, around) for a in node.args)
        return _selected(c, x, y)
    if node.op in COMPARISONS:
        return _compared(node, around)
    return EITHER


def _selected(c: Truth, x: Truth, y: Truth) -> Truth:
    """Of where(c, x, y)."""
    never = inverse(c[1])
    always = either(either(both(c[0], x[0]), both(never, y[0])), both(x[0], y[0]))
    perhaps = either(both(c[1], x[1]), both(inverse(c[0]), y[1]))
    return (always, perhaps)


def _compared(node: Expr, around: Around) -> Truth:
    left, right = node.args
    if left.kind == "float":
        return EITHER
    if node.op in ("eq", "ne"):
        always, perhaps = _equal(left, right, around)
        return (
            (always, perhaps)
            if node.op == "eq"
            else (inverse(perhaps), inverse(always))
        )
    gap = linear(left) - linear(right)
    low, high = ends(gap if node.op in ("lt", "le") else gap.times(-1), around)
    limit = number(-1 if node.op in ("lt", "gt") else 0)
    return (
        FALSE if high is None else at_most(high, limit),
        TRUE if low is None else at_most(low, limit),
    )


def _equal(left: Expr, right: Expr, around: Around) -> Truth:
    if left.kind == "bool":
        x, y = truth(left, around), truth(right, around)
        return (
            either(both(x[0], y[0]), both(inverse(x[1]), inverse(y[1]))),
            either(both(x[1], y[1]), both(inverse(x[0]), inverse(y[0]))),
        )
    gap = linear(left) - linear(right)
    if (found := _remainder(gap)) is not None:
        dividend, period, rest = found
        first, last = ends(dividend - number(rest), around)
        if first is None or last is None:
            return EITHER
        # a multiple lies between them; both are the same one
        up = divided(first + number(period - 1), period)
        multiple = apply("eq", apply("mod", expression(first), const(period)), const(0))
        always = both(at_most(last, first), multiple)
        return (always, at_most(up, divided(last, period)))
    low, high = ends(gap, around)
    zero = number(0)
    always = FALSE
    if low is not None and high is not None:
        always = both(at_most(high, zero), at_most(zero, low))
    above = TRUE if low is None else at_most(low, zero)
    return (always, both(above, TRUE if high is None else at_most(zero, high)))


# Integers.


def ends(total: Linear, around: Around) -> Ends:
    """The least and the greatest value of a sum, each part on its own."""
    low: Linear | None = number(total.constant)
    high: Linear | None = number(total.constant)
    for part, coefficient in total.parts:
        least, most = _part(part, around)
        if coefficient < 0:
            least, most = most, least
        low = None if low is None or least is None else low + least.times(coefficient)
        high = None if high is None or most is None else high + most.times(coefficient)
    return (low, high)


def _part(node: Expr, around: Around) -> Ends:
    if node not in around.parts:
        around.parts[node] = _ends_of(node, around)
    return around.parts[node]


def _ends_of(node: Expr, around: Around) -> Ends:
    if node.op == "var":
        return around.variables.get(str(node.value), UNKNOWN)
    if node.op in READS:
        return around.read(node, around) or UNKNOWN
    if node.op == "int":  # of a condition
        always, perhaps = truth(node.args[0], around)
        return (_one(always), _one(perhaps))
    if node.op == "where":
        c = truth(node.args[0], around)
        x, y = (ends(linear(a), around) for a in node.args[1:])
        picked = (
            _picked(c, x[0], y[0], "minimum"),
            _picked(c, x[1], y[1], "maximum"),
        )
        return UNKNOWN if _is_deep(picked) else picked
    rule = _RULES.get(node.op)
    if rule is None:
        return UNKNOWN
    found = rule(*(ends(linear(a), around) for a in node.args))
    if not _is_deep(found):
        return found
    if node.op == "mod" and (divisor := _known(ends(linear(node.args[1]), around))):
        return (number(0), number(divisor - 1)) if divisor > 0 else UNKNOWN
    return UNKNOWN


DEEPEST = 14  # operations inside each other: more make a verdict too long


def _is_deep(found: Ends) -> bool:
    parts = [p for end in found if end is not None for p, _ in end.parts]
    return any(p.depth > DEEPEST for p in parts)


def _one(condition: Expr) -> Linear:
    return linear(convert(condition, "int"))


def _picked(c: Truth, x: Linear | None, y: Linear | None, worst: str) -> Linear | None:
    always, perhaps = c
    if always == TRUE:
        return x
    if perhaps == FALSE:
        return y
    if x is None or y is None:
        return None
    a, b = expression(x), expression(y)
    other = chosen(perhaps, _joined(worst, a, b), b)
    return linear(chosen(always, a, other))


def _joined(op: str, x: Expr, y: Expr) -> Expr:
    return x if x == y else apply(op, x, y)


def below(x: Linear, y: Linear) -> bool:
    """Whether x <= y is proven, for ends of which each low is less than its high."""
    for side, other, some in ((x, y, "minimum"), (y, x, "maximum")):
        if len(side.parts) == 1 and side.parts[0][1] == 1:
            part = side.parts[0][0]
            if part.op in ("minimum", "maximum"):
                each = [linear(a) + number(side.constant) for a in part.args]
                found = (
                    below(e, other) if side is x else below(other, e) for e in each
                )
                return any(found) if part.op == some else all(found)
    left = {str(p.value) if p.op == "var" else p: c for p, c in (x - y).parts}
    most = (x - y).constant
    for name in [n for n in left if isinstance(n, str) and n.endswith("_lo")]:
        low, high = left.pop(name), left.pop(name.replace("_lo", "_hi"), 0)
        if low + high or low < 0:
            return False
        most -= low
    return not left and most <= 0


def join(op: str, x: Linear | None, y: Linear | None) -> Linear | None:
    """minimum or maximum of two ends, both needed."""
    if x is None or y is None:
        return None
    if below(x, y):
        return x if op == "minimum" else y
    if below(y, x):
        return y if op == "minimum" else x
    return linear(apply(op, expression(x), expression(y)))


def _either_known(op: str, x: Linear | None, y: Linear | None) -> Linear | None:
    """The same where one end is enough."""
    return y if x is None else x if y is None else join(op, x, y)


def _minimum(x: Ends, y: Ends) -> Ends:
    return (join("minimum", x[0], y[0]), _either_known("minimum", x[1], y[1]))


def _maximum(x: Ends, y: Ends) -> Ends:
    return (_either_known("maximum", x[0], y[0]), join("maximum", x[1], y[1]))


def _abs(x: Ends) -> Ends:
    turned: Ends = (
        None if x[1] is None else x[1].times(-1),
        None if x[0] is None else x[0].times(-1),
    )
    low, high = _maximum(x, turned)
    return (_either_known("maximum", low, number(0)), high)


def _floordiv(x: Ends, y: Ends) -> Ends:
    divisor = _known(y)
    if divisor is None or divisor == 0:
        return UNKNOWN
    if divisor < 0:
        x = (x[1], x[0])
    return (_quotient(x[0], divisor), _quotient(x[1], divisor))


def _known(x: Ends) -> int | None:
    low, high = x
    if low is None or low != high or not low.is_constant():
        return None
    return low.constant


def _quotient(x: Linear | None, divisor: int) -> Linear | None:
    if x is None or divisor > 0:
        return None if x is None else divided(x, divisor)
    return divided(x.times(-1), -divisor)


def _mod(x: Ends, y: Ends) -> Ends:
    divisor = _known(y)
    if divisor is None or divisor <= 0:
        return UNKNOWN
    whole = (number(0), number(divisor - 1))
    if x[0] is None or x[1] is None:
        return whole
    first, last = (divided(e, divisor) for e in (x[0], x[1]))
    same = at_most(last, first)  # within one period
    rest = [expression(e - first.times(divisor)) for e in (x[0], x[1])]
    return (
        linear(chosen(same, rest[0], const(0))),
        linear(chosen(same, rest[1], const(divisor - 1))),
    )


def _mul(x: Ends, y: Ends) -> Ends:
    if x[0] is None or x[1] is None or y[0] is None or y[1] is None:
        return UNKNOWN
    corners = [
        apply("mul", expression(a), expression(b)) for a in x for b in y if a and b
    ]
    low = high = corners[0]
    for corner in corners[1:]:
        low, high = _joined("minimum", low, corner), _joined("maximum", high, corner)
    return (linear(low), linear(high))


_RULES: Mapping[str, Callable[..., Ends]] = {
    "minimum": _minimum,
    "maximum": _maximum,
    "abs": _abs,
    "floordiv": _floordiv,
    "mod": _mod,
    "mul": _mul,
}
