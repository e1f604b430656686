"""What library masks and scores take: counts, numbers, names, axes, positions, grids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attngen.errors import ExpressionError
from attngen.operands import Axis
from attngen.tracing import operand

Positions = str | tuple[str, str] | None
Places = tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def count(name: str, value: object, least: int = 0) -> int:
    """An integer of at least so much."""
    if not is_int(value) or value < least:  # type: ignore[operator]
        raise ExpressionError(
            f"{name} can't be {value!r}.",
            got=repr(value),
            needed=f"an integer of at least {least}",
        )
    return value  # type: ignore[return-value]


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ExpressionError(
            f"{name} can't be that.", got=repr(value), needed="a positive number"
        )
    return float(value)  # type: ignore[arg-type]


def at_axes(axes: tuple[Axis, ...] | str, b: Any, h: Any, q: Any, k: Any) -> Any:
    """The indices of an operand that has some of the axes b, h, q, k, in its order."""
    letters = {"b": b, "h": h, "q": q, "k": k}
    for axis in axes:
        if axis not in letters:
            raise ExpressionError(
                "A dense operand has the axes b, h, q, k.",
                got=repr(axis),
                needed="b, h, q or k",
            )
    return tuple(letters[str(axis)] for axis in axes)


def places(positions: Positions) -> Places:
    """Where a query stands and where a key does: functions of (b, q) and of (b, k).

    Args:
        positions: None: index + offset, as everywhere. A name: the int32 operand [b, k] of
            that name, for queries and keys that are the same tokens. Two names: of an
            operand [b, q] and one [b, k].
    """
    if positions is None:
        return (lambda b, q: q), (lambda b, k: k)
    if isinstance(positions, str):
        of = operand(positions, axes="bk", dtype="int32")
        return (lambda b, q: of[b, q]), (lambda b, k: of[b, k])
    if not isinstance(positions, tuple) or len(positions) != 2:
        raise ExpressionError(
            "positions can't be that.",
            got=repr(positions),
            needed="a name, or two: of the queries' positions and of the keys'",
        )
    of_q = operand(positions[0], axes="bq", dtype="int32")
    of_k = operand(positions[1], axes="bk", dtype="int32")
    return (lambda b, q: of_q[b, q]), (lambda b, k: of_k[b, k])


def sizes(name: str, value: object, least: int = 1, axes: int = 0) -> tuple[int, ...]:
    """One to three integers, of at least so much; one number stands for all axes.

    Args:
        axes: how many are needed; 0: as many as are given.
    """
    if is_int(value):
        value = (value,) * max(axes, 1)
    given = value if isinstance(value, tuple) else ()
    if not 1 <= len(given) <= 3 or (axes and len(given) != axes):
        many = f"{axes} of them" if axes else "a tuple of 2 or 3"
        raise ExpressionError(
            f"{name} can't be {value!r}.",
            got=repr(value),
            needed=f"an integer, or {many}",
        )
    return tuple(count(name, n, least) for n in given)


def coordinates(grid: tuple[int, ...], position: Any) -> list[Any]:
    """Where a position lies on a grid, whose last axis runs fastest."""
    found: list[Any] = []
    stride = math.prod(grid)
    for i, length in enumerate(grid):
        stride //= length
        at = position if stride == 1 else position // stride
        found.append(at if i == 0 else at % length)
    return found


def on_grid(grid: tuple[int, ...], position: Any) -> Any:
    """Whether a position lies on a grid."""
    return (position >= 0) & (position < math.prod(grid))
