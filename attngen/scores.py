"""The score library, each score written in the language itself (see tracing.score).

A spec's scores are applied in their order, after the scale and before the mask.
"""

from __future__ import annotations

import math
from typing import Any

from attngen.errors import ExpressionError
from attngen.masks import _count, _letter
from attngen.operands import Axis
from attngen.symbols import maximum, minimum, tanh
from attngen.tracing import Score, library, operand, score


@library
def softcap(cap: float) -> Score:
    """cap · tanh(s / cap): scores stay within ±cap (Gemma 2, arXiv 2408.00118).

    Raises:
        ExpressionError: cap isn't a positive number.
    """
    if (
        isinstance(cap, bool)
        or not isinstance(cap, int | float)
        or not 0 < cap < math.inf
    ):
        raise ExpressionError(
            "softcap's cap can't be that.", got=repr(cap), needed="cap > 0"
        )
    return score(lambda s, b, h, q, k: float(cap) * tanh(s / float(cap)))


@library
def alibi(slopes: str = "slopes") -> Score:
    """s + slope[h] · (k − q): attention with linear biases (arXiv 2108.12409).

    Args:
        slopes: the name of the float32 operand [h].
    """
    of = operand(slopes, axes="h", dtype="float32")
    return score(lambda s, b, h, q, k: s + of[h] * (k - q))


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
    place = {"b": 0, "h": 1, "q": 2, "k": 3}
    return score(lambda s, *at: s + values[tuple(at[place[_letter(a)]] for a in axes)])


@library
def relative_buckets(
    table: str = "relative_bias",
    buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
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
    """
    _count("relative_buckets' buckets", buckets)
    _count("relative_buckets' max_distance", max_distance)
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
        distance = abs(k - q) if bidirectional else maximum(q - k, 0)
        bucket = minimum(distance, near)
        for start in starts:
            bucket = bucket + (distance >= start)
        return s + of[h, bucket + side * (k > q) if bidirectional else bucket]

    return score(add)


def _reaches(distance: int, near: int, far: int, step: int, steps: int) -> bool:
    """Whether (distance / near) ** steps >= (far / near) ** step, in exact integers."""
    return bool(distance**steps * near**step >= far**step * near**steps)


LIBRARY: dict[str, Any] = {
    f.__name__: f for f in (softcap, alibi, bias, relative_buckets)
}
