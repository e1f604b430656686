"""Every tile of a plan: full, on an edge or empty, as the emitted loops take it.

Where tiles are skipped by a list, the verdicts on all of them are computed at once, as the
emitted file does. What operands decide at run time isn't known here: such tiles are edges.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from attngen.plans import Plan
from attngen.reference import evaluate
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles, chunk_limits, key_chunks
from attngen.verdicts import Verdict, verdict

FULL, EDGE, EMPTY = 0, 1, 2
Array = np.ndarray[Any, Any]
MOST = 2**22  # tiles that are all looked at, of one head
FEW = 2**15  # of a candidate's


def count_listed(
    spec: AttentionSpec, q_chunk: int, k_chunk: int, *, exact: bool = True
) -> Tiles:
    """The tiles of one head by their verdicts; of many, chunks of queries at even distances.

    Args:
        exact: False looks at fewer of them. Those of the first batch and head are counted.
    """
    q_chunks, k_chunks = -(-spec.q_len // q_chunk), -(-spec.kv_len // k_chunk)
    most = MOST if exact else FEW
    step = max(1, q_chunks * k_chunks // most)
    rows = np.arange(step // 2, q_chunks, step)
    full = edge = 0
    for some in range(0, len(rows), max(1, 2**20 // k_chunks)):
        kinds = listed_kinds(
            spec, q_chunk, k_chunk, rows[some : some + max(1, 2**20 // k_chunks)]
        )
        full += int((kinds == FULL).sum())
        edge += int((kinds == EDGE).sum())
    if len(rows) < q_chunks:
        full, edge = (round(x * q_chunks / len(rows)) for x in (full, edge))
    return Tiles(full, edge, q_chunks * k_chunks - full - edge)


@functools.lru_cache(maxsize=32)
def _verdict(spec: AttentionSpec) -> Verdict:
    assert spec.mask is not None
    return verdict(spec.mask.expr)


def listed_kinds(
    spec: AttentionSpec, q_chunk: int, k_chunk: int, rows: Array, head: int = 0
) -> Array:
    """FULL, EDGE or EMPTY [rows, key chunks] by the verdicts, of some chunks of queries.

    Lengths and offsets that come at run time are taken at their largest.
    """
    static = spec.static_q_offset
    offset = spec.kv_len - spec.q_len if static is None else static
    starts = np.minimum(rows * q_chunk, max(0, spec.q_len - q_chunk))[:, None]
    keys = np.arange(-(-spec.kv_len // k_chunk))[None, :] * k_chunk
    last = np.minimum(keys + k_chunk, spec.kv_len)
    env = {
        "q_lo": starts + offset,
        "q_hi": np.minimum(starts + q_chunk, spec.q_len) + offset,
        "k_lo": keys + spec.kv_offset,
        "k_hi": last + spec.kv_offset,
        "b_lo": 0,
        "b_hi": 1,
        "h_lo": head,
        "h_hi": head + 1,
    }
    found = _verdict(spec)
    some, every = (evaluate(x, env, {}, np.float64) for x in (found.some, found.every))
    whole = last - keys == min(k_chunk, spec.kv_len)
    kinds = np.where(np.logical_and(every, whole), FULL, np.where(some, EDGE, EMPTY))
    return np.broadcast_to(kinds, (len(rows), keys.shape[1]))


def kinds(plan: Plan, most: int = 2**22) -> Array:
    """FULL, EDGE or EMPTY [chunks of queries, key chunks] as the plan's loops take them.

    Args:
        most: tiles; of more, chunks of queries and of keys at even distances.
    """
    spec, q_chunk, k_chunk = plan.spec, plan.q_chunk, plan.k_chunk
    q_chunks, k_chunks = -(-spec.q_len // q_chunk), -(-spec.kv_len // k_chunk)
    rows = np.arange(0, q_chunks, max(1, q_chunks * k_chunks // most))
    if dict(plan.options).get("skip") == "list":
        return listed_kinds(spec, q_chunk, k_chunk, rows)
    made = np.full((len(rows), k_chunks), EMPTY, np.int8)
    limits = chunk_limits(spec, q_chunk)
    for row, index in enumerate(rows):
        for first, full_first, full_last, last in key_chunks(limits[index], k_chunk):
            made[row, first:last] = EDGE
            made[row, full_first:full_last] = FULL
    return made
