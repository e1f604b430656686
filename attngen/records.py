"""Candidate, Record: what was timed on a device, and what it says is fastest.

Values only: nothing here runs, reads or writes anything.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import msgspec

from attngen import timing
from attngen.errors import FileError
from attngen.keys import Key, canonical
from attngen.plans import Option
from attngen.units import show_bytes, show_time

EFFORTS = ("estimate", "measure", "patient")  # each at least as good as those before
SURE = 3  # rounds: of fewer, a single wild one decides
SHOWN = 16  # candidates in a record's table


Choices = dict[str, Option]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan that was tried.

    Args:
        choice: all choices of the plan, as `fix` takes them.
        digest: SHA-256 of its emitted source, of the spec without a budget; None where it
            couldn't be emitted.
        temp_bytes: of temporaries, certified; None where the compiler doesn't say.
        on_chip_bytes: of a TPU's own memory, which temp_bytes leaves out; None elsewhere, and
            where a record is older than this.
        modelled_bytes, modelled_s: what the model says.
        bound_s: seconds below which a call can't end, by the compiled main loop: of a device
            that isn't here.
        estimated_s: seconds of a call, by the compiler's own estimate of cycles: of a device
            that isn't here.
        samples_s: seconds of a call, a sample a round.
        yardsticks_s: of a fixed piece of work in the same rounds. Samples of candidates
            with the same yardstick were taken in the same round.
        failed: why it can't be used; None where it can.
    """

    choice: Choices
    digest: str | None
    temp_bytes: int | None
    modelled_bytes: int
    modelled_s: float
    bound_s: float | None = None
    estimated_s: float | None = None
    on_chip_bytes: int | None = None
    samples_s: tuple[float, ...] = ()
    yardsticks_s: tuple[float, ...] = ()
    failed: str | None = None

    @functools.cached_property
    def identity(self) -> str:
        return canonical([self.choice, self.digest])

    def fits(self, budget: int | None) -> bool:
        """Whether its certified bytes are within a budget; unknown ones fit none."""
        if budget is None:
            return True
        return self.temp_bytes is not None and self.temp_bytes <= budget

    def agrees(self, fix: Mapping[str, Option]) -> bool:
        """Whether it has the choices that a user makes."""
        return all(
            n in self.choice and _same(self.choice[n], v) for n, v in fix.items()
        )

    @property
    def least(self) -> str:
        """Its fastest call, or what its compiler says of one, for people."""
        if self.samples_s:
            return show_time(min(self.samples_s))
        sign = "≥" if self.estimated_s is None else "≈"
        return f"{sign} {show_time(self.compiled_s or 0)}"

    @property
    def compiled_s(self) -> float | None:
        """What its compiler makes of a call: an estimate, or else a bound."""
        return self.bound_s if self.estimated_s is None else self.estimated_s

    @property
    def took(self) -> tuple[str, str]:
        """A call's time and its spread, for people."""
        if not self.samples_s:
            return self.least, "–"
        found = timing.spread(self.samples_s)
        several = len(self.samples_s) > 1
        return show_time(found.median), f"{found.relative:.0%}" if several else "–"

    def merged(self, other: Candidate) -> Candidate:
        """The samples of both, each once; all else as the other says, if it does."""
        own = list(zip(self.yardsticks_s, self.samples_s, strict=True))
        missing = Counter(zip(other.yardsticks_s, other.samples_s, strict=True))
        missing.subtract(Counter(own))
        both = own + [pair for pair, n in missing.items() for _ in range(n)]
        on_chip = other.on_chip_bytes
        return replace(
            other,
            on_chip_bytes=self.on_chip_bytes if on_chip is None else on_chip,
            samples_s=tuple(s for _, s in both),
            yardsticks_s=tuple(y for y, _ in both),
        )


