"""Comparison: attngen beside its peers, as a value and as text of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from attngen import timing
from attngen.plans import Plan
from attngen.spec import AttentionSpec
from attngen.timing import Spread
from attngen.units import show_bytes, show_time

OWN = "attngen"
WIDTH = 100
EXACT, ROUNDS_MORE, OTHER = "right", "rounds more", "computes something else"
NOT_INSTALLED, REFUSED = "not installed", "can't say it"
TOO_LARGE, FAILED = "too large", "failed"


@dataclass(frozen=True)
class Entry:
    """One contender.

    Args:
        status: "right": within the error that the validator allows; "rounds more" than it
            allows; "computes something else" (still timed); or why it wasn't timed: "not
            installed", "can't say it", "too large", "failed".
        note: how the spec was said, or the reason.
        samples_s: seconds of a call, one a round; the rounds are all contenders' own.
        temp_bytes: of temporaries, as its compiler says; None where nothing says it.
        error, allowed: the largest absolute error, and what is allowed, of the output that
            is worst; error is None where NaNs or infinities aren't the reference's.
        fault: what is wrong with the output, in words.
        prepared_s: seconds spent before the first call, by what they went to.
    """

    name: str
    status: str
    note: str
    samples_s: tuple[float, ...] = ()
    temp_bytes: int | None = None
    error: float | None = None
    allowed: float | None = None
    fault: str = ""
    prepared_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def checked(self) -> bool:
        return self.status in (EXACT, ROUNDS_MORE, OTHER)


@dataclass(frozen=True)
class Comparison:
    """What was seen of one spec on one device, all contenders side by side.

    Args:
        entries: attngen's own first.
        rows: how many queries of each output were judged by the reference.
        yardsticks_s: of a fixed piece of work, one a round.
        device: what is known of it.
        versions: of attngen and of what the contenders compute with.
    """

    spec: AttentionSpec
    plan: Plan
    entries: tuple[Entry, ...]
    rows: int
    yardsticks_s: tuple[float, ...]
    device: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def noise(self) -> float:
        """How much the machine changed from one round to the next, as a share."""
        return timing.noise(self.yardsticks_s)

    def entry(self, name: str) -> Entry:
        """The contender of that name; KeyError where there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def ratio(self, name: str) -> Spread | None:
        """How long a contender takes by what attngen takes, over the rounds."""
        samples = self.entry(name).samples_s
        own = self.entry(OWN).samples_s
        return timing.ratio(samples, own) if samples else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, all samples included."""
        return {
            "spec": self.spec.to_dict(),
            "plan": self.plan.to_dict(),
            "device": dict(self.device),
            "versions": dict(self.versions),
            "rounds": len(self.yardsticks_s),
            "noise": self.noise,
            "yardsticks_s": list(self.yardsticks_s),
            "rows": self.rows,
            "entries": [self._entry(e) for e in self.entries],
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        ratio = self.ratio(entry.name)
        seconds = timing.spread(entry.samples_s) if entry.samples_s else None
        return asdict(entry) | {
            "time_s": None if seconds is None else asdict(seconds),
            "ratio": None if ratio is None else asdict(ratio),
        }

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._table(), "", *self._notes()])

    def _head(self) -> list[str]:
        spec, device = self.spec, self.device
        size = f"{spec.batch} × {spec.q_heads} head{'' if spec.q_heads == 1 else 's'}"
        size += f" over {spec.kv_heads}" if spec.repeats > 1 else ""
        size += f", {spec.q_len} queries × {spec.kv_len} keys, dim {spec.qk_dim}"
        size += f" and {spec.v_dim}" if spec.v_dim != spec.qk_dim else ""
        rounds = len(self.yardsticks_s)
        where = f"{device['name']} ({device['model']}, {device['cores']} cores)"
        noisy = "" if self.noise < timing.NOISY else ": noisy, more rounds help"
        said = f"{rounds} round{'' if rounds == 1 else 's'} side by side, each contender once "
        return [
            f"{size}, {spec.dtype}",
            *(["the forward pass alone, of each"] if spec.derivatives else []),
            *textwrap.wrap(f"on {where}", WIDTH),
            f"{said}a round; noise {self.noise:.0%}{noisy}",
        ]

    def _table(self) -> list[str]:
        titles = ("time", "by attngen's time", "temporaries", "error")
        lines = [
            f"{'':<12}{titles[0]:>9}   {titles[1]:<22}{titles[2]:>12}{titles[3]:>10}"
        ]
        for entry in self.entries:
            if not entry.checked:
                lines.append(f"{entry.name:<12}{'—':>9}   {entry.status}")
                continue
            seconds = timing.spread(entry.samples_s).median
            temp = "—" if entry.temp_bytes is None else show_bytes(entry.temp_bytes)
            error = "astray" if entry.error is None else f"{entry.error:.1e}"
            status = "" if entry.status == EXACT else entry.status
            line = f"{entry.name:<12}{show_time(seconds):>9}   {self._ratio(entry):<22}"
            lines.append(f"{line}{temp:>12}{error:>10}   {status}".rstrip())
        return lines

    def _ratio(self, entry: Entry) -> str:
        if entry.name == OWN or (found := self.ratio(entry.name)) is None:
            return "1"
        low, middle, high = (
            f"{x:.2f}" if x < 100 else f"{x:.0f}"
            for x in (found.low, found.median, found.high)
        )
        return f"{middle}× [{low} {high}]"

    def _notes(self) -> list[str]:
        lines = []
        for entry in self.entries:
            said = entry.note
            if entry.prepared_s:
                times = (f"{n} {show_time(s)}" for n, s in entry.prepared_s.items())
                said += f" · before the call: {', '.join(times)}"
            said += f" · {entry.fault}" if entry.fault else ""
            lines += textwrap.wrap(
                said,
                WIDTH,
                initial_indent=f"{entry.name:<12}",
                subsequent_indent=" " * 12,
            )
        return lines
