"""Which plans a search tries: some that differ, and the neighbours of the fastest."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

from attngen.keys import canonical
from attngen.plans import Option, Plan

NEAR = 12  # neighbours that are tried at a time


def different(plans: Sequence[Plan], most: int) -> list[Plan]:
    """The best plans that aren't all alike, and some that need far less memory.

    Of plans with the same chunk sizes two are taken, so that a choice that the model sees
    no difference in doesn't take all places. The last places are for plans of a quarter of
    the memory, which a smaller budget will ask for.
    """
    small = most // 4
    picked: list[Plan] = []
    seen: dict[tuple[object, ...], int] = {}
    for plan in plans:
        chunks = (plan.algorithm, plan.q_chunk, plan.k_chunk)
        if seen.setdefault(chunks, 0) < 2 and len(picked) < most - small:
            seen[chunks] += 1
            picked.append(plan)
    least = min(p.temp_bytes for p in picked)
    for plan in plans:
        if len(picked) < most and plan.temp_bytes <= least / 4 < least:
            picked.append(plan)
            least = plan.temp_bytes
    for plan in plans:
        if len(picked) < most and plan not in picked:
            picked.append(plan)
    return picked


def neighbours(
    choice: Mapping[str, Option], plans: Sequence[Plan], tried: Collection[str]
) -> list[Plan]:
    """Plans that differ from a choice in one thing, of those not tried yet.

    The best of each thing come first, then the second best of each: the model may see no
    gain in what there is one.

    Args:
        plans: best first, as `planner.near` gives them.
    """
    by_name: dict[str, list[Plan]] = {}
    for plan in plans:
        own = plan.choice
        if canonical(own) in tried:
            continue
        names = own.keys() | choice.keys()
        apart = [n for n in names if own.get(n) != choice.get(n)]
        if own["algorithm"] != choice["algorithm"]:
            by_name.setdefault("algorithm", []).append(plan)
        elif len(apart) == 1:
            by_name.setdefault(apart[0], []).append(plan)
    in_turn = itertools.zip_longest(*by_name.values())
    return [plan for several in in_turn for plan in several if plan is not None][:NEAR]
