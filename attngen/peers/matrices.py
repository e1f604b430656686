"""How large the arrays are that some peers make, before they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from attngen import expr
from attngen.expr import Expr
from attngen.spec import AttentionSpec


@dataclass(frozen=True)
class Matrix:
    """An array of queries by keys, one for each batch and head that it differs for."""

    batch: int
    heads: int
    q_len: int
    kv_len: int

    @classmethod
    def of(cls, spec: AttentionSpec, *nodes: Expr, lengths: bool = False) -> Matrix:
        """Of expressions evaluated together; run-time offsets differ for each batch.

        lengths: whether the spec's run-time lengths, which do too, are said by it.
        """
        read = frozenset[str]().union(*(expr.variables(n) for n in nodes))
        batch = "b" in read or (spec.static_q_offset is None and "q" in read)
        batch = batch or (lengths and (spec.kv_lengths or spec.q_lengths))
        return cls(
            spec.batch if batch else 1,
            spec.q_heads if "h" in read else 1,
            spec.q_len,
            spec.kv_len,
        )

    @property
    def elements(self) -> int:
        return math.prod((self.batch, self.heads, self.q_len, self.kv_len))


def score_bytes(spec: AttentionSpec) -> int:
    """Of all scores and their softmax, in float32."""
    return 2 * 4 * spec.batch * spec.q_heads * spec.q_len * spec.kv_len


def available_bytes() -> int | None:
    """Memory that can be had now without others losing theirs; None where nothing says it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].removesuffix("kB")) * 1024
    except (OSError, LookupError, ValueError):
        return None
