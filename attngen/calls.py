"""attention(q, k, v, …): from arrays and options to a spec's fields and operands."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from attngen import stored_calls
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


# what says that K/V aren't dense arrays in the dtype of q
_STORED = frozenset((*stored_calls.OFFSETS, "block_table", "k_scale", "storage"))


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
        if _STORED.intersection(options):
            fields += stored_calls.fields_of(q, k, options, operands)
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
    layout, storage = options.get("layout", "bthd"), options.get("storage")
    packed, paged = storage == "packed", storage == "paged"
    tokens = ["tokens, heads", "heads, tokens"]
    for name, shape in zip("qkv", call.shapes, strict=True):
        if len(shape) != (3 if packed else 4):
            first, second = (f"[{x}, dim]" for x in tokens)
            if not packed:
                first, second = (f"[batch, {x}, dim]" for x in tokens)
            raise CallError(
                f"{name} must have {'three' if packed else 'four'} axes.",
                got=f"an array of shape {shape}",
                needed=f'{first}, or {second} with layout="bhtd"',
                hint="cu_seqlens_q and cu_seqlens_k say that tokens are packed"
                if packed
                else None,
            )
    q, k, v = call.shapes
    same = k[:-1] == v[:-1] and q[-1] == k[-1]
    if not same or not (packed or paged or q[0] == k[0]):
        raise CallError(
            "q, k and v don't fit together.",
            got=f"q {list(q)}, k {list(k)}, v {list(v)}",
            needed="one batch; k and v of the same tokens and heads; q and k of one dim",
        )
    dtypes = [str(d) for d in call.dtypes]
    narrow = stored_calls.kv_dtype(dtypes, options)
    token, head = (-2, -3) if layout == "bhtd" else (-3, -2)
    found = {
        "q_heads": q[head],
        "kv_heads": k[head],
        "q_len": q[token],
        "qk_dim": q[-1],
        "v_dim": v[-1],
        "dtype": dtypes[0],
    }
    found |= {} if paged else {"kv_len": k[token]}
    found |= {} if packed else {"batch": q[0]}
    found |= {} if narrow is None else {"kv_dtype": narrow}
    return options | found
