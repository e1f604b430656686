"""Masks of tokens that lie on a line, an image or a volume, row by row."""

from __future__ import annotations

from typing import Any

from attngen.arguments import coordinates, on_grid, sizes
from attngen.errors import ExpressionError
from attngen.symbols import maximum, minimum
from attngen.tracing import Mask, library, mask

Sizes = int | tuple[int, ...]


@library
def neighborhood(grid: Sizes, window: Sizes, dilation: Sizes = 1) -> Mask:
    """Neighborhood attention (NATTEN, arXiv 2204.07143; dilated 2209.15001).

    A query sees the window around it. At a border the window is moved inwards, so that it
    always holds as many keys. With a dilation these are every dilation-th; a query then
    sees keys of its own residue only, and borders are those of its residue.

    Args:
        grid: how many tokens there are on each of 1 to 3 axes, e.g. (height, width); the
            last runs fastest. Positions outside neither see nor are seen.
        window: how many keys on each axis; odd.
        dilation: on each axis.

    Raises:
        ExpressionError: an even window, or one that is longer than its axis:
            window · dilation > grid.
    """
    grid = sizes("neighborhood's grid", grid)
    window = sizes("neighborhood's window", window, 1, len(grid))
    dilation = sizes("neighborhood's dilation", dilation, 1, len(grid))
    for length, wide, step in zip(grid, window, dilation, strict=True):
        if wide % 2 == 0 or wide * step > length:
            raise ExpressionError(
                "neighborhood's window doesn't fit.",
                got=f"window={window}, dilation={dilation}, grid={grid}",
                needed="odd windows, with window * dilation <= grid on each axis",
            )

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = on_grid(grid, q)
        axes = zip(coordinates(grid, q), coordinates(grid, k), strict=True)
        for i, (q_at, k_at) in enumerate(axes):
            found = found & _near(q_at, k_at, grid[i], window[i], dilation[i])
        return found

    return mask(seen)


def _near(q: Any, k: Any, length: int, window: int, dilation: int) -> Any:
    """Whether a key is in a query's window on one axis."""
    if dilation == 1:
        first = minimum(maximum(q - window // 2, 0), length - window)
        return (k >= first) & (k < first + window)
    last = (length - 1 - q % dilation) // dilation - (window - 1)
    first = minimum(maximum(q // dilation - window // 2, 0), last)
    near = (k // dilation >= first) & (k // dilation < first + window)
    return near & (k % dilation == q % dilation)


@library
def shifted_windows(grid: Sizes, window: Sizes, shift: Sizes = 0) -> Mask:
    """Windows of a grid, moved by a shift and cut at its borders (Swin, arXiv 2103.14030).

    Tokens see each other in the same window. Swin rolls the grid by -shift, splits it into
    windows and masks what came from the other side; this is what is then seen, without
    rolling anything. Its layers take shift=0 and window // 2 in turns.

    Args:
        grid: how many tokens there are on each of 1 to 3 axes, e.g. (height, width); the
            last runs fastest. Positions outside neither see nor are seen.
        window: how long windows are on each axis; the last may be cut.
        shift: by how much they are moved on each axis, 0 <= shift < window.

    Raises:
        ExpressionError: a shift as long as its window, or a size that isn't one.
    """
    grid = sizes("shifted_windows' grid", grid)
    window = sizes("shifted_windows' window", window, 1, len(grid))
    shift = sizes("shifted_windows' shift", shift, 0, len(grid))
    if any(s >= w for s, w in zip(shift, window, strict=True)):
        raise ExpressionError(
            "shifted_windows' shift is too long.",
            got=f"shift={shift}, window={window}",
            needed="a shift of less than the window on each axis",
        )

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = on_grid(grid, q) & on_grid(grid, k)
        axes = zip(coordinates(grid, q), coordinates(grid, k), strict=True)
        for i, (q_at, k_at) in enumerate(axes):
            more = window[i] - shift[i] if shift[i] else 0
            same = (q_at + more) // window[i] == (k_at + more) // window[i]
            found = found & same
        return found

    return mask(seen)