def _same(one: Option, other: Option) -> bool:
    return one == other and isinstance(one, bool) == isinstance(other, bool)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A search that wasn't interrupted.

    Args:
        effort: "measure" or "patient".
        fix: the choices that were the user's.
        budget: bytes; None: what the device's memory leaves.
        noise: how much the machine changed from round to round, as a share.
        stopped: it ended for want of time, and had less than its effort takes by itself.
    """

    effort: Literal["measure", "patient"]
    fix: Choices
    budget: int | None
    noise: float
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class Record:
    """All that was timed of one key.

    Args:
        finished: the searches that weren't interrupted.
        candidates: every plan that was tried, those that failed too.
    """

    key: Key
    finished: tuple[Finished, ...] = ()
    candidates: tuple[Candidate, ...] = field(default=())

    @property
    def effort(self) -> str:
        """The greatest of a search that was done.

        "unfinished" where each was interrupted, or stopped for want of time.
        """
        done = [f.effort for f in self.finished if not f.stopped]
        tried = any(c.samples_s or c.compiled_s for c in self.candidates)
        none = "unfinished" if tried else "estimate"
        return max(done, key=EFFORTS.index, default=none)

    def searched(self, effort: str, fix: Mapping[str, Option]) -> tuple[Finished, ...]:
        """The searches of at least that effort that weren't narrower than fix.

        One that was stopped is of no effort: what it timed is used, and is no end of it.
        """
        efforts = [EFFORTS[0] if f.stopped else f.effort for f in self.finished]
        return tuple(
            f
            for f, done in zip(self.finished, efforts, strict=True)
            if EFFORTS.index(done) >= EFFORTS.index(effort)
            and all(n in fix and _same(fix[n], v) for n, v in f.fix.items())
        )

    @functools.cached_property
    def standings(self) -> dict[str, float]:
        """What each timed candidate takes by what the fastest takes, by identity.

        Less than 1 only where there are too few rounds to believe it. Where none is timed,
        it is of what the compiler makes of the candidates.
        """
        usable = [c for c in self.candidates if c.failed is None]
        timed = [c for c in usable if c.samples_s]
        if not timed:
            known = {
                c.identity: c.compiled_s for c in usable if c.compiled_s is not None
            }
            return {n: s / min(known.values()) for n, s in known.items()}
        seconds: dict[str, dict[Hashable, float]] = {
            c.identity: dict(zip(c.yardsticks_s, c.samples_s, strict=True))
            for c in timed
        }
        fixed: dict[Hashable, float] = {y: y for c in timed for y in c.yardsticks_s}
        found = timing.standings(seconds, fixed)
        sure = [found[c.identity] for c in timed if len(c.samples_s) >= SURE]
        least = min(sure or found.values(), default=1.0)
        return {name: ratio / least for name, ratio in found.items()}

    def ranked(
        self, budget: int | None = None, fix: Mapping[str, Option] | None = None
    ) -> tuple[Candidate, ...]:
        """The candidates with standings whose certified bytes fit, the fastest first.

        Those of fewer rounds than can be believed come last. Of those that weren't timed, and
        have the same bound, the model says which is faster.
        """
        usable = [
            c
            for c in self.candidates
            if c.identity in self.standings and c.fits(budget) and c.agrees(fix or {})
        ]

        def place(c: Candidate) -> tuple[bool, float, float, int]:
            few = 0 < len(c.samples_s) < SURE
            modelled_s = 0.0 if c.samples_s else c.modelled_s
            return few, self.standings[c.identity], modelled_s, c.temp_bytes or 0

        return tuple(sorted(usable, key=place))

    def best(
        self, budget: int | None = None, fix: Mapping[str, Option] | None = None
    ) -> Candidate | None:
        """The fastest candidate within a budget (bytes) that has the fixed choices."""
        return next(iter(self.ranked(budget, fix)), None)

    def find(self, choice: Mapping[str, Option], digest: str) -> Candidate | None:
        """The candidate of a choice and a source."""
        identity = canonical([dict(choice), digest])
        return next((c for c in self.candidates if c.identity == identity), None)

    def merged(self, other: Record) -> Record:
        """All that either has; samples that both have are kept once.

        A plan that once couldn't be emitted or certified is forgotten when it could.
        """
        candidates = {c.identity: c for c in self.candidates}
        for c in other.candidates:
            known = candidates.get(c.identity)
            candidates[c.identity] = c if known is None else known.merged(c)
        made = {
            canonical(c.choice) for c in candidates.values() if c.digest is not None
        }
        finished: dict[str, Finished] = {}
        for f in (*self.finished, *other.finished):
            of = canonical([f.effort, f.fix, f.budget])
            if not f.stopped or finished.get(of, f).stopped:
                finished[of] = f
        return Record(
            key=self.key,
            finished=tuple(finished.values()),
            candidates=tuple(
                c
                for c in candidates.values()
                if c.digest is not None or canonical(c.choice) not in made
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"effort": self.effort}

    def to_json(self, *, indent: int = 2) -> str:
        return msgspec.json.format(
            msgspec.json.encode(self.to_dict()), indent=indent
        ).decode()

    @classmethod
    def from_dict(cls, data: Any) -> Record:
        """The record that `to_dict` wrote.

        Raises:
            FileError: it isn't one.
        """
        try:
            made = msgspec.convert(data, cls)
        except msgspec.ValidationError as error:
            raise _no_record(str(error)) from error
        for c in made.candidates:
            if len(c.samples_s) != len(c.yardsticks_s):
                raise _no_record("samples_s and yardsticks_s of different lengths")
            times = (
                *c.samples_s,
                *c.yardsticks_s,
                *[s for s in (c.bound_s, c.estimated_s) if s is not None],
            )
            if not all(0 < s < float("inf") for s in times):
                raise _no_record("a sample that isn't a positive number of seconds")
        return made

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        try:
            return cls.from_dict(msgspec.json.decode(text))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _no_record(str(error)) from error

    def __str__(self) -> str:
        ranked = self.ranked()
        columns, width = self._columns()
        lines = [
            f"{self.size} on {self.key.target} by {self.key.backend}"[:100],
            f"{self.key.device}, {self.key.cores} cores; effort: {self.effort}"[:100],
            "",
            "".join(f"{name:>{size}}" for name, size in columns.items()) + "  plan",
        ]

        def row(c: Candidate) -> str:
            shown = self._figures(c)
            figures = "".join(f"{shown[n]:>{size}}" for n, size in columns.items())
            return f"{figures}  {_words(c, width)}"

        lines += map(row, ranked[:SHOWN])
        if len(ranked) > SHOWN:
            lines.append(f"       and {len(ranked) - SHOWN} that are slower")
        failed = [c for c in self.candidates if c.failed is not None]
        lines += [f"failed {_words(c)}"[:100] for c in failed]
        others = [c for c in self.candidates if c not in ranked and c not in failed]
        lines += map(row, others[:SHOWN])
        if len(others) > SHOWN:
            lines.append(f"       and {len(others) - SHOWN} that weren't timed")
        for f in self.finished:
            if f.stopped:
                lines.append(f"stopped: {f.effort} had less time than it takes")
            if f.noise >= timing.NOISY:
                lines.append(
                    f"noisy: in {f.effort}, neighbouring rounds differed by {f.noise:.0%}"
                )
        return "\n".join(lines)

    def _columns(self) -> tuple[dict[str, int], int]:
        """The table's columns with their widths, and what is left for a plan's words."""
        columns = {"": 6, "a call": 11}
        if any(c.samples_s for c in self.candidates):
            columns |= {"spread": 8, "rounds": 8}
        columns["certified"] = 12
        if any(c.on_chip_bytes is not None for c in self.candidates):
            columns["on chip"] = 11
        return columns, 98 - sum(columns.values())

    def _figures(self, c: Candidate) -> dict[str, str]:
        """What the table says of a candidate, by column."""
        standing = self.standings.get(c.identity)
        took, spread = c.took if standing is not None else ("not timed", "")
        rounds = "" if standing is None else str(len(c.samples_s) or "–")
        return {
            "": "" if standing is None else f"{standing:.2f}×",
            "a call": took,
            "spread": spread,
            "rounds": rounds,
            "certified": _known(c.temp_bytes),
            "on chip": _known(c.on_chip_bytes),
        }

    @property
    def size(self) -> str:
        """What is computed, in few words."""
        s = self.key.spec
        heads = f"{s.get('batch')} × {s.get('q_heads')} heads"
        square = (
            f"{s.get('q_len')} queries × {s.get('kv_len')} keys × {s.get('qk_dim')}"
        )
        kinds = (s.get("dtype"), s.get("storage"), s.get("kv_dtype"))
        return ", ".join(
            [heads, square, *(k for k in kinds if k not in (None, "dense"))]
        )


def _known(count: int | None) -> str:
    return "?" if count is None else show_bytes(count)


def _words(c: Candidate, width: int = 53) -> str:
    """A choice in the columns that are left: what is usual is left out."""
    first = f"{c.choice.get('algorithm')} {c.choice.get('q_chunk')}×{c.choice.get('k_chunk')}"
    if c.failed is not None:
        text = f"{first}: {c.failed.splitlines()[0]}"
    else:
        rest = {n: v for n, v in c.choice.items() if n not in _FIRST}
        shown = [
            v if isinstance(v, str) else f"{_ABBREVIATED.get(n, n)}={canonical(v)}"
            for n, v in rest.items()
            if n == "head_chunk" or (v != 1 and v is not False and v not in _USUAL)
        ]
        text = " ".join([first, *shown])
    return text if len(text) <= width else text[: width - 1] + "…"


_USUAL = ("forward", "padded", "pointers")
_FIRST = ("algorithm", "q_chunk", "k_chunk", "guard")
_ABBREVIATED = {"head_chunk": "heads", "batch_chunk": "batch"}


def _no_record(got: str) -> FileError:
    return FileError(
        "This isn't a record.", got=got, needed="what record.to_json() writes"
    )
