"""The statements of a chunk of queries, and of keys, that a backward pass works on.

lse has no sink in it, so p = exp(s - lse) sums up to 1 without it; `share` is what of the
weights the keys have beside a sink: it scales dout and delta. A cotangent of lse adds p · dlse:
delta less dlse. A query that sees no key has lse = -inf; here +inf, which makes each of its p 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen import slopes
from attngen.backends.jax import shards
from attngen.backends.jax.lies import Lies, head_dims
from attngen.backends.jax.loops import memory
from attngen.backends.jax.slope_code import MASKED, SUMS, Line
from attngen.backends.jax.statements import as_tuple, assign
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    chosen,
    dimensions,
    drops,
    exponential,
    guards,
    heads,
    product_keywords,
    without_keys,
)
from attngen.plans import Plan

WIDTH = 80  # columns beside the indent
BARRIER = "# barriers, here and below: else XLA converts whole arrays outside the loops"


@dataclass(frozen=True)
class Loops:
    """What is known of the loops that call a tile.

    named: the variables b, g, i (chunks of queries), c (of keys) that it takes.
    masked, unmasked: whether there are tiles with a mask, and without.
    ragged: the axes, q or k, whose last chunk overlaps the one before.
    passes: how many there are; the first sums up operands' gradients.
    """

    named: tuple[str, ...]
    masked: bool
    unmasked: bool
    ragged: frozenset[str]
    passes: int


class ChunkWriter:
    """Writes the statements of chunks."""

    def __init__(self, plan: Plan, at: Tile, starts: Starts, loops: Loops) -> None:
        self.plan, self.spec, self.at, self.starts = plan, plan.spec, at, starts
        self.loops = loops
        self.lines: list[Line] = []
        self.p = "p"
        self.twice = forms_twice(plan)
        self.seen = "scored" if plan.drops_keys else "seen"
        self.out, self.dlse = "out" in self.spec.outputs, "lse" in self.spec.outputs
        self.summed = self.out and plan.option("delta") == "summed"
        self.stats = f"jnp.{self.spec.stats_dtype}"
        self.qk, self.v = head_dims(plan)
        self.how = exponential(plan)
        self.dn = chosen(plan, "slices") == "dn"
        # a number of each row, or of each key, beside the elements of its vector
        self.spread = "[..., None, :]" if self.dn else "[..., None]"
        self.memory = memory(plan, at, at, starts)
        self.einsum = "_product" if product_keywords(plan) else "jnp.einsum"

    def queries(self) -> list[str]:
        """A chunk of queries: scaled, with their dout, lse and delta."""
        self._add(*start(self.loops, "q"))
        self._rows()
        self._row_numbers()
        self._add(f"return {', '.join(self.of_queries)}")
        return self._text()

    @property
    def of_queries(self) -> list[str]:
        """What a tile is told of its queries."""
        mass = ["mass_row"] * (self.summed or keeps_mass(self.plan))
        if self.out:
            return ["rows", "d_rows", "lse_row", "delta_row", *mass]
        return ["rows", "lse_row", "dlse_row", *mass]

    def keys(self) -> list[str]:
        """A chunk of keys and values."""
        self._add(*start(self.loops, "k"))
        self._keys()
        self._add(f"return {', '.join(self.of_keys)}")
        return self._text()

    @property
    def of_keys(self) -> list[str]:
        return ["kc", "vc"] if self.out else ["kc"]

    def _add(self, *lines: str, masked: bool = False) -> None:
        self.lines += [(line, (MASKED,) if masked else ()) for line in lines]

    def _text(self) -> list[str]:
        """The statements, in branches where not all tiles, or passes, have them."""
        branches = {MASKED} if self.loops.unmasked else set()
        branches |= {SUMS} if self.loops.passes > 1 else set()
        found: list[str] = []
        inside: tuple[str, ...] = ()
        for line, subject in self.lines:
            own = tuple(x for x in subject if x in branches)
            kept = 0
            while kept < min(len(own), len(inside)) and own[kept] == inside[kept]:
                kept += 1
            for depth in range(kept, len(own)):
                found.append("    " * depth + f"if {own[depth]}:")
            inside = own
            found.append("    " * len(own) + line)
        return found

    def _cast(self, dtype: str) -> str:
        """To the dtype of the products, from another."""
        product = str(self.plan.option("product_dtype"))
        return f".astype(jnp.{product})" if dtype != product else ""

    def _starts(self) -> None:
        for letter in "qk":
            self._add(*start(self.loops, letter))

    def _barrier(self, names: list[str]) -> dict[str, str]:
        """Reads that stay where they are: the name of each array, as it is read."""
        if not self.plan.option("guard"):
            return {n: n for n in names}
        here = [f"{n}_here" for n in names]
        if (BARRIER, ()) not in self.lines:
            self._add(BARRIER)
        call = ["lax.optimization_barrier", f"({', '.join([*names, 'at'])})"]
        self._add(*assign(", ".join([*here, "at"]), [call], WIDTH))
        return dict(zip(names, here, strict=True))

    def _rows(self) -> None:
        """A chunk of queries, of dout, and of out where delta is made of it again."""
        delta = self.plan.option("delta") if self.out else ""
        self._add(f"at = {Lies(self.plan, self.at, self.starts, 'q', self.qk).begin}")
        names = ["q", *(["dout"] if self.out else [])]
        names += ["out"] if delta == "again" else []
        read = self._barrier(names)
        own = self._cast(self.spec.dtype)
        if chosen(self.plan, "scale") == "queries":
            own += f" * {scale_name(self.plan)}"
        self._slice("rows", read["q"], self.qk, own)
        if self.out:
            cast = self._cast(self.spec.out_dtype_name)
            if self._multiplied():
                narrow = self.spec.out_dtype_name != self.spec.stats_dtype
                cast = f".astype({self.stats})" if narrow else ""
            self._slice("d_rows", read["dout"], self.v, cast)
        if delta == "again":
            self._slice("out_rows", read["out"], self.v, "")

    def _multiplied(self) -> bool:
        """Whether dout is multiplied in the statistics' dtype before its products."""
        delta = self.plan.option("delta")
        return bool(self.spec.sink or self.spec.dropout) or delta != "kept"

    def _slice(self, name: str, source: str, dim: str, more: str) -> None:
        """A chunk of rows of an array, as a tile has them."""
        own = Lies(self.plan, self.at, self.starts, "q", dim)
        self._add(*assign(name, own.sliced(source), WIDTH))
        if more:
            self._add(f"{name} = {name}{more}")

    def _row_numbers(self) -> None:
        """lse, delta and dlse of each row, and what is 0 where it sees no key."""
        delta = self.plan.option("delta") if self.out else ""
        guarded, cast = guards(self.plan), self._cast(self.spec.stats_dtype)
        self._add(f"at = {self.memory['memory']['lse_begin']}")
        self._row("lse")
        if guarded:
            self._add(
                "known = lse_row != -jnp.inf  # else the query sees no key",
                "lse_row = jnp.where(known, lse_row, jnp.inf)",
                f"rows = jnp.where(known{self.spread}, rows, 0)",
            )
            if self.out:
                self._add(f"d_rows = jnp.where(known{self.spread}, d_rows, 0)")
        if delta == "again":
            axis = -2 if self.dn else -1
            self._add(f"delta_row = (d_rows * out_rows).sum({axis})")
        if drops(self.plan):
            self._add("d_rows /= 1 - DROPOUT")
        if self.spec.sink and self.out:
            self._add(
                *self._sink(),
                "share = 1 / (1 + jnp.exp(sink_at_h - lse_row))  # of keys, beside the sink",
                f"d_rows *= share{self.spread}",
            )
        if self.how["base_2"]:
            self._add("lse_row *= LOG2E")
        if delta == "summed":
            self._add(
                "if summing:  # delta, and the sum of p, are still to be made",
                f"    return rows, d_rows{cast}, lse_row, None, None",
            )
        if delta == "summed" or keeps_mass(self.plan):
            self._row("mass")
        if delta in ("kept", "summed"):
            self._row("delta")
        if self.dlse:
            self._row("dlse")
        if guarded:
            names = ["delta_row"] * self.out + ["dlse_row"] * self.dlse
            self._add(*(f"{n} = jnp.where(known, {n}, 0)" for n in names))
        if self.spec.sink and self.out:
            self._add("delta_row *= share")
        if self.dlse and self.out:
            self._add("delta_row -= dlse_row")
        if cast and self.out and self._multiplied():
            self._add(f"d_rows = d_rows{cast}")

    def _row(self, name: str) -> None:
        """A number of each row, out of an array [b, h, t]."""
        of = {"b": self.at.sizes["b"], "q": "Q_CHUNK", "h": heads(self.at)}
        size = as_tuple(shards.sizes(self.plan, "bhq", of, ahead=True))
        calls = [["lax.dynamic_slice", name, "at", size]]
        if back := shards.moved(self.plan, "bhq", back=True):
            calls.append([".transpose", *dimensions(back)])
        calls.append([".reshape", *dimensions(self.at.shape(self.at.rows))])
        self._add(*assign(f"{name}_row", calls, WIDTH))

    def _sink(self) -> list[str]:
        shape = dimensions(without_keys(self.at.spread("gr")))
        begin = (
            self.starts.g
            if self.spec.repeats == 1 or self.starts.g == "0"
            else f"{self.starts.g} * R"
        )
        begins = as_tuple(shards.begins(self.plan, "h", {"h": begin}))
        sizes = as_tuple(shards.sizes(self.plan, "h", {"h": heads(self.at)}))
        calls = [["lax.dynamic_slice", "sink", begins, sizes], [".reshape", *shape]]
        return [
            *assign("sink_at_h", calls, WIDTH),
            *(
                [f"sink_at_h = sink_at_h.astype({self.stats})"]
                if self.stats != "jnp.float32"
                else []
            ),
        ]

    def _keys(self) -> None:
        own = {
            n: Lies(self.plan, self.at, self.starts, "k", d) for n, d in self._dims()
        }
        self._add(f"at = {own['k'].begin}")
        read = self._barrier(list(own))
        for source, lies in own.items():
            self._add(*assign(f"{source}c", lies.sliced(read[source]), WIDTH))
            if cast := self._cast(self.spec.dtype):
                self._add(f"{source}c = {source}c{cast}")

    def _dims(self) -> list[tuple[str, str]]:
        return [("k", self.qk), ("v", self.v)] if self.out else [("k", self.qk)]


