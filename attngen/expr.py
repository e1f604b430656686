"""Expressions of the mask and score language: a small frozen tree.

    expression ::= const | var | load(operand, index, …) | op(expression, …)
                 | searchsorted(operand, expression)
    const      ::= bool | int | float
    var        ::= b | h | q | k        batch, query head, query and key position (int)
                 | s                    the score so far (float; in scores only)
    op         ::= add sub mul div floordiv mod neg abs minimum maximum
                 | exp log tanh
                 | lt le gt ge eq ne
                 | and or not
                 | where
                 | int float            conversions: bool to int, int to float

Every node has a kind: "bool", "int" or "float". Integer arithmetic is Python's: `//` and
`%` floor. Trees are made by operators (tracing.py) or read from JSON as data; no text is
ever parsed or evaluated.
"""

from __future__ import annotations

import math
import operator as python_operator
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from attngen.errors import ExpressionError, OperandError
from attngen.operands import Kind, Operand

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("and", "or", "not")
ARITHMETIC = ("add", "sub", "mul", "neg", "abs", "minimum", "maximum")
INTEGER_ONLY = ("floordiv", "mod")
FLOAT_ONLY = ("div", "exp", "log", "tanh")
READS = ("load", "searchsorted")  # nodes that have an operand
ARITY = (
    dict.fromkeys(("neg", "abs", "exp", "log", "tanh", "not", "int", "float"), 1)
    | dict.fromkeys(("add", "sub", "mul", "div", "floordiv", "mod"), 2)
    | dict.fromkeys(("minimum", "maximum", "and", "or", *COMPARISONS), 2)
    | {"where": 3}
)
DEEPEST = 256  # operations inside each other: functions over trees call themselves
VARIABLES: dict[str, Kind] = {
    "b": "int",
    "h": "int",
    "q": "int",
    "k": "int",
    "s": "float",
}


@dataclass(frozen=True, slots=True)
class Expr:
    """A node: its operation, its arguments, and the kind of its value.

    `const` holds its value in `value`, `var` its name, `load` and `searchsorted` their
    Operand; the other operations have `value=None`. `depth` counts the operations inside each other.

    Raises:
        ExpressionError: there are more than DEEPEST of them.
    """

    op: str
    args: tuple[Expr, ...]
    kind: Kind
    value: bool | int | float | str | Operand | None = None
    depth: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        depth = 1 + max((a.depth for a in self.args), default=0)
        if depth > DEEPEST:
            raise ExpressionError(
                "A mask or score is nested too deeply.",
                got=f"{depth} operations inside each other",
                needed=f"at most {DEEPEST}",
                hint="read an operand instead of joining many constants",
            )
        object.__setattr__(self, "depth", depth)

    def __repr__(self) -> str:
        return f"Expr({describe(self)})"


