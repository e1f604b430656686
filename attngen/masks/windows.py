"""Masks of the distance between two tokens, and of where they stand."""

from __future__ import annotations

from attngen.arguments import Positions, count, is_int, places
from attngen.errors import ExpressionError
from attngen.tracing import Mask, library, mask, operand


@library
def causal(positions: Positions = None) -> Mask:
    """A query sees the keys up to its own position: k <= q.

    Args:
        positions: None: index + offset. The name of an int32 operand [b, k] holds others,
            of queries and keys that are the same tokens; two names (of operands [b, q] and
            [b, k]) of queries and keys that aren't. They may restart with each document;
            then combine with documents().
    """
    of_q, of_k = places(positions)
    return mask(lambda b, h, q, k: of_k(b, k) <= of_q(b, q))


@library
def sliding_window(
    left: int, right: int | None = None, positions: Positions = None
) -> Mask:
    """A query sees `left` keys that end with its own, and `right` after it.

    q - left < k, and k <= q + right unless right is None (then the future isn't limited:
    combine with causal()). Mistral's and Gemma's window of 4096 is
    `causal() & sliding_window(4096)`: the query's own key counts among the 4096.

    Args:
        positions: as for `causal`.

    Raises:
        ExpressionError: left < 1, or right < 0.
    """
    count("sliding_window's left", left, 1)
    of_q, of_k = places(positions)
    if right is None:
        return mask(lambda b, h, q, k: of_k(b, k) > of_q(b, q) - left)
    count("sliding_window's right", right)
    return mask(
        lambda b, h, q, k: (
            (of_k(b, k) > of_q(b, q) - left) & (of_k(b, k) <= of_q(b, q) + right)
        )
    )


@library
def dilated_window(left: int, dilation: int, right: int | None = None) -> Mask:
    """A window of every dilation-th key (Longformer, arXiv 2004.05150, section 3.1).

    A query sees `left` keys that end with its own, at distances 0, dilation, 2 · dilation …,
    and `right` after it; right=None doesn't limit the future.

    Raises:
        ExpressionError: left or dilation < 1, or right < 0.
    """
    count("dilated_window's left", left, 1)
    count("dilated_window's dilation", dilation, 1)
    window = mask(
        lambda b, h, q, k: (k > q - left * dilation) & ((q - k) % dilation == 0)
    )
    if right is None:
        return window
    reach = count("dilated_window's right", right) * dilation
    return window & mask(lambda b, h, q, k: k <= q + reach)


@library
def prefix(length: int | str) -> Mask:
    """Every query sees the first keys: k < length. Prefix-LM is `prefix(n) | causal()`.

    Args:
        length: how many, or the name of an int32 operand [b] that says so for each batch.
    """
    if isinstance(length, str):
        lengths = operand(length, axes="b", dtype="int32")
        return mask(lambda b, h, q, k: k < lengths[b])
    count("prefix's length", length)
    return mask(lambda b, h, q, k: k < length)


@library
def streaming_llm(first: int, window: int) -> Mask:
    """The first keys, and the last before each query (StreamingLLM, arXiv 2309.17453).

    Args:
        first: how many keys are seen from everywhere ("attention sinks"; the paper has 4).
        window: keys that end with the query's own.

    Raises:
        ExpressionError: first < 0, or window < 1.
    """
    count("streaming_llm's first", first)
    count("streaming_llm's window", window, 1)
    return mask(lambda b, h, q, k: (k <= q) & ((k < first) | (k > q - window)))


@library
def longformer(radius: int, tokens: int | str) -> Mask:
    """A window on both sides, and global tokens (Longformer, arXiv 2004.05150).

    A key is seen from up to `radius` tokens away (the paper's window is 2 · radius); global
    tokens see every key, and every query sees them.

    Args:
        radius: of the window, its own token aside.
        tokens: how many tokens at the start are global, or the name of a boolean operand
            [b, k] that says which are. Queries and keys are the same tokens, so q_len may
            then be at most kv_len.

    Raises:
        ExpressionError: radius or tokens < 0.
    """
    count("longformer's radius", radius)
    near = mask(lambda b, h, q, k: (k >= q - radius) & (k <= q + radius))
    if isinstance(tokens, str):
        of = operand(tokens, axes="bk", dtype="bool")
        return near | mask(lambda b, h, q, k: of[b, q] | of[b, k])
    count("longformer's tokens", tokens)
    return near | mask(lambda b, h, q, k: (q < tokens) | (k < tokens))


@library
def strided(stride: int) -> Mask:
    """Sparse Transformer's strided pattern (arXiv 1904.10509): both its heads merged.

    A query sees the `stride` keys that end with its own, and every stride-th before.

    Raises:
        ExpressionError: stride < 1.
    """
    count("strided's stride", stride, 1)
    return mask(
        lambda b, h, q, k: (k <= q) & ((k > q - stride) | ((q - k) % stride == 0))
    )


@library
def fixed(stride: int, summary: int = 1) -> Mask:
    """Sparse Transformer's fixed pattern (arXiv 1904.10509): both its heads merged.

    A query sees the keys before it in its own block of `stride`, and the last `summary`
    keys of every earlier block.

    Raises:
        ExpressionError: stride < 1, or summary not from 1 to stride.
    """
    count("fixed's stride", stride, 1)
    if not is_int(summary) or not 1 <= summary <= stride:
        raise ExpressionError(
            "fixed's summary can't be that.",
            got=repr(summary),
            needed=f"an integer from 1 to the stride, {stride}",
        )
    return mask(
        lambda b, h, q, k: (
            (k <= q) & ((k // stride == q // stride) | (k % stride >= stride - summary))
        )
    )
