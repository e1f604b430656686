"""Integer expressions as sums: Σ coefficient · part + constant.

The parts are variables and whatever isn't a sum itself (a quotient, a read of an operand),
so that `q // 8 - k // 8 + 3` is one of three parts, and `q + 1 - q` of none.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.expr import Expr, apply, const


@dataclass(frozen=True)
class Linear:
    """Σ coefficient · part + constant; no coefficient is 0."""

    parts: tuple[tuple[Expr, int], ...] = ()
    constant: int = 0

    def __add__(self, other: Linear) -> Linear:
        total = dict(self.parts)
        for part, coefficient in other.parts:
            total[part] = total.get(part, 0) + coefficient
        kept = tuple((p, c) for p, c in total.items() if c)
        return Linear(kept, self.constant + other.constant)

    def __sub__(self, other: Linear) -> Linear:
        return self + other.times(-1)

    def times(self, factor: int) -> Linear:
        if factor == 0:
            return Linear()
        parts = tuple((p, c * factor) for p, c in self.parts)
        return Linear(parts, self.constant * factor)

    def is_constant(self) -> bool:
        return not self.parts


def number(value: int) -> Linear:
    return Linear((), value)


def linear(node: Expr) -> Linear:
    """The expression, an integer's, as a sum."""
    if node.op == "const" and isinstance(node.value, int):
        return number(int(node.value))
    if node.op in ("add", "sub"):
        x, y = (linear(a) for a in node.args)
        return x + y if node.op == "add" else x - y
    if node.op == "neg":
        return linear(node.args[0]).times(-1)
    if node.op == "mul":
        x, y = (linear(a) for a in node.args)
        if x.is_constant():
            return y.times(x.constant)
        if y.is_constant():
            return x.times(y.constant)
    return Linear(((node, 1),))


def affine(node: Expr) -> tuple[int, int, int] | None:
    """(a, b, c) where the expression is a·q + b·k + c, else None."""
    return None if node.kind != "int" else affine_of(linear(node))


def affine_of(total: Linear) -> tuple[int, int, int] | None:
    found = {"q": 0, "k": 0}
    for part, coefficient in total.parts:
        if part.op != "var" or part.value not in found:
            return None
        found[str(part.value)] = coefficient
    return found["q"], found["k"], total.constant


def expression(total: Linear) -> Expr:
    """The sum as an expression, positive parts first."""
    ordered = sorted(total.parts, key=lambda p: p[1] < 0)
    result: Expr | None = None
    for part, coefficient in ordered:
        size = abs(coefficient)
        value = part if size == 1 else apply("mul", part, const(size))
        if result is None:
            result = value if coefficient > 0 else apply("neg", value)
        else:
            result = apply("add" if coefficient > 0 else "sub", result, value)
    if result is None:
        return const(total.constant)
    if total.constant:
        op = "add" if total.constant > 0 else "sub"
        result = apply(op, result, const(abs(total.constant)))
    return result


def divided(total: Linear, divisor: int) -> Linear:
    """total // divisor, of a positive divisor; what it divides comes out."""
    if all(c % divisor == 0 for _, c in total.parts):
        parts = tuple((p, c // divisor) for p, c in total.parts)
        return Linear(parts, total.constant // divisor)
    return linear(apply("floordiv", expression(total), const(divisor)))


def at_most(x: Linear, y: Linear) -> Expr:
    """x <= y as a condition: what is negative stands on the other side."""
    gap = x - y
    left = Linear(tuple((p, c) for p, c in gap.parts if c > 0))
    right = Linear(tuple((p, -c) for p, c in gap.parts if c < 0))
    room = -gap.constant  # left <= right + room
    if gap.is_constant():
        return const(room >= 0)
    if left.is_constant():
        return apply("ge", expression(right), const(-room))
    if right.is_constant():
        return apply("le", expression(left), const(room))
    if room == -1:
        return apply("lt", expression(left), expression(right))
    if room < 0:
        left, room = left + number(-room), 0
    return apply("le", expression(left), expression(right + number(room)))
