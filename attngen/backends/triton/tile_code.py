"""The statements inside a tile: positions, operands, scores and the mask.

A tile is [q, k]: a program computes one chunk of queries of one head of one batch, so b and
h are scalars. Queries are a column, keys a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attngen import expr
from attngen.backends.triton import statements
from attngen.backends.triton.bounds import end_of_keys, offset_source
from attngen.backends.triton.printer import TritonPrinter
from attngen.expr import Expr
from attngen.intervals import Interval, proven
from attngen.operands import Operand
from attngen.plans import Plan, grouped
from attngen.printer import read_name, search_name
from attngen.spec import AttentionSpec

WIDTH = 88
_NAMES = {"b": "b_index", "h": "h_index", "q": "q_pos", "k": "k_pos", "s": "s"}
_OTHER = {"bool": "False", "int": "0", "float": "0.0"}


def fours(spec: AttentionSpec) -> bool:
    """Whether dropout makes four words at a time: a block's first key is a fourth one."""
    return spec.kv_offset % 4 == 0 and spec.storage != "packed"


def power_of_two(n: int) -> int:
    """The least that isn't below n."""
    return 1 << (n - 1).bit_length()


@dataclass
class TileCode:
    """Statements of a tile of one kind.

    rows: before the loops: what depends on batch, head and query alone.
    keys: in the tile: positions of keys, and operands that the scores read.
    score: the scores, in order.
    mask: what the mask reads, and the mask as `seen`.
    kept: which weights dropout keeps.
    """

    rows: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    score: list[str] = field(default_factory=list)
    mask: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class Writer:
    """Writes the code of interior tiles and of edge tiles, which share their rows.

    at_rows, at_cols, blank: how rows and columns lie in a tile, and a tile of zeros; axis:
    of the rows.

    Args:
        env: what variables can be, whatever the lengths are at run time.
        index_dtype: of positions.
    """

    at_rows, at_cols = "rows[:, None]", "cols[None, :]"
    blank, axis = "tl.zeros((Q_BLOCK, K_BLOCK), tl.float32)", "0"

    def __init__(
        self,
        plan: Plan,
        env: Mapping[str, Interval],
        index_dtype: str,
        helpers: set[str],
    ) -> None:
        self.plan, self.spec, self.env = plan, plan.spec, env
        self.index_dtype, self.helpers = index_dtype, helpers
        self.packed = self.spec.storage == "packed"
        self.rows: list[str] = []
        self.rows_defined: set[str] = set()
        self.row_indices = 0
        self.searched: dict[Expr, str] = {}
        self.places: dict[Expr, list[str]] = {}  # the indices of a read, as text
        self.heads = grouped(self.spec, plan.choice)  # of the rows of a tile
        self.names = dict(_NAMES)
        if self.heads > 1:
            self.names["h"] = "h_index[:, None]"
        if not offset_source(self.spec):
            self.names["q"] = "q_index"
        if self.spec.kv_offset == 0:
            self.names["k"] = "k_index"

    def write(self, *, edge: bool) -> TileCode:
        self.edge, self.width = edge, WIDTH - 8
        self.code = TileCode(rows=self.rows)
        self.defined: set[str] = set()
        self.gathered: dict[Expr, str] = {}
        self.gathers = self.indices = 0
        if edge:
            self._define("k_index", self.code.keys)
        if self.spec.dropout and self.packed:
            self._token("q", self.rows)
            self._token("k", self.code.keys)
        elif self.spec.dropout:
            self._variable("q", self.rows)
            if not fours(self.spec):
                self._variable("k", self.code.keys)
        for i, score in enumerate(self.spec.score):
            self._needs(score.expr, self.code.keys)
            self.before(i)
            printer = self._printer(f"score{i}")
            self.code.score += printer.lines("s", score.expr, width=self.width)
            if "s" not in expr.variables(score.expr):  # perhaps not of both axes
                self.code.score.append(f"s = {self.blank} + s")
            self.after(i)
            for node in [n for n in self.gathered if "s" in expr.variables(n)]:
                del self.gathered[node]  # the next score has another s
        if edge:
            self._mask()
        if self.spec.dropout:
            at = f"b_index, {self.names['h']}, {self.names['q']}"
            if self.packed:
                at = f"tl.zeros_like(b_index), {self.names['h']}, q_token, k_token"
            elif not fours(self.spec):
                at += f", {self.names['k']}"
            else:
                shift = " + K_OFFSET" if self.spec.kv_offset else ""
                at += f", c * K_BLOCK{shift}, K_BLOCK, {self.axis}"
            self.code.kept = [f"kept = _dropout(seed, {at})"]
        return self.code

    def before(self, i: int) -> None:
        """What comes before the statements of score i."""

    def after(self, i: int) -> None:
        """What comes after them, where their names are still known."""

    def _mask(self) -> None:
        lines = self.code.mask
        terms: list[list[str]] = []
        if self.spec.mask is not None:
            self._needs(self.spec.mask.expr, lines)
            printer = self._printer("part")
            terms.append(printer.lines("seen", self.spec.mask.expr, width=self.width))
        terms.append([f"seen = k_index < {end_of_keys(self.spec)}"])
        if self.spec.q_lengths:
            self._define("q_index", self.rows)
            terms.append(["seen = q_index < q_length"])
        for i, term in enumerate(terms):
            if i:
                term[-1] = term[-1].replace("seen = ", "seen &= ", 1)
            lines += term

    def _printer(self, prefix: str) -> TritonPrinter:
        return TritonPrinter(
            "tl",
            self.names,
            self._load,
            int_dtype=self.index_dtype,
            prefix=prefix,
            env=self.env,
            helpers=self.helpers,
        )

    # What an expression needs defined first.

    def _needs(self, root: Expr, lines: list[str]) -> None:
        """Define the positions and operands that an expression reads, innermost first."""
        for a in root.args:
            if not (root.op == "load" and a.op == "var"):  # an index, not a position
                self._needs(a, lines)
        if root.op == "var":
            self._variable(str(root.value), lines)
        elif root.op == "load":
            self._read(root, lines)
        elif root.op == "searchsorted":
            self._search(root, lines)

    def _variable(self, name: str, lines: list[str]) -> None:
        if name == "q":
            self._define("q_index", self.rows)
            if self.names["q"] == "q_pos":
                self._define("q_pos", self.rows)
        elif name == "k":
            self._define("k_index", lines)
            if self.names["k"] == "k_pos":
                self._define("k_pos", lines)

    def _token(self, name: str, lines: list[str]) -> str:
        """Define which of all tokens of q or k one is, and return its name."""
        self._define(f"{name}_index", lines)
        if not self.packed:
            return f"{name}_index"
        self._define(f"{name}_token", lines)
        return f"{name}_token"

    def _define(self, name: str, lines: list[str]) -> None:
        known = self.rows_defined if lines is self.rows else self.defined
        if name in known:
            return
        known.add(name)
        text = {
            "q_index": "token[:, None]"
            if self.heads > 1
            else f"q_start + {self.at_rows}",
            "q_pos": "q_index + offset",
            "k_index": f"c * K_BLOCK + {self.at_cols}",
            "k_pos": "k_index + K_OFFSET",
            "q_token": "q_index + q_first",
            "k_token": "k_index + k_first",
        }[name]
        lines.append(f"{name} = {text}")

    def _read(self, node: Expr, lines: list[str]) -> None:
        """Define the values of an operand, each where the tile needs it."""
        assert isinstance(node.value, Operand)
        reads = expr.variables(node)
        if "k" not in reads and "s" not in reads:
            lines = self.rows
        if "s" in reads:
            lines = self.code.score
        name = self.name(node)
        known = self.rows_defined if lines is self.rows else self.defined
        if name in known:
            return
        known.add(name)
        steps, conditions, other = [], [], _OTHER[node.kind]
        self.places[node] = []
        unsure = not proven(node, self.env)
        for i, (axis, index) in enumerate(zip(node.value.axes, node.args, strict=True)):
            text = self._index(index, lines)
            self.places[node].append(text)
            if isinstance(axis, int) and unsure and index.op != "const":
                conditions.append(f"({text} >= 0) & ({text} < {axis})")
                other = 'float("nan")'  # of the values outside
            if isinstance(axis, str) and index.op == "var":
                conditions += self._there(index)
            if not (text.isdigit() or text in (self.names["b"], self.names["h"])):
                text = f"{text}.to(tl.int64)"
            steps.append(f"{text} * {node.value.name}_stride_{i}")
        if not unsure and not proven(node, self._padded()):
            conditions += self._there(node)  # it is proven for tokens that are there
        conditions = list(dict.fromkeys(conditions))
        room = self._room(lines)
        lines += self._load_of(name, node, steps, conditions, other, room)

    def _padded(self) -> dict[str, Interval]:
        """Where variables can lie in a ragged tile, which has tokens that aren't there."""
        chunks = {"q": self.plan.q_chunk, "k": self.plan.k_chunk}
        names = ((n, chunks[n[0]]) for n in ("q", "q_index", "k", "k_index"))
        more = {n: (self.env[n][0], self.env[n][1] + chunk - 1) for n, chunk in names}
        return {**self.env, **more}

    def _there(self, node: Expr) -> list[str]:
        """Whether the tokens are there whose positions an expression reads."""
        reads = expr.variables(node)
        conditions = ["(q_index < q_len)"] if "q" in reads else []
        return conditions + ["(k_index < kv_len)"] * ("k" in reads and self.edge)

    def _load_of(
        self,
        name: str,
        node: Expr,
        steps: list[str],
        conditions: list[str],
        other: str,
        room: int,
    ) -> list[str]:
        assert isinstance(node.value, Operand)
        return statements.load(
            name,
            node.value.name,
            steps,
            conditions,
            other,
            self._cast(node),
            width=self.width,
            room=room,
        )

    def _room(self, lines: list[str]) -> int:
        return WIDTH - (4 if lines is self.rows else 8)

    def varies(self, node: Expr) -> bool:
        """Whether what is read before the loops differs between the rows of a tile."""
        reads = expr.variables(node)
        return "q" in reads or (self.heads > 1 and "h" in reads)

    def read_whole(self, node: Expr, axis: int, lines: list[str]) -> str:
        """Define all values of an axis of its own length, in place of a read of one.

        Where heads are packed, those of each of these.
        """
        assert isinstance(node.value, Operand)
        length = node.value.axes[axis]
        assert isinstance(length, int)
        every = f"tl.arange(0, {power_of_two(length)})"
        steps = []
        for i, index in enumerate(node.args):
            text = every if i == axis else self._index(index, lines)
            if text == "h_index[:, None]":
                text = "g_heads"
            steps.append(f"{text} * {node.value.name}_stride_{i}")
        conditions = [f"{every} < {length}"] if length & (length - 1) else []
        if any("g_heads" in step for step in steps):
            heads = f"tl.arange(0, {power_of_two(self.heads)})"
            if self.heads & (self.heads - 1):
                heads = f"tl.minimum({heads}, R - 1)"
            line = f"g_heads = g_index * R + {heads}[:, None]"
            lines += [line] if line not in lines else []
        name = f"{node.value.name}_at_all"
        lines += self._load_of(name, node, steps, conditions, "0.0", WIDTH - 4)
        return name

    def _cast(self, node: Expr) -> str:
        assert isinstance(node.value, Operand)
        wanted = {"float": "float32", "int": self.index_dtype}.get(node.kind)
        return "" if wanted in (None, node.value.dtype) else f".to(tl.{wanted})"

    def _index(self, index: Expr, lines: list[str]) -> str:
        """The text of an index: a constant, a variable, or a step of its own."""
        if index.op == "const":
            return str(index.value)
        if index.op == "var":
            if index.value in ("q", "k"):
                at = self.rows if index.value == "q" else lines
                return self._token(str(index.value), at)
            return self.names[str(index.value)]
        # before the loops under another name: what a loop assigns anew it carries
        if lines is self.rows:
            self.row_indices += 1
            step = f"row_index_{self.row_indices}"
        else:
            self.indices += 1
            step = f"index_{self.indices}"
        lines += self._printer(step).lines(step, index, width=self.width)
        return step

    def _search(self, node: Expr, lines: list[str]) -> None:
        """Define how many entries of an operand are at most an expression of q or k."""
        assert isinstance(node.value, Operand)
        lines = lines if "k" in expr.variables(node) else self.rows
        name = search_name(node, self.searched)
        known = self.rows_defined if lines is self.rows else self.defined
        if name in known:
            return
        known.add(name)
        (x,) = node.args
        text = self.names[str(x.value)] if x.op == "var" else self._index(x, lines)
        if x.op == "const":
            text = f"tl.full((1, 1), {text}, tl.{self.index_dtype})"
        operand, length = node.value.name, node.value.axes[0]
        self.helpers.add("_searchsorted")
        arguments = [f"{operand}_ptr", f"{operand}_stride_0", str(length), text]
        lines += statements.call(name, "_searchsorted", arguments, self._room(lines))

    def name(self, node: Expr) -> str:
        """A name for the values of a read: of its indices where these are variables."""
        assert isinstance(node.value, Operand)
        if all(i.op in ("var", "const") for i in node.args):
            return read_name(node)
        if node not in self.gathered:
            self.gathered[node] = f"{node.value.name}_at_i{self.gathers}"
            self.gathers += 1
        return self.gathered[node]

    def _load(self, node: Expr) -> str:
        if node.op == "searchsorted":
            return self.searched[node]
        return self.name(node)
