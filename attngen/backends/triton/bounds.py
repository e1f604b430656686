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
from attngen.plans import Plan
from attngen.regions import Span, analyse
from attngen.spec import AttentionSpec


@dataclass
class Bounds:
    """Statements that define first, last, full_first and full_last, as far as needed.

    Args:
        low_edge: whether there are edges before the interior, too.
        interior: whether there is one.
        some: whether any key is ever seen.
        there: which keys of a block any query here sees; "" where only the mask tells.
    """

    lines: list[str] = field(default_factory=list)
    about: list[str] = field(default_factory=list)
    low_edge: bool = False
    interior: bool = True
    some: bool = True
    first: str = "0"
    there: str = ""

    def only_where(self, condition: str) -> None:
        """Leave the interior empty where a condition doesn't hold: all tiles are edges."""
        inner = "full_first" if self.low_edge else self.first
        self.lines.append(f"full_last = tl.where({condition}, full_last, {inner})")

    @property
    def names(self) -> list[str]:
        """The variables that bound the loops, of those that are defined."""
        bounds = ("first", "last", "full_first", "full_last")
        return [n for n in bounds if any(x.startswith(f"{n} = ") for x in self.lines)]


def bounds(plan: Plan, env: Mapping[str, Interval], helpers: set[str]) -> Bounds:
    spec, span = plan.spec, analyse(plan.spec)
    if not span.some:
        about = ["No query sees any key."]
        return Bounds(about=about, interior=False, some=False)
    if none_full(spec, plan.q_chunk, plan.k_chunk):  # an edge tile is right of any kind
        span = dataclasses.replace(span, any_full=False)
    made = Bounds(interior=span.any_full)
    limits = _Limits(plan, env, helpers, made.lines)
    limits.define(span)
    end = limits.end
    if span.low is not None:
        made.first = "first"
        low = limits.index(span.low)
        low = f"tl.maximum({low}, 0)" if limits.below_zero(span.low) else low
        made.lines += [f"low = {low}", "first = low // K_BLOCK"]
    high = "high" if span.high is not None else end
    if span.high is not None:
        made.lines.append(f"high = tl.minimum({limits.index(span.high)}, {end})")
    last = f"tl.cdiv({high}, K_BLOCK)"
    if span.low is not None:
        last = f"tl.maximum({last}, first)"
    elif span.high is not None and limits.below_zero(span.high):
        last = f"tl.maximum({last}, 0)"
    made.lines.append(f"last = {last}")
    if hull_is_seen(spec):
        above = "(key >= low) & " if span.low is not None else ""
        made.there = f"{above}(key < {high})" if above else f"key < {high}"
    if spec.q_lengths:
        made.lines.append(f"last = tl.where(q_start < q_length, last, {made.first})")
    if not span.any_full:
        made.about = [f"Key blocks [{made.first}, last) hold what any query here sees."]
        return made
    inner = made.first
    if span.full_low is not None:
        made.low_edge = True
        inner = "full_first"
        low = f"tl.cdiv({limits.index(span.full_low)}, K_BLOCK)"
        made.lines.append(
            f"full_first = tl.minimum(tl.maximum({low}, {made.first}), last)"
        )
    full = end
    if span.full_high is not None:
        full = f"tl.minimum({limits.index(span.full_high)}, {end})"
    over = span.high is not None or spec.q_lengths  # else full_last <= last as it is
    made.lines.append(f"full_last = {full} // K_BLOCK")
    below = span.full_high is not None and limits.below_zero(span.full_high)
    text = f"tl.maximum(full_last, {inner})" if below or inner != "0" else "full_last"
    text = f"tl.minimum({text}, last)" if over else text
    if text != "full_last":
        made.lines.append(f"full_last = {text}")
    if spec.q_lengths:
        every = "tl.minimum(q_start + Q_BLOCK, q_len) <= q_length"
        made.lines.append(f"full_last = tl.where({every}, full_last, {inner})")
    made.about = [
        f"Key blocks [{made.first}, last) hold what any query here sees, and",
        f"[{inner}, full_last) only what every one of them sees.",
    ]
    return made


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
    ) -> None:
        self.spec, self.lines = plan.spec, lines
        low, high = env["q"]
        names = {"q_lo": "q_lo", "q_hi": "q_hi"}
        around = {"q_lo": (low, high), "q_hi": (low + 1, high + 1)}
        self.printer = TritonPrinter("tl", names, repr, env=around, helpers=helpers)
        self.end = end_of_keys(self.spec)
        self.count = 0

    def define(self, span: Span) -> None:
        """q_lo and q_hi, where a limit reads them."""
        limits = (span.low, span.high) if not span.any_full else span.limits
        read = {n for limit in limits if limit is not None for n in variables(limit)}
        shift = " + offset" if offset_source(self.spec) else ""
        if read:
            names = " and ".join(n for n in ("q_lo", "q_hi") if n in read)
            self.lines.append(f"# {names}: positions, half-open")
        if "q_lo" in read:
            self.lines.append(f"q_lo = q_start{shift}")
        if "q_hi" in read:
            self.lines.append(f"q_hi = tl.minimum(q_start + Q_BLOCK, q_len){shift}")

    def below_zero(self, limit: Expr) -> bool:
        """Whether a limit can be, as an index of a key."""
        around = self.printer.env
        return interval(limit, around)[0] < self.spec.kv_offset

    def index(self, limit: Expr) -> str:
        if limit.op == "const":
            return str(max(0, int(limit.value) - self.spec.kv_offset))  # type: ignore[arg-type]
        text = self.printer.text(limit)
        if len(text) > 30:  # a step of its own
            self.count += 1
            name = f"limit_{self.count}"
            self.lines += self.printer.lines(name, limit, width=76)
            text = name
        if not self.spec.kv_offset:
            return text
        return f"{text if tightness(limit) == POSTFIX else f'({text})'} - K_OFFSET"
