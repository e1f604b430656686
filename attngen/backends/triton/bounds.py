"""Which key blocks a chunk of queries visits: the closed-form bounds as emitted text.

Lengths and offsets are known at run time only, so every limit is clamped to the keys that
are there, and the last, ragged block is always an edge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from attngen.backends.triton.printer import TritonPrinter
from attngen.diagonals import hull_is_seen
from attngen.expr import POSTFIX, Expr, variables
from attngen.expr import level as tightness
from attngen.fullness import none_full
from attngen.intervals import Interval, interval
from attngen.plans import Plan, grouped
from attngen.regions import Span, spans
from attngen.spec import AttentionSpec

Run = tuple[str, str]
ANYWHERE = (-(2**30), 2**30)  # positions of keys that come at run time


@dataclass
class Bounds:
    """Statements that define the ends of runs of key blocks, as far as needed.

    Args:
        interiors: the runs of blocks without a mask; edges: of those with it.
        some: whether any key is ever seen.
        there: which keys of a block any query here sees; "" where only the mask tells.
        listed: whether a row of the launcher's list says which blocks; runs count in it.
        visits: of each span of the mask the ends of its runs, in order.
        share: statements that cut the runs to what a split takes of them.
    """

    lines: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    interiors: list[Run] = field(default_factory=list)
    edges: list[Run] = field(default_factory=list)
    some: bool = True
    there: str = ""
    listed: bool = False
    visits: list[tuple[str, ...]] = field(default_factory=list)
    share: list[str] = field(default_factory=list)

    @property
    def interior(self) -> bool:
        return bool(self.interiors)

    def only_where(self, condition: str) -> None:
        """Leave the interiors empty where a condition doesn't hold: all tiles are edges."""
        for first, last in self.interiors:
            self.lines.append(f"{last} = tl.where({condition}, {last}, {first})")

    def split(self) -> None:
        """Cut the runs to the share that a split takes of all of their blocks."""
        if not self.visits:
            return
        renamed: dict[str, str] = {}
        self.share = _shares(self.visits)
        for number, (first, *inner, last) in zip(
            ("", *NUMBERS), self.visits, strict=False
        ):
            renamed[first], renamed[last] = f"lo{number}", f"hi{number}"
            for end in inner:
                text = f"tl.minimum(tl.maximum({end}, lo{number}), hi{number})"
                self.share.append(f"{end} = {text}")
        for runs in (self.interiors, self.edges):
            runs[:] = [(renamed.get(a, a), renamed.get(b, b)) for a, b in runs]

    @property
    def names(self) -> list[str]:
        """The variables that bound the loops, of those that are defined."""
        bounds = ("first", "last", "full_first", "full_last")
        every = [f"{n}{i}" for i in ("", *NUMBERS) for n in bounds]
        return [n for n in every if any(x.startswith(f"{n} = ") for x in self.lines)]


NUMBERS = ("_2", "_3")  # of the second and third span of a mask


def _shares(visits: list[tuple[str, ...]]) -> list[str]:
    """Statements that define the blocks [lo, hi) of a split, of each span."""
    lengths = [f"{v[-1]} - {v[0]}" if v[0] != "0" else v[-1] for v in visits]
    lines = ["# this split's share of them: blocks [lo, hi)"]
    count = lengths[0]
    if not count.isidentifier() or visits[1:]:
        count = "count"
        texts = [n if n.isidentifier() else f"({n})" for n in lengths]
        lines.append(f"count = {' + '.join(texts) if visits[1:] else lengths[0]}")
    ends = [f"{count} * {part} // KV_SPLITS" for part in ("split", "(split + 1)")]
    first = visits[0][0]
    if not visits[1:]:
        start = "" if first == "0" else f"{first} + "
        return [*lines, f"lo = {start}{ends[0]}", f"hi = {start}{ends[1]}"]
    lines += [f"begin = {ends[0]}", f"end = {ends[1]}"]
    for number, visit, length in zip(("", *NUMBERS), visits, lengths, strict=False):
        first, last = visit[0], visit[-1]
        for name, at in ((f"lo{number}", "begin"), (f"hi{number}", "end")):
            text = at if first == "0" else f"{first} + {at}"
            text = f"tl.maximum({text}, {first})" if number else text
            lines.append(f"{name} = tl.minimum({text}, {last})")
        if visit is not visits[-1]:
            lines += [f"begin -= {length}", f"end -= {length}"]
    return lines


