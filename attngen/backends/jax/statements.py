"""Assignments as text, in as many statements as lines of a width need; small texts in them."""

from __future__ import annotations

from attngen.operands import Operand

COMPARED = 32  # entries (XLA:CPU of jax 0.10.2)


def assign(name: str, calls: list[list[str]], width: int) -> list[str]:
    """name = function(arguments).method(…)…, in as many statements as it needs.

    Each call is its function or method, then its arguments.
    """
    line = f"{name} = {''.join(_invoked(c) for c in calls)}"
    if len(line) <= width:
        return [line]
    first, *methods = calls
    lines = _statement(name, "", first, width)
    for method in methods:
        lines += _statement(name, name, method, width)
    return lines


def searched(name: str, operand: Operand, x: str, width: int) -> list[str]:
    """name = how many entries of an operand are at most x, whatever their order.

    Of few entries XLA compares and counts all in one loop; of more it would keep what it
    compares, entries times elements of x.
    """
    (length,) = operand.axes
    assert isinstance(length, int)
    if length > COMPARED:
        call = [f"jnp.sort({operand.name})", x, 'side="right"']
    else:
        call = [operand.name, x, 'side="right"', 'method="compare_all"']
    return assign(name, [["jnp.searchsorted", *call]], width)


def _statement(name: str, receiver: str, call: list[str], width: int) -> list[str]:
    function, *arguments = call
    line = f"{name} = {receiver}{_invoked(call)}"
    if len(line) <= width or not arguments:
        return [line]
    return [f"{name} = {receiver}{function}(", *(f"    {a}," for a in arguments), ")"]


def wrapped(line: str, width: int) -> list[str]:
    """An assignment of one call in as many lines as a formatter would take."""
    start, bracket, rest = line.partition("(")
    plain = all(c.isalnum() or c in "_.= ,[]" for c in start)
    if len(line) <= width or not bracket or not plain or not rest.endswith(")"):
        return [line]
    arguments, depth = [""], 0
    for c in rest[:-1]:
        depth += (c in "([") - (c in ")]")
        if depth < 0:  # the call ends before the line does
            return [line]
        if c == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += c
    arguments = [a.strip() for a in arguments]
    joined = f"    {', '.join(arguments)}"
    if len(joined) <= width:
        return [f"{start}(", joined, ")"]
    return [f"{start}(", *(f"    {a}," for a in arguments), ")"]


def rebound(function: str, names: list[str], width: int) -> list[str]:
    """names = function(names), in as many lines as a formatter would take."""
    joined = ", ".join(names)
    if len(f"{joined} = {function}(") <= width:
        return wrapped(f"{joined} = {function}({joined})", width)
    each = [f"    {name}," for name in names]
    arguments = [f"    {joined}"] if len(joined) <= width - 4 else each
    return ["(", *each, f") = {function}(", *arguments, ")"]


def _invoked(call: list[str]) -> str:
    function, *arguments = call
    return f"{function}({', '.join(arguments)})" if arguments else function


def as_tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
