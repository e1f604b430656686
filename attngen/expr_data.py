"""Expressions as JSON values, and back: data, never text that is evaluated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from attngen.errors import ExpressionError, OperandError
from attngen.expr import (
    ARITY,
    READS,
    VARIABLES,
    Expr,
    apply,
    const,
    convert,
    load,
    searchsorted,
    var,
)
from attngen.operands import Operand


def to_data(node: Expr) -> Any:
    """The tree as JSON values: numbers, variable names, and lists that open with an op."""
    if node.op == "const":
        if isinstance(node.value, float):
            if math.isinf(node.value):
                return ["const", "inf" if node.value > 0 else "-inf"]
            return ["const", node.value]
        return node.value
    if node.op == "var":
        return node.value
    head = [node.op]
    if isinstance(node.value, Operand):
        head.append(node.value.name)
    return head + [to_data(a) for a in node.args]


def from_data(data: Any, declared: Mapping[str, Operand]) -> Expr:
    """The tree that `to_data` wrote, with every node checked as if it had been traced."""
    if isinstance(data, bool | int):
        return const(data)
    if isinstance(data, str) and data in VARIABLES:
        return var(data)
    if isinstance(data, list) and data and isinstance(data[0], str):
        op, *rest = data
        if op == "const" and len(rest) == 1:
            number = rest[0]
            if number in ("inf", "-inf"):
                return const(float(number))
            numeric = isinstance(number, int | float) and not isinstance(number, bool)
            if numeric and number == number:  # NaN isn't a constant of the language
                return convert(const(number), "float")
        elif op in READS and rest and isinstance(rest[0], str):
            if rest[0] not in declared:
                raise OperandError(
                    f"An expression reads an operand {rest[0]!r} that isn't declared.",
                    got=rest[0],
                    needed="one of " + (", ".join(declared) or "none"),
                )
            args = tuple(from_data(a, declared) for a in rest[1:])
            if op == "load":
                return load(declared[rest[0]], args)
            if len(args) == 1:
                return searchsorted(declared[rest[0]], args[0])
        elif op in ARITY:
            return apply(op, *(from_data(a, declared) for a in rest))
        elif op not in ("const", "load"):
            raise ExpressionError(
                f"The language has no operation {op!r:.80}.",
                got=repr(data)[:200],
                needed="one of " + ", ".join(sorted(("const", "load", *ARITY))),
                hint='["where", condition, x, y] chooses between two values',
            )
    raise ExpressionError(
        "An expression in a file can't be read.",
        got=repr(data)[:200],
        needed="a number, one of b, h, q, k, s, or a list that opens with one of "
        + ", ".join((*READS, *ARITY)),
        hint="write it in Python and take what spec.to_json() prints",
    )
