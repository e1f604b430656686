"""Masks and scores from Python functions: called once, with symbols that record.

    causal = attngen.mask(lambda b, h, q, k: k <= q)
    alibi = attngen.score(lambda s, b, h, q, k: s + slopes[h] * (k - q))

The operators of a `Symbol` build `Expr` trees (expr.py); everything else about the
function (its text, its closure) is never looked at.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from attngen import expr
from attngen.errors import ExpressionError
from attngen.expr import Axis, Expr, Operand, apply, const, describe


class Symbol:
    """A value that a traced mask or score computes with."""

    __slots__ = ("expr",)
    __hash__ = None  # type: ignore[assignment]

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

    __int__ = __float__ = __index__ = __array__ = __contains__ = _no_value
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


class OperandSymbol:
    """An operand under tracing: `ids[b, q]` reads it."""

    __slots__ = ("operand",)

    def __init__(self, declared: Operand) -> None:
        self.operand = declared

    def __repr__(self) -> str:
        return repr(self.operand)

    def _unindexed(self, *_: object) -> NoReturn:
        _node(self)
        raise AssertionError

    # Python would answer these itself, and the mask would silently be a constant.
    __eq__ = __ne__ = __bool__ = __iter__ = __contains__ = _unindexed

    def __getitem__(self, index: object) -> Symbol:
        items = index if isinstance(index, tuple) else (index,)
        return Symbol(expr.load(self.operand, tuple(_node(i) for i in items)))


def _node(value: object) -> Expr:
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
                "NaN can't be a constant of a mask or score.", got="nan", needed="a number"
            )
        return const(value)
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return _node(value.item())  # a NumPy scalar
    raise ExpressionError(
        "A mask or score computes with something that isn't a number or a symbol.",
        got=f"{type(value).__name__}",
        needed="Python numbers, b, h, q, k, s, and operands",
        hint='declare an array as attngen.operand("name", axes=…, dtype=…) and pass it '
        "to the kernel by that name",
    )


def call(op: str, *args: object) -> Symbol:
    """Apply an operation of the language to symbols and numbers."""
    return Symbol(apply(op, *(_node(a) for a in args)))


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


def operand(name: str, *, axes: str | tuple[Axis, ...], dtype: str) -> OperandSymbol:
    """Declare a tensor that masks or scores read, passed to the kernel as `name=array`.

    Args:
        name: an identifier that the emitted file doesn't use itself.
        axes: a letter or a length for each dimension: b (batch), h (query heads),
            q (queries), k (keys), or a positive integer for an axis of its own length.
        dtype: bool, int32, int64, float16, bfloat16, float32 or float64. Integers are
            taken to lie within ±2³⁰ (±2⁶² for int64).

    A lettered axis is read at the tile's own batch, head, query or key: `ids[b, q]` is
    that query's row of `ids`, by index, whatever the offset of its position is (a k axis
    may be read at q, where queries and keys are the same tokens). An axis of its own
    length takes any integer expression; `q` or `k` alone is again the index, and inside
    an expression (`table[h, q - k + 64]`) they are positions. An index outside the axis
    reads NaN; where a constant or the spec proves it, it is an error.

    Raises:
        OperandError: the name, an axis or the dtype can't be.
    """
    listed = tuple(axes) if isinstance(axes, str | tuple | list) else (axes,)
    return OperandSymbol(Operand(name, listed, dtype))


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: a boolean expression of b, h, q, k and operands.

    Combine masks with `&`, `|` and `~`. Two masks are equal when their expressions are.
    """

    expr: Expr
    form: Any = field(compare=False, repr=False)

    @property
    def operands(self) -> tuple[Operand, ...]:
        return expr.operands(self.expr)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(apply("and", self.expr, other.expr), {"and": [self.form, other.form]})

    def __or__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(apply("or", self.expr, other.expr), {"or": [self.form, other.form]})

    def __invert__(self) -> Mask:
        return Mask(apply("not", self.expr), {"not": self.form})

    def __bool__(self) -> NoReturn:
        raise ExpressionError(
            "Python asked a mask whether it is true.",
            got=describe(self.expr),
            needed="masks joined with &, | and ~",
        )

    def __str__(self) -> str:
        return describe(self.expr)


