"""Assignments as text, in as many statements as lines of a width need."""

from __future__ import annotations


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


def _statement(name: str, receiver: str, call: list[str], width: int) -> list[str]:
    function, *arguments = call
    line = f"{name} = {receiver}{_invoked(call)}"
    if len(line) <= width or not arguments:
        return [line]
    return [f"{name} = {receiver}{function}(", *(f"    {a}," for a in arguments), ")"]


def _invoked(call: list[str]) -> str:
    function, *arguments = call
    return f"{function}({', '.join(arguments)})" if arguments else function


def tupled(items: list[str]) -> str:
    """The text of a tuple."""
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
