"""Every tile of a plan: full, on an edge or empty, as the emitted loops take it.

Where tiles are skipped by a list, the verdicts on all of them are computed at once, as the
emitted file does. What operands decide at run time isn't known here: such tiles are edges.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attngen.plans import Plan
from attngen.reference import evaluate
from attngen.regions import spans
from attngen.spec import AttentionSpec
from attngen.tiles import Limits, Tiles, Visit, chunk_limits, key_chunks, limits_of
from attngen.verdicts import Verdict, verdict

FULL, EDGE, EMPTY = 0, 1, 2
Array = np.ndarray[Any, Any]
MOST = 2**22  # tiles that are all looked at, of one head
FEW = 2**14  # of a candidate's
WIDE = 2**11  # key chunks of a candidate's: of more, several are judged as one
LEAST = 4  # chunks of queries that are looked at, however many keys each has


def count_listed(
    spec: AttentionSpec, q_chunk: int, k_chunk: int, *, exact: bool = True
) -> Tiles:
    """The tiles of one head by their verdicts; of many, chunks of queries at even distances.

    Args:
        exact: False looks at fewer of them. Those of the first batch and head are counted.
    """
    k_chunks = -(-spec.kv_len // k_chunk)
    if not exact and k_chunks > WIDE:  # of several at once, as many as any of them
        several = -(-k_chunks // WIDE)
        coarse = count_listed(spec, q_chunk, k_chunk * several, exact=False)
        total = -(-spec.q_len // q_chunk) * k_chunks
        full = min(coarse.full * several, total)
        edge = min(coarse.edge * several, total - full)
        return Tiles(full, edge, total - full - edge)
    q_chunks = -(-spec.q_len // q_chunk)
    most = MOST if exact else FEW
    step = max(1, min(q_chunks * k_chunks // most, q_chunks // LEAST))
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


LOOKED_AT = 2**20  # tiles of a list, of one picture
SIDE = 2**10  # of more: so many blocks of tiles each way
ROWS = 2**11  # chunks of queries whose bounds are computed for one picture


class Cells(NamedTuple):
    """FULL, EDGE or EMPTY of each cell, and how many tiles it is high and wide."""

    kinds: Array
    high: int
    wide: int


def cells(plan: Plan, rows: int, columns: int) -> Cells:
    """The tiles of a head as at most rows × columns cells, each of one tile or several.

    All cells hold equally many chunks of queries, and of keys, but for the last. One of
    several tiles is full or empty where all of them are: else an edge. Of very many tiles not
    each is looked at: blocks of them are judged as one tile where they are listed, and chunks
    of queries at even distances where loops have bounds.
    """
    spec = plan.spec
    q_chunks, k_chunks = -(-spec.q_len // plan.q_chunk), -(-spec.kv_len // plan.k_chunk)
    if dict(plan.options).get("skip") == "list":
        return _listed_cells(plan, rows, columns)
    first, last = _edges(rows, q_chunks), _edges(columns, k_chunks)
    rows, columns = len(first) - 1, len(last) - 1
    looked_at = max(1, ROWS // rows)  # of each row of cells
    of = [limits_of(spec, span, plan.q_chunk) for span in spans(spec)]
    found = np.full((rows, columns), EDGE, np.int8)
    for row in range(rows):
        count = min(looked_at, int(first[row + 1] - first[row]))
        chunks = np.linspace(first[row], first[row + 1] - 1, count).astype(np.int64)
        visited = full = np.zeros(columns, np.int64)
        for chunk in dict.fromkeys(chunks.tolist()):
            for a, b, c, d in _visits(plan, of, chunk):
                visited = visited + _overlap(a, d, last)
                full = full + _overlap(b, c, last)
        found[row][visited == 0] = EMPTY
        found[row][full == count * np.diff(last)] = FULL
    return Cells(found, int(first[1]), int(last[1]))


def _edges(most: int, chunks: int) -> Array:
    """Where each of at most so many cells begins, and the last one ends, in chunks."""
    each = -(-chunks // most)
    return np.append(np.arange(0, chunks, each, dtype=np.int64), chunks)


def _visits(plan: Plan, of: list[Callable[[int], Limits]], chunk: int) -> list[Visit]:
    spec = plan.spec
    start = max(0, min(chunk * plan.q_chunk, spec.q_len - plan.q_chunk))
    most = -(-spec.kv_len // plan.k_chunk)
    return [
        (min(a, most), min(b, most), min(c, most), min(d, most))
        for a, b, c, d in key_chunks([x(start) for x in of], plan.k_chunk)
    ]


def _overlap(first: int, last: int, edges: Array) -> Array:
    """How many of the chunks [first, last) each cell holds."""
    return np.diff(np.clip(edges, first, max(first, last)))


def _listed_cells(plan: Plan, rows: int, columns: int) -> Cells:
    spec, q_chunk, k_chunk = plan.spec, plan.q_chunk, plan.k_chunk
    q_chunks, k_chunks = -(-spec.q_len // q_chunk), -(-spec.kv_len // k_chunk)
    high = wide = 1  # tiles of a block
    if q_chunks * k_chunks > LOOKED_AT:
        high, wide = -(-q_chunks // SIDE), -(-k_chunks // SIDE)
        q_chunk, k_chunk = q_chunk * high, k_chunk * wide
        q_chunks, k_chunks = -(-spec.q_len // q_chunk), -(-spec.kv_len // k_chunk)
    first, last = _edges(rows, q_chunks), _edges(columns, k_chunks)
    rows, columns = len(first) - 1, len(last) - 1
    found = np.full((rows, columns), EDGE, np.int8)
    for row in range(rows):
        full = empty = np.ones(columns, bool)
        chunks = np.arange(first[row], first[row + 1])
        for some in np.array_split(chunks, -(-len(chunks) * k_chunks // 2**17)):
            made = listed_kinds(spec, q_chunk, k_chunk, some)
            full = full & _all(made == FULL, last)
            empty = empty & _all(made == EMPTY, last)
        found[row][empty] = EMPTY
        found[row][full] = FULL
    return Cells(found, int(first[1]) * high, int(last[1]) * wide)


def _all(holds: Array, edges: Array) -> Array:
    """Whether it holds for all tiles of each cell."""
    return np.asarray(np.logical_and.reduceat(holds.all(axis=0), edges[:-1]))
