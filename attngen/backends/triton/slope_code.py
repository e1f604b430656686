"""The statements of a tile of the backward pass: scores made again, and what they pass on.

From ds, the gradient of the last score, back through the scores: each multiplies it by its own
slope (slopes.py), and each read of a float operand takes its part, summed as it is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from attngen import expr, slopes
from attngen.backends.triton import statements
from attngen.backends.triton.tile_code import TileCode, Writer, power_of_two
from attngen.expr import Expr, var
from attngen.operands import Operand

SIZES = {"b": "B", "h": "H", "q": "T", "k": "S"}  # as launchers call them
DS = var("ds", "float")
Line = tuple[str, bool]  # a statement, and whether it is of masked tiles alone
Kind = Literal["rows", "columns", "entries", "row_entries", "column_entries", "pairs"]


@dataclass(frozen=True)
class Part:
    """What a read of an operand takes of ds.

    Args:
        name: of the variable that holds it.
        node: the read.
        kind: "rows" and "columns" are sums of a tile's queries or keys; "entries" of what
            it has for each entry of the axes that the read's indices compute, "row_entries"
            and "column_entries" for each query or key, too; "pairs" is all of it, as the
            operand has both axes.
    """

    name: str
    node: Expr
    kind: Kind

    @property
    def operand(self) -> Operand:
        assert isinstance(self.node.value, Operand)
        return self.node.value


@dataclass
class SlopeCode:
    """code: the tile's statements up to its mask; back: those that follow `ds`."""

    code: TileCode
    back: list[Line] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


class SlopeWriter(Writer):
    """A tile's statements, and those of its slopes.

    Queries are the tile's axis ROWS, 0 or 1, as rows and cols lie.
    """

    at_rows, at_cols, blank, axis = "rows", "cols", "blank", "ROWS"

    def slopes(self) -> SlopeCode:
        self.known: dict[int, dict[Expr, str]] = {}
        found = SlopeCode(self.write(edge=True))
        for i in reversed(range(len(self.spec.score))):
            self.gathered = self.known[i]
            self._through(i, found)
        return found

    def before(self, i: int) -> None:
        score = self.spec.score[i]
        every = (slopes.SCORE, *slopes.reads(score))
        if any("s" in expr.variables(slopes.slope(score.expr, of)) for of in every):
            self.code.score.append(f"s_{i} = s")
        if "s" not in expr.variables(score.expr):
            self.code.score.append("blank = tl.zeros_like(s)")

    def after(self, i: int) -> None:
        self.known[i] = dict(self.gathered)

    def _through(self, i: int, found: SlopeCode) -> None:
        score = self.spec.score[i]
        for node in slopes.reads(score):
            self._operand(i, node, found)
        own = slopes.slope(score.expr, slopes.SCORE)
        if own != slopes.ONE:
            found.back += self._product("ds", i, own)

    def _product(self, target: str, i: int, by: Expr) -> list[Line]:
        """target = ds · an expression, 0 where the key isn't seen, whatever that is there."""
        if by == slopes.ZERO:
            return [(f"{target} = tl.zeros_like(ds)", False)]
        printer = self._printer(f"slope{i}")
        printer.variables = {**printer.variables, "s": f"s_{i}", "ds": "ds"}
        printer.often = 1
        made = printer.lines(target, slopes.product(DS, by), width=self.width)
        lines: list[Line] = [(line, False) for line in made]
        if not _is_finite(by):
            lines.append((f"{target} = tl.where(seen, {target}, 0.0)", True))
        return lines

    def _operand(self, i: int, node: Expr, found: SlopeCode) -> None:
        source, by = "ds", slopes.slope(self.spec.score[i].expr, node)
        part = Part(f"d_{self.name(node)}", node, kind_of(node))
        if by != slopes.ONE:
            source = f"{part.operand.name}_part"
            found.back += self._product(source, i, by)
        lines = self._summed(part, source)
        if part.name in (p.name for p in found.parts):  # another score reads the same
            lines = [_added(line, part.name) for line in lines]
        else:
            found.parts.append(part)
        found.back += [(line, False) for line in lines]

    def _summed(self, part: Part, source: str) -> list[str]:
        if part.kind == "rows":
            return [f"{part.name} = tl.sum({source}, 1 - ROWS)"]
        if part.kind == "columns":
            return [f"{part.name} = tl.sum({source}, ROWS)"]
        if part.kind == "pairs":
            return [f"{part.name} = {source}"]
        self._define("q_index", self.rows)
        index, count = self._entry(part)
        helper, arguments = "_by_entry", [source, "entry"]
        if part.kind != "entries":
            helper = "_by_entry_each"
            arguments.append("1 - ROWS" if part.kind == "row_entries" else "ROWS")
        self.helpers.add(helper)
        arguments += [str(count), str(power_of_two(count))]
        return [
            f"entry = tl.where(q_index < q_len, {index}, -1)",
            *statements.call(part.name, helper, arguments, self.width),
        ]

    def _entry(self, part: Part) -> tuple[str, int]:
        """Which entry of the axes that are computed a read reads, and how many there are."""
        index, count = "", 1
        for place in computed(part.node):
            length = part.operand.axes[place]
            assert isinstance(length, int)
            own = self.places[part.node][place]
            index = f"{index} * {length} + {own}" if index else own
            count *= length
        return index, count


