"""attention(q, k, v, …): from arrays and options to a spec's fields and operands."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from attngen.errors import CallError, SpecError
from attngen.spec import FIELDS

# Fields that the arrays say themselves.
_FROM_ARRAYS = frozenset(
    ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "qk_dim", "v_dim", "dtype")
)
_OPTIONS = frozenset(FIELDS) - _FROM_ARRAYS
_ARRAYS = (
    "kv_lengths",
    "q_lengths",
    "q_offset",
    "sink",
)  # a field, or the operand itself


class Call(NamedTuple):
    """What decides which kernel a call needs: hashable, and made in microseconds."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]


@functools.cache
def _tracer() -> type:
    """JAX's type of what is traced: an import costs microseconds, even a repeated one."""
    from jax.core import Tracer

    return Tracer  # type: ignore[no-any-return]


def split(
    q: Any, k: Any, v: Any, options: dict[str, Any]
) -> tuple[Call, dict[str, Any], bool]:
    """The call, the operands, and whether anything is traced by JAX.

    Raises:
        CallError: q, k or v is no array.
        SpecError: an option can't be a field's value.
    """
    fields: list[tuple[str, Any]] = []
    operands: dict[str, Any] = {}
    for name, value in options.items():
        if name in _ARRAYS and hasattr(value, "shape"):
            operands[name] = value
            fields.append((name, "operand" if name == "q_offset" else True))
        elif name in _OPTIONS:
            fields.append((name, tuple(value) if isinstance(value, list) else value))
        else:
            operands[name] = value
    try:
        call = Call(
            (q.shape, k.shape, v.shape), (q.dtype, k.dtype, v.dtype), tuple(fields)
        )
        hash(call)
    except AttributeError:
        raise CallError(
            "q, k and v must be arrays.",
            got=", ".join(type(x).__name__ for x in (q, k, v)),
            needed="JAX or NumPy arrays",
        ) from None
    except TypeError:
        raise SpecError(
            "An option of attention() can't be a field's value.",
            got=", ".join(f"{n}={type(x).__name__}" for n, x in fields),
            needed="numbers, names, masks, tuples of scores",
        ) from None
    tracer = _tracer()
    traced = isinstance(q, tracer) or isinstance(k, tracer) or isinstance(v, tracer)
    traced = traced or any(isinstance(x, tracer) for x in operands.values())
    return call, operands, traced


class InsideTrace(Exception):
    """JAX is tracing, although no argument is traced: a closure's arrays, say."""


def check_trace() -> None:
    """Raise InsideTrace where jit would trace what is computed now."""
    import jax.numpy as jnp

    if isinstance(jnp.zeros(()), _tracer()):
        raise InsideTrace


def spec_fields(call: Call) -> dict[str, Any]:
    """The fields of the spec that a call asks for.

    Raises:
        CallError: an array has the wrong rank, or the three don't fit together.
    """
    options = dict(call.options)
    layout = options.get("layout", "bthd")
    for name, shape in zip("qkv", call.shapes, strict=True):
        if len(shape) != 4:
            raise CallError(
                f"{name} must have four axes.",
                got=f"an array of shape {shape}",
                needed="[batch, tokens, heads, dim], or [batch, heads, tokens, dim] with "
                'layout="bhtd"',
            )
    q, k, v = call.shapes
    if k[:3] != v[:3] or q[0] != k[0] or q[3] != k[3]:
        raise CallError(
            "q, k and v don't fit together.",
            got=f"q {list(q)}, k {list(k)}, v {list(v)}",
            needed="one batch; k and v of the same tokens and heads; q and k of one dim",
        )
    dtypes = [str(d) for d in call.dtypes]
    if len(set(dtypes)) > 1:
        raise CallError(
            "q, k and v have different dtypes.",
            got=", ".join(dtypes),
            needed="one dtype",
        )
    token, head = (2, 1) if layout == "bhtd" else (1, 2)
    return options | {
        "batch": q[0],
        "q_heads": q[head],
        "kv_heads": k[head],
        "q_len": q[token],
        "kv_len": k[token],
        "qk_dim": q[3],
        "v_dim": v[3],
        "dtype": dtypes[0],
    }
