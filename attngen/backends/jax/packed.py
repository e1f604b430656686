"""Packed storage: sequences behind each other as one batch, which a mask tells apart.

A packed spec becomes a dense one of batch 1 whose mask says, too, that query and key are of
the same sequence. In masks and scores b becomes the sequence, q and k the positions in it:
by searches in the cumulative offsets, each of q or of k alone, which lists of tiles follow.
"""

from __future__ import annotations

import dataclasses
import functools

from attngen import expr, tracing
from attngen.expr import Expr, apply, const, load, searchsorted, var, variables
from attngen.linear import Linear, expression, linear
from attngen.operands import Operand
from attngen.plans import Plan
from attngen.spec import AttentionSpec, own_operand

SUMS = ("add", "sub", "neg", "mul")
PAIR = frozenset("qk")


@functools.lru_cache(maxsize=64)
def lowered(spec: AttentionSpec) -> AttentionSpec:
    """The dense spec of a packed one; any other as it is."""
    if spec.storage != "packed":
        return spec
    made = _Lowering(spec)
    return dataclasses.replace(
        spec,
        storage="dense",
        batch=1,
        q_offset=0,
        kv_offset=0,
        mask=tracing.mask_of(made.mask(), {}),
        score=tuple(
            tracing.score_of(made.lower(score.expr), {}) for score in spec.score
        ),
    )


def lowered_plan(plan: Plan) -> Plan:
    """The plan of the dense spec, for a plan of a packed one."""
    if plan.spec.storage != "packed":
        return plan
    return dataclasses.replace(plan, spec=lowered(plan.spec))


class _Lowering:
    """Rewrites the expressions of a packed spec."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec, self.count = spec, spec.batch
        self.after: dict[
            str, Expr
        ] = {}  # the sequences that begin at a token or before
        self.sequence: dict[str, Expr] = {}
        self.offsets: dict[str, Operand] = {}
        for x, length in (("q", spec.q_len), ("k", spec.kv_len)):
            name, axes = f"cu_seqlens_{x}", (spec.batch + 1,)
            self.offsets[x] = own_operand(name, axes, "int32", length)
            self.after[x] = searchsorted(self.offsets[x], var(x))
            last = apply("minimum", self.after[x], const(spec.batch))
            index = apply("sub", last, const(1))
            self.sequence[x] = apply("maximum", index, const(0))
        self.position = {"q": self._query(), "k": self._key()}

    def _offset(self, x: str, of: str, more: int = 0) -> Expr:
        """Where the sequence of a query, or of a key, begins among queries, or keys.

        Args:
            x: whose offsets; of: whose sequence; more: 1 for where it ends.
        """
        at = self.sequence[of]
        index = apply("add", at, const(1)) if more else at
        return load(self.offsets[x], (index,))

    def _query(self) -> Expr:
        spec, q = self.spec, var("q")
        if spec.q_offset == "bottom_right":
            end = apply("sub", q, self._offset("q", "q", 1))
            return apply("add", end, self._length_of_keys("q"))
        place = apply("sub", q, self._offset("q", "q"))
        if spec.q_offset == "operand":
            moved = own_operand("q_offset", (spec.batch,), "int32")
            return apply("add", place, load(moved, (self.sequence["q"],)))
        assert isinstance(spec.q_offset, int | None)
        return apply("add", place, const(spec.q_offset)) if spec.q_offset else place

    def _length_of_keys(self, of: str) -> Expr:
        return apply("sub", self._offset("k", of, 1), self._offset("k", of))

    def _key(self) -> Expr:
        place = apply("sub", var("k"), self._offset("k", "k"))
        moved = self.spec.kv_offset
        return apply("add", place, const(moved)) if moved else place

    def mask(self) -> Expr:
        """Query and key are of one sequence, and the user's mask says yes."""
        inside = apply("le", self.after["q"], const(self.count))
        same = apply("and", inside, apply("eq", self.after["q"], self.after["k"]))
        if self.spec.mask is None:
            return same
        return apply("and", same, self.lower(self.spec.mask.expr))

    def lower(self, node: Expr, side: str = "q", *, summed: bool = False) -> Expr:
        """An expression of sequences and positions as one of packed tokens.

        Args:
            side: whose sequence b is, where the expression reads neither q nor k.
            summed: whether it is a part of a sum, which is put in order as a whole.
        """
        own = variables(node) & PAIR
        side = next(iter(own)) if len(own) == 1 else side if not own else "q"
        if node.op == "var":
            if node.value == "b":
                return self.sequence[side]
            return self.position.get(str(node.value), node)
        if node.op == "load":
            return self._read(node, side)
        sums = node.kind == "int" and node.op in SUMS
        args = tuple(self.lower(a, side, summed=sums) for a in node.args)
        made = Expr(node.op, args, node.kind, node.value)
        if not variables(made) >= PAIR:
            return made
        if node.op in expr.COMPARISONS and args[0].kind == "int":
            return self._compared(made)
        return self._in_order(made) if sums and not summed else made

    def _read(self, node: Expr, side: str) -> Expr:
        """A read: at the sequence where the operand has an axis b, at packed tokens."""
        assert isinstance(node.value, Operand)
        of = node.value
        axes = tuple(self.count if axis == "b" else axis for axis in of.axes)
        index = tuple(
            i
            if i.op == "const" or (i.op == "var" and i.value != "b")
            else self.lower(i, side)
            for i in node.args
        )
        if axes == of.axes and index == node.args:
            return node
        made = of if axes == of.axes else dataclasses.replace(of, axes=axes)
        return load(made, index)

    # Sums and comparisons of q and k, as what is of k and what is of q: each is computed
    # for a row or a column of a tile, and lists of tiles follow each.

    def _compared(self, node: Expr) -> Expr:
        left, right = (linear(a) for a in node.args)
        sides = self._sides(left - right)
        if sides is None:
            return node
        of_k, of_q = sides
        return apply(node.op, expression(of_k), expression(of_q.times(-1)))

    def _in_order(self, node: Expr) -> Expr:
        sides = self._sides(linear(node))
        if sides is None:
            return node
        of_k, of_q = sides
        return apply("sub", expression(of_k), expression(of_q.times(-1)))

    def _sides(self, total: Linear) -> tuple[Linear, Linear] | None:
        """What is of keys, and the rest; None where a part is of both.

        Where query and key are of one sequence, the keys of the query's are the key's.
        """
        ours = {
            self._offset("k", "q", more): self._offset("k", "k", more)
            for more in (0, 1)
        }
        of_k, of_q = Linear(), Linear((), total.constant)
        for part, coefficient in total.parts:
            own = Linear(((ours.get(part, part), coefficient),))
            reads = variables(own.parts[0][0]) & PAIR
            if len(reads) == 2:
                return None
            if reads == {"k"}:
                of_k += own
            else:
                of_q += own
        return of_k, of_q