def start(loops: Loops, letter: str) -> list[str]:
    """Where a chunk of queries, or of keys, begins."""
    name, index, chunk, length = {
        "q": ("q_start", "i", "Q_CHUNK", "T"),
        "k": ("k_start", "c", "K_CHUNK", "S"),
    }[letter]
    if index not in loops.named:
        return []
    if letter in loops.ragged:
        return [
            f"{name} = jnp.minimum({index} * {chunk}, {length} - {chunk})  # the last overlaps"
        ]
    return [f"{name} = {index} * {chunk}"]


def keeps_mass(plan: Plan) -> bool:
    """Whether the sum of exp(s - lse), which is 1 but for rounding, comes with lse."""
    summed = "out" in plan.spec.outputs and plan.option("delta") == "summed"
    return plan.option("mass") == "kept" and not summed


def forms_twice(plan: Plan) -> bool:
    """Whether ds is formed once for dk, and once more for dq."""
    return chosen(plan, "ds") == "twice"


def scale_name(plan: Plan) -> str:
    """The constant by which q·k becomes the score that a tile has."""
    return "SCALE_2" if exponential(plan)["base_2"] else "SCALE"


def trained(plan: Plan) -> list[str]:
    """The operands whose gradients tiles add up."""
    return [o.name for o in slopes.trained(plan.spec) if o.name != "sink"]
