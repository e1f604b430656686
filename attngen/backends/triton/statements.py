"""Statements that break over lines as a formatter breaks them."""

from __future__ import annotations


def load(
    name: str,
    operand: str,
    steps: list[str],
    conditions: list[str],
    other: str,
    cast: str,
    *,
    width: int,
    room: int,
) -> list[str]:
    """name = what is read of an operand, so many steps into it.

    Args:
        conditions: where it is read; `other` is there else.
        cast: text behind the read.
        width: for a line.
        room: for one that can't be shorter, which is more before the loops.
    """
    pointer = f"{operand}_ptr + {' + '.join(steps)}"
    keywords = []
    if conditions:
        mask = " & ".join(conditions)
        if len(conditions) == 1 and mask.startswith("(") and mask.count("(") == 1:
            mask = mask[1:-1]
        keywords = [f"mask={mask}", f"other={other}"]
    line = f"{name} = tl.load({', '.join([pointer, *keywords])}){cast}"
    if len(line) <= width:
        return [line]
    lines = [f"{name} = {operand}_ptr"]
    for step in steps:
        if len(lines[-1]) + len(step) + 3 <= width and len(lines) == 1:
            lines[-1] += f" + {step}"
        elif len(name) + len(step) + 4 <= room:
            lines.append(f"{name} += {step}")
        else:
            lines += [f"{name} += (", f"    {step}", ")"]
    line = f"{name} = tl.load({', '.join([name, *keywords])}){cast}"
    if len(line) <= width:
        return [*lines, line]
    if not conditions:
        return [*lines, *call(name, "tl.load", [name], room, cast)]
    there = f"{name}_there"
    lines.append(f"{there} = {keywords[0][5:]}")
    arguments = [name, f"mask={there}", keywords[1]]
    return [*lines, *call(name, "tl.load", arguments, room, cast)]


def call(
    name: str,
    function: str,
    arguments: list[str],
    room: int,
    cast: str = "",
) -> list[str]:
    """name = function(arguments), on several lines where one is too short."""
    inner = ", ".join(arguments)
    line = f"{name} = {function}({inner}){cast}"
    if len(line) <= room:
        return [line]
    lines = [f"{name} = {function}({inner})"]
    if len(lines[0]) > room:
        lines = [f"{name} = {function}(", *(f"    {a}," for a in arguments), ")"]
    return [*lines, f"{name} = {name}{cast}"] if cast else lines
