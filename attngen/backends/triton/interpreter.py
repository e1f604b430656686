"""The child's side of an interpreted call: arrays in files, Triton on the CPU.

Triton 3.9's interpreter multiplies the raw 16-bit integers of bfloat16 (and NumPy has no
such numbers), so products of bfloat16 are made of float32 here, and integers become it by way of
float32; and it drops the bits of
float32 that bfloat16 lacks, where a GPU rounds to the nearest, so that is done here, too.
The emitted file stays as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def call(job: dict[str, Any]) -> list[str]:
    """Call an emitted file's attention with the arrays of a folder; write its outputs.

    Args:
        job: source: the emitted file; folder: where <name>.npy lie, bfloat16 as their bits;
            dtypes: of each array by name; gradients, cotangents: as loader.differentiated
            takes them, where there are any.

    Returns:
        The dtypes of the outputs, which were written as out_<i>.npy.
    """
    from attngen.backends.triton.loader import (
        differentiated,
        import_file,
        numbers,
        tensor,
    )

    _multiply_bfloat16()
    _round_to_bfloat16()
    _integers_to_bfloat16()
    folder = Path(job["folder"])
    given = {n: np.load(folder / f"{n}.npy") for n in job["dtypes"]}
    tensors = {n: tensor(given[n], dtype) for n, dtype in job["dtypes"].items()}
    module = import_file(Path(job["source"]))
    with np.errstate(all="ignore"):
        outputs = differentiated(
            module.attention,
            job.get("gradients", {}),
            job.get("cotangents", {}),
            **tensors,
        )
    made = {f"out_{i}": numbers(x) for i, x in enumerate(outputs)}
    return list(save(folder, made).values())


def save(folder: Path, arrays: Mapping[str, Any]) -> dict[str, str]:
    """Write arrays as <name>.npy, what NumPy has no name for as bits; each dtype by name."""
    for name, x in arrays.items():
        bits = {"bfloat16": np.int16, "float8_e4m3fn": np.int8}.get(str(x.dtype))
        np.save(folder / f"{name}.npy", x if bits is None else x.view(bits))
    return {name: str(x.dtype) for name, x in arrays.items()}


def outputs(folder: Path, dtypes: Sequence[str]) -> tuple[Any, ...]:
    """What `call` wrote."""
    import ml_dtypes

    made = [np.load(folder / f"out_{i}.npy") for i in range(len(dtypes))]
    return tuple(
        x.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else x
        for x, dtype in zip(made, dtypes, strict=True)
    )


@functools.cache  # once a process: it wraps what is there
def _multiply_bfloat16() -> None:
    """Make the interpreter multiply bfloat16 as numbers, accumulated in float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(
        self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any
    ) -> Any:
        a, b = (_widened(x, tl) for x in (a, b))
        return plain(self, a, b, d, precision, imprecise)

    def _widened(x: Any, tl: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        bits = x.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = create_dot


@functools.cache
def _round_to_bfloat16() -> None:
    """Make the interpreter round float32 to the nearest bfloat16, ties to even."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(x: Any, before: Any, after: Any, rounding: Any) -> Any:
        if (before, after) == (tl.float32, tl.bfloat16):
            return x.astype(ml_dtypes.bfloat16).view(np.uint16)
        return plain(x, before, after, rounding)

    interpreter._convert_float = convert


@functools.cache
def _integers_to_bfloat16() -> None:
    """Make the interpreter convert integers to bfloat16 as numbers: by way of float32."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def by_float32(plain: Any) -> Any:
        def convert(self: Any, x: Any, to: Any) -> Any:
            if to.scalar != tl.bfloat16:
                return plain(self, x, to)
            wide = interpreter.TensorHandle(x.data.astype(np.float32), tl.float32)
            return self.create_fp_trunc(wide, to)

        return convert

    for name in ("create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, by_float32(getattr(builder, name)))
