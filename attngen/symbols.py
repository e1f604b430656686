"""Symbols: values that record what a traced function computes with them."""

from __future__ import annotations

import math
from typing import NoReturn

from attngen import expr
from attngen.errors import ExpressionError
from attngen.expr import Expr, apply, const, describe
from attngen.operands import Operand


class Symbol:
    """A value that a traced mask or score computes with."""

    __slots__ = ("expr",)

    def __init__(self, node: Expr) -> None:
        self.expr = node

    def __repr__(self) -> str:
        return f"Symbol({describe(self.expr)})"

    def __bool__(self) -> NoReturn:
        raise ExpressionError(
            "Python asked a symbol of the mask language whether it is true.",
            got=describe(self.expr),
            needed="an expression without 'and', 'or', 'not', 'if', chained comparisons, "
            "min(), max()",
            hint="write & for and, | for or, ~ for not, attngen.where(c, x, y) for if, "
            "(a < b) & (b < c) for a < b < c, attngen.minimum / attngen.maximum",
        )

    def _no_value(self, *_: object, **__: object) -> NoReturn:
        raise ExpressionError(
            "A symbol of the mask language was used as if it were a number or an array.",
            got=describe(self.expr),
            needed="operators, abs(), and attngen's minimum, maximum, where, exp, log, tanh",
            hint="attngen.where(c, x, y) instead of jnp.where, and so on",
        )

    def __getattr__(self, name: str) -> NoReturn:
        _no_attribute(self, name, "expr")
        self._no_value()

    __int__ = __float__ = __index__ = __array__ = __contains__ = _no_value
    __len__ = __getitem__ = __call__ = __hash__ = _no_value
    __jax_array__ = property(_no_value)  # JAX only asks whether there is one
    __array_ufunc__ = None

    def _no_operator(self, *_: object) -> NoReturn:
        raise ExpressionError(
            "The mask language doesn't have this operator.",
            got=f"an operator of {describe(self.expr)}",
            needed="+ - * / // %, comparisons, & | ~, and abs()",
            hint="x * x for x ** 2, p != q for p ^ q of two conditions",
        )

    __pow__ = __rpow__ = __xor__ = __rxor__ = __matmul__ = __rmatmul__ = _no_operator
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _no_operator
    __divmod__ = __rdivmod__ = __round__ = _no_operator

    def __iter__(self) -> NoReturn:
        self._no_value()

    def __add__(self, other: object) -> Symbol:
        return call("add", self, other)

    def __radd__(self, other: object) -> Symbol:
        return call("add", other, self)

    def __sub__(self, other: object) -> Symbol:
        return call("sub", self, other)

    def __rsub__(self, other: object) -> Symbol:
        return call("sub", other, self)

    def __mul__(self, other: object) -> Symbol:
        return call("mul", self, other)

    def __rmul__(self, other: object) -> Symbol:
        return call("mul", other, self)

    def __truediv__(self, other: object) -> Symbol:
        return call("div", self, other)

    def __rtruediv__(self, other: object) -> Symbol:
        return call("div", other, self)

    def __floordiv__(self, other: object) -> Symbol:
        return call("floordiv", self, other)

    def __rfloordiv__(self, other: object) -> Symbol:
        return call("floordiv", other, self)

    def __mod__(self, other: object) -> Symbol:
        return call("mod", self, other)

    def __rmod__(self, other: object) -> Symbol:
        return call("mod", other, self)

    def __neg__(self) -> Symbol:
        if self.expr.op == "const":
            return Symbol(const(-self.expr.value))  # type: ignore[operator]
        return call("neg", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return call("abs", self)

    def __lt__(self, other: object) -> Symbol:
        return call("lt", self, other)

    def __le__(self, other: object) -> Symbol:
        return call("le", self, other)

    def __gt__(self, other: object) -> Symbol:
        return call("gt", self, other)

    def __ge__(self, other: object) -> Symbol:
        return call("ge", self, other)

    def __eq__(self, other: object) -> Symbol:  # type: ignore[override]
        return call("eq", self, other)

    def __ne__(self, other: object) -> Symbol:  # type: ignore[override]
        return call("ne", self, other)

    def __and__(self, other: object) -> Symbol:
        return call("and", self, other)

    def __rand__(self, other: object) -> Symbol:
        return call("and", other, self)

    def __or__(self, other: object) -> Symbol:
        return call("or", self, other)

    def __ror__(self, other: object) -> Symbol:
        return call("or", other, self)

    def __invert__(self) -> Symbol:
        return call("not", self)


def _no_attribute(symbol: object, name: str, own: str) -> None:
    """Let Python find that there is no such thing where it asks for itself."""
    if name == own or name.startswith("__"):
        raise AttributeError(f"{type(symbol).__name__} has no {name!r}")


class OperandSymbol:
    """An operand under tracing: `ids[b, q]` reads it."""

    __slots__ = ("operand",)

    def __init__(self, declared: Operand) -> None:
        self.operand = declared

    def __repr__(self) -> str:
        return repr(self.operand)

    def _unindexed(self, *_: object) -> NoReturn:
        node_of(self)
        raise AssertionError

    # Python would answer these itself, and the mask would silently be a constant.
    __eq__ = __ne__ = __bool__ = __iter__ = __contains__ = __len__ = _unindexed

    def __getattr__(self, name: str) -> NoReturn:
        _no_attribute(self, name, "operand")
        self._unindexed()

    def __getitem__(self, index: object) -> Symbol:
        items = index if isinstance(index, tuple) else (index,)
        return Symbol(expr.load(self.operand, tuple(node_of(i) for i in items)))


def node_of(value: object) -> Expr:
    if isinstance(value, Symbol):
        return value.expr
    if isinstance(value, OperandSymbol):
        raise ExpressionError(
            f"Operand {value.operand.name!r} is used without an index.",
            got=value.operand.name,
            needed=f"{value.operand.name}[…], one index for each of its axes",
        )
    if isinstance(value, bool | int | float):
        if isinstance(value, float) and math.isnan(value):
            raise ExpressionError(
                "NaN can't be a constant of a mask or score.",
                got="nan",
                needed="a number",
            )
        return const(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return node_of(value.item())  # a NumPy scalar
    raise ExpressionError(
        "A mask or score computes with something that isn't a number or a symbol.",
        got=f"{type(value).__name__}",
        needed="Python numbers, b, h, q, k, s, and operands",
        hint='declare an array as attngen.operand("name", axes=…, dtype=…) and pass it '
        "to the kernel by that name",
    )


def call(op: str, *args: object) -> Symbol:
    """Apply an operation of the language to symbols and numbers."""
    return Symbol(apply(op, *(node_of(a) for a in args)))


def minimum(x: object, y: object) -> Symbol:
    """The smaller of two numbers, inside a mask or score."""
    return call("minimum", x, y)


def maximum(x: object, y: object) -> Symbol:
    """The larger of two numbers, inside a mask or score."""
    return call("maximum", x, y)


def where(condition: object, x: object, y: object) -> Symbol:
    """x where the condition holds, else y, inside a mask or score."""
    return call("where", condition, x, y)


def exp(x: object) -> Symbol:
    """e**x, inside a mask or score."""
    return call("exp", x)


def log(x: object) -> Symbol:
    """The natural logarithm, inside a mask or score."""
    return call("log", x)


def tanh(x: object) -> Symbol:
    """The hyperbolic tangent, inside a mask or score."""
    return call("tanh", x)


def searchsorted(offsets: OperandSymbol, x: object) -> Symbol:
    """How many entries of an integer operand are at most x, inside a mask or score.

    With cumulative offsets, which rise, this finds the sequence that position x lies in:
    NumPy's `searchsorted(offsets, x, side="right")`. It is the count whatever their order.

    Args:
        offsets: an operand with one axis, of its own length: `axes=(n,)`.
        x: an integer that depends on the query or on the key, but not on both.
    """
    if not isinstance(offsets, OperandSymbol):
        raise ExpressionError(
            "searchsorted searches an operand.",
            got=repr(offsets)[:200],
            needed="an operand without an index, and an integer",
            hint='attngen.operand("offsets", axes=(n,), dtype="int32")',
        )
    return Symbol(expr.searchsorted(offsets.operand, node_of(x)))
