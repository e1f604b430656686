"""attention() of packed, paged or quantised K/V: what the arrays say of the spec's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attngen.dtypes import ARRAYS, KV_DTYPES
from attngen.errors import CallError

OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
Shape = tuple[int, ...]


def fields_of(
    q: Any, k: Any, options: Mapping[str, Any], operands: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """The fields that offsets, a table and scales given by name say.

    Operands of these names that a mask or score declares itself are its own.

    Raises:
        CallError: an array is missing, or doesn't fit.
    """
    scores = options.get("score") or ()
    own = [options.get("mask"), *(scores if isinstance(scores, tuple) else (scores,))]
    declared = {o.name for x in own for o in getattr(x, "operands", ())}
    named = {n: x for n, x in operands.items() if n not in declared}
    storage = options.get("storage")
    packed = any(n in named for n in OFFSETS) if storage is None else None
    if storage is None and packed:
        storage = "packed"
    if storage is None and "block_table" in named:
        storage = "paged"
    found: list[tuple[str, Any]] = []
    if storage == "packed":
        found += _packed(named)
    elif storage == "paged":
        found += _paged(k, options, named)
    if "k_scale" in named and "kv_scale" not in options and len(k.shape) >= 3:
        layout = options.get("layout", "bthd")
        found.append(("kv_scale", _scale(storage, layout, k.shape, named)))
    if storage is not None and "storage" not in options:
        found.append(("storage", storage))
    return found


def _shape(x: Any) -> Shape:
    return tuple(getattr(x, "shape", ()))


def _got(named: Mapping[str, Any], name: str) -> str:
    """An operand's shape, or what it is instead of an array, for people."""
    if name not in named:
        return "missing"
    x = named[name]
    return str(list(x.shape)) if hasattr(x, "shape") else f"a {type(x).__name__}"


def _packed(named: Mapping[str, Any]) -> list[tuple[str, Any]]:
    shapes = {n: _shape(named.get(n)) for n in OFFSETS}
    counts = set(shapes.values())
    if len(counts) != 1 or len(next(iter(counts))) != 1 or next(iter(counts))[0] < 2:
        got = ", ".join(f"{n} {_got(named, n)}" for n in shapes)
        raise CallError(
            "Packed sequences are told by two arrays of cumulative offsets.",
            got=got,
            needed="cu_seqlens_q=… and cu_seqlens_k=…, int32 [sequences + 1] both",
        )
    return [("batch", next(iter(counts))[0] - 1)]


def _paged(
    k: Any, options: Mapping[str, Any], named: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    table, pages = _shape(named.get("block_table")), _shape(k)
    if len(table) != 2 or len(pages) != 4:
        raise CallError(
            "Paged K/V are told by a table of pages.",
            got=f"block_table {_got(named, 'block_table')}, k {list(pages)}",
            needed="block_table=…, int32 [batch, pages of a sequence]; k and v "
            "[pages, page_size, heads, dim]",
        )
    size = pages[1 if options.get("layout", "bthd") == "bthd" else 2]
    for name, told in (("page_size", size), ("num_pages", pages[0])):
        if options.get(name) not in (None, told):
            raise CallError(
                f"{name} isn't that of k and v.",
                got=f"{name}={options[name]!r}, k {list(pages)}",
                needed=f"{name}={told}, or none",
            )
    return [
        ("page_size", size), ("num_pages", pages[0]), ("kv_len", table[1] * size),
    ]  # fmt: skip


def _scale(
    storage: str | None, layout: str, k: Shape, named: Mapping[str, Any]
) -> str | int:
    """kv_scale by the shape of k_scale."""
    scale = _shape(named["k_scale"])
    if not scale or 0 in scale:
        raise CallError(
            "k_scale isn't an array of scales.",
            got=f"k_scale {_got(named, 'k_scale')}",
            needed="k_scale=… and v_scale=…, float32: [kv_heads], or scales of tokens or "
            "blocks of them, [batch, kv_heads, scales]",
            hint="attngen.quantise(spec, k, v) makes them",
        )
    if len(scale) == 1:
        return "head"
    tokens = k[-3] if layout == "bthd" else k[-2]
    if scale[-1] == tokens and storage != "paged":
        return "token"
    count = scale[-1]
    least = -(-tokens // count)
    # a block of n tokens or more makes fewer scales
    n = -(-tokens // (count - 1)) if count > 1 else least + 1
    sure = least == n - 1 or (storage == "paged" and tokens % count == 0)
    if not sure:
        raise CallError(
            "The shape of k_scale doesn't say of how many tokens a scale is.",
            got=f"k_scale {list(scale)}, k {list(k)}",
            needed="kv_scale=…, the tokens of a block; [kv_heads], or one for each token, "
            "need none",
        )
    return "token" if least == 1 else least


def kv_dtype(dtypes: list[str], options: Mapping[str, Any]) -> str | None:
    """The field kv_dtype, by the dtypes of q, k and v.

    Raises:
        CallError: k and v have two, or one that K/V can't have.
    """
    names = {array: name for name, array in ARRAYS.items()}
    q, k, v = (names.get(d, d) for d in dtypes)
    if k != v or (k != q and k not in KV_DTYPES):
        raise CallError(
            "q, k and v have different dtypes.",
            got=", ".join(dtypes),
            needed="one dtype; or k and v in one of " + ", ".join(KV_DTYPES),
        )
    given = options.get("kv_dtype")
    if given not in (None, k):
        raise CallError(
            "kv_dtype isn't that of k and v.",
            got=f"kv_dtype={given!r}, k and v in {k}",
            needed=f"kv_dtype={k!r}, or none",
            hint="attngen.quantise(spec, k, v) makes k and v of a spec's kv_dtype",
        )
    return None if k == q else k
