"""Masks that a boolean operand holds: of pairs, or of blocks."""

from __future__ import annotations

from attngen.arguments import at_axes, sizes
from attngen.errors import ExpressionError
from attngen.operands import Axis
from attngen.tracing import Mask, library, mask, operand


@library
def dense(name: str = "mask", axes: tuple[Axis, ...] | str = "bhqk") -> Mask:
    """A boolean operand that says for each pair whether the key is seen.

    Args:
        name: the operand's name.
        axes: which of b, h, q, k it has, in order; the missing ones are broadcast.
    """
    values = operand(name, axes=tuple(axes), dtype="bool")
    return mask(lambda *at: values[at_axes(axes, *at)])


@library
def block_sparse(
    blocks: tuple[int, int],
    block: int | tuple[int, int] = 128,
    name: str = "block_mask",
    axes: str = "",
) -> Mask:
    """A boolean operand that says for each block of queries and of keys whether it is seen.

    Blocks are of positions: the query at position q lies in block q // block. With a
    q_offset or kv_offset, a call is a part of the square that the operand describes. Where
    a position could lie outside of it (blocks · block too few, or an offset that isn't known
    before run time), the spec is refused.

    Args:
        blocks: how many of queries and of keys, ceil(length / block).
        block: positions in each, or two numbers: of queries, of keys.
        name: of the operand [*axes, blocks[0], blocks[1]].
        axes: "b", "h" or "bh" where batches or heads differ.

    Raises:
        ExpressionError: a size below 1, or other axes.
    """
    of_q, of_k = sizes("block_sparse's blocks", blocks, 1, 2)
    wide, long = sizes("block_sparse's block", block, 1, 2)
    if axes not in ("", "b", "h", "bh", "hb"):
        raise ExpressionError(
            "A block mask has the axes b and h, before its blocks.",
            got=repr(axes),
            needed='"", "b", "h" or "bh"',
        )
    values = operand(name, axes=(*axes, of_q, of_k), dtype="bool")

    def at(b: object, h: object, q: object, k: object) -> object:
        return values[(*at_axes(axes, b, h, q, k), q // wide, k // long)]  # type: ignore[operator]

    return mask(at)
