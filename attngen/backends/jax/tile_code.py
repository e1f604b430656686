"""The statements inside a tile: positions, operands, scores and the mask."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from attngen import expr
from attngen.backends.jax import shards, tables
from attngen.backends.jax.distance import by_distance
from attngen.backends.jax.positions import definition
from attngen.backends.jax.statements import as_tuple, assign, searched
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    chosen,
    dimensions,
    drops,
    heads,
    is_whole,
    letters_of,
    times,
)
from attngen.expr import Expr
from attngen.intervals import domain, proven
from attngen.operands import Operand
from attngen.plans import Plan
from attngen.printer import ArrayPrinter, read_name, search_name

WIDTH = 88
LENGTHS = {"b": "B", "h": "H", "q": "T", "k": "S"}


@dataclass
class TileCode:
    """What a tile computes beside the two products, as lists of statements.

    rows: before the key loop: what depends on batch, head and (unless the queries of
        tiles differ) query alone.
    keys: in every tile: positions of keys and operands that the scores read.
    score: the scores, in order.
    kept: which weights dropout keeps.
    edge: in edge tiles only: what the mask reads, and the mask as `seen`.
    """

    rows: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    score: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    edge: list[str] = field(default_factory=list)


def tile_code(
    plan: Plan,
    at: Tile,
    starts: Starts,
    indent: int,
    ragged: bool,
    edge: Tile | None = None,
) -> TileCode:
    """Args:
    edge: the tile that is masked, where that isn't the whole tile: then the queries
        of one tile aren't those of another.
    """
    return Writer(plan, at, starts, WIDTH - indent, ragged, edge).write()


class Writer:
    """Writes a tile's statements.

    one_scope: scores and mask are statements of one function.
    """

    one_scope = False

    def __init__(
        self,
        plan: Plan,
        at: Tile,
        starts: Starts,
        width: int,
        ragged: bool,
        edge: Tile | None,
    ) -> None:
        self.plan, self.spec, self.at = plan, plan.spec, at
        self.starts, self.width, self.ragged = starts, width, ragged
        self.edge = edge
        self.code = TileCode()
        self.rows_defined: set[str] = set()
        self.keys_defined: set[str] = set()
        self.gathered: dict[Expr, str] = {}
        self.searched: dict[Expr, str] = {}
        self.places: dict[Expr, str] = {}  # the indices of what is gathered, as text
        self.gathers = self.indices = 0
        self.env = domain(plan.spec)

    def write(self) -> TileCode:
        self.scores([score.expr for score in self.spec.score])
        if drops(self.plan):
            self._dropout()
        if not self.one_scope:
            self.keys_defined, self.gathered = set(), {}
        self.at = self.edge or self.at
        self._mask()
        return self.code

    def scores(self, expressions: Iterable[Expr]) -> None:
        """The statements of scores that are applied one after another."""
        dtype = self.spec.stats_dtype
        for i, node in enumerate(expressions):
            self.before(i)
            self._needs(node, self.code.keys, dtype)
            printer = self.printer(dtype, f"score{i}")
            self.code.score += printer.lines("s", node, width=self.width)
            if "s" not in expr.variables(node):  # perhaps not of every axis
                shape = self.at.shape(self.at.letters)
                self.code.score.append(f"s = jnp.full({shape}, s, jnp.{dtype})")
            self.after(i)
            for read in [n for n in self.gathered if "s" in expr.variables(n)]:
                del self.gathered[read]  # the next score has another s

    def before(self, i: int) -> None:
        """What comes before the statements of score i."""

    def after(self, i: int) -> None:
        """What comes after them, where their names are still known."""

    def _dropout(self) -> None:
        """Which weights are kept: `kept`, of every axis of the tile."""
        for name in "bhqk":
            self._variable(name, self.code.keys)
        arguments = ", ".join(self._names()[a] for a in "bhqk")
        self.code.kept = [f"kept = _dropout(seed, {arguments})"]

    def _mask(self) -> None:
        """Every condition for a key to be there; `seen` where there is any."""
        terms: list[list[str]] = []
        if self.spec.mask is not None:
            mask = self.spec.mask.expr
            if chosen(self.plan, "mask") == "distance":
                mask = by_distance(mask)
            self._needs(mask, self.code.edge, "float32")
            printer = self.printer("float32", "part")
            terms.append(printer.lines("seen", mask, width=self.width))
        if self.ragged:
            self._define("k_index", self.code.edge)
            terms.append(["seen = k_index >= c * K_CHUNK"])
        if self.spec.kv_lengths:
            self._define("k_index", self.code.edge)
            self._define("kv_length", self.code.rows)
            terms.append(["seen = k_index < kv_length"])
        if self.spec.q_lengths:
            self._define("q_index", self.code.rows)
            self._define("q_length", self.code.rows)
            terms.append(["seen = q_index < q_length"])
        for i, lines in enumerate(terms):
            if i:
                lines[-1] = lines[-1].replace("seen = ", "seen &= ", 1)
            self.code.edge += lines

    def _names(self) -> dict[str, str]:
        """What the emitted text calls the variables of expressions."""
        names = {"b": "b_index", "h": "h_index", "q": "q_pos", "k": "k_pos"}
        names |= {n: n for n in ("s", "away", "shift")}
        if self.spec.static_q_offset == 0:
            names["q"] = "q_index"
        if self.spec.kv_offset == 0:
            names["k"] = "k_index"
        return names

    def printer(self, float_dtype: str, prefix: str) -> ArrayPrinter:
        names = self._names()

        def load(node: Expr) -> str:
            return self._load(node, float_dtype)

        return ArrayPrinter(
            "jnp", names, load, float_dtype, self.plan.index_dtype, prefix=prefix
        )

    # What an expression needs defined first.

    def _needs(self, root: Expr, keys: list[str], float_dtype: str) -> None:
        """Define the positions and operands that an expression reads, innermost first."""
        for a in root.args:
            index = root.op == "load" and a.op == "var"
            if not index:
                self._needs(a, keys, float_dtype)
        if root.op == "var":
            self._variable(str(root.value), keys)
        elif root.op == "load" and self._gathers(root):
            self._gather(root, keys, float_dtype)
        elif root.op == "load":
            self._slice(root, keys)
        elif root.op == "searchsorted":
            self._search(root, keys, float_dtype)

    def _variable(self, name: str, keys: list[str]) -> None:
        if name in ("b", "h"):
            self._define(f"{name}_index", self.code.rows)
        elif name == "q":
            lines = self._lines({"q"}, keys)
            self._define("q_index", lines)
            if self.spec.static_q_offset != 0:
                self._define("q_pos", lines)
        elif name in ("away", "shift"):
            self._define(name, keys)
        elif name == "k":
            self._define("k_index", keys)
            if self.spec.kv_offset:
                self._define("k_pos", keys)

    def _lines(self, reads: Collection[str], keys: list[str]) -> list[str]:
        """Where to define what depends on these variables: in the tile, or before it."""
        inside = "k" in reads or ("q" in reads and self.edge is not None)
        return keys if inside else self.code.rows

    def _new(self, name: str, lines: list[str]) -> bool:
        """Whether a name is still to be defined where `lines` go; from now on it is."""
        known = self.rows_defined if lines is self.code.rows else self.keys_defined
        if name in known:
            return False
        known.add(name)
        return True

    def _define(self, name: str, lines: list[str]) -> None:
        if self._new(name, lines):
            lines += self._definition(name)

    def _definition(self, name: str) -> list[str]:
        return definition(self.plan, self.at, self.starts, name, self.width)

    # Operands.

    def _gathers(self, node: Expr) -> bool:
        """Whether a read is no slice: an axis of its own length, or the diagonal [q, q]."""
        assert isinstance(node.value, Operand)
        pairs = zip(node.value.axes, node.args, strict=True)
        own = any(isinstance(a, int) and i.op != "const" for a, i in pairs)
        return own or len(set(letters := letters_of(node))) != len(letters)

    def _slice(self, node: Expr, keys: list[str]) -> None:
        """Define the part of an operand that belongs to this tile."""
        assert isinstance(node.value, Operand)
        name, used = read_name(node), letters_of(node)
        lines = self._lines(used, keys)
        if not self._new(name, lines):
            return
        begins: list[str] = []
        sizes: list[str] = []
        view: list[str] = []  # the operand's shape, with its shards apart
        axes: list[str] = []  # the letter that each axis of that is read at
        for axis, index in zip(node.value.axes, node.args, strict=True):
            letter, whole = str(index.value), LENGTHS.get(str(axis), str(axis))
            if index.op == "const":
                begins, sizes = [*begins, letter], [*sizes, "1"]
                view, axes = [*view, whole], [*axes, ""]
                continue
            begins += shards.begins(self.plan, letter, {letter: self._begin(letter)})
            sizes += shards.sizes(self.plan, letter, {letter: self._size(letter)})
            view += shards.shape(self.plan, letter, {letter: whole})
            axes += [a for a, _ in shards.axes(self.plan, letter)]
        source = node.value.name
        if len(axes) != len(node.args):
            source = f"{name}_of_shards"
            lines += assign(
                source, [[node.value.name], [".reshape", *view]], self.width
            )
        if set(begins) == {"0"} and is_whole(self.plan, node):
            calls = [[node.value.name]]
        else:
            arguments = [source, as_tuple(begins), as_tuple(sizes)]
            calls = [["lax.dynamic_slice", *arguments]]
        ordered = sorted(used, key="bhqk".index)
        if used != ordered:
            fixed = [i for i, letter in enumerate(axes) if not letter]
            moved = [i for i, letter in enumerate(axes) if letter]
            moved.sort(key=lambda i: "bhqk".index(axes[i]))
            calls.append([".transpose", *(str(i) for i in fixed + moved)])
        target = "".join({"h": "gr"}.get(a, a) for a in ordered)
        calls.append([".reshape", *dimensions(self.at.spread(target))])
        lines += assign(name, calls, self.width)

    def _begin(self, letter: str) -> str:
        starts = self.starts
        head = times(starts.g, self.spec.repeats)
        return {"b": starts.b, "h": head, "q": starts.q, "k": starts.k}[letter]

    def _size(self, letter: str) -> str:
        return heads(self.at) if letter == "h" else self.at.sizes[letter]

    def _gather(self, node: Expr, keys: list[str], float_dtype: str) -> None:
        """Define the values of an operand that is indexed by an expression."""
        if node in self.gathered:
            return
        assert isinstance(node.value, Operand)
        reads = expr.variables(node)
        lines = self.code.score if "s" in reads else self._lines(reads, keys)
        name = f"{node.value.name}_at_i{self.gathers}"
        self.gathers += 1
        index = []
        safe = proven(node, self.env)
        by_head = tables.is_by_head(self.plan, node)
        for axis, i in zip(node.value.axes, node.args, strict=True):
            if by_head and i.op == "var":
                index.append(":")
            elif i.op == "var":
                letter = str(i.value)
                self._define(f"{letter}_index", self._lines({letter}, keys))
                index.append(f"{i.value}_index")
            elif i.op == "const":
                index.append(str(i.value))
            else:
                step = self._step(i, lines, float_dtype)
                if not safe:  # JAX counts negative indices from the end
                    lines.append(f"{step} = jnp.where({step} < 0, {axis}, {step})")
                index.append(step)
        how = ['mode="fill"', "fill_value=jnp.nan"]
        if safe:
            how = ['mode="promise_in_bounds"']
        at = ", ".join(index)
        if len(name) + len(node.value.name) + len(at) + 13 > self.width:
            lines.append(f"indices_{self.gathers} = ({at})")
            at = f"indices_{self.gathers}"
        self.places[node] = at
        source = node.value.name
        if by_head and shards.is_split(self.plan, "h"):
            source = f"{name}_of_heads"
            rows = self._lines({"h"}, keys)
            rows += tables.rows(self.plan, node, source, self._begin("h"), self.width)
        calls = [[f"{source}.at[{at}].get", *how]]
        if by_head:
            target = self.at.spread("".join(reads).replace("h", "gr"))
            calls.append([".reshape", *dimensions(target)])
        lines += assign(name, calls, self.width)
        self.gathered[node] = name

    def _step(self, index: Expr, lines: list[str], float_dtype: str) -> str:
        self.indices += 1
        name = f"index_{self.indices}"
        lines += self.printer(float_dtype, name).lines(name, index, width=self.width)
        return name

    def _search(self, node: Expr, keys: list[str], float_dtype: str) -> None:
        """Define how many entries of an operand are at most an expression of q or k."""
        assert isinstance(node.value, Operand)
        name = search_name(node, self.searched)
        lines = self._lines(expr.variables(node), keys)
        if not self._new(name, lines):
            return
        (x,) = node.args
        printer = self.printer(float_dtype, "index")
        text = printer.text(x) if x.op == "var" else self._step(x, lines, float_dtype)
        lines += searched(name, node.value, text, self.width)

    def _load(self, node: Expr, float_dtype: str) -> str:
        """The text of a read inside an expression: a name, converted where it must be."""
        assert isinstance(node.value, Operand)
        if node.op == "searchsorted":
            return self.searched[node]
        text = self.gathered.get(node) or read_name(node)
        wanted = {"float": float_dtype, "int": self.plan.index_dtype}.get(node.kind)
        if wanted is None or node.value.dtype == wanted:
            return text
        return f"jnp.{wanted}({text})"
