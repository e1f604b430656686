"""Tables that are read by head at computed indices, where heads are sharded: T5's, say.

XLA gathers a sharded axis that is read at indices. So a tile's rows are sliced as other
operands are, each where it lies, and are then read whole in heads.
"""

from __future__ import annotations

from attngen import expr
from attngen.backends.jax import shards
from attngen.backends.jax.statements import as_tuple, assign
from attngen.expr import Expr
from attngen.operands import Operand
from attngen.plans import Plan


def is_by_head(plan: Plan, node: Expr) -> bool:
    """Whether a read is of a table [h, n] at the tile's own heads, and at another index."""
    assert isinstance(node.value, Operand)
    if plan.spec.head_shards == 1 or node.value.axes[0] != "h":
        return False
    first, *others = node.args
    ours = first.op == "var" and first.value == "h"
    return (
        ours
        and len(others) == 1
        and isinstance(node.value.axes[1], int)
        and others[0].op not in ("var", "const")
        and expr.variables(others[0]) <= {"q", "k"}
    )


def rows(plan: Plan, node: Expr, name: str, begin: str, width: int) -> list[str]:
    """Lines that define a tile's rows [heads, n] of a table; `begin`: its first head."""
    table = node.value
    assert isinstance(table, Operand)
    length = str(table.axes[1])
    of = {"h": "H"}
    view = [*shards.shape(plan, "h", of), length]
    at = [*shards.begins(plan, "h", {"h": begin}), "0"]
    size = [*shards.sizes(plan, "h", of), length]
    return [
        *assign(name, [[table.name], [".reshape", *view]], width),
        *assign(
            name, [["lax.dynamic_slice", name, as_tuple(at), as_tuple(size)]], width
        ),
        f"{name} = {name}.reshape(-1, {length})",
    ]
