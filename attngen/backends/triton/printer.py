"""Expressions as Triton text.

Triton's `//` and `%` truncate where Python's floor, and it has no tanh: where an operand
can be negative, and for tanh, the emitted file gets a small function of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from attngen.expr import POSTFIX, Expr, wrap
from attngen.intervals import Interval, interval
from attngen.printer import ArrayPrinter, Part


@dataclass
class TritonPrinter(ArrayPrinter):
    """As ArrayPrinter; `helpers` collects the functions that the text calls.

    Args:
        env: what each variable can be, so that a plain `//` is printed where it floors.
    """

    env: Mapping[str, Interval] = field(default_factory=dict)
    helpers: set[str] = field(default_factory=set)
    _HELPED: ClassVar[Mapping[str, str]] = {
        "tanh": "_tanh",
        "floordiv": "_floor_div",
        "mod": "_floor_mod",
    }

    def _print(self, node: Expr, args: list[Part]) -> str:
        op = node.op
        if op in ("floordiv", "mod") and self._truncates(node):
            return super()._print(node, args)
        if op in self._HELPED:
            name = self._HELPED[op]
            self.helpers |= {name, "_floor_div"} if op == "mod" else {name}
            return f"{name}({', '.join(text for text, _ in args)})"
        if op in ("int", "float"):
            dtype = self.int_dtype if op == "int" else self.float_dtype
            return f"{wrap(args[0], POSTFIX)}.to({self.namespace}.{dtype})"
        return super()._print(node, args)

    def _truncates(self, node: Expr) -> bool:
        """Whether rounding towards zero and rounding down are the same here."""
        dividend, divisor = (interval(a, self.env) for a in node.args)
        return dividend[0] >= 0 and divisor[0] > 0

    def _const(self, value: object) -> str:
        text = super()._const(value)
        return text.replace(f"{self.namespace}.inf", 'float("inf")')
