"""Which key chunks a chunk of queries visits: the closed-form bounds as emitted text."""

from __future__ import annotations

from typing import Any

from attngen.backends.jax.candidates import bounded
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.listing import listing
from attngen.backends.jax.statements import wrapped
from attngen.backends.jax.tile import Starts, Tile, chosen
from attngen.expr import POSTFIX, Expr, variables
from attngen.expr import level as tightness
from attngen.intervals import interval
from attngen.plans import Plan
from attngen.printer import ArrayPrinter
from attngen.regions import analyse, spans

WIDTH = 80  # columns that are left beside the indent


def bounds(
    plan: Plan,
    at: Tile,
    starts: Starts,
    ragged: bool,
    lengths: Lengths,
    width: int = WIDTH,
    *,
    apart: bool = False,
) -> dict[str, Any]:
    """The key chunks to visit: statements, and the loops with their ends as text.

    "limits" spells more of the limits that these are made of, among the same statements.

    Args:
        apart: the last chunk of queries overlaps the one before, and none may count twice:
            all of its tiles are masked.
    """
    lines: list[str] = []
    limits = Limits(plan, lines, lengths)
    if chosen(plan, "skip") == "list":
        made = listing(plan, at, starts, ragged, lengths, apart=apart)
        about = ["What each key chunk holds, told by its ends"]
        about[0] += " and by what is read there." if made.ahead else "."
        return {
            "lines": [x for line in made.lines for x in wrapped(line, width)],
            "limits": limits,
            "loops": made.loops,
            "about": about,
            "ahead": made.ahead,
            "functions": made.functions,
            "listed": True,
        }
    found = _bounds(plan, starts, ragged, apart, lengths, lines, limits)
    lines[:] = [x for line in lines for x in wrapped(line, width)]
    return {
        "lines": lines,
        "limits": limits,
        "ahead": [],
        "functions": set(),
        "listed": False,
    } | found


def _bounds(
    plan: Plan,
    starts: Starts,
    ragged: bool,
    apart: bool,
    lengths: Lengths,
    lines: list[str],
    limits: Limits,
) -> dict[str, Any]:
    spec, whole = plan.spec, analyse(plan.spec)
    if not whole.some:
        return {"loops": [], "about": ["No query sees any key."]}
    if spec.kv_len <= plan.k_chunk and not chosen(plan, "diagonal"):
        # nothing to skip: the only chunk, with its mask if there is one
        edge = bounded(spec) or not whole.any_full or apart
        return {"loops": [("edge" if edge else "interior", "0", "1")], "about": []}
    if spec.kv_lengths:
        lines.append(f"kv_count = {lengths.part('kv_lengths')}")
    if spec.q_lengths:
        lines.append(f"q_count = {lengths.part('q_lengths')}")
    if chosen(plan, "diagonal"):
        return _above_triangle(plan, lines, limits)
    made = [
        _Visit(plan, starts, ragged, apart, lengths, lines, limits, index)
        for index in range(len(spans(spec)))
    ]
    loops: list[tuple[str, str, str]] = []
    for visit in made:
        loops += visit.write(loops[-1][2] if loops else None)
    texts = [f"[{v.first}, {v.last})" for v in made]
    about = [f"Key chunks {_listed(texts)} hold what any query here sees"]
    if any(v.inner is not None for v in made):
        about[0] += ", and"
        inner = [f"[{v.inner[0]}, {v.inner[1]})" for v in made if v.inner is not None]
        about.append(f"{_listed(inner)} only what every one of them sees.")
    else:
        about[0] += "."
    return {"loops": [x for x in loops if x[1] != x[2]], "about": about}


def _listed(texts: list[str]) -> str:
    return ", ".join(texts[:-1]) + " and " + texts[-1] if texts[1:] else texts[0]


