"""The score library, each score written in the language itself (see tracing.score).

A spec's scores are applied in their order, after the scale and before the mask. A learned
sink for each head is a field of the spec (`sink=True`), not a score.
"""

from __future__ import annotations

import math
from typing import Any

from attngen.arguments import (
    Positions,
    at_axes,
    coordinates,
    count,
    places,
    positive,
    sizes,
)
from attngen.errors import ExpressionError
from attngen.operands import Axis
from attngen.symbols import exp, maximum, minimum, tanh, where
from attngen.tracing import Score, library, operand, score


@library
def softcap(cap: float | str) -> Score:
    """cap · tanh(s / cap): scores stay within ±cap (Gemma 2, arXiv 2408.00118).

    Args:
        cap: a positive number, or the name of a float32 operand [h].

    Raises:
        ExpressionError: cap isn't a positive number.
    """
    if isinstance(cap, str):
        caps = operand(cap, axes="h", dtype="float32")
        return score(lambda s, b, h, q, k: caps[h] * tanh(s / caps[h]))
    number = positive("softcap's cap", cap)
    return score(lambda s, b, h, q, k: number * tanh(s / number))


@library
def temperature(
    name: str = "temperature",
    axes: tuple[Axis, ...] | str = "h",
    dtype: str = "float32",
) -> Score:
    """s / temperature: of each head, say (as Swin v2's cosine attention, arXiv 2111.09883).

    Args:
        name: the operand's name.
        axes: which of b, h, q, k it has, in order; the missing ones are broadcast.
        dtype: of the operand.
    """
    values = operand(name, axes=tuple(axes), dtype=dtype)
    return score(lambda s, *at: s / values[at_axes(axes, *at)])