def _added(line: str, name: str) -> str:
    """A line of `name = …` as one that adds to it."""
    return line.replace(" = ", " += ", 1) if line.startswith(f"{name} = ") else line


def computed(node: Expr) -> list[int]:
    """The axes of a read whose indices are neither variables nor numbers."""
    return [i for i, index in enumerate(node.args) if index.op not in ("var", "const")]


def entries_of(node: Expr) -> int:
    """How many entries the axes have that a read's indices compute."""
    assert isinstance(node.value, Operand)
    lengths = [node.value.axes[place] for place in computed(node)]
    return math.prod(n for n in lengths if isinstance(n, int))


def kind_of(node: Expr) -> Kind:
    if computed(node):
        own = {str(index.value) for index in node.args if index.op == "var"}
        if "q" in own:
            return "row_entries"
        return "column_entries" if "k" in own else "entries"
    reads = expr.variables(node)
    if "k" not in reads:
        return "rows"
    return "pairs" if "q" in reads else "columns"


def placed(part: Part) -> tuple[str, str]:
    """A buffer as the operand's axes lie, as text; and where it belongs, "" if everywhere."""
    node, operand = part.node, part.operand
    letters = {
        "rows": ["b", "h", "q"], "columns": ["b", "h", "k"], "entries": ["b", "h", "", "*"],
        "row_entries": ["b", "h", "q", "*"], "column_entries": ["b", "h", "k", "*"],
        "pairs": [*(a for a in "bh" if a in expr.variables(node)), "q", "k"],
    }[part.kind]  # fmt: skip
    wanted = [
        str(i.value) if i.op == "var" else "*" for i in node.args if i.op != "const"
    ]
    sums = [n for n, a in enumerate(letters) if a not in wanted]
    text = part.name
    if sums:
        text += f".sum({sums[0] if len(sums) == 1 else tuple(sums)})"
    left = [a for a in letters if a in wanted]
    if wanted.count("*") > 1:
        lengths = tuple(operand.axes[i] for i in computed(node))
        text += f".unflatten({left.index('*')}, {lengths})"
        place = left.index("*")
        left[place : place + 1] = ["*"] * len(lengths)
    order = []
    free = list(enumerate(left))
    for a in wanted:
        n = next(i for i, (_, b) in enumerate(free) if b == a)
        order.append(free.pop(n)[0])
    if order != sorted(order):
        text += f".permute({', '.join(map(str, order))})"
    whole = all(
        index.op != "const"
        and not (index.op == "var" and isinstance(axis, int))
        and not (index.op == "var" and axis != index.value)
        for axis, index in zip(operand.axes, node.args, strict=True)
    )
    if whole:
        return text, ""
    at = [
        str(i.value)
        if i.op == "const"
        else f":{SIZES[str(i.value)]}"
        if i.op == "var"
        else ":"
        for i in node.args
    ]
    return text, ", ".join(at)


def unplaced(node: Expr, *, packed: bool = False) -> str:
    """Why what a read takes can't be put where it belongs; "" if it can."""
    own = [str(index.value) for index in node.args if index.op == "var"]
    if packed and "b" in own:
        return "the batch of packed sequences"
    if packed and kind_of(node) == "pairs":
        return "pairs of packed tokens"
    if len(set(own)) < len(own):
        return "two axes at one index"
    if computed(node) and {"q", "k"} <= set(own):
        return "queries, keys and a computed index"
    return ""


def _is_finite(node: Expr) -> bool:
    """Whether an expression is finite whatever arrays hold: arithmetic of positions."""
    return all(
        n.op not in ("load", "div", "exp", "log") and n.value != "s"
        for n in expr.walk(node)
    )
