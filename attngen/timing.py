"""The only clock: how long calls take, side by side, and how far that can be trusted.

What a machine does from minute to minute changes by factors, so no two times are compared
unless they were taken in one round: contenders take turns, each once a round, and what is
compared is the ratio within each round. A fixed piece of work, the yardstick, is timed in
every round too: how much its time changes from one round to the next is the machine's noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from attngen.errors import TimingError
from attngen.units import show_time

clock: Callable[[], float] = time.perf_counter  # seconds, from any beginning

FILL_S = 0.010  # a sample of shorter calls is the mean of as many as fill this
MOST_CALLS = 10_000  # of one sample
STANDS_S = 1.0  # of work that a clock may not see before it is said to stand
NOISY = 0.1  # of `noise`: neighbouring rounds differ by 10%; said, and more rounds help
USELESS = 2.0  # neighbouring rounds differ by a factor of three: nothing can be told
ENOUGH = 5  # rounds before noise can be told

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles.

    low and high are the first and third quartile: half of the values lie between them.
    """

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """The distance of the quartiles, by the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def spread(values: Iterable[float]) -> Spread:
    """The median and quartiles of at least one value, interpolated linearly."""
    ordered = sorted(values)

    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
        return low + (high - low) * (at - math.floor(at))

    return Spread(quantile(0.5), quantile(0.25), quantile(0.75))


def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
    """How long `one` takes by what `other` takes, round by round; of equally many samples."""
    return spread(a / b for a, b in zip(one, other, strict=True))


def noise(yardsticks: Sequence[float]) -> float:
    """How much one round differs from the next, as a share; 0 of too few.

    Half the distance of the quartiles of the logarithms of the ratios of neighbouring
    samples, as a factor less one: where each round takes 10% more or less than the one
    before, 0.1. A slow change, of a clock that follows its temperature, say, is no noise:
    it cancels within each round.
    """
    if len(yardsticks) < ENOUGH:
        return 0.0
    found = ratio(yardsticks[1:], yardsticks[:-1])
    return math.sqrt(found.high / found.low) - 1


def check_noise(yardsticks: Sequence[float]) -> None:
    """Refuse samples that nothing can be told from.

    Raises:
        TimingError: neighbouring rounds differ by USELESS or more.
    """
    if (found := noise(yardsticks)) >= USELESS:
        raise TimingError(
            "This machine is too noisy to time anything.",
            got=f"one and the same work takes {found:.0%} more or less from round to round",
            needed=f"less than {USELESS:.0%}; below {NOISY:.0%} it is quiet",
            hint="end what else runs here, and try again",
        )


def sample(call: Call) -> float:
    """Seconds of one call, which returns only when its work is done.

    Of calls shorter than FILL_S, the mean of as many as fill that.

    Raises:
        TimingError: the clock doesn't advance.
    """
    begin, count = time.process_time(), 1
    seconds = _seconds(call, 1)
    while not seconds > 0 and count < MOST_CALLS:  # a coarse clock, or one that stands
        if time.process_time() - begin > STANDS_S:
            break
        count = min(2 * count, MOST_CALLS)
        seconds = _seconds(call, count) / count
    if 0 < seconds * count < FILL_S:
        count = min(math.ceil(FILL_S / seconds), MOST_CALLS)
        seconds = _seconds(call, count) / count
    if not (seconds > 0 and math.isfinite(seconds)):
        raise TimingError(
            "The clock doesn't advance.",
            got=f"{show_time(seconds)} for {count} calls",
            needed="a clock that runs forward while work is done",
            hint="time.perf_counter() must count on this machine",
        )
    return seconds


def _seconds(call: Call, count: int) -> float:
    start = clock()
    for _ in range(count):
        call()
    return clock() - start


def yardstick() -> Call:
    """A fixed piece of work, of a few milliseconds: a float32 product of 640 × 640."""
    import numpy as np

    a = np.linspace(-1, 1, 640 * 640, dtype=np.float32).reshape(640, 640)
    out = np.empty_like(a)
    return lambda: np.matmul(a, a, out=out)


@dataclass
class Rounds:
    """What was timed: seconds of each contender and of the yardstick, a sample a round."""

    samples_s: dict[str, list[float]]
    yardsticks_s: list[float] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.yardsticks_s)

    @property
    def noise(self) -> float:
        return noise(self.yardsticks_s)

    def ratio(self, one: str, other: str) -> Spread:
        """How long `one` takes by what `other` takes, over the rounds."""
        return ratio(self.samples_s[one], self.samples_s[other])


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    on_sample: Callable[[str, float, float], None] | None = None,
    on_round: Callable[[Rounds], bool] | None = None,
    yardstick: Call | None = None,
    warm_up: bool = True,
    settle_s: float = 0.0,
) -> Rounds:
    """Time calls side by side: each once a round, in an order that rotates.

    Args:
        calls: the contenders by name; each returns when its work is done.
        rounds: at most how many.
        on_sample: told a contender's name, its seconds, and the round's yardstick's.
        on_round: told all so far after each round; True ends it.
        yardstick: the fixed work; None: `yardstick()`.
        warm_up: call each once before, untimed.
        settle_s: to wait after each sample. Threads of a pool look for more work for some
            milliseconds (libgomp's about ten) and hold up who is timed next: it matters
            where contenders have pools of their own.

    Raises:
        TimingError: the clock doesn't advance.
    """
    fixed = yardstick or globals()["yardstick"]()
    for call in (fixed, *(calls.values() if warm_up else ())):
        call()
    found = Rounds({name: [] for name in calls})
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names) if names else 0
        found.yardsticks_s.append(sample(fixed))
        time.sleep(settle_s)
        for name in names[first:] + names[:first]:
            found.samples_s[name].append(sample(calls[name]))
            time.sleep(settle_s)
            if on_sample is not None:
                on_sample(name, found.samples_s[name][-1], found.yardsticks_s[-1])
        if on_round is not None and on_round(found):
            break
    return found


def standings(
    seconds: Mapping[Name, Mapping[Hashable, float]], fixed: Mapping[Hashable, float]
) -> dict[Name, float]:
    """What each contender takes by what the quickest takes, from rounds that not all ran.

    Two that ran in the same rounds are compared by the median of their ratios there; who
    never met by way of others, those first that met most often (a maximum spanning tree).
    Only where nobody ties two sessions together does the fixed work.

    Args:
        seconds: for each contender its seconds by round; at least one each.
        fixed: seconds of the fixed work, in every round.
    """
    rows = [dict(x) for x in seconds.values()] + [dict(fixed)]
    last = len(rows) - 1  # the fixed work's place
    first = max(range(last), key=lambda i: len(rows[i]), default=last)
    own = {first: 0.0}  # logarithms of the seconds, by the first's

    def tie(one: int, other: int) -> tuple[bool, int]:
        met = len(rows[one].keys() & rows[other].keys())
        return met > 0 and last not in (one, other), met

    best = {i: (tie(i, first), first) for i in range(len(rows)) if i != first}
    while best:
        new = max(best, key=lambda i: best[i][0])
        via = best.pop(new)[1]
        met = rows[new].keys() & rows[via].keys()
        median = spread(math.log(rows[new][r] / rows[via][r]) for r in met).median
        own[new] = own[via] + median
        for i, (known, _) in best.items():
            if (tied := tie(i, new)) > known:
                best[i] = tied, new
    least = min(own[i] for i in range(last)) if last else 0.0
    return {n: math.exp(own[i] - least) for i, n in enumerate(seconds)}
