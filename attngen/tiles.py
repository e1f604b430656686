"""How many tiles a plan visits, and which: the loops of an emitted file, as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attngen.expr import Expr, const, variables
from attngen.regions import Span, compiled, spans
from attngen.spec import AttentionSpec


@dataclass(frozen=True)
class Tiles:
    """How many tiles of one head are full, on an edge, or empty and never visited."""

    full: int
    edge: int
    empty: int

    @property
    def visited(self) -> int:
        return self.full + self.edge

    @property
    def total(self) -> int:
        return self.full + self.edge + self.empty


Limits = tuple[int, int, int, int]
Visit = tuple[int, int, int, int]


def key_limits(spec: AttentionSpec, span: Span, q_start: int, q_chunk: int) -> Limits:
    """low, high, full_low, full_high of one chunk of queries, as key indices.

    Lengths and offsets that come at run time are taken at their largest. low may lie
    beyond the keys, where the loops end before they begin.
    """
    return limits_of(spec, span, q_chunk)(q_start)


def limits_of(spec: AttentionSpec, span: Span, q_chunk: int) -> Callable[[int], Limits]:
    """`key_limits` as a function of where the chunk of queries starts."""
    n, shift = spec.kv_len, spec.kv_offset
    if not span.some:
        return lambda q_start: (0, 0, 0, 0)
    static = spec.static_q_offset
    offset = spec.kv_len - spec.q_len if static is None else static

    def at(limit: Expr | None, otherwise: int) -> Callable[[int, int], int]:
        return compiled(const(otherwise + shift) if limit is None else limit)

    of_low, of_high = at(span.low, 0), at(span.high, n)
    of_full_low, of_full_high = at(span.full_low, 0), at(span.full_high, n)

    def limits(q_start: int) -> Limits:
        q_lo = q_start + offset
        q_hi = q_lo + q_chunk
        low = max(0, of_low(q_lo, q_hi) - shift)
        high = min(n, max(0, of_high(q_lo, q_hi) - shift))
        if not span.any_full:
            return (low, high, low, low)
        full_low = min(n, max(0, of_full_low(q_lo, q_hi) - shift))
        return (low, high, full_low, min(n, max(0, of_full_high(q_lo, q_hi) - shift)))

    return limits


SAMPLES = 512


def chunk_limits(
    spec: AttentionSpec, q_chunk: int, *, exact: bool = True, grouped: int = 1
) -> list[tuple[Limits, ...]]:
    """The limits of each chunk of queries, of each span, whatever the key chunks are.

    Args:
        exact: False looks at no more than about 512 chunks, evenly spaced.
        grouped: heads whose rows a chunk holds, query by query: it has q_chunk rows.
    """
    found = spans(spec)
    chunks = -(-spec.q_len * grouped // q_chunk)
    step = 1 if exact else max(1, chunks // SAMPLES)
    looked_at = range(step // 2, chunks, step)
    if grouped > 1:
        return [_grouped_limits(spec, q_chunk, grouped, i) for i in looked_at]
    each = [limits_of(spec, span, q_chunk) for span in found]

    def limits(start: int) -> tuple[Limits, ...]:
        return tuple([of(start) for of in each])

    if not any(variables(limit) for span in found for limit in span.limits):
        return [limits(0)] * len(looked_at)  # all are alike
    starts = (min(i * q_chunk, spec.q_len - q_chunk) for i in looked_at)
    return [limits(start) for start in starts]


def _grouped_limits(
    spec: AttentionSpec, rows: int, grouped: int, i: int
) -> tuple[Limits, ...]:
    """Of chunk i of so many rows, of which each query has one for each grouped head."""
    start = i * rows // grouped
    stop = min(-(-(i + 1) * rows // grouped), spec.q_len)
    return tuple([limits_of(spec, x, stop - start)(start) for x in spans(spec)])


def key_chunks(limits: Sequence[Limits], k_chunk: int) -> list[Visit]:
    """first, full_first, full_last, last of the key chunks that a chunk of queries visits.

    Of each span: [first, last) hold what any of the queries sees, [full_first, full_last)
    only what all do. None begins before the one before it ends.
    """
    found: list[Visit] = []
    for low, high, full_low, full_high in limits:
        first = max(low // k_chunk, found[-1][-1] if found else 0)
        last = max(first, -(-high // k_chunk))
        full_first = min(max(-(-full_low // k_chunk), first), last)
        full_last = min(max(full_high // k_chunk, full_first), last)
        found.append((first, full_first, full_last, last))
    return found


def count_tiles(
    spec: AttentionSpec,
    q_chunk: int,
    k_chunk: int,
    *,
    exact: bool = True,
    grouped: int = 1,
    limits: list[tuple[Limits, ...]] | None = None,
) -> Tiles:
    """The tiles of one head, as the emitted loops visit them; of `grouped` heads at once.

    Args:
        exact, grouped: as for `chunk_limits`; what isn't looked at is taken to be alike.
        limits: of the chunks of queries, where they are known.
    """
    if limits is None:
        limits = chunk_limits(spec, q_chunk, exact=exact, grouped=grouped)
    full = edge = 0
    for own, alike in Counter(limits).items():
        for first, full_first, full_last, last in key_chunks(own, k_chunk):
            full += alike * (full_last - full_first)
            edge += alike * (last - first - (full_last - full_first))
    q_chunks = -(-spec.q_len * grouped // q_chunk)
    k_chunks = -(-spec.kv_len // k_chunk)
    if len(limits) < q_chunks:
        full, edge = (round(x * q_chunks / len(limits)) for x in (full, edge))
    return Tiles(full, edge, q_chunks * k_chunks - full - edge)