def const(value: bool | int | float) -> Expr:
    if isinstance(value, bool):
        return Expr("const", (), "bool", value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ExpressionError(
                "A constant of a mask or score is too large.",
                got=f"an integer of {value.bit_length()} bits",
                needed="an integer that int64 holds",
            )
        return Expr("const", (), "int", int(value))
    return Expr("const", (), "float", float(value))  # NumPy's float64 is a float, too


def var(name: str, kind: Kind | None = None) -> Expr:
    return Expr("var", (), kind or VARIABLES[name], name)


def load(operand: Operand, index: tuple[Expr, ...]) -> Expr:
    """A read of an operand. See `tracing.operand` for what the indices mean."""
    if len(index) != len(operand.axes):
        raise ExpressionError(
            f"Operand {operand.name!r} is indexed by the wrong number of indices.",
            got=f"{len(index)}",
            needed=f"{len(operand.axes)}, one for each of its axes {operand.axes}",
        )

    for axis, i in zip(operand.axes, index, strict=True):
        if i.kind != "int":
            raise ExpressionError(
                f"Operand {operand.name!r} is indexed by something that isn't an integer.",
                got=f"{describe(i)}, a {i.kind}, in {read_text(operand, index)}",
                needed="an integer expression",
                hint="// divides integers; attngen.where(c, 1, 0) counts a condition c",
            )
        if isinstance(axis, int) or i.op == "const":
            continue
        paired = {"b": "b", "h": "h", "q": "qk", "k": "qk"}[axis]
        if i.op != "var" or str(i.value) not in paired:
            raise ExpressionError(
                f"Axis {axis!r} of operand {operand.name!r} is indexed by an expression.",
                got=f"{describe(i)}, in {read_text(operand, index)}",
                needed=f"{' or '.join(paired)} alone, or a number",
                hint="give the operand an axis of its own length, e.g. axes=('h', 64), "
                "to index it by an expression",
            )
    return Expr("load", index, operand.kind, operand)


def read_text(operand: Operand, index: tuple[Expr, ...]) -> str:
    """A read as a person would write it."""
    return f"{operand.name}[{', '.join(describe(i) for i in index)}]"


def searchsorted(operand: Operand, x: Expr) -> Expr:
    """How many entries of an operand are at most x. See `symbols.searchsorted`."""
    name = operand.name
    if len(operand.axes) != 1 or isinstance(operand.axes[0], str):
        raise ExpressionError(
            f"Operand {name!r} can't be searched.",
            got=f"axes {operand.axes}",
            needed="one axis, of its own length: axes=(n,)",
            hint="what differs between batches can be told by ids: masks.documents",
        )
    if operand.kind != "int" or x.kind == "float":
        floats = operand.dtype if operand.kind != "int" else f"{describe(x)}, a float"
        raise ExpressionError(
            f"searchsorted of {name!r} takes integers.",
            got=floats,
            needed="an int32 or int64 operand, and an integer expression",
        )
    if {"q", "k"} <= variables(x):
        raise ExpressionError(
            f"searchsorted of {name!r} would be asked for each pair of query and key.",
            got=describe(x),
            needed="an expression of q or of k, not of both",
            hint="compare searchsorted(…, q) with searchsorted(…, k)",
        )
    return Expr("searchsorted", (convert(x, "int"),), "int", operand)


def convert(x: Expr, kind: Kind) -> Expr:
    """x as a value of a wider kind: bool to int, int to float."""
    if x.kind == kind:
        return x
    if kind == "float":
        if x.op == "const" and isinstance(x.value, int):
            return const(float(x.value))
        return Expr("float", (convert(x, "int"),), "float")
    if kind == "int" and x.kind == "bool":
        return const(int(x.value)) if x.op == "const" else Expr("int", (x,), "int")  # type: ignore[arg-type]
    raise ExpressionError(
        "A value of one kind is used where another is needed.",
        got=f"{describe(x)}, a {x.kind}",
        needed=f"a {kind}",
        hint="a comparison makes a bool of a number",
    )


def widest(*kinds: Kind) -> Kind:
    order: tuple[Kind, ...] = ("bool", "int", "float")
    return max(kinds, key=order.index)


def apply(op: str, *args: Expr) -> Expr:
    """The node for `op`, with its arguments converted to what it takes."""
    if op not in ARITY or len(args) != ARITY[op]:
        raise ExpressionError(
            "This isn't an operation of the language.",
            got=f"{op} of {len(args)} arguments",
            needed="one of " + ", ".join(sorted(ARITY)),
        )
    if op in LOGIC:
        return _folded(Expr(op, tuple(convert(a, "bool") for a in args), "bool"))
    if op == "where":
        kind = widest(args[1].kind, args[2].kind)
        branches = (convert(args[1], kind), convert(args[2], kind))
        return Expr(op, (convert(args[0], "bool"), *branches), kind)
    if op in ("int", "float"):
        return convert(args[0], op)  # type: ignore[arg-type]
    if op in FLOAT_ONLY:
        return _checked(Expr(op, tuple(convert(a, "float") for a in args), "float"))
    if op in INTEGER_ONLY:
        for a in args:
            if a.kind == "float":
                raise ExpressionError(
                    "// and % take integers.",
                    got=f"{describe(a)}, a float",
                    needed="an integer expression",
                    hint="use / for floats",
                )
        return _checked(Expr(op, tuple(convert(a, "int") for a in args), "int"))
    kind = widest(*(a.kind for a in args))
    if op in COMPARISONS:
        if kind == "bool" and op not in ("eq", "ne"):
            kind = "int"
        return _folded(Expr(op, tuple(convert(a, kind) for a in args), "bool"))
    kind = widest(kind, "int")
    return _folded(Expr(op, tuple(convert(a, kind) for a in args), kind))


_FOLD: dict[str, Callable[..., Any]] = {
    "not": python_operator.not_,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "div": python_operator.truediv,
    "minimum": min,
    "maximum": max,
}
_FOLD |= {
    name: getattr(python_operator, name)
    for name in (*COMPARISONS, "add", "sub", "mul", "neg", "abs", *INTEGER_ONLY)
}


def _folded(node: Expr) -> Expr:
    """What Python computes of constants, here and now.

    Emitted text would leave it to Python, too, where ~True is -2 and 1.0 / 0.0 an error.
    """
    if node.op not in _FOLD or any(a.op != "const" for a in node.args):
        return node
    values: list[Any] = [a.value for a in node.args]
    if node.kind == "bool":
        values = [_float32(v) if isinstance(v, float) else v for v in values]
        return const(bool(_FOLD[node.op](*values)))
    value = _FOLD[node.op](*values)
    if value != value:
        raise ExpressionError(
            "NaN can't be a constant of a mask or score.",
            got=describe(node),
            needed="a number",
        )
    return const(value)


def _float32(value: Any) -> float:
    """Rounded to float32, in which masks compare floats; ±inf beyond its range."""
    try:
        rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def _checked(node: Expr) -> Expr:
    if node.op in ("floordiv", "mod", "div") and node.args[1] in (const(0), const(0.0)):
        raise ExpressionError(
            "A mask or score divides by zero.",
            got=describe(node),
            needed="another divisor",
        )
    return _folded(node)


def walk(node: Expr) -> Iterator[Expr]:
    """Every node, parents first."""
    yield node
    for a in node.args:
        yield from walk(a)


def operands(*nodes: Expr) -> tuple[Operand, ...]:
    """The operands read by the expressions, by name; two that share one must be equal."""
    found: dict[str, Operand] = {}
    for root in nodes:
        for node in walk(root):
            if isinstance(node.value, Operand):
                known = found.setdefault(node.value.name, node.value)
                if known != node.value:
                    raise OperandError(
                        f"Two different operands are called {known.name!r}.",
                        got=f"{known.to_dict()} and {node.value.to_dict()}",
                        needed="one name for one operand",
                    )
    return tuple(found[name] for name in sorted(found))


def variables(node: Expr) -> frozenset[str]:
    """The variables that the expression reads, those in indices included."""
    return frozenset(str(n.value) for n in walk(node) if n.op == "var")


def axes(node: Expr) -> frozenset[str]:
    """The letters along which the expression differs: its variables, its operands' axes."""
    lettered = (a for o in operands(node) for a in o.axes if isinstance(a, str))
    return variables(node) | frozenset(lettered)


def substitute(node: Expr, change: Callable[[Expr], Expr | None]) -> Expr:
    """The tree with each node replaced for which `change` returns another."""
    new = change(node)
    if new is not None:
        return new
    args = tuple(substitute(a, change) for a in node.args)
    return node if args == node.args else Expr(node.op, args, node.kind, node.value)


# Infix spellings and Python's precedence, loosest first; unary and postfix bind tighter.
INFIX = {
    "lt": ("<", 1), "le": ("<=", 1), "gt": (">", 1), "ge": (">=", 1),
    "eq": ("==", 1), "ne": ("!=", 1),
    "or": ("|", 2), "and": ("&", 3),
    "add": ("+", 4), "sub": ("-", 4),
    "mul": ("*", 5), "div": ("/", 5), "floordiv": ("//", 5), "mod": ("%", 5),
}  # fmt: skip
UNARY, POSTFIX = 6, 7


def level(node: Expr) -> int:
    """How tightly the node's text binds, as in INFIX."""
    if node.op in INFIX:
        return INFIX[node.op][1]
    negative = node.op == "const" and node.value < 0  # type: ignore[operator]
    return UNARY if node.op in ("neg", "not") or negative else POSTFIX


def infix(op: str, left: tuple[str, int], right: tuple[str, int]) -> str:
    """left op right, each given with its level, in parentheses where it needs them."""
    symbol, own = INFIX[op]
    # comparisons don't chain; - / // % don't associate to the right
    return f"{wrap(left, own + (own == 1))} {symbol} {wrap(right, own + 1)}"


def wrap(part: tuple[str, int], least: int) -> str:
    text, own = part
    return text if own >= least else f"({text})"


def describe(node: Expr) -> str:
    """The expression as a person would write it. For messages, never for code."""
    if node.op in ("const", "var"):
        return str(node.value)
    if node.op in ("int", "float"):
        return describe(node.args[0])
    parts = [(describe(a), _described_level(a)) for a in node.args]
    if node.op in INFIX:
        return infix(node.op, *parts)
    if node.op in ("neg", "not"):
        return ("-" if node.op == "neg" else "~") + wrap(parts[0], POSTFIX)
    inner = ", ".join(text for text, _ in parts)
    if isinstance(node.value, Operand):
        name = node.value.name
        return (
            f"{name}[{inner}]" if node.op == "load" else f"{node.op}({name}, {inner})"
        )
    return f"{node.op}({inner})"


def _described_level(node: Expr) -> int:
    return (
        _described_level(node.args[0]) if node.op in ("int", "float") else level(node)
    )
