"""What quantised K/V cost in accuracy, for a report: stated, and not judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from attngen import inputs, reference
from attngen.reference import Array, numpy_dtype
from attngen.reports import Quantised
from attngen.spec import AttentionSpec


def of_quantising(
    spec: AttentionSpec,
    outputs: Mapping[str, Array],
    given: tuple[Array, Mapping[str, Any]],
    rows: Array,
    *,
    seed: int,
    case: str,
    measure: Callable[[Array, Array], float | None],
) -> list[Quantised]:
    """The errors against attention of K/V as they were, beside those of a plain one's.

    Args:
        outputs: of the kernel, by name.
        given: q and the operands, of `inputs.arrays` with that seed.
        measure: the largest absolute error of an array.
    """
    plain = dataclasses.replace(spec, kv_dtype=None, kv_scale="head")
    (q, operands), kv = given, inputs.unquantised(spec, seed=seed)
    arrays = plain, q, kv["k"], kv["v"], operands
    want = reference.attention(*arrays, rows=rows)
    how = reference.plain(plain)
    other = reference.attention(*arrays, rows=rows, rounding=how)
    made = []
    for name, array in outputs.items():
        narrow = other[name].astype(numpy_dtype(spec.dtype_of(name)))
        error = measure(reference.pick(spec, name, array, rows), want[name])
        base = measure(narrow, want[name]) or 0.0
        made.append(Quantised(case, name, str(spec.kv_dtype), spec.dtype, error, base))
    return made