class _Visit:
    """The loops over one span of the mask: its first edge, its interior, its last edge."""

    def __init__(
        self,
        plan: Plan,
        starts: Starts,
        ragged: bool,
        apart: bool,
        lengths: Lengths,
        lines: list[str],
        limits: Limits,
        index: int,
    ) -> None:
        self.spec, self.span = plan.spec, spans(plan.spec)[index]
        self.starts, self.ragged, self.lengths = starts, ragged, lengths
        self.apart = apart
        self.lines, self.limits = lines, limits
        self.index, self.number = index, f"_{index + 1}" if index else ""
        self.whole = plan.spec.kv_len // plan.k_chunk
        self.first, self.last = "0", str(self.whole + ragged)
        self.inner: tuple[str, str] | None = None

    def name(self, what: str) -> str:
        return what + self.number

    def write(self, before: str | None) -> list[tuple[str, str, str]]:
        """The loops, in order; before: where the span before this one ends."""
        self._ends(before)
        if not self.span.any_full:
            return [("edge", self.first, self.last)]
        self._inside()
        assert self.inner is not None
        return [
            ("edge", self.first, self.inner[0]),
            ("interior", *self.inner),
            ("edge", self.inner[1], self.last),
        ]

    def _ends(self, before: str | None) -> None:
        spec, span, limits = self.spec, self.span, self.limits
        self.first = limits.chunk(
            self.name("first"), span.low, up=False, otherwise="0", after=before
        )
        high = limits.high(span.high, self.lengths.extreme("kv_count", "max"))
        between = before is not None and self.index + 1 < len(spans(spec))
        self.last = limits.chunk(
            self.name("last"),
            high,
            up=True,
            otherwise=self.last,
            after=self.first if between else None,
        )
        if spec.q_lengths:
            q_most = self.lengths.extreme("q_count", "max")
            name = self.name("last")
            there = f"{self.starts.q} < {q_most}"
            self.lines.append(f"{name} = jnp.where({there}, {self.last}, {self.first})")
            self.last = name

    def _inside(self) -> None:
        spec, span, lines, limits = self.spec, self.span, self.lines, self.limits
        first, last = self.first, self.last
        full_first, full_last = self.name("full_first"), self.name("full_last")
        inner_first, inner_last = first, last
        if span.full_low is not None:
            text = limits.text(span.full_low, up=True)
            lines.append(f"{full_first} = jnp.clip({text}, {first}, {last})")
            inner_first = full_first
        if span.full_high is not None or spec.kv_lengths:
            full = limits.high(span.full_high, self.lengths.extreme("kv_count", "min"))
            text = limits.text(full, up=False)
            lines.append(f"{full_last} = jnp.clip({text}, {inner_first}, {last})")
            inner_last = full_last
        elif self.ragged and (inner_first, last) == ("0", str(self.whole + 1)):
            inner_last = str(self.whole)
        elif self.ragged:
            lines.append(f"{full_last} = jnp.clip({self.whole}, {inner_first}, {last})")
            inner_last = full_last
        if spec.q_lengths:
            q_least = self.lengths.extreme("q_count", "min")
            every = f"{self.starts.q} + Q_CHUNK <= {q_least}"
            lines.append(
                f"{full_last} = jnp.where({every}, {inner_last}, {inner_first})"
            )
            inner_last = full_last
        if self.apart:
            own = f"{self.starts.q} == i * Q_CHUNK"
            lines.append(f"{full_last} = jnp.where({own}, {inner_last}, {inner_first})")
            inner_last = full_last
        self.inner = (inner_first, inner_last)


def _above_triangle(plan: Plan, lines: list[str], limits: Limits) -> dict[str, Any]:
    """The chunks before a diagonal: `regions.rises` says that each is whole."""
    full = analyse(plan.spec).full_high
    about = [
        "Key chunks [0, full_last) hold only what every query here sees; each query"
    ]
    about += ["sees one key more than the one before it, the first of them one more."]
    lines.append(f"full_last = {limits.text(full, up=False)}")
    return {"loops": [("interior", "0", "full_last")], "about": about}


