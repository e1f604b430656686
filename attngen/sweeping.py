"""Tune for ever smaller budgets: what each half of the memory costs in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from attngen import timing
from attngen.errors import BudgetError, TimingError
from attngen.plans import Option
from attngen.records import Record
from attngen.spec import AttentionSpec
from attngen.units import show_bytes

LEAST = 2**17  # bytes: of the smallest budget
SHARE = (
    5  # of the time the first search, which has the spec's own budget, takes one part
)

Search = Callable[[AttentionSpec, float], Record]


def sweep(
    spec: AttentionSpec,
    search: Search,
    *,
    effort: str,
    seconds: float,
    fix: Mapping[str, Option],
    say: Callable[[str], None],
) -> Record:
    """Search within the spec's budget, then within each power of two below what that took.

    Down to LEAST, or until nothing fits, or the machine is too noisy. Budgets that were searched before come last, so
    that one that was stopped for want of time goes on where it was.

    Args:
        search: tunes a spec within about so many seconds.
        seconds: of all searches together.

    Raises:
        as `search`, of the first.
    """
    begin = timing.clock()
    record = search(spec, seconds / SHARE)
    best = record.best(spec.budget_bytes, fix)
    wanted = halvings(best.temp_bytes if best else None)
    done = {f.budget for f in record.searched(effort, fix)}
    if not wanted and spec.budget_bytes not in done:  # all of the time is the first's
        return search(spec, begin + seconds - timing.clock())
    wanted = [*(b for b in wanted if b not in done), *(b for b in wanted if b in done)]
    empty = 0  # the largest budget that nothing fits
    for i, budget in enumerate(wanted):
        if budget <= empty:
            continue
        left = begin + seconds - timing.clock()
        if left <= 0:
            say(f"time for {i} of {len(wanted)} smaller budgets; tune again to go on")
            break
        say(f"within {show_bytes(budget)}")
        smaller = dataclasses.replace(spec, memory_budget=budget)
        try:
            record = search(smaller, left / (len(wanted) - i))
        except BudgetError:
            empty = max(empty, budget)
        except TimingError as error:  # what was found before it stands
            say(f"no more budgets: {error.what} ({error.got})")
            break
        if record.best(budget, fix) is None:
            empty = max(empty, budget)
        if empty == budget:
            say(f"nothing fits {show_bytes(budget)}")
    return record


def halvings(most: int | None) -> list[int]:
    """The powers of two below some bytes, the largest first, down to LEAST."""
    found = []
    budget = LEAST
    while most is not None and budget < most:
        found.append(budget)
        budget *= 2
    return found[::-1]
