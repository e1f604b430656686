"""attngen: a compiler for attention.

Say what attention you want, on which target, within how many bytes; get readable source
that is proven to compute it and proven to fit.
"""

from __future__ import annotations

from attngen import masks, presets, scores
from attngen.api import attention, build, certify, emit, plan, tune, validate
from attngen.spec import AttentionSpec
from attngen.symbols import (
    exp,
    log,
    maximum,
    minimum,
    tanh,
    where,
)
from attngen.tracing import (
    Mask,
    Score,
    mask,
    operand,
    score,
)
from attngen.version import __version__

__all__ = [
    "AttentionSpec",
    "Mask",
    "Score",
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
    "score",
    "scores",
    "tanh",
    "tune",
    "validate",
    "where",
]
