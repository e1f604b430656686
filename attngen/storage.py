"""How q, k and v are stored: dense, packed or paged, and K/V in a narrower dtype.

Packed: the tokens of all sequences lie behind each other, without a batch axis; those of
sequence b are [cu_seqlens_q[b], cu_seqlens_q[b + 1]) of q, and [cu_seqlens_k[b],
cu_seqlens_k[b + 1]) of k and v. The first offset is 0, none is below the one before it, and
tokens from the last one on belong to no sequence: they see nothing.

Paged: k and v are pages of `page_size` tokens, in any order; tokens [i · page_size,
(i + 1) · page_size) of sequence b lie in page block_table[b, i]. Entries behind the last
token that is there may hold anything.

Masks and scores see logical positions in both: those within a sequence.

Quantised: a key is k · k_scale, a value v · v_scale, each scale one of a kv head, of a token
or of a block of tokens of a head.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from attngen.dtypes import DIGITS, QUANTISED
from attngen.errors import NotBuiltError, SpecError
from attngen.operands import Axis

if TYPE_CHECKING:
    from attngen.spec import AttentionSpec

Own = tuple[str, tuple[Axis, ...], str]  # an operand's name, axes and dtype
PAGE_SIZE = 16  # vLLM's


def own_operands(spec: AttentionSpec) -> list[Own]:
    """The operands that say where tokens lie, and what K and V are multiplied by."""
    own: list[Own] = []
    if spec.storage == "packed":
        of = (spec.batch + 1,)
        own += [("cu_seqlens_q", of, "int32"), ("cu_seqlens_k", of, "int32")]
    if spec.storage == "paged":
        own.append(("block_table", ("b", pages_of_each(spec)), "int32"))
    if spec.is_quantised:
        own += [(f"{x}_scale", scale_axes(spec), "float32") for x in "kv"]
    return own


def pages_of_each(spec: AttentionSpec) -> int:
    """The pages of a sequence, at most."""
    return -(-spec.kv_len // spec.page_size)


def pages(spec: AttentionSpec) -> int:
    """The pages that there are."""
    return spec.num_pages or spec.batch * pages_of_each(spec)


def scale_block(spec: AttentionSpec) -> int:
    """The tokens that share a scale, where heads don't have one each."""
    return 1 if spec.kv_scale == "token" else int(spec.kv_scale)


