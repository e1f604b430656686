"""Frontier: what each byte of temporaries buys in time, of all plans that were tried.

Values only; drawing.py makes the picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from attngen import timing
from attngen.records import Candidate, Choices, Record
from attngen.targets import Target
from attngen.units import show_count

BEND = 0.08  # of a point's time, that another has to save to be a bend


class Other(Protocol):
    """What stands beside the plans: `peers.references.Reference` is one."""

    @property
    def name(self) -> str: ...
    @property
    def temp_bytes(self) -> int | None: ...
    @property
    def on_chip_bytes(self) -> int | None: ...
    @property
    def time_s(self) -> float | None: ...
    @property
    def failed(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Point:
    """A program: its certified bytes, and what a call takes.

    Args:
        name: its chunk sizes, as "2048×512", or the name of what isn't attngen's.
        choice: of a plan; None of what isn't attngen's.
        temp_bytes: of temporaries, certified; None where it doesn't fit the target.
        on_chip_bytes: of a TPU's own memory beside them; None where it isn't known.
        time_s: of a call; None where nothing says it.
        missing: why one of them is None.
    """

    name: str
    choice: Choices | None
    temp_bytes: int | None
    time_s: float | None
    missing: str | None = None
    on_chip_bytes: int | None = None

    @property
    def drawn(self) -> bool:
        return self.temp_bytes is not None and self.time_s is not None


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """All certified plans of a spec on a target with their times, and what is beside them.

    Args:
        what: the spec in few words.
        target: its name, and the device's.
        time: what the times are, in words: measured, or by whose estimate.
        points: of plans.
        others: of programs that aren't attngen's.
    """

    what: str
    target: str
    time: str
    points: tuple[Point, ...]
    others: tuple[Point, ...]

    @property
    def line(self) -> tuple[Point, ...]:
        """The plans that no other beats in both, by their bytes."""
        return pareto(self.points)

    @property
    def bends(self) -> tuple[Point, ...]:
        """Those of the line that save some time over the one before."""
        kept: list[Point] = []
        for p in self.line:
            if not kept or _time(p) < (1 - BEND) * _time(kept[-1]):
                kept.append(p)
        if kept and kept[-1] != self.line[-1]:  # the fastest is always one
            kept = [*(kept[:-1] if len(kept) > 1 else kept), self.line[-1]]
        return tuple(kept)

    def to_dict(self) -> dict[str, Any]:
        """As `attngen tune --json` prints it: the line and what is beside it."""
        return {
            "what": self.what,
            "target": self.target,
            "time": self.time,
            "line": [asdict(p) for p in self.line],
            "others": [asdict(p) for p in self.others],
            "points": len(self.points),
        }


def of(record: Record, target: Target, others: Iterable[Other]) -> Frontier:
    """The frontier of a record, over all budgets."""
    usable = [c for c in record.candidates if c.failed is None]
    leader_s = _leader_s(record)
    points = [_point(c, record, leader_s) for c in usable]
    device = record.key.device.removesuffix(", not here")
    return Frontier(
        what=record.size,
        target=record.key.target
        if device == "unknown"
        else f"{record.key.target} ({device})",
        time="time of a call, measured" if leader_s else _estimate(target),
        points=tuple(p for p in points if p.drawn),
        others=tuple(
            Point(
                name=o.name,
                choice=None,
                temp_bytes=o.temp_bytes,
                on_chip_bytes=o.on_chip_bytes,
                time_s=o.time_s,
                missing=o.failed,
            )
            for o in others
        ),
    )


def pareto(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other has both fewer bytes and less time than, by their bytes."""
    drawn = [p for p in points if p.drawn]
    found: list[Point] = []
    for p in sorted(drawn, key=lambda p: (p.temp_bytes, p.time_s)):
        if not found or _time(p) < _time(found[-1]):
            found.append(p)
    return tuple(found)


def within(points: Sequence[Point], budget: int | None) -> Point | None:
    """The fastest of some points whose bytes are within a budget."""
    fitting = [p for p in points if budget is None or (p.temp_bytes or 0) <= budget]
    return min((p for p in fitting if p.drawn), key=_time, default=None)


def _time(point: Point) -> float:
    assert point.time_s is not None
    return point.time_s


def _point(c: Candidate, record: Record, leader_s: float | None) -> Point:
    """A candidate; where it was timed, beside the others in the same rounds.

    Args:
        leader_s: what the fastest takes; None where nothing was timed.
    """
    seconds = c.compiled_s
    if leader_s is not None:
        standing = record.standings.get(c.identity)
        seconds = None if standing is None else standing * leader_s
    return Point(
        name=f"{c.choice['q_chunk']}×{c.choice['k_chunk']}",
        choice=c.choice,
        temp_bytes=c.temp_bytes,
        on_chip_bytes=c.on_chip_bytes,
        time_s=seconds,
    )


def _leader_s(record: Record) -> float | None:
    """Seconds of the fastest that was timed, by which standings become times."""
    best = record.best()
    if best is None or not best.samples_s:
        return None
    return timing.spread(best.samples_s).median / record.standings[best.identity]


def _estimate(target: Target) -> str:
    """Whose estimate the times are, and at which clock cycles become seconds."""
    if target.tpu is None:
        return "least time of a call, by its compiler"
    clock = show_count(target.tpu.clock_hz)
    return f"time of a call, by XLA:TPU's estimate of cycles at {clock}Hz"