class Limits:
    """Limits in positions → key chunks, as text; defines q_lo and q_hi when first used."""

    def __init__(self, plan: Plan, lines: list[str], lengths: Lengths) -> None:
        self.plan, self.spec, self.lines, self.lengths = plan, plan.spec, lines, lengths
        self.printer = ArrayPrinter("jnp", {"q_lo": "q_lo", "q_hi": "q_hi"}, repr)
        self.defined = False
        self.count = 0

    def _define(self) -> None:
        if self.defined:
            return
        self.defined = True
        spec, static = self.spec, self.spec.static_q_offset
        start = "q_start" if spec.q_len != self.plan.q_chunk else "0"
        if self.plan.index_dtype == "int64":
            start = f"jnp.int64({start})"
        end = "Q_CHUNK" if start == "0" else f"{start} + Q_CHUNK"
        low = start
        if static is None:
            self.lines.append(f"offset = {self.lengths.part('q_offset')}")
            low += f" + {self.lengths.extreme('offset', 'min')}"
            end += f" + {self.lengths.extreme('offset', 'max')}"
        elif static:
            low, end = f"{low} + Q_OFFSET", f"{end} + Q_OFFSET"
        read = self._read()
        self.lines.append(f"# {' and '.join(read)}: positions, half-open")
        texts = {"q_lo": low, "q_hi": end}
        self.lines += [f"{name} = {texts[name]}" for name in read]

    def _read(self) -> list[str]:
        """Which of q_lo and q_hi the mask's limits read."""
        if chosen(self.plan, "diagonal"):
            return ["q_lo"]
        found = spans(self.spec)
        limits = [limit for span in found for limit in (span.low, span.high)]
        for span in found:
            limits += [span.full_low, span.full_high] if span.any_full else []
        read = {name for x in limits if x is not None for name in variables(x)}
        return [name for name in ("q_lo", "q_hi") if name in read]

    def _range(self, limit: Expr) -> tuple[float, float]:
        spec, static = self.spec, self.spec.static_q_offset
        if static is None:
            return (float("-inf"), float("inf"))
        last = spec.q_len - self.plan.q_chunk
        env = {"q_lo": (static, static + last)}
        env["q_hi"] = (static + self.plan.q_chunk, static + spec.q_len)
        low, high = interval(limit, env)
        return (low - spec.kv_offset, high - spec.kv_offset)

    def high(self, limit: Expr | None, length: str) -> tuple[str, int] | None:
        """An upper limit in key indices, no higher than the keys that are there.

        As text with its precedence: 0 for a sum, 1 for what binds tighter.
        """
        if limit is None:
            return (length, 1) if self.spec.kv_lengths else None
        text, level = self._index(limit)
        if self.spec.kv_lengths:
            return self._step(f"jnp.minimum({text}, {length})")
        if self._range(limit)[1] > self.spec.kv_len:
            return (f"jnp.minimum({text}, S)", 1)
        return (text, level)

    def index(self, limit: Expr) -> str:
        """A limit in key indices, as an operand of a comparison."""
        return self._index(limit)[0]

    def _step(self, text: str) -> tuple[str, int]:
        """A call as it is, or by the name of a step where it is long."""
        if len(text) > 38:
            self.count += 1
            self.lines.append(f"limit_{self.count} = {text}")
            text = f"limit_{self.count}"
        return (text, 1)

    def _index(self, limit: Expr) -> tuple[str, int]:
        if limit.op == "const":
            return (str(max(0, int(limit.value) - self.spec.kv_offset)), 1)  # type: ignore[arg-type]
        self._define()
        text = self.printer.text(limit)
        level = 1 if tightness(limit) == POSTFIX else 0
        if len(text) > 30:  # a step of its own
            self.count += 1
            text, level = f"limit_{self.count}", 1
            self.lines += self.printer.lines(text, limit, width=76)
        if self.spec.kv_offset:
            return (f"{text} - K_OFFSET", 0)
        return (text, level)

    def text(self, limit: Expr | tuple[str, int] | None, *, up: bool) -> str:
        """The chunk that a limit falls into, rounded down, or up."""
        assert limit is not None
        text, level = limit if isinstance(limit, tuple) else self._index(limit)
        inner = text if level else f"({text})"
        return f"-(-{inner} // K_CHUNK)" if up else f"{inner} // K_CHUNK"

    def chunk(
        self,
        name: str,
        limit: Expr | tuple[str, int] | None,
        *,
        up: bool,
        otherwise: str,
        after: str | None = None,
    ) -> str:
        """The name of a chunk, or a number; no chunk before `after` does."""
        if limit is None:
            return otherwise
        if (
            isinstance(limit, Expr)
            and limit.op != "const"
            and self._range(limit)[0] < 0
        ):
            limit = (f"jnp.maximum({self._index(limit)[0]}, 0)", 1)
        text = self.text(limit, up=up)
        text = text if after is None else f"jnp.maximum({text}, {after})"
        self.lines.append(f"{name} = {text}")
        return name
