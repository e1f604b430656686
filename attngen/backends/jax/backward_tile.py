"""The statements of a tile of the backward pass: scores made again, p, and ds.

    p = exp(s - lse)      dp = dout·v      ds = p · (dp - delta)      delta = Σ dout·out

lse has no sink in it, so p sums up to 1 without it; `share` is what of the weights the keys
have beside a sink: it scales dout and delta. A cotangent of lse adds p · dlse: delta less dlse.
A query that sees no key has lse = -inf; here +inf, which makes each of its p 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attngen import slopes
from attngen.backends.jax import shards
from attngen.backends.jax.loops import WHOLE, memory
from attngen.backends.jax.slope_code import MASKED, SUMS, Line, SlopeWriter
from attngen.backends.jax.statements import as_tuple, assign
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    axes_text,
    chosen,
    dimensions,
    drops,
    exponential,
    guards,
    heads,
    inverse,
    inverse_keys,
    order,
    permutation,
    product_keywords,
    ranged,
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


class TileWriter:
    """Writes the statements of a tile."""

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

    def tile(self) -> list[str]:
        """p and ds, and what gradients of operands are made of."""
        self._add(*start(self.loops, "q"), *start(self.loops, "k"))
        self._add(f"{', '.join(self.of_queries)} = of_queries")
        self._add(f"{', '.join(self.of_keys)} = of_keys")
        writer = SlopeWriter(self.plan, self.at, self.starts, WIDTH, False, None)
        made = writer.slopes(masked=self.loops.masked, seen=self.seen)
        self._add(*made.code.rows, *made.code.keys)
        s, _, _ = subscripts(self.plan, self.at)
        self._add(f's = {self.einsum}("{s}", rows, kc)')
        if chosen(self.plan, "scale") != "queries":
            self._add(f"s *= {scale_name(self.plan)}")
        self._add(*made.code.score)
        self._weights(made.code.edge)
        self._store()
        if drops(self.plan):
            self._add(*made.code.kept)
            self._add("kept = lax.optimization_barrier(kept)  # made once")
        p = "jnp.where(kept, p, 0)" if drops(self.plan) else "p"
        if self.out and self.twice:
            self._ds_twice(s, made.back)
            self._add(f"return {p}, ds, again, kc")
            self._without_unused()
            return self._text()
        if self.out:
            self._add(*self._dp(s))
            if self.summed:
                self._add(
                    "if delta_row is None:  # it is what is summed here",
                    "    return p.sum(-1), (p * dp).sum(-1)",
                )
            self._add(f"ds = {self.p} * (dp - delta_row[..., None])")
        else:
            self._add(f"ds = {self.p} * dlse_row[..., None]")
        names = [f"d_{name}" for name in trained(self.plan)]
        if names:
            self.lines.append((f"{as_tuple(names)} = sums", (SUMS,)))
        self.lines += made.back
        if names:
            tuple_ = ", ".join(names) if len(names) > 1 else as_tuple(names)
            self.lines.append((f"sums = {tuple_}", (SUMS,)))
        if chosen(self.plan, "store") == "both":
            cast = self._cast(self.spec.stats_dtype)
            self._add(f"ds = lax.optimization_barrier(ds{cast})")
        self._add(f"return {p}, ds, kc" + (", sums" if names else ""))
        self._without_unused()
        return self._text()

    def _dp(self, s: str) -> list[str]:
        """The cotangent of p, of which dropout passes a part."""
        lines = [f'dp = {self.einsum}("{s}", d_rows, vc)']
        if self.spec.dropout:
            lines.append("dp = jnp.where(kept, dp, 0)")
        return lines

    def _store(self) -> None:
        """p where it is made once, and kept for its products."""
        store = chosen(self.plan, "store")
        if store == "free":
            return
        cast = self._cast(self.spec.stats_dtype) if store != "p" else ""
        self._add(f"p = lax.optimization_barrier(p{cast})  # made once")
        if cast:
            self.p = f"p.astype({self.stats})"

    def _ds_twice(self, s: str, back: list[Line]) -> None:
        """ds for dk, and again for dq: each product is fused with its own."""
        made = [
            *self._dp(s),
            f"ds = {self.p} * (dp - delta_row[..., None])",
        ]
        self._add("", "def ds_of(d_rows, vc, delta_row):")
        self._add(*(f"    {line}" for line in made))
        outer, self.lines = self.lines, [*back]
        lines = self._text()
        self.lines = outer
        self._add(*(f"    {line}" for line in lines), "    return ds", "")
        self._add(
            "ds = ds_of(d_rows, vc, delta_row)",
            "same = lax.optimization_barrier((d_rows, vc, delta_row))",
            "again = ds_of(*same)  # each is fused with a product of its own",
        )

    def _without_unused(self) -> None:
        """Leave out where chunks begin, if nothing else here asks."""
        for name in ("q_start", "k_start"):
            reads = [x for x, _ in self.lines if re.search(rf"\b{name}\b", x)]
            if len(reads) == 1:
                self.lines = [x for x in self.lines if x[0] != reads[0]]

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

    def _weights(self, mask: list[str]) -> None:
        """p, which is 0 where the key isn't seen; what those hold doesn't matter."""
        inner = "s - lse_row[..., None]"
        if self.how["exp_scaled"]:
            inner = f"({inner}) * LOG2E"
        self._add(f"p = {self.how['exp']}({inner})")
        if self.summed:
            self._add(
                "if mass_row is not None:",
                "    p *= (1 / mass_row)[..., None]  # lse is rounded, as scores are",
            )
        elif keeps_mass(self.plan):
            self._add("p *= (1 / mass_row)[..., None]  # lse is rounded")
        if self.plan.drops_keys:
            self._add("scored = s != -jnp.inf")
        lines = list(mask)
        for letter in sorted(self.loops.ragged):
            lines += self._counted(letter, lines)
        if self.loops.masked:
            self._add(*lines, masked=True)
            if self.plan.drops_keys and lines:
                self._add("scored &= seen", masked=True)
        if self.plan.drops_keys or self.loops.masked:
            self._add(*self._blank(), masked=not self.plan.drops_keys)

    def _counted(self, letter: str, before: list[str]) -> list[str]:
        """That a chunk which overlaps the one before it counts none twice."""
        index, chunk = {"q": ("i", "Q_CHUNK"), "k": ("c", "K_CHUNK")}[letter]
        lines = []
        name = f"{letter}_index"
        known = any(
            x.startswith(f"{name} = ") for x in (*(x for x, _ in self.lines), *before)
        )
        if not known:
            begin = self.starts.q if letter == "q" else self.starts.k
            made = ranged(self.plan, self.at, begin, letter, self.at.sizes[letter])
            lines.append(f"{name} = {made}")
        sign = "&=" if any(x.startswith("seen = ") for x in before) else "="
        return [*lines, f"seen {sign} {name} >= {index} * {chunk}"]

    def _blank(self) -> list[str]:
        """p of what isn't seen is 0; keys that no query here sees may hold NaN."""
        letters, keys = self.at.letters, key_letters(self.plan, self.at)
        rows = [letters.index(a) for a in letters if a not in keys]
        moved = inverse_keys(keys, letters)
        any_ = f"there = jnp.broadcast_to({self.seen}, s.shape).any({axes_text(rows)})"
        lines = [f"{any_}{moved}{self.spread}"]
        if len(lines[0]) > WIDTH:
            lines = [any_, f"there = there{moved}{self.spread}"]
        lines.append("kc = jnp.where(there, kc, 0)  # else NaN, perhaps")
        if self.out:
            lines.append("vc = jnp.where(there, vc, 0)")
        return [*lines, f"p = jnp.where({self.seen}, p, 0)"]


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


