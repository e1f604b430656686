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
HARDLY = 1.03  # times what the best takes: hardly slower
SHARE = 5  # the first search, within the spec's own budget, has a fifth of the time

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
    """Search within the spec's budget, then within ever smaller powers of two.

    The next is below what a plan takes that is hardly slower than the best: no time goes to
    budgets between them. Down to LEAST, or until nothing fits, or the machine is too noisy.
    Budgets that were searched before come last, so that a sweep that was stopped for want of
    time goes on where it was.

    Args:
        search: tunes a spec within about so many seconds.
        seconds: of all searches together.

    Raises:
        as `search`, of the first.
    """
    begin = timing.clock()
    record = search(spec, seconds / SHARE)
    done = {f.budget for f in record.searched(effort, fix)}
    budgets = below(record, spec.budget_bytes, fix)
    if not budgets and spec.budget_bytes not in done:  # all of the time is the first's
        return search(spec, begin + seconds - timing.clock())
    known: list[int] = []
    while budgets or known:
        left = begin + seconds - timing.clock()
        if left <= 0:
            if budgets:
                said = show_bytes(budgets[0])
                say(f"no time for {said} and less; tune again to go on")
            break
        if budgets and budgets[0] in done:
            known.append(budgets[0])
            budgets = below(record, budgets[0], fix)
            continue
        budget = budgets[0] if budgets else known.pop(0)
        say(f"within {show_bytes(budget)}")
        smaller = dataclasses.replace(spec, memory_budget=budget)
        try:
            record = search(smaller, left / (len(budgets or known) + 1))
        except BudgetError:
            pass  # so it has none of that budget
        except TimingError as error:  # what was found before it stands
            say(f"no more budgets: {error.what} ({error.got})")
            break
        if record.best(budget, fix) is None:
            say(f"nothing fits {show_bytes(budget)}")
        if budgets:
            budgets = below(record, budget, fix)
    return record


def below(record: Record, budget: int | None, fix: Mapping[str, Option]) -> list[int]:
    """The budgets to search next, the largest first; none below what nothing fits."""
    ranked = record.ranked(budget, fix)
    if not ranked:
        return []
    most = HARDLY * record.standings[ranked[0].identity]
    near = [c for c in ranked if record.standings[c.identity] <= most]
    return halvings(min(c.temp_bytes or 0 for c in near))


def halvings(most: int) -> list[int]:
    """The powers of two below some bytes, the largest first, down to LEAST."""
    found = []
    budget = LEAST
    while budget < most:
        found.append(budget)
        budget *= 2
    return found[::-1]
