"""attngen: a compiler for attention.

Say what attention you want, on which target, within how many bytes; get readable source
that is proven to compute it and proven to fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attngen import masks, presets, scores
from attngen.api import attention, build, certify, emit, plan, tune, validate
from attngen.plans import Plan
from attngen.reports import Certificate, Report
from attngen.spec import AttentionSpec
from attngen.symbols import (
    exp,
    log,
    maximum,
    minimum,
    searchsorted,
    tanh,
    where,
)
from attngen.targets import Target
from attngen.tracing import (
    Mask,
    Score,
    mask,
    operand,
    score,
)
from attngen.version import __version__

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.kernel import Kernel
    from attngen.quantisation import quantise
    from attngen.records import Record

__all__ = [
    "AttentionSpec",
    "Certificate",
    "Kernel",
    "Mask",
    "Plan",
    "Record",
    "Report",
    "Score",
    "Source",
    "Target",
    "__version__",
    "attention",
    "build",
    "certify",
    "emit",
    "exp",
    "log",
    "mask",
    "masks",
    "maximum",
    "minimum",
    "operand",
    "plan",
    "presets",
    "quantise",
    "score",
    "scores",
    "searchsorted",
    "tanh",
    "tune",
    "validate",
    "where",
]


def __getattr__(name: str) -> Any:
    """Source, Kernel and quantise when they are first asked for: they bring NumPy along."""
    if name == "Source":
        from attngen.emitter import Source

        return Source
    if name == "Kernel":
        from attngen.kernel import Kernel

        return Kernel
    if name == "Record":
        from attngen.records import Record

        return Record
    if name == "quantise":
        from attngen.quantisation import quantise

        return quantise
    raise AttributeError(f"module 'attngen' has no attribute {name!r}")
