"""Keys of an edge tile that no query of it sees: their values may be NaN, and are blanked.

The masked scores tell them, in a pass over the tile (the choice blank = scores). Where each
key between a chunk's limits is seen by one of its queries (regions.hull_is_seen), the limits
tell them, too: by a comparison for each key (blank = limits).
"""

from __future__ import annotations

from collections.abc import Collection

from attngen.backends.jax.bounds import Limits
from attngen.backends.jax.tile import chosen
from attngen.plans import Plan
from attngen.regions import analyse
from attngen.tiles import chunk_limits

CHUNKS = 4096  # of queries, at most, whose limits are all looked at


def unseen(
    plan: Plan, limits: Limits, ragged: bool, edge: Collection[str]
) -> list[str] | None:
    """Statements that define `there` for the keys of a tile; none where all are seen.

    Args:
        edge: the statements before them, which may define the keys' indices.

    Returns:
        None where only the scores tell.
    """
    spec, span = plan.spec, analyse(plan.spec)
    if chosen(plan, "blank") == "scores":
        return None
    low_whole, high_whole = _whole(plan)
    terms = []
    if span.low is not None and not low_whole:
        terms.append(f"k_index >= {limits.index(span.low)}")
    if span.high is not None and not high_whole:
        terms.append(f"k_index < {limits.index(span.high)}")
    if spec.kv_lengths:
        terms.append("k_index < kv_length")
    if ragged:
        terms.append("k_index >= c * K_CHUNK")
    if not terms:
        return []
    known = any(line.startswith("k_index = ") for line in edge)
    first = [] if known else ["k_index = k_start + jnp.arange(K_CHUNK)"]
    comment = "  # a query here sees that key"
    return [
        *first,
        f"there = {terms[0]}{comment}",
        *(f"there &= {term}" for term in terms[1:]),
    ]


def _whole(plan: Plan) -> tuple[bool, bool]:
    """Whether the lower, and the upper limit of each chunk lie where tiles end.

    The only tile is visited also where no key lies between them.
    """
    spec, k = plan.spec, plan.k_chunk
    if spec.static_q_offset is None or -(-spec.q_len // plan.q_chunk) > CHUNKS:
        return False, False
    found = [own[0] for own in chunk_limits(spec, plan.q_chunk)]
    if k == spec.kv_len:
        return (
            all(low == 0 for low, *_ in found),
            all(high == k for _, high, *_ in found),
        )
    low = all(low % k == 0 for low, *_ in found)
    return low, all(high % k == 0 or high == spec.kv_len for _, high, *_ in found)
