"""The statements of a tile of the backward pass: scores again, and what they pass on.

From ds, the cotangent of the last score, back through the scores: each multiplies it by its own
slope (slopes.py); each read of a float operand takes its part, summed over the axes that the
operand doesn't have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attngen import expr, slopes
from attngen.backends.jax import shards
from attngen.backends.jax.statements import as_tuple, assign
from attngen.backends.jax.tile import dimensions, letters_of
from attngen.backends.jax.tile_code import TileCode, Writer
from attngen.expr import Expr, var
from attngen.operands import Operand

DS = var("ds", "float")
Line = tuple[str, tuple[str, ...]]  # a statement, and what it is subject to
MASKED, SUMS = "masked", "sums is not None"


@dataclass
class SlopeCode:
    """code: the tile's statements; back: those that follow `ds`.

    Of these some belong to masked tiles alone, some to the pass that sums up operands'
    gradients.
    """

    code: TileCode
    back: list[Line] = field(default_factory=list)


class SlopeWriter(Writer):
    """A tile's statements, and those of its slopes. See `slope_code`."""

    one_scope = True

    def slopes(self, *, masked: bool, seen: str) -> SlopeCode:
        """Args:
        masked: whether there are tiles with a mask.
        seen: the name of what says which keys are seen.
        """
        self.known: dict[int, dict[Expr, str]] = {}
        self.has_mask, self.seen = masked, seen
        found = SlopeCode(self.write())
        for i in reversed(range(len(self.spec.score))):
            self.gathered = self.known[i]
            self._through(i, found.back)
        return found

    def _mask(self) -> None:
        self.width -= 4  # in a branch
        super()._mask()
        self.width += 4

    def before(self, i: int) -> None:
        if self._reads_score(i):
            self.code.score.append(f"s_{i} = s")

    def after(self, i: int) -> None:
        self.known[i] = dict(self.gathered)

    def _reads_score(self, i: int) -> bool:
        """Whether what a score passes on depends on what it was given."""
        score = self.spec.score[i]
        found = [
            slopes.slope(score.expr, of) for of in (slopes.SCORE, *slopes.reads(score))
        ]
        return any("s" in expr.variables(x) for x in found)

    def _through(self, i: int, lines: list[Line]) -> None:
        score = self.spec.score[i]
        for node in slopes.reads(score):
            self._operand(i, node, lines)
        own = slopes.slope(score.expr, slopes.SCORE)
        if own != slopes.ONE:
            lines += self._product("ds", i, own)

    def _product(self, target: str, i: int, by: Expr, *subject: str) -> list[Line]:
        """target = ds · an expression, 0 where the key isn't seen, whatever that is there."""
        if by == slopes.ZERO:
            return [(f"{target} = jnp.zeros_like(ds)", subject)]
        printer = self.printer(self.spec.stats_dtype, f"slope{i}")
        printer.variables = {**printer.variables, "s": f"s_{i}", "ds": "ds"}
        printer.often = 1
        node = slopes.product(DS, by)
        made = printer.lines(target, node, width=self.width)
        lines = [(line, subject) for line in made]
        always = self.plan.drops_keys
        if not _is_finite(by) and (self.has_mask or always):
            where = f"{target} = jnp.where({self.seen}, {target}, 0)"
            lines.append((where, subject if always else (*subject, MASKED)))
        return lines

    def _operand(self, i: int, node: Expr, lines: list[Line]) -> None:
        """What a read of an operand takes of ds, added to the operand's gradient."""
        operand = node.value
        assert isinstance(operand, Operand)
        source, by = "ds", slopes.slope(self.spec.score[i].expr, node)
        if by != slopes.ONE:
            source = f"{operand.name}_part"
            lines += self._product(source, i, by, SUMS)
        made = self._scattered if self._gathers(node) else self._sliced
        lines += [(x, (SUMS,)) for x in made(node, source)]

    def _sliced(self, node: Expr, source: str) -> list[str]:
        """Summed over the axes that the operand doesn't have, as it lies."""
        operand = node.value
        assert isinstance(operand, Operand)
        letters = letters_of(node)
        tile, name = self.at.letters, f"d_{operand.name}"
        kept = {a for letter in letters for a in {"h": "gr"}.get(letter, letter)}
        sums = [str(n) for n, a in enumerate(tile) if a not in kept]
        calls = []
        if sums:
            calls.append([".sum", sums[0] if len(sums) == 1 else as_tuple(sums)])
        begins: list[str] = []
        sizes: list[str] = []
        for index in node.args:
            letter = str(index.value)
            if index.op == "const":
                begins, sizes = [*begins, letter], [*sizes, "1"]
                continue
            begins += shards.begins(self.plan, letter, {letter: self._begin(letter)})
            sizes += shards.sizes(self.plan, letter, {letter: self._size(letter)})
        order = [a for a in tile if a in kept]  # as what is left lies
        wanted = [a for i in letters for a in {"h": "gr"}.get(i, i) if a in order]
        if order != wanted:
            calls.append([".transpose", *(str(order.index(a)) for a in wanted)])
        calls.append([".reshape", *dimensions(as_tuple(sizes))])
        first, *rest = calls
        part = assign("part", [[source + first[0], *first[1:]], *rest], self.width)
        return [
            *part,
            *assign(name, [["_add_at", name, "part", as_tuple(begins)]], self.width),
        ]

    def _scattered(self, node: Expr, source: str) -> list[str]:
        """Added where the read's indices point."""
        operand = node.value
        assert isinstance(operand, Operand)
        name = f"d_{operand.name}"
        at, letters = self.places[node], expr.variables(node)
        if self.spec.static_q_offset is None and "q" in letters:
            letters |= {"b"}  # queries stand elsewhere in each batch
        kept = {a for letter in letters for a in {"h": "gr"}.get(letter, letter)}
        sums = [str(n) for n, a in enumerate(self.at.letters) if a not in kept]
        lines = []
        if sums:
            call = [f"{source}.sum", sums[0] if len(sums) == 1 else as_tuple(sums)]
            shape = self.at.spread("".join(a for a in self.at.letters if a in kept))
            lines += assign(
                "part", [call, [".reshape", *dimensions(shape)]], self.width
            )
            source = "part"
        # of a tile alone, then added: one by one, so many numbers would round more
        calls = [[f"jnp.zeros_like({name}).at[{at}].add", source, 'mode="drop"']]
        return [*lines, *assign("part", calls, self.width), f"{name} += part"]


def _is_finite(node: Expr) -> bool:
    """Whether an expression is finite whatever arrays hold: arithmetic of positions."""
    return all(
        n.op not in ("load", "div", "exp", "log") and n.value != "s"
        for n in expr.walk(node)
    )
