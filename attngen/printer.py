"""Expressions as Python text over arrays, for backends whose language is NumPy's.

Text is built from the tree's nodes only: operations from a fixed table, numbers through
`repr`, operands through names that were checked. What is computed more than twice, and
what would make a line too long, becomes a named step, so that a formatter has nothing
to do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from attngen.dtypes import FLOAT32_LIMIT
from attngen.errors import InternalError
from attngen.expr import INFIX, POSTFIX, READS, UNARY, Expr, infix, level, walk, wrap
from attngen.operands import Operand

_CALLS = ("minimum", "maximum", "where", "abs", "exp", "log", "tanh")
Part = tuple[str, int]  # text, and how tightly it binds


@dataclass
class ArrayPrinter:
    """Prints expressions with the functions of an array namespace ("np", "jnp").

    Args:
        namespace: where minimum, where, exp and the dtypes are.
        variables: text for each variable; text of more than a name must be an operand of
            the tightest binding (a call, an index).
        load: text for a read of an operand, or a search of one, likewise.
        float_dtype: of the float arithmetic.
        int_dtype: of the integer arithmetic.
        prefix: of the names of steps.
        often: what a long expression computes more often than that is a step.
    """

    namespace: str
    variables: Mapping[str, str]
    load: Callable[[Expr], str]
    float_dtype: str = "float32"
    int_dtype: str = "int32"
    prefix: str = "part"
    often: int = 2
    _steps: list[str] = field(default_factory=list, init=False)
    _named: dict[Expr, str] = field(default_factory=dict, init=False)
    _count: int = field(default=0, init=False)

    def lines(self, target: str, node: Expr, *, width: int) -> list[str]:
        """Statements that end with `target = …`, none longer than `width`."""
        self._steps, self._named = [], {}
        if self.often < 2 or len(self.text(node)) > width - len(target) - 3:
            self._name_repeated(node, width)
        text = self._fit(node, width - len(target) - 3, width)
        return [*self._steps, f"{target} = {text}"]

    def text(self, node: Expr) -> str:
        """The expression on one line, however long."""
        if node in self._named:
            return self._named[node]
        return self._print(node, [self._part(a) for a in node.args])

    def _part(self, node: Expr) -> Part:
        return (self.text(node), POSTFIX if node in self._named else level(node))

    def _name_repeated(self, root: Expr, width: int) -> None:
        """Steps for what the expression computes more than twice, smallest first."""
        counts = Counter(n for n in walk(root) if n.args and n.op not in READS)
        repeated = [n for n, count in counts.items() if count > self.often]
        for node in sorted(repeated, key=lambda n: len(self.text(n))):
            self._named[node] = self._step(node, width)

    def _step(self, node: Expr, width: int) -> str:
        name = self._new_name()
        text = self._fit(node, width - len(name) - 3, width)
        self._steps.append(f"{name} = {text}")
        return name

    def _new_name(self) -> str:
        self._count += 1
        return f"{self.prefix}_{self._count}"

    def _fit(self, node: Expr, room: int, width: int) -> str:
        """Text that fits the room left in its line, after steps where it wouldn't."""
        text = self.text(node)
        if (
            len(text) <= room
            or not node.args
            or node.op in READS
            or node in self._named
        ):
            return text
        left = node.args[0]
        if node.op in INFIX and left.op == node.op and left not in self._named:
            return self._chain(node, width)  # x = a + b, then x = x + c
        parts = [self._part(a) for a in node.args]
        for i in sorted(range(len(parts)), key=lambda i: -len(parts[i][0])):
            if len(self._print(node, parts)) <= room:
                break
            if node.args[i].args and not parts[i][0].isidentifier():
                parts[i] = (self._step(node.args[i], width), POSTFIX)
        return self._print(node, parts)

    def _chain(self, node: Expr, width: int) -> str:
        links = []
        while node.op in INFIX and node.args[0].op == node.op:
            links.append(node)
            node = node.args[0]
        name = self._step(node, width)
        for i, link in enumerate(reversed(links)):
            room = width - 2 * len(name) - 8
            other = link.args[1]
            right = (self._fit(other, room, width), level(other))
            if other in self._named:
                right = (right[0], POSTFIX)
            elif len(right[0]) > room and other.args and other.op not in READS:
                right = (self._step(other, width), POSTFIX)
            text = infix(link.op, (name, POSTFIX), right)
            if i == len(links) - 1:
                return text
            self._steps.append(f"{name} = {text}")
        return name

    def _print(self, node: Expr, args: list[Part]) -> str:
        op = node.op
        if op == "const":
            return self._const(node.value)
        if op == "var":
            return self.variables[str(node.value)]
        if op in READS:
            return self.load(node)
        if op in INFIX:
            return infix(op, *args)
        if op in ("neg", "not"):
            return ("-" if op == "neg" else "~") + wrap(args[0], UNARY + 1)
        inner = ", ".join(text for text, _ in args)
        if op in _CALLS:
            return f"{self.namespace}.{op}({inner})"
        if op in ("int", "float"):
            dtype = self.int_dtype if op == "int" else self.float_dtype
            return f"{self.namespace}.{dtype}({inner})"
        raise InternalError(f"The printer doesn't know the operation {op!r}.")

    def _const(self, value: object) -> str:
        if isinstance(value, float) and self.float_dtype == "float32":
            value = (
                value if abs(value) < FLOAT32_LIMIT else math.copysign(math.inf, value)
            )
        if isinstance(value, float) and math.isinf(value):
            return f"{'-' if value < 0 else ''}{self.namespace}.inf"
        return repr(value)


def stepwise(
    printer: ArrayPrinter, target: str, node: Expr, width: int, *, in_place: bool = True
) -> list[str]:
    """Statements for a condition, one for each that it joins where a line is too short.

    Args:
        in_place: whether the target may take another shape by `&=`.
    """
    if (
        node.op not in ("and", "or")
        or len(printer.text(node)) + len(target) + 3 <= width
    ):
        return printer.lines(target, node, width=width)
    parts: list[Expr] = []
    left = [node]
    while left:
        part = left.pop()
        if part.op == node.op:
            left += reversed(part.args)
        else:
            parts.append(part)
    sign, start = INFIX[node.op][0], f"{target} = "
    lines = printer.lines(target, parts[0], width=width)
    for part in parts[1:]:
        own = printer.lines(target, part, width=width - len(target) - 5)
        text = own[-1].removeprefix(start)
        if in_place:
            own[-1] = f"{target} {sign}= {text}"
        else:
            text = text if text.isidentifier() else f"({text})"
            own[-1] = f"{start}{target} {sign} {text}"
        lines += own
    return lines


def read_name(node: Expr) -> str:
    """A name for an operand's values where variables and numbers index it.

    Numbers are kept apart: x[1, 12] isn't x[11, 2].
    """
    assert isinstance(node.value, Operand)
    between = "_" if any(i.op == "const" for i in node.args) else ""
    return f"{node.value.name}_at_{between.join(str(i.value) for i in node.args)}"


def search_name(node: Expr, searched: dict[Expr, str]) -> str:
    """A name for how many entries of an operand go up to something, kept for good."""
    assert isinstance(node.value, Operand)
    (x,) = node.args
    which = str(x.value) if x.op == "var" else str(len(searched))
    return searched.setdefault(node, f"{node.value.name}_at_to_{which}")