def bounds(
    plan: Plan,
    env: Mapping[str, Interval],
    helpers: set[str],
    *,
    interior: bool = True,
    shift: str = "",
) -> Bounds:
    """Args:
    interior: whether there may be blocks without a mask.
    shift: the position of key 0 where it comes at run time, as text.
    """
    spec, found = plan.spec, spans(plan.spec, ANYWHERE if shift else None)
    if not found[0].some:
        return Bounds(about=["No query sees any key."], some=False)
    fewest = max(1, plan.q_chunk // grouped(spec, plan.choice))  # queries of a tile
    # an edge tile is right of any kind
    if not interior or none_full(spec, fewest, plan.k_chunk):
        found = tuple(dataclasses.replace(span, any_full=False) for span in found)
    made = Bounds()
    limits = _Limits(plan, env, helpers, made.lines, shift)
    limits.define(found)
    visits: list[_Visit] = []
    for span, number in zip(found, ("", *NUMBERS), strict=False):
        before = visits[-1].last if visits else None
        visits.append(_Visit(spec, span, number, limits, made, before))
        made.visits.append(visits[-1].ends)
    if hull_is_seen(spec):
        low, high = visits[0].low, visits[0].high
        above = "(key >= low) & " if low else ""
        made.there = f"{above}(key < {high})" if above else f"key < {high}"
    texts = [f"[{v.first}, {v.last})" for v in visits]
    made.about = [f"Key blocks {_and(texts)} hold what any query here sees"]
    made.about[0] += ", and" if made.interior else "."
    if made.interior:
        inner = [f"[{first}, {last})" for first, last in made.interiors]
        made.about.append(f"{_and(inner)} only what every one of them sees.")
    return made


def _and(texts: list[str]) -> str:
    return ", ".join(texts[:-1]) + " and " + texts[-1] if texts[1:] else texts[0]


class _Visit:
    """The runs of blocks of one span of the mask."""

    def __init__(
        self,
        spec: AttentionSpec,
        span: Span,
        number: str,
        limits: _Limits,
        made: Bounds,
        before: str | None,
    ) -> None:
        self.spec, self.span, self.number = spec, span, number
        self.limits, self.lines = limits, made.lines
        self.first, self.last = "0", f"last{number}"
        self.low = self.high = ""
        self._ends(before)
        self.ends: tuple[str, ...] = (self.first, self.last)
        if not span.any_full:
            made.edges.append((self.first, self.last))
            return
        inner = self._inside()
        full_last = f"full_last{number}"
        self.ends = tuple(dict.fromkeys((self.first, inner, full_last, self.last)))
        made.interiors.append((inner, full_last))
        if inner != self.first:
            made.edges.append((self.first, inner))
        made.edges.append((full_last, self.last))

    def _ends(self, before: str | None) -> None:
        span, limits, lines, end = self.span, self.limits, self.lines, self.limits.end
        number = self.number
        if span.low is not None:
            self.first, self.low = f"first{number}", f"low{number}"
            low = limits.index(span.low)
            low = f"tl.maximum({low}, 0)" if limits.below_zero(span.low) else low
            first = f"{self.low} // K_BLOCK"
            if before is not None:
                first = f"tl.maximum({first}, {before})"
            lines += [f"{self.low} = {low}", f"{self.first} = {first}"]
        self.high = f"high{number}" if span.high is not None else end
        if span.high is not None:
            high = f"tl.minimum({limits.index(span.high)}, {end})"
            lines.append(f"{self.high} = {high}")
        last = f"tl.cdiv({self.high}, K_BLOCK)"
        if span.low is not None:
            last = f"tl.maximum({last}, {self.first})"
        elif span.high is not None and limits.below_zero(span.high):
            last = f"tl.maximum({last}, 0)"
        lines.append(f"{self.last} = {last}")
        if self.spec.q_lengths:
            there = f"tl.where(q_start < q_length, {self.last}, {self.first})"
            lines.append(f"{self.last} = {there}")

    def _inside(self) -> str:
        """Where the blocks that all queries see begin; after statements that say so."""
        span, limits, lines, end = self.span, self.limits, self.lines, self.limits.end
        inner, last = self.first, self.last
        full_first, full_last = f"full_first{self.number}", f"full_last{self.number}"
        if span.full_low is not None:
            inner = full_first
            low = f"tl.cdiv({limits.index(span.full_low)}, K_BLOCK)"
            line = f"{full_first} = tl.minimum(tl.maximum({low}, {self.first}), {last})"
            if len(line) > 84:
                lines.append(f"{full_first} = tl.maximum({low}, {self.first})")
                line = f"{full_first} = tl.minimum({full_first}, {last})"
            lines.append(line)
        full = end
        if span.full_high is not None:
            full = f"tl.minimum({limits.index(span.full_high)}, {end})"
        # else full_last <= last as it is
        over = span.high is not None or self.spec.q_lengths
        lines.append(f"{full_last} = {full} // K_BLOCK")
        below = span.full_high is not None and limits.below_zero(span.full_high)
        text = full_last
        if below or inner != "0":
            text = f"tl.maximum({full_last}, {inner})"
        text = f"tl.minimum({text}, {last})" if over else text
        if text != full_last:
            lines.append(f"{full_last} = {text}")
        if self.spec.q_lengths:
            every = f"{limits.stop} <= q_length"
            lines.append(f"{full_last} = tl.where({every}, {full_last}, {inner})")
        return inner


def offset_source(spec: AttentionSpec) -> str:
    """Where the position of query 0 comes from at run time; "" where it is 0."""
    if spec.q_offset == "bottom_right":
        return "lengths" if spec.kv_lengths else "bottom_right"
    if spec.q_offset == "operand":
        return "operand"
    return "constant" if spec.q_offset else ""


def end_of_keys(spec: AttentionSpec) -> str:
    """The variable that holds how many keys are there."""
    return "kv_end" if spec.kv_lengths else "kv_len"


class _Limits:
    """Limits in positions → key indices, as text."""

    def __init__(
        self,
        plan: Plan,
        env: Mapping[str, Interval],
        helpers: set[str],
        lines: list[str],
        shift: str,
    ) -> None:
        self.spec, self.lines = plan.spec, lines
        self.late = bool(shift)
        self.shift = shift or ("K_OFFSET" if self.spec.kv_offset else "")
        low, high = env["q"]
        names = {"q_lo": "q_lo", "q_hi": "q_hi"}
        around = {"q_lo": (low, high), "q_hi": (low + 1, high + 1)}
        self.printer = TritonPrinter("tl", names, repr, env=around, helpers=helpers)
        self.end = end_of_keys(self.spec)
        self.stop = "tl.minimum(q_start + Q_BLOCK, q_len)"  # of the tile's queries
        if grouped(self.spec, plan.choice) > 1:
            self.stop = "q_stop"
        self.count = 0

    def define(self, found: tuple[Span, ...]) -> None:
        """q_lo and q_hi, where a limit reads them."""
        limits = [
            limit
            for span in found
            for limit in (span.limits if span.any_full else (span.low, span.high))
        ]
        read = {n for limit in limits if limit is not None for n in variables(limit)}
        shift = " + offset" if offset_source(self.spec) else ""
        if read:
            names = " and ".join(n for n in ("q_lo", "q_hi") if n in read)
            self.lines.append(f"# {names}: positions, half-open")
        if "q_lo" in read:
            self.lines.append(f"q_lo = q_start{shift}")
        if "q_hi" in read:
            self.lines.append(f"q_hi = {self.stop}{shift}")

    def below_zero(self, limit: Expr) -> bool:
        """Whether a limit can be, as an index of a key."""
        around = self.printer.env
        return self.late or interval(limit, around)[0] < self.spec.kv_offset

    def index(self, limit: Expr) -> str:
        if limit.op == "const" and not self.late:
            return str(max(0, int(limit.value) - self.spec.kv_offset))  # type: ignore[arg-type]
        text = self.printer.text(limit)
        if len(text) > 30:  # a step of its own
            self.count += 1
            name = f"limit_{self.count}"
            self.lines += self.printer.lines(name, limit, width=76)
            text = name
        if not self.shift:
            return text
        return f"{text if tightness(limit) == POSTFIX else f'({text})'} - {self.shift}"