@dataclass(frozen=True)
class Score:
    """A change to the scores: a float expression of s, b, h, q, k and operands."""

    expr: Expr
    form: Any = field(compare=False, repr=False)

    @property
    def operands(self) -> tuple[Operand, ...]:
        return expr.operands(self.expr)

    def __str__(self) -> str:
        return describe(self.expr)


def _form(node: Expr) -> dict[str, Any]:
    declared = {o.name: o.to_dict() for o in expr.operands(node)}
    return {"expr": expr.to_data(node)} | ({"operands": declared} if declared else {})


def _trace(function: Callable[..., object], names: str, what: str) -> Expr:
    if not callable(function):
        raise ExpressionError(
            f"A {what} is made from a function.",
            got=type(function).__name__,
            needed=f"a function of ({', '.join(names)})",
        )
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise ExpressionError(
            f"The {what} function doesn't take the arguments of a {what}.",
            got=str(inspect.signature(function)),
            needed=f"({', '.join(names)})",
        ) from error
    return _node(function(*(Symbol(expr.var(n)) for n in names)))


def mask(function: Callable[..., object]) -> Mask:
    """A mask from a function of (b, h, q, k) that says whether the key is seen.

    Args:
        function: called once, with symbols. b and h are the batch and query head, q and k
            the positions (index + offset) of query and key.

    Raises:
        ExpressionError: it computes something that the language doesn't have, or
            returns a number.
    """
    return mask_of(_trace(function, "bhqk", "mask"))


def mask_of(node: Expr, form: Any = None) -> Mask:
    if node.kind != "bool":
        raise ExpressionError(
            "A mask returned a number.",
            got=f"{describe(node)}, a {node.kind}",
            needed="a comparison, or several joined with &, | and ~",
            hint="a number that is added to the scores is a score: attngen.score(…)",
        )
    if "s" in expr.variables(node):
        raise ExpressionError(
            "A mask can't read the score.",
            got=describe(node),
            needed="an expression of b, h, q, k and operands",
            hint="in a score, attngen.where(…, s, -float('inf')) leaves keys out",
        )
    return Mask(node, _form(node) if form is None else form)


def score(function: Callable[..., object]) -> Score:
    """A score from a function of (s, b, h, q, k) that returns the new s.

    Args:
        function: called once, with symbols. s is the score so far (float32; float64 for
            float64 inputs). Returning -inf means that the key is not there.

    Raises:
        ExpressionError: it computes something that the language doesn't have, or
            returns a boolean.
    """
    return score_of(_trace(function, "sbhqk", "score"))


def score_of(node: Expr, form: Any = None) -> Score:
    if node.kind == "bool":
        raise ExpressionError(
            "A score returned a boolean.",
            got=describe(node),
            needed="a number",
            hint="to leave keys out, use a mask, or attngen.where(…, s, -float('inf'))",
        )
    node = expr.convert(node, "float")
    return Score(node, _form(node) if form is None else form)


def library(make: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function of masks.py or scores.py as the library's, known by its name.

    What it makes carries its name and arguments, which is how a spec's JSON says it.
    """
    signature = inspect.signature(make)

    @functools.lru_cache(maxsize=256, typed=True)  # or True would find what 1 made
    def cached(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        made = make(*args, **kwargs)
        given = {
            name: list(v) if isinstance(v, tuple) else float(v) if isinstance(v, float) else v
            for name, v in bound.arguments.items()  # float(): NumPy's float64 is one, too
            if v is not None  # TOML has no null, and None is only ever a default
        }
        return type(made)(made.expr, {make.__name__: given})

    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            hash((args, tuple(kwargs.items())))
        except TypeError:
            raise ExpressionError(
                f"{make.__name__} takes numbers, names and tuples.",
                got=repr(args or kwargs)[:200],
                needed=f"{make.__name__}{signature}",
            ) from None
        return cached(*args, **kwargs)

    wrapper.__library__ = True  # type: ignore[attr-defined]
    return wrapper
