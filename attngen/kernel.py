"""Kernel: a loaded function that knows what it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from attngen import checks, philox
from attngen.emitter import Source
from attngen.errors import BackendError, CallError, OperandError
from attngen.plans import Plan
from attngen.reference import numpy_dtype
from attngen.reports import Certificate, Report
from attngen.spec import AttentionSpec
from attngen.traced import is_traced

SEED_HINT = (
    "jax.random.key_data(jax.random.key(n)) is one, and so is the number n, below 2**64"
)


@dataclass(frozen=True, eq=False)
class Kernel:
    """An attention function with everything that is known of it.

    Call it as `kernel(q, k, v, name=operand, …)`; shapes and dtypes are checked against
    the spec. Returns the spec's outputs in their order, one alone not in a tuple.

    Offsets, lengths and tables of packed and paged K/V are looked at where checks.py says.

    Two operands may be numbers: q_offset, and seed, as `philox.seed_words` has it.

    any_size: the function takes any batch and lengths, and checks its arguments itself
    (Triton's kernels do).

    absent: the target, where it isn't here: the function is traced for it, inside jax.jit
    say, and isn't called on arrays.

    report and certificate are None where it was built inside a trace, which neither
    validates nor compiles anything.

    Raises:
        CallError: q, k or v doesn't match the spec.
        OperandError: an operand is missing, surplus, or doesn't match; or an offset, a
            length or a page can't be followed.
        BackendError: arrays, where the target isn't here.
    """

    spec: AttentionSpec
    plan: Plan
    source: Source
    report: Report | None
    certificate: Certificate | None
    function: Callable[..., Any] = field(repr=False)
    any_size: bool = field(default=False, repr=False)
    absent: str = field(default="", repr=False)
    _expected: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = field(
        init=False, repr=False
    )

    def __post_init__(self) -> None:
        names = ("q", "k", "v", *(o.name for o in self.spec.operands))
        expected = {
            n: (self.spec.shape_of(n), numpy_dtype(self.spec.dtype_of(n)))
            for n in names
        }
        object.__setattr__(self, "_expected", expected)

    def __call__(self, q: Any, k: Any, v: Any, **operands: Any) -> Any:
        if self.any_size:
            return self.function(q, k, v, **operands)
        given = {"q": q, "k": k, "v": v, **operands}
        expected = self._expected
        if len(given) != len(expected):
            raise self._names_error(operands)
        for name, x in given.items():
            want = expected.get(name)
            if want is None:
                raise self._names_error(operands)
            if getattr(x, "shape", None) != want[0] or x.dtype != want[1]:
                if name == "q_offset" and _is_scalar(x):
                    operands[name] = x if hasattr(x, "dtype") else np.int32(x)
                    continue
                if name == "seed" and _is_number(x):
                    operands[name] = philox.seed_words(x)
                    continue
                raise self._mismatch(name, x)
        if self.absent and not any(is_traced(x) for x in given.values()):
            raise self._not_here()
        if self.spec.storage != "dense":
            checks.check(self.spec, given)
        return self.function(q, k, v, **operands)

    def _not_here(self) -> BackendError:
        return BackendError(
            "This kernel can't be called here.",
            got=f"arrays, on a machine without a {self.absent}",
            needed=f"a {self.absent}, or a trace: jax.jit(f).lower(…) for one",
            hint="kernel.source.write(path) keeps the file, which computes the same on any "
            "device; build with target=None for this one",
        )

    def _names_error(self, operands: dict[str, Any]) -> OperandError:
        wanted = [n for n in self._expected if n not in ("q", "k", "v")]
        missing = [n for n in wanted if n not in operands]
        surplus = [n for n in operands if n not in wanted]
        what = "An operand is missing." if missing else "There is an operand too many."
        return OperandError(
            what,
            got=", ".join(operands) or "no operands",
            needed=", ".join(wanted) or "no operands",
            hint=f"pass {missing[0]}=…" if missing else f"leave out {surplus[0]}",
        )

    def _mismatch(self, name: str, x: Any) -> CallError | OperandError:
        shape, dtype = self._expected[name]
        kind = CallError if name in ("q", "k", "v") else OperandError
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            got = f"{type(x).__name__}"
        else:
            got = f"{x.dtype}{list(x.shape)}"
        layout = f" ({self.spec.layout})" if name in ("q", "k", "v") else ""
        return kind(
            f"{name} doesn't match the spec.",
            got=got,
            needed=f"{dtype}{list(shape)}{layout}",
            hint=SEED_HINT if name == "seed" else None,
        )

    def __str__(self) -> str:
        return self.plan.explain()


def _is_number(x: Any) -> bool:
    """A seed as a Python int."""
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**64


def _is_scalar(x: Any) -> bool:
    """A scalar q_offset: a Python int, or an int32 array of no dimensions."""
    if isinstance(x, int) and not isinstance(x, bool):
        return abs(x) < 2**30
    return getattr(x, "shape", None) == () and x.dtype == np.int32
