"""K/V in a narrower dtype: numbers and the scales that they are multiplied by."""

from __future__ import annotations

from typing import Any

import numpy as np

from attngen import storage
from attngen.dtypes import DTYPES, LARGEST
from attngen.errors import CallError, SpecError
from attngen.reference import Array, by_heads, numpy_dtype
from attngen.spec import AttentionSpec
from attngen.traced import is_traced


def quantise(spec: AttentionSpec, k: Any, v: Any) -> dict[str, Array]:
    """k and v as `spec.kv_dtype`, with their scales: `attn(q, **quantise(spec, k, v))`.

    A scale is the largest magnitude of what shares it, over the largest number of the dtype
    (448 or 127), and 1 where all is 0; numbers are rounded to the nearest, ties to even.

    Args:
        k, v: float arrays in the spec's shapes.

    Returns:
        k and v as NumPy arrays; k_scale and v_scale float32, as `spec.kv_scale` says.

    Raises:
        SpecError: the spec's kv_dtype has no scales.
        CallError: k or v has another shape, isn't of finite floats, or is traced.
    """
    if not spec.is_quantised:
        raise SpecError(
            "K/V of this spec aren't quantised.",
            got=f"kv_dtype={spec.kv_dtype!r}",
            needed="kv_dtype: one of " + ", ".join(LARGEST),
        )
    made: dict[str, Array] = {}
    for name, x in (("k", k), ("v", v)):
        values = _numbers(name, x)
        if values.shape != spec.shape_of(name):
            raise CallError(
                f"{name} doesn't match the spec.",
                got=f"shape {list(values.shape)}",
                needed=f"shape {list(spec.shape_of(name))} ({spec.layout})",
            )
        made[name], made[f"{name}_scale"] = _quantised(spec, values)
    return made


def _numbers(name: str, x: Any) -> Array:
    """An array's values in float32."""
    dtype = str(getattr(x, "dtype", ""))
    traced = is_traced(x)
    if traced or dtype not in DTYPES:
        raise CallError(
            f"{name} can't be quantised.",
            got="an array that is traced" if traced else dtype or type(x).__name__,
            needed="a NumPy or JAX array of floats, outside a trace",
        )
    with np.errstate(over="ignore"):
        values = np.asarray(x).astype(np.float32)
    if not np.isfinite(values).all():
        raise CallError(
            f"{name} can't be quantised.",
            got="values that are NaN or infinite in float32",
            needed="finite values: their largest makes the scale",
        )
    return values


def _quantised(spec: AttentionSpec, x: Array) -> tuple[Array, Array]:
    assert spec.kv_dtype is not None
    values = by_heads(spec, x)  # [place, kv_heads, tokens, dim]
    largest = np.abs(values).max(-1)
    if spec.kv_scale == "head":
        largest = largest.max((0, 2))
        each = largest[None, :, None]
    else:
        block = storage.scale_block(spec)
        tokens = largest.shape[2]
        largest = np.pad(largest, ((0, 0), (0, 0), (0, -tokens % block)))
        largest = largest.reshape(*largest.shape[:2], -1, block).max(-1)
        each = np.repeat(largest, block, axis=2)[:, :, :tokens]
        largest = largest[0] if spec.storage == "packed" else largest
    most = np.float32(LARGEST[spec.kv_dtype])

    def scale(of: Array) -> Array:
        return np.where(of == 0, np.float32(1), of / most).astype(np.float32)

    numbers = values / scale(each)[..., None]
    if spec.kv_dtype == "int8":
        numbers = np.rint(numbers)
    numbers = np.clip(numbers, -most, most).astype(numpy_dtype(spec.kv_dtype))
    laid = np.swapaxes(numbers, 1, 2) if spec.layout == "bthd" else numbers
    return laid.reshape(x.shape), scale(largest)
