"""Masks of which tokens belong together: documents, packed sequences, lengths, trees."""

from __future__ import annotations

from typing import Any

from attngen.arguments import count
from attngen.errors import ExpressionError
from attngen.masks.windows import prefix as first_keys
from attngen.symbols import OperandSymbol, minimum, searchsorted
from attngen.tracing import Mask, library, mask, operand


@library
def documents(
    ids: str | None = None, *, q_ids: str | None = None, k_ids: str | None = None
) -> Mask:
    """A query sees the keys of its own document (segment).

    Args:
        ids: the name of the int32 operand [b, k] that holds each token's document
            ("document_ids" unless given). Queries and keys are the same tokens, so q_len
            may be at most kv_len.
        q_ids, k_ids: instead of it, where they aren't (cross-attention): the names of two
            int32 operands, [b, q] and [b, k].

    Raises:
        ExpressionError: one of q_ids and k_ids alone, or with ids.
    """
    if q_ids is None and k_ids is None:
        of = operand("document_ids" if ids is None else ids, axes="bk", dtype="int32")
        return mask(lambda b, h, q, k: of[b, q] == of[b, k])
    if q_ids is None or k_ids is None or ids is not None:
        raise ExpressionError(
            "documents takes ids, or q_ids and k_ids.",
            got=f"ids={ids!r}, q_ids={q_ids!r}, k_ids={k_ids!r}",
            needed="ids where queries and keys are the same tokens, else both others",
        )
    of_q = operand(q_ids, axes="bq", dtype="int32")
    of_k = operand(k_ids, axes="bk", dtype="int32")
    return mask(lambda b, h, q, k: of_q[b, q] == of_k[b, k])


@library
def packed(
    sequences: int, q_offsets: str = "cu_seqlens", k_offsets: str | None = None
) -> Mask:
    """A query sees the keys of its own sequence, of several packed one behind the other.

    Offsets are cumulative, as FlashAttention's `cu_seqlens`: sequence i holds the tokens at
    positions offsets[i] to offsets[i + 1] - 1. Sequences may be empty; tokens before the
    first offset and from the last on neither see nor are seen. With causal() each query
    sees what is before it in its sequence, where queries and keys are the same tokens.

    Each token is compared with the offsets in every tile: of hundreds of sequences,
    `documents` of ids costs less.

    Args:
        sequences: how many, N.
        q_offsets: the name of the int32 operand [N + 1] of the queries' offsets.
        k_offsets: of the keys', where these aren't the same tokens; then say q_offset=0.

    Raises:
        ExpressionError: sequences < 1.
    """
    of_q, of_k = _offsets("packed", sequences, q_offsets, k_offsets or q_offsets)

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        after = searchsorted(of_q, q)  # 1 in the first sequence
        inside = (after > 0) & (after <= sequences)
        return inside & (after == searchsorted(of_k, k))

    return mask(seen)


@library
def packed_causal(
    sequences: int, q_offsets: str = "cu_seqlens_q", k_offsets: str = "cu_seqlens_k"
) -> Mask:
    """`packed`, and causal within each sequence, whose last query stands at its last key.

    That is FlashAttention's causal attention of variable lengths (arXiv 2307.08691), where
    a sequence has fewer queries than keys (a chunk of a prefill, a few steps of decode).
    Where both have the same offsets, `packed(n) & causal()` says the same with less.

    Args:
        sequences, q_offsets, k_offsets: as for `packed`. Say q_offset=0 (an offset that
            only run time knows asks for 64-bit integers).
    """
    of_q, of_k = _offsets("packed_causal", sequences, q_offsets, k_offsets)

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        after_q, after_k = searchsorted(of_q, q), searchsorted(of_k, k)
        q_end = of_q[minimum(after_q, sequences)]
        k_end = of_k[minimum(after_k, sequences)]
        inside = (after_q > 0) & (after_q <= sequences)
        return inside & (after_q == after_k) & (k - k_end <= q - q_end)

    return mask(seen)


def _offsets(name: str, sequences: int, *names: str) -> list[OperandSymbol]:
    count(f"{name}'s sequences", sequences, 1)
    return [operand(n, axes=(sequences + 1,), dtype="int32") for n in names]


@library
def lengths(keys: str | None = "key_lengths", queries: str | None = None) -> Mask:
    """Only the first keys and queries of each batch are there.

    Prefer the spec's own `kv_lengths=True` and `q_lengths=True`: they skip what isn't
    there, never read it, and place q_offset="bottom_right" at the last key that is. This
    mask counts positions, and can be joined with others by `|` and `~`.

    Args:
        keys: the name of the int32 operand [b] of how many keys there are; None: all.
        queries: the name of another, of the queries; None: all.

    Raises:
        ExpressionError: neither is given.
    """
    if keys is None and queries is None:
        raise ExpressionError(
            "lengths of neither keys nor queries.",
            got="keys=None, queries=None",
            needed="the name of an operand [b] for at least one of them",
        )
    there = []
    if keys is not None:
        of_k = operand(keys, axes="b", dtype="int32")
        there.append(mask(lambda b, h, q, k: k < of_k[b]))
    if queries is not None:
        of_q = operand(queries, axes="b", dtype="int32")
        there.append(mask(lambda b, h, q, k: q < of_q[b]))
    return there[0] if len(there) == 1 else there[0] & there[1]


@library
def tree(
    enter: str = "tree_enter",
    exit: str = "tree_exit",
    q_enter: str | None = None,
    prefix: int | str | None = None,
) -> Mask:
    """A token of a tree sees itself and its ancestors: tree attention for speculation.

    (SpecInfer, arXiv 2305.09781; Medusa, arXiv 2401.10774.) A walk over the tree numbers
    its tokens in preorder: `enter` is a token's number, `exit` the first number after all
    of its descendants. Key k is the query or its ancestor where
    enter[k] <= enter[q] < exit[k].

    Args:
        enter, exit: the names of two int32 operands [b, k]. A key with an enter of 0 and an
            exit beyond all numbers is seen by every token: so the tokens that were decoded
            before the tree can be told, or by `prefix`.
        q_enter: the name of the int32 operand [b, q] of the queries' numbers, where these
            are only the tree's tokens, behind cached keys; None: all keys are queries, too.
        prefix: how many keys come before the tree, which all queries see: a number, or the
            name of an int32 operand [b].
    """
    of_enter, of_exit = (operand(n, axes="bk", dtype="int32") for n in (enter, exit))
    of_q = of_enter if q_enter is None else operand(q_enter, axes="bq", dtype="int32")
    ancestors = mask(
        lambda b, h, q, k: (of_enter[b, k] <= of_q[b, q]) & (of_q[b, q] < of_exit[b, k])
    )
    return ancestors if prefix is None else first_keys(prefix) | ancestors
