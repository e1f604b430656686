"""attngen: a compiler for attention.

Say what attention you want, on which target, within how many bytes; get readable source
that is proven to compute it and proven to fit.
"""

from __future__ import annotations

__version__ = "0.1.0"

from attngen import masks, presets, scores
from attngen.api import attention, build, certify, emit, plan, tune, validate
from attngen.spec import AttentionSpec
from attngen.tracing import (
    Mask,
    Score,
    exp,
    log,
    mask,
    maximum,
    minimum,
    operand,
    score,
    tanh,
    where,
)

__all__ = [
    "AttentionSpec",
    "Mask",
    "Score",
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
