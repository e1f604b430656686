"""Recall: what was timed of a spec before, and whether it is still used."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from attngen import planner, timing
from attngen.backends import Backend
from attngen.building import emit
from attngen.errors import AttngenError, WisdomError
from attngen.keys import Key
from attngen.legality import considered
from attngen.plans import Alternative, Option, Plan
from attngen.records import Candidate, Record
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import show_bytes
from attngen.version import __version__, installed

if TYPE_CHECKING:
    from attngen.emitter import Source

Fix = Mapping[str, Option]
WIDTH = 100
SHOWN = 5  # other plans that were timed, in a plan's explanation


def key_of(spec: AttentionSpec, target: Target, by: Backend) -> Key:
    """What a time of the spec holds for, here and now; what a bound does elsewhere."""
    plain = msgspec.json.decode(spec.to_json())
    plain.pop("memory_budget")
    return Key(
        spec=plain,
        target=target.name,
        device=target.model if by.is_here(target) else f"{target.model}, not here",
        cores=target.cores,
        backend=by.name,
        versions=_versions(tuple(by.requires)),
    )


@functools.cache
def _versions(requires: tuple[str, ...]) -> dict[str, str]:
    names = [re.split(r"[^\w.-]", r.strip(), maxsplit=1)[0] for r in requires]
    if "jax" in names:
        names.append("jaxlib")
    found = installed(names)
    return {"attngen": __version__} | {n: found.get(n, "none") for n in names}


def neutral(spec: AttentionSpec, target: Target, by: Backend, choice: Fix) -> Plan:
    """The plan of a full choice, of the spec without its budget: what records are of."""
    free = dataclasses.replace(spec, memory_budget=None)
    return dataclasses.replace(planner.rank(free, target, by, choice)[0], fixed=())


def recall(
    spec: AttentionSpec, target: Target, by: Backend, effort: str, fix: Fix
) -> tuple[Plan, Source] | None:
    """The fastest recorded plan that fits, and that is still emitted as it was recorded.

    None where no search of that effort ended, it was of a smaller budget than the model's
    best plan needs now, or none of its plans fits. Damaged wisdom is a warning where the
    effort is "estimate".

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    from attngen import wisdom

    try:
        record = wisdom.find(key_of(spec, target, by))
    except WisdomError as error:
        if effort != "estimate":
            raise
        warnings.warn(f"Wisdom isn't used: {error}", stacklevel=4)
        return None
    if record is None or not _searched(record, spec, target, by, effort, fix):
        return None
    for candidate in record.ranked(spec.budget_bytes, fix):
        plan = _current(candidate, spec, target, by)
        if isinstance(plan, Plan):
            others = _others(record, candidate, spec, target, by, fix)
            chosen = dataclasses.replace(
                plan, spec=spec, fixed=tuple(fix), alternatives=others
            )
            return chosen, emit(chosen)
    return None


def _searched(
    record: Record,
    spec: AttentionSpec,
    target: Target,
    by: Backend,
    effort: str,
    fix: Fix,
) -> bool:
    """Whether a search of that effort could have chosen what the model likes best now."""
    budgets = [f.budget for f in record.searched(effort, fix)]
    largest = max((b for b in budgets if b is not None), default=0)
    if None in budgets or not budgets:
        return bool(budgets)
    if spec.budget_bytes is not None and spec.budget_bytes <= largest:
        return True
    best = planner.rank(spec, target, by, fix, smallest=1)[0]
    return best.temp_bytes <= largest


def _others(
    record: Record,
    chosen: Candidate,
    spec: AttentionSpec,
    target: Target,
    by: Backend,
    fix: Fix,
) -> tuple[Alternative, ...]:
    """What else was timed and can be had, in the order of its speed, and why it isn't."""
    made: list[Alternative] = []
    for c in record.ranked(None, fix):
        if len(made) == SHOWN:
            break
        if c == chosen or not isinstance(_current(c, spec, target, by), Plan):
            continue
        how = "bound" if c.estimated_s is None else "estimated"
        how = "timed here" if c.samples_s else how
        if c.fits(spec.budget_bytes):
            ratio = record.standings[c.identity] / record.standings[chosen.identity]
            reason = f"{how}: {ratio - 1:.0%} slower"
            if ratio < 1:
                reason = f"{how}: too few rounds to tell"
        else:
            reason = f"{how}: over the budget"
        timed = timing.spread(c.samples_s).median if c.samples_s else None
        seconds = c.compiled_s if timed is None else timed
        need = c.modelled_bytes if c.temp_bytes is None else c.temp_bytes
        made.append(Alternative(c.choice, need, seconds, reason))
    return tuple(made)


def _current(
    candidate: Candidate, spec: AttentionSpec, target: Target, by: Backend
) -> Plan | str:
    """The plan of a candidate, if it is emitted today as it was when it was timed.

    If not, the reason: plans may have other choices today, or other values, or be spelled
    otherwise.
    """
    choice = candidate.choice
    space = considered(spec, target, by, choice)
    axes = space.get(str(choice.get("algorithm")))
    if axes is None:
        return f"algorithm {choice.get('algorithm')!r:.40} isn't known"
    for name in (n for n in choice if n not in ("algorithm", *axes)):
        return f"choice {name!r:.40} isn't known"
    for name in (n for n in axes if n not in choice):
        return f"choice {name!r}, which plans have now, isn't said"
    try:
        plan = neutral(spec, target, by, choice)
        if emit(plan).digest == candidate.digest:
            return plan
        return "they would be emitted differently today"
    except AttngenError as error:  # a value that is no longer legal
        return f"they aren't legal today: {error.needed}"


def why(spec: AttentionSpec, target: Target, by: Backend) -> str:
    """Whether a record of a spec is used by `build`, and if not, why not.

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    from attngen import wisdom

    key = key_of(spec, target, by)
    record = wisdom.find(key)
    lines = [wisdom.why(key)]
    timed = () if record is None else record.ranked()
    if record is None or not record.finished or not timed:
        return lines[0]
    found = [(c, _current(c, spec, target, by)) for c in timed]
    current = [c for c, plan in found if isinstance(plan, Plan)]
    stale = Counter(reason for _, reason in found if isinstance(reason, str))
    for reason, count in stale.items():
        lines += textwrap.wrap(
            f"{count} of the {len(timed)} plans that were timed aren't used: {reason}.",
            WIDTH,
        )
    if current and not any(c.fits(spec.budget_bytes) for c in current):
        least = min(c.temp_bytes for c in current if c.temp_bytes is not None)
        lines.append(
            f"No other is within the budget: the least is {show_bytes(least)}."
        )
    elif not _searched(record, spec, target, by, "estimate", {}):
        lines.append(
            "It isn't used: only a smaller budget was tuned for, or fixed choices."
        )
    elif current:
        lines.append("`build` uses it.")
    else:
        lines.append("Nothing is left of it: tune again.")
    return "\n".join(lines)
