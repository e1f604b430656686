"""Which key chunks a chunk of queries visits: the closed-form bounds as emitted text."""

from __future__ import annotations

from typing import Any

from attngen.backends.jax import shards
from attngen.backends.jax.candidates import bounded
from attngen.backends.jax.tile import Starts, Tile, chosen
from attngen.expr import POSTFIX, Expr, variables
from attngen.expr import level as tightness
from attngen.intervals import interval
from attngen.plans import Plan
from attngen.printer import ArrayPrinter
from attngen.regions import analyse


class Lengths:
    """Run-time lengths and offsets of a tile's batches, as scalars for the bounds."""

    def __init__(self, plan: Plan, at: Tile, starts: Starts) -> None:
        self.many = "b" in at.letters
        self.start = starts.b
        self.begins = ", ".join(shards.begins(plan, "b", {"b": starts.b}))
        self.sizes = ", ".join(shards.sizes(plan, "b", at.sizes))

    def part(self, operand: str) -> str:
        """As JAX's own integers, which loops count in: 64 bits where those are on."""
        text = operand
        if not self.many:
            text = f"{operand}[{self.start}]"
        elif self.start != "0":
            comma = "" if "," in self.begins else ","
            at = f"({self.begins}{comma}), ({self.sizes}{comma})"
            text = f"lax.dynamic_slice({operand}, {at})"
        return f"{text}.astype(int)"

    def extreme(self, name: str, which: str) -> str:
        return f"{name}.{which}()" if self.many else name


def bounds(
    plan: Plan, at: Tile, starts: Starts, ragged: bool, lengths: Lengths
) -> dict[str, Any]:
    """The key chunks to visit: statements, and the loops with their ends as text.

    "limits" spells more of the limits that these are made of, among the same statements.
    """
    lines: list[str] = []
    limits = Limits(plan, lines, lengths)
    found = _bounds(plan, starts, ragged, lengths, lines, limits)
    return {"lines": lines, "limits": limits} | found


def _bounds(
    plan: Plan,
    starts: Starts,
    ragged: bool,
    lengths: Lengths,
    lines: list[str],
    limits: Limits,
) -> dict[str, Any]:
    spec, span = plan.spec, analyse(plan.spec)
    if not span.some:
        return {"loops": [], "about": ["No query sees any key."]}
    if spec.kv_len <= plan.k_chunk and not chosen(plan, "diagonal"):
        # nothing to skip: the only chunk, with its mask if there is one
        edge = bounded(spec) or not span.any_full
        return {"loops": [("edge" if edge else "interior", "0", "1")], "about": []}
    if spec.kv_lengths:
        lines.append(f"kv_count = {lengths.part('kv_lengths')}")
    if spec.q_lengths:
        lines.append(f"q_count = {lengths.part('q_lengths')}")
    whole = spec.kv_len // plan.k_chunk
    chunks = whole + ragged
    if chosen(plan, "diagonal"):
        return _above_triangle(plan, lines, limits)
    first = limits.chunk("first", span.low, up=False, otherwise="0")
    low_edge = span.any_full and span.full_low is not None
    high_edge = span.full_high is not None or spec.kv_lengths
    high = limits.high(span.high, lengths.extreme("kv_count", "max"))
    last = limits.chunk("last", high, up=True, otherwise=str(chunks))
    if spec.q_lengths:
        q_most = lengths.extreme("q_count", "max")
        lines.append(f"last = jnp.where({starts.q} < {q_most}, {last}, {first})")
        last = "last"
    if not span.any_full:
        about = [f"Key chunks [{first}, {last}) hold what any query here sees."]
        return {"loops": [("edge", first, last)], "about": about}
    inner_first, inner_last = first, last
    if low_edge:
        text = limits.text(span.full_low, up=True)
        lines.append(f"full_first = jnp.clip({text}, {first}, {last})")
        inner_first = "full_first"
    if high_edge:
        full = limits.high(span.full_high, lengths.extreme("kv_count", "min"))
        text = limits.text(full, up=False)
        lines.append(f"full_last = jnp.clip({text}, {inner_first}, {last})")
        inner_last = "full_last"
    elif ragged and (inner_first, last) == ("0", str(chunks)):
        inner_last = str(whole)
    elif ragged:
        lines.append(f"full_last = jnp.clip({whole}, {inner_first}, {last})")
        inner_last = "full_last"
    if spec.q_lengths:
        every = f"{starts.q} + Q_CHUNK <= {lengths.extreme('q_count', 'min')}"
        lines.append(f"full_last = jnp.where({every}, {inner_last}, {inner_first})")
        inner_last = "full_last"
    loops = [
        ("edge", first, inner_first),
        ("interior", inner_first, inner_last),
        ("edge", inner_last, last),
    ]
    about = [
        f"Key chunks [{first}, {last}) hold what any query here sees, and",
        f"[{inner_first}, {inner_last}) only what every one of them sees.",
    ]
    return {"loops": [x for x in loops if x[1] != x[2]], "about": about}


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
        span = analyse(self.spec)
        if chosen(self.plan, "diagonal"):
            return ["q_lo"]
        limits = [span.low, span.high]
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
    ) -> str:
        if limit is None:
            return otherwise
        if (
            isinstance(limit, Expr)
            and limit.op != "const"
            and self._range(limit)[0] < 0
        ):
            limit = (f"jnp.maximum({self._index(limit)[0]}, 0)", 1)
        self.lines.append(f"{name} = {self.text(limit, up=up)}")
        return name