def head_dims(plan: Plan) -> tuple[str, str]:
    same = plan.spec.qk_dim == plan.spec.v_dim
    return ("D", "D") if same else ("QK_DIM", "V_DIM")


def key_letters(plan: Plan, at: Tile) -> str:
    """The axes of a chunk of keys, as it lies, but for its vectors' own."""
    dn = chosen(plan, "slices") == "dn"
    memory_order = "bgk" if dn else order(plan.spec.layout, "bkg")
    return "".join(a for a in memory_order if a in at.letters)


@dataclass(frozen=True)
class Lies:
    """How a chunk of queries (axis q) or of keys (k) of an array lies in memory, and in a tile.

    dim: of its vectors, as text. With slices = dn these lie across, the tokens last.
    """

    plan: Plan
    at: Tile
    starts: Starts
    axis: str
    dim: str

    @property
    def dn(self) -> bool:
        return chosen(self.plan, "slices") == "dn"

    @property
    def letters(self) -> str:
        """The array's axes: of queries h, of keys g."""
        heads_ = "h" if self.axis == "q" else "g"
        if self.dn:
            return f"b{heads_}{self.axis}"
        return order(self.plan.spec.layout, f"b{self.axis}{heads_}")

    def _with_dim(self, items: list[str], dim: str) -> list[str]:
        return [*items[:-1], dim, items[-1]] if self.dn else [*items, dim]

    @property
    def begin(self) -> str:
        starts = self.starts
        one = starts.g == "0" or self.plan.spec.repeats == 1
        head = starts.g if one else f"{starts.g} * R"
        of = {"b": starts.b, "q": starts.q, "k": starts.k, "h": head, "g": starts.g}
        begins = shards.begins(self.plan, self.letters, of, ahead=True)
        return as_tuple(self._with_dim(begins, "0"))

    @property
    def size(self) -> str:
        of = self.at.sizes | {"h": heads(self.at)}
        sizes = shards.sizes(self.plan, self.letters, of, ahead=True)
        return as_tuple(self._with_dim(sizes, self.dim))

    @property
    def whole(self) -> str:
        """The shape of the array."""
        shape = shards.shape(self.plan, self.letters, WHOLE, ahead=True)
        return as_tuple(self._with_dim(shape, self.dim))

    @property
    def _back(self) -> str:
        return "" if self.dn else shards.moved(self.plan, f"{self.letters}d", back=True)

    @property
    def _ahead(self) -> str:
        return "" if self.dn else shards.moved(self.plan, f"{self.letters}d")

    @property
    def _memory_order(self) -> str:
        return self.letters.replace("h", "gr")

    @property
    def _tile_order(self) -> str:
        """Of queries as a tile has them; of keys as they lie."""
        if self.axis == "k":
            return key_letters(self.plan, self.at)
        return self.at.rows

    @property
    def subscripts(self) -> str:
        letters = self._tile_order
        return f"{letters[:-1]}d{letters[-1]}" if self.dn else f"{letters}d"

    @property
    def shape(self) -> str:
        """Of the sums of a chunk: dq as rows of a tile, dk and dv tokens last."""
        if self.axis == "q":
            sizes = [self.at.sizes[a] for a in self._tile_order]
            return as_tuple(self._with_dim(sizes, self.dim))
        every = self.at.sizes | {"d": self.dim}
        return as_tuple([every[a] for a in sums_of(self.plan, self.at)])

    def sliced(self, source: str) -> list[list[str]]:
        """The calls that take a chunk, at `at`, as a tile has it."""
        calls = [["lax.dynamic_slice", source, "at", self.size]]
        if self._back:
            calls.append([".transpose", *dimensions(self._back)])
        present = [a for a in self._memory_order if a in self.at.letters]
        sizes = [self.at.sizes[a] for a in present]
        calls.append([".reshape", *self._with_dim(sizes, self.dim)])
        if self.axis == "q" and not self.dn:
            moved = permutation(self._memory_order, self.at.letters)
            calls += [[".transpose", *dimensions(moved)]] if moved else []
        return calls

    def put(self) -> list[str]:
        """How the sums of a chunk become one of the array: methods, as text."""
        calls: list[str] = []
        if self.axis == "q" and not self.dn:
            moved = inverse(self._memory_order, self.at.letters)
            calls += [f".transpose{moved}"] if moved else []
        elif not self.dn:
            summed = sums_of(self.plan, self.at)
            order_ = [summed.index(a) for a in f"{key_letters(self.plan, self.at)}d"]
            calls += [f".transpose{as_tuple(list(map(str, order_)))}"]
        sizes = shards.sizes(
            self.plan, self.letters, self.at.sizes | {"h": heads(self.at)}
        )
        calls.append(f".reshape{as_tuple(self._with_dim(sizes, self.dim))}")
        return [*calls, *([f".transpose{self._ahead}"] if self._ahead else [])]

    @property
    def across(self) -> str:
        """How the whole array is transposed ahead, with slices = dn."""
        return "(0, 2, 3, 1)" if self.plan.spec.layout == "bthd" else "(0, 1, 3, 2)"

    @property
    def along(self) -> str:
        """And back."""
        return "(0, 3, 1, 2)" if self.plan.spec.layout == "bthd" else "(0, 1, 3, 2)"


def sums_of(plan: Plan, at: Tile) -> str:
    """The axes of dk and dv as they are summed up: tokens last."""
    return "".join(a for a in "bg" if a in at.letters) + "dk"


def subscripts(plan: Plan, at: Tile) -> tuple[str, str, str]:
    """Of s and dp; of dq; of dk and dv, whose vectors lie across.

    Processors multiply a tile from the right, where its rows are summed over.
    """
    none = Starts("0", "0", "0", "0")
    rows, keys = (Lies(plan, at, none, axis, "D").subscripts for axis in "qk")
    letters = at.letters
    return (
        f"{rows},{keys}->{letters}",
        f"{letters},{keys}->{rows}",
        f"{rows},{letters}->{sums_of(plan, at)}",
    )


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