@library
def alibi(
    slopes: str | None = None, heads: int | None = None, positions: Positions = None
) -> Score:
    """s + slope[h] · (k − q): attention with linear biases (arXiv 2108.12409).

    Args:
        slopes: the name of the float32 operand [h] ("slopes" unless given).
        heads: instead of it, how many query heads there are: then slopes are the paper's,
            2^(−8 (h + 1) / heads); where heads is no power of two, those of the power n
            below it, and then every other one of 2n.
        positions: where tokens stand, as for `masks.causal`.

    Raises:
        ExpressionError: slopes and heads are given, or heads < 1.
    """
    of_q, of_k = places(positions)
    if heads is None:
        of = operand("slopes" if slopes is None else slopes, axes="h", dtype="float32")
        return score(lambda s, b, h, q, k: s + of[h] * (of_k(b, k) - of_q(b, q)))
    if slopes is not None:
        raise ExpressionError(
            "alibi takes slopes or heads.",
            got=f"slopes={slopes!r}, heads={heads!r}",
            needed="one of them",
        )
    power = 1 << (count("alibi's heads", heads, 1).bit_length() - 1)
    step = 8 * math.log(2) / power

    def add(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        nth = h + 1
        if power != heads:
            nth = where(h < power, nth, h - power + 0.5)
        return s + exp(nth * -step) * (of_k(b, k) - of_q(b, q))

    return score(add)


@library
def decay(
    rates: str = "decay",
    grid: int | tuple[int, ...] | None = None,
    positions: Positions = None,
) -> Score:
    """s + rate[h] · distance: each token away multiplies a weight by exp(rate), < 1.

    The exponential decay γ of RetNet (arXiv 2307.08621) as a bias of log γ · |q − k|; on a
    grid, by the Manhattan distance (RMT, arXiv 2309.11523).

    Args:
        rates: the name of the float32 operand [h] that holds log γ. RetNet's are
            np.log1p(-(2.0 ** (-5 - np.arange(heads)))).
        grid: of the tokens, e.g. (height, width), the last axis runs fastest; None: a line.
        positions: where tokens stand, as for `masks.causal`.

    Raises:
        ExpressionError: a size is below 1, or a grid and positions are given.
    """
    of_q, of_k = places(positions)
    if positions is not None and grid is not None:
        raise ExpressionError(
            "decay takes a grid or positions.",
            got=f"grid={grid!r}, positions={positions!r}",
            needed="one of them",
        )
    extents = (1,) if grid is None else sizes("decay's grid", grid)
    of = operand(rates, axes="h", dtype="float32")

    def add(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        q_at, k_at = (coordinates(extents, p) for p in (of_q(b, q), of_k(b, k)))
        distance: Any = abs(q_at[0] - k_at[0])
        for i, j in zip(q_at[1:], k_at[1:], strict=True):
            distance = distance + abs(i - j)
        return s + of[h] * distance

    return score(add)


@library
def bias(
    name: str = "bias", axes: tuple[Axis, ...] | str = "bhqk", dtype: str = "float32"
) -> Score:
    """s + bias: a dense operand; −inf in it leaves the key out.

    Args:
        name: the operand's name.
        axes: which of b, h, q, k it has, in order; the missing ones are broadcast.
        dtype: of the operand.
    """
    values = operand(name, axes=tuple(axes), dtype=dtype)
    return score(lambda s, *at: s + values[at_axes(axes, *at)])


@library
def relative_table(
    grid: int | tuple[int, ...],
    window: int | tuple[int, ...] | None = None,
    table: str = "relative_table",
) -> Score:
    """s + table[h, q − k]: a learned bias for each offset (Swin, arXiv 2103.14030).

    On each axis the offset q − k, from −(n − 1) to n − 1, is moved to 0 … 2n − 2; entries
    lie one behind the other, the last axis fastest: Swin's table, transposed.

    Args:
        grid: how many tokens there are on each of 1 to 3 axes, e.g. (height, width); the
            last runs fastest.
        window: n on each axis; None: all of the grid. Farther offsets read NaN, so a mask
            must hide those (shifted_windows with the same window does).
        table: the name of the float32 operand [h, (2 n_1 − 1) · (2 n_2 − 1) …].

    Raises:
        ExpressionError: a size that isn't one, or a window larger than the grid.
    """
    grid = sizes("relative_table's grid", grid)
    reach = grid
    if window is not None:
        reach = sizes("relative_table's window", window, 1, len(grid))
    if any(n > length for n, length in zip(reach, grid, strict=True)):
        raise ExpressionError(
            "relative_table's window doesn't fit.",
            got=f"window={reach}, grid={grid}",
            needed="a window of at most the grid on each axis",
        )
    entries = math.prod(2 * n - 1 for n in reach)
    of = operand(table, axes=("h", entries), dtype="float32")

    def add(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        index: Any = None
        inside: Any = None
        axes = zip(coordinates(grid, q), coordinates(grid, k), reach, strict=True)
        for q_at, k_at, n in axes:
            offset = q_at - k_at
            near = (offset > -n) & (offset < n)
            inside = near if inside is None else inside & near
            moved = offset + (n - 1)
            index = moved if index is None else index * (2 * n - 1) + moved
        return s + of[h, index if reach == grid else where(inside, index, -1)]

    return score(add)


@library
def relative_buckets(
    table: str = "relative_bias",
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
    positions: Positions = None,
) -> Score:
    """s + table[h, bucket(k − q)]: T5's relative position bias (arXiv 1910.10683).

    Near distances have a bucket each, far ones share logarithmic ones. T5 rounds a float
    logarithm down; here each bucket's first distance is a constant, so that the buckets
    are exact integers on every backend.

    Args:
        table: the name of the float32 operand [h, buckets].
        buckets: how many, both directions together where bidirectional.
        max_distance: from where on all distances share the last bucket.
        bidirectional: True for an encoder; False gives every future key bucket 0.
        positions: where tokens stand, as for `masks.causal`.
    """
    of_q, of_k = places(positions)
    count("relative_buckets' buckets", buckets)
    count("relative_buckets' max_distance", max_distance)
    side = buckets // 2 if bidirectional else buckets
    near = side // 2
    if near < 1 or max_distance <= near:
        raise ExpressionError(
            "relative_buckets can't be laid out.",
            got=f"buckets={buckets}, max_distance={max_distance}",
            needed="at least 4 buckets (2 where one-sided) and max_distance > buckets / 4",
        )
    # distance d ≥ near falls into near + ⌊log(d / near) / log(max / near) · (side − near)⌋
    starts = []
    distance = near
    for step in range(1, side - near):
        while not _reaches(distance, near, max_distance, step, side - near):
            distance += 1
        starts.append(distance)
    of = operand(table, axes=("h", buckets), dtype="float32")

    def add(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        q, k = of_q(b, q), of_k(b, k)
        distance = abs(k - q) if bidirectional else maximum(q - k, 0)
        bucket = minimum(distance, near)
        for start in starts:
            bucket = bucket + (distance >= start)
        return s + of[h, bucket + side * (k > q) if bidirectional else bucket]

    return score(add)


def _reaches(distance: int, near: int, far: int, step: int, steps: int) -> bool:
    """Whether (distance / near) ** steps >= (far / near) ** step, in exact integers."""
    return bool(distance**steps * near**step >= far**step * near**steps)


_ALL = (softcap, temperature, alibi, decay, bias, relative_table, relative_buckets)
LIBRARY: dict[str, Any] = {f.__name__: f for f in _ALL}
