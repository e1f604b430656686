"""The statements of a tile of the backward pass: scores made again, and what they pass on.

From ds, the gradient of the last score, back through the scores: each multiplies it by its own
slope (slopes.py), and each read of a float operand takes its part, summed as it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from attngen import expr, slopes
from attngen.backends.triton.tile_code import TileCode, Writer
from attngen.expr import Expr, var
from attngen.operands import Operand

DS = var("ds", "float")
Line = tuple[str, bool]  # a statement, and whether it is of masked tiles alone
Kind = Literal["rows", "columns", "entries", "pairs"]


@dataclass(frozen=True)
class Part:
    """What a read of an operand takes of ds.

    Args:
        name: of the variable that holds it.
        node: the read.
        kind: "rows" and "columns" are sums of a tile's queries or keys; "entries" of what
            it has for each entry of the axes that the read's indices compute; "pairs" is
            all of it, as the operand has both axes.
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
            lines[-1] = lines[-1].replace(f"{part.name} = ", f"{part.name} += ", 1)
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
        self.helpers.add("_by_entry")
        arguments = [source, "entry", str(count), str(power_from(count))]
        return [
            f"entry = tl.where(q_index < q_len, {index}, -1)",
            *self._call(part.name, "_by_entry", arguments, self.width),
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


def power_from(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def computed(node: Expr) -> list[int]:
    """The axes of a read whose indices are neither variables nor numbers."""
    return [i for i, index in enumerate(node.args) if index.op not in ("var", "const")]


def kind_of(node: Expr) -> Kind:
    if computed(node):
        return "entries"
    reads = expr.variables(node)
    if "k" not in reads:
        return "rows"
    return "pairs" if "q" in reads else "columns"


def _is_finite(node: Expr) -> bool:
    """Whether an expression is finite whatever arrays hold: arithmetic of positions."""
    return all(
        n.op not in ("load", "div", "exp", "log") and n.value != "s"
        for n in expr.walk(node)
    )
