"""The mask library, each mask written in the mask language itself (see tracing.mask).

Masks relate positions; combine them with `&`, `|` and `~`. Lengths of keys that differ
between batches are a field of the spec (`kv_lengths=True`), not a mask.
"""

from __future__ import annotations

from typing import Any

from attngen.errors import ExpressionError
from attngen.operands import Axis
from attngen.tracing import Mask, library, mask, operand


def _count(name: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ExpressionError(
            f"{name} can't be {value!r}.",
            got=repr(value),
            needed=f"an integer of at least {least}",
        )
    return value


@library
def causal() -> Mask:
    """A query sees the keys up to its own position: k <= q."""
    return mask(lambda b, h, q, k: k <= q)


@library
def sliding_window(left: int, right: int | None = None) -> Mask:
    """A query sees `left` keys that end with its own, and `right` after it.

    q - left < k, and k <= q + right unless right is None (then the future isn't limited:
    combine with causal()). Mistral's and Gemma's window of 4096 is
    `causal() & sliding_window(4096)`: the query's own key counts among the 4096.

    Raises:
        ExpressionError: left < 1, or right < 0.
    """
    _count("sliding_window's left", left, 1)
    if right is None:
        return mask(lambda b, h, q, k: k > q - left)
    _count("sliding_window's right", right)
    return mask(lambda b, h, q, k: (k > q - left) & (k <= q + right))


@library
def prefix(length: int | str) -> Mask:
    """Every query sees the first keys: k < length. Prefix-LM is `prefix(n) | causal()`.

    Args:
        length: how many, or the name of an int32 operand [b] that says so for each batch.
    """
    if isinstance(length, str):
        lengths = operand(length, axes="b", dtype="int32")
        return mask(lambda b, h, q, k: k < lengths[b])
    _count("prefix's length", length)
    return mask(lambda b, h, q, k: k < length)


@library
def documents(ids: str = "document_ids") -> Mask:
    """A query sees the keys of its own document.

    Args:
        ids: the name of the int32 operand [b, k] that holds each token's document.
            Queries and keys are the same tokens, so q_len may be at most kv_len.
    """
    of = operand(ids, axes="bk", dtype="int32")
    return mask(lambda b, h, q, k: of[b, q] == of[b, k])


@library
def dense(name: str = "mask", axes: tuple[Axis, ...] | str = "bhqk") -> Mask:
    """A boolean operand that says for each pair whether the key is seen.

    Args:
        name: the operand's name.
        axes: which of b, h, q, k it has, in order; the missing ones are broadcast.
    """
    values = operand(name, axes=tuple(axes), dtype="bool")
    letters = {"b": 0, "h": 1, "q": 2, "k": 3}
    return mask(lambda *at: values[tuple(at[letters[_letter(a)]] for a in axes)])


def _letter(axis: Axis) -> str:
    if axis not in ("b", "h", "q", "k"):
        raise ExpressionError(
            "A dense operand has the axes b, h, q, k.",
            got=repr(axis),
            needed="b, h, q or k",
        )
    return str(axis)


LIBRARY: dict[str, Any] = {
    f.__name__: f for f in (causal, sliding_window, prefix, documents, dense)
}
