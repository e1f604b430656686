"""attention(q, k, v, …): from arrays and options to a spec's fields and operands."""

from __future__ import annotations

from typing import Any

from attngen.errors import CallError
from attngen.spec import FIELDS

# Fields that the arrays say themselves.
_FROM_ARRAYS = (
    "batch",
    "q_heads",
    "kv_heads",
    "q_len",
    "kv_len",
    "qk_dim",
    "v_dim",
    "dtype",
)
_OPTIONS = frozenset(FIELDS) - frozenset(_FROM_ARRAYS)
_ARRAYS = ("kv_lengths", "q_lengths", "q_offset", "sink")  # True, or the operand itself

Key = tuple[tuple[str, Any], ...]


def split_options(
    q: Any, k: Any, v: Any, options: dict[str, Any]
) -> tuple[Key, dict[str, Any], bool]:
    """The spec's fields as a hashable key, the operands, and whether anything is traced.

    Raises:
        CallError: an array has the wrong rank, or the three don't fit together.
    """
    import jax

    layout = options.get("layout", "bthd")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(getattr(x, "shape", ())) != 4:
            raise CallError(
                f"{name} must have four axes.",
                got=f"{type(x).__name__} of shape {getattr(x, 'shape', None)}",
                needed="[batch, tokens, heads, dim], or [batch, heads, tokens, dim] with "
                'layout="bhtd"',
            )
    token, head = (1, 2) if layout == "bthd" else (2, 1)
    if (
        k.shape[:3] != v.shape[:3]
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
    ):
        raise CallError(
            "q, k and v don't fit together.",
            got=f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}",
            needed="one batch; k and v of the same tokens and heads; q and k of one dim",
        )
    if not q.dtype == k.dtype == v.dtype:
        raise CallError(
            "q, k and v have different dtypes.",
            got=f"{q.dtype}, {k.dtype}, {v.dtype}",
            needed="one dtype",
        )
    fields: dict[str, Any] = {
        "batch": q.shape[0],
        "q_heads": q.shape[head],
        "kv_heads": k.shape[head],
        "q_len": q.shape[token],
        "kv_len": k.shape[token],
        "qk_dim": q.shape[3],
        "v_dim": v.shape[3],
        "dtype": str(q.dtype),
    }
    operands: dict[str, Any] = {}
    for name, value in options.items():
        if name in _ARRAYS and hasattr(value, "shape"):
            operands[name] = value
            fields[name] = "operand" if name == "q_offset" else True
        elif name in _OPTIONS:
            fields[name] = tuple(value) if isinstance(value, list) else value
        else:
            operands[name] = value
    traced = any(isinstance(x, jax.core.Tracer) for x in (q, k, v, *operands.values()))
    return tuple(fields.items()), operands, traced
