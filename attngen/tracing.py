"""Masks and scores from Python functions: called once, with symbols that record.

    causal = attngen.mask(lambda b, h, q, k: k <= q)
    alibi = attngen.score(lambda s, b, h, q, k: s + slopes[h] * (k - q))

The operators of a `Symbol` build `Expr` trees (expr.py); everything else about the
function (its text, its closure) is never looked at.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from attngen import expr, expr_data
from attngen.errors import ExpressionError
from attngen.expr import Expr, apply, describe
from attngen.operands import Axis, Operand
from attngen.symbols import OperandSymbol, Symbol, node_of


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
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.expr))

    def __hash__(
        self,
    ) -> int:  # of a whole tree: computed once, looked up at every call
        return self._hash

    @property
    def operands(self) -> tuple[Operand, ...]:
        return expr.operands(self.expr)

    def __and__(self, other: Mask) -> Mask:
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            apply("and", self.expr, other.expr), {"and": [self.form, other.form]}
        )

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
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.expr))

    def __hash__(
        self,
    ) -> int:  # of a whole tree: computed once, looked up at every call
        return self._hash

    @property
    def operands(self) -> tuple[Operand, ...]:
        return expr.operands(self.expr)

    def __str__(self) -> str:
        return describe(self.expr)


def _form(node: Expr) -> dict[str, Any]:
    declared = {o.name: o.to_dict() for o in expr.operands(node)}
    return {"expr": expr_data.to_data(node)} | (
        {"operands": declared} if declared else {}
    )


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
    try:
        return node_of(function(*(Symbol(expr.var(n)) for n in names)))
    except ExpressionError:  # a TypeError that says what is wrong
        raise
    except TypeError as error:  # of an array library that is given a symbol, say
        raise ExpressionError(
            f"The {what} function computes what the language doesn't have.",
            got=str(error).splitlines()[0] if str(error) else "a TypeError",
            needed="operators, abs(), and attngen's minimum, maximum, where, exp, log, tanh",
            hint="attngen.exp(s) instead of jnp.exp(s), and so on",
        ) from error


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
    """Mark a function of masks or scores.py as the library's, known by its name.

    What it makes carries its name and arguments, which is how a spec's JSON says it.
    """
    signature = inspect.signature(make)

    @functools.lru_cache(maxsize=256, typed=True)  # or True would find what 1 made
    def cached(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        made = make(*args, **kwargs)
        given = {
            name: list(v)
            if isinstance(v, tuple)
            else float(v)
            if isinstance(v, float)
            else v
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