def scale_axes(spec: AttentionSpec) -> tuple[Axis, ...]:
    """Of k_scale and v_scale."""
    if spec.kv_scale == "head":
        return (spec.kv_heads,)
    block = scale_block(spec)
    if spec.storage == "paged":
        return (pages(spec), spec.kv_heads, spec.page_size // block)
    tokens: Axis = "k" if block == 1 else -(-spec.kv_len // block)
    heads: tuple[Axis, ...] = (spec.kv_heads, tokens)
    return heads if spec.storage == "packed" else ("b", *heads)


def shape_of(spec: AttentionSpec, name: str) -> tuple[int, ...]:
    """The shape of q, k, v, out or lse."""
    batch = () if spec.storage == "packed" else (spec.batch,)
    if name == "lse":
        return (*batch, spec.q_heads, spec.q_len)
    heads, tokens, dim = {
        "q": (spec.q_heads, spec.q_len, spec.qk_dim),
        "k": (spec.kv_heads, spec.kv_len, spec.qk_dim),
        "v": (spec.kv_heads, spec.kv_len, spec.v_dim),
        "out": (spec.q_heads, spec.q_len, spec.v_dim),
    }[name]
    if spec.storage == "paged" and name in ("k", "v"):
        batch, tokens = (pages(spec),), spec.page_size
    middle = (tokens, heads) if spec.layout == "bthd" else (heads, tokens)
    return (*batch, *middle, dim)


def check(spec: AttentionSpec) -> None:
    """What the fields of storage and of K/V can't be together."""
    _check_paged(spec)
    if spec.storage == "packed" and (spec.kv_lengths or spec.q_lengths):
        name = "kv_lengths" if spec.kv_lengths else "q_lengths"
        raise SpecError(
            "In packed storage the offsets say how long sequences are.",
            got=f'storage="packed", {name}=True',
            needed=f"{name}=False",
            hint="cu_seqlens_q and cu_seqlens_k are operands of their own",
        )
    narrow, block = spec.is_quantised, spec.kv_scale
    if not narrow and block != "head":
        raise SpecError(
            "kv_scale is of quantised K/V.",
            got=f"kv_scale={block!r}, kv_dtype={spec.kv_dtype!r}",
            needed="kv_dtype: one of " + ", ".join(QUANTISED),
        )
    if spec.storage == "paged" and isinstance(block, int) and spec.page_size % block:
        raise SpecError(
            "Blocks of a scale don't divide the pages.",
            got=f"kv_scale={block}, page_size={spec.page_size}",
            needed="kv_scale that divides page_size",
        )


def _check_paged(spec: AttentionSpec) -> None:
    if spec.storage == "paged":
        return
    for name, value, default in (
        ("page_size", spec.page_size, PAGE_SIZE),
        ("num_pages", spec.num_pages, None),
    ):
        if value != default:
            raise SpecError(
                f"{name} is of paged storage.",
                got=f"{name}={value}, storage={spec.storage!r}",
                needed='storage="paged"',
            )


def refuse(spec: AttentionSpec) -> None:
    """Raise NotBuiltError for what no backend does with stored K/V."""
    plain = spec.kv_dtype is None or spec.is_quantised
    if not plain and not _holds(spec.dtype, str(spec.kv_dtype)):
        raise NotBuiltError(
            "kv_dtype holds numbers that dtype doesn't.",
            got=f"kv_dtype={spec.kv_dtype!r}, dtype={spec.dtype!r}",
            needed="a kv_dtype of which each number is one of dtype's",
            hint="convert k and v to dtype, and leave kv_dtype out",
        )
    if spec.derivatives is None:
        return
    paged, narrow = spec.storage == "paged", spec.is_narrow
    for field, cached in (("storage", paged), ("kv_dtype", narrow)):
        if cached:
            raise NotBuiltError(
                f"Derivatives aren't built for {field}={getattr(spec, field)!r}.",
                got=f"derivatives={spec.derivatives!r}",
                needed="derivatives=None",
                hint="a cache isn't trained: dense or packed K/V in dtype have gradients",
            )


def _holds(wide: str, narrow: str) -> bool:
    """Whether each number of a dtype is one of the other's."""
    if {wide, narrow} == {"float16", "bfloat16"}:
        return False
    return DIGITS[narrow] <= DIGITS[wide]


def typical(spec: AttentionSpec) -> AttentionSpec:
    """The dense spec of as many sequences, each of the mean length; a dense one as it is."""
    if spec.storage == "dense":
        return spec
    made: dict[str, Any] = {
        "storage": "dense", "page_size": PAGE_SIZE, "num_pages": None,
    }  # fmt: skip
    if spec.storage == "packed":
        made["q_len"] = -(-spec.q_len // spec.batch)
        made["kv_len"] = -(-spec.kv_len // spec.batch)
    return dataclasses.replace(spec, **made)


def of_scale(spec: AttentionSpec) -> str:
    """What of a kv head has a scale of its own, in words: the head, a token, n tokens."""
    named = spec.kv_scale in ("head", "token")
    return str(spec.kv_scale) if named else f"{spec.kv_scale} tokens"


def described(spec: AttentionSpec) -> list[str]:
    """How q, k and v are stored, in sentences for an emitted file."""
    lines = []
    if spec.storage == "packed":
        lines.append(
            f"of {spec.batch} packed sequences: b has the queries cu_seqlens_q[b] to "
            "cu_seqlens_q[b+1]-1, and keys by cu_seqlens_k; q and k are positions in it; "
            "other tokens see nothing"
        )
    if spec.storage == "paged":
        size = spec.page_size
        lines.append(
            f"of paged k and v: key i of sequence b is token i%{size} of page "
            f"block_table[b, i//{size}]; entries behind its last key aren't followed"
        )
    if spec.is_quantised:
        each = of_scale(spec)
        lines.append(
            f"of quantised k and v: each is its {spec.kv_dtype} number times k_scale, or "
            f"v_scale, of its kv head" + ("" if each == "head" else f" and {each}")
        )
    return lines
