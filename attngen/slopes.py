"""Derivatives of expressions, as expressions: the local derivatives of scores.

By the rules of calculus over the tree's few operations. (sympy.diff would need half a second
to be imported, and writes minimum, maximum and conditions as Heaviside and Piecewise.) Where
two branches meet it is as in JAX: at equal arguments of minimum and maximum each has half,
and |x| has slope 1 at 0. What is compared, or indexes a table, has no derivative.
"""

from __future__ import annotations

import functools

from attngen.expr import Expr, apply, const, var, walk
from attngen.operands import Operand
from attngen.spec import AttentionSpec
from attngen.tracing import Score

ZERO, ONE, HALF = const(0.0), const(1.0), const(0.5)
SCORE = var("s")


@functools.lru_cache(maxsize=1024)
def slope(node: Expr, of: Expr) -> Expr:
    """The derivative of an expression with respect to the score, or to a read of an operand.

    Args:
        of: the variable s, or a load; other reads of the same operand count as constants.
    """
    if node == of:
        return ONE
    if node.kind != "float" or node.op in ("const", "var", "load", "float"):
        return ZERO
    x, *rest = node.args
    if node.op == "where":
        first, second = (slope(a, of) for a in rest)
        return first if first == second else apply("where", x, first, second)
    dx = slope(x, of)
    if not rest:
        return _unary(node, x, dx)
    (y,) = rest
    return _binary(node, x, y, dx, slope(y, of))


def _unary(node: Expr, x: Expr, dx: Expr) -> Expr:
    if dx == ZERO:
        return ZERO
    if node.op == "neg":
        return _negated(dx)
    if node.op == "exp":
        return product(node, dx)
    if node.op == "log":
        return apply("div", dx, x)
    if node.op == "tanh":
        return product(apply("sub", ONE, apply("mul", node, node)), dx)
    sign = apply("where", apply("lt", x, ZERO), const(-1.0), ONE)
    return product(sign, dx)  # abs


def _binary(node: Expr, x: Expr, y: Expr, dx: Expr, dy: Expr) -> Expr:
    if dx == dy == ZERO:
        return ZERO
    if node.op == "add":
        return _sum(dx, dy)
    if node.op == "sub":
        return _sum(dx, _negated(dy))
    if node.op == "mul":
        return _sum(product(dx, y), product(x, dy))
    if node.op == "div":
        first = ZERO if dx == ZERO else apply("div", dx, y)
        return _sum(
            first, _negated(apply("div", product(node, dy), y)) if dy != ZERO else ZERO
        )
    order = "lt" if node.op == "minimum" else "gt"
    both = product(HALF, _sum(dx, dy))
    tied = apply("where", apply("eq", x, y), both, dy)
    return apply("where", apply(order, x, y), dx, tied)


def _negated(x: Expr) -> Expr:
    if x.op == "const":
        return const(-float(x.value))  # type: ignore[arg-type]
    return x.args[0] if x.op == "neg" else apply("neg", x)


def _sum(x: Expr, y: Expr) -> Expr:
    if ZERO in (x, y):
        return y if x == ZERO else x
    return apply("sub", x, y.args[0]) if y.op == "neg" else apply("add", x, y)


def product(x: Expr, y: Expr) -> Expr:
    """x · y, without zeros and ones."""
    if ZERO in (x, y):
        return ZERO
    if ONE in (x, y):
        return y if x == ONE else x
    if x.op == "neg":
        return _negated(product(x.args[0], y))
    if y.op == "neg":
        return _negated(product(x, y.args[0]))
    if y.op == "const":
        x, y = y, x
    if x.op == "const" and y.op == "mul" and y.args[0].op == "const":
        return product(apply("mul", x, y.args[0]), y.args[1])
    return apply("mul", x, y)


def reads(score: Score) -> tuple[Expr, ...]:
    """The reads of float operands that a score can be differentiated in."""
    loads = dict.fromkeys(
        n for n in walk(score.expr) if n.op == "load" and n.kind == "float"
    )
    return tuple(n for n in loads if slope(score.expr, n) != ZERO)


@functools.lru_cache(maxsize=256)
def trained(spec: AttentionSpec) -> tuple[Operand, ...]:
    """The operands that have a gradient: a sink, and what scores can be differentiated in."""
    own = [o for o in spec.own_operands if o.kind == "float"]
    found = {n.value for score in spec.score for n in reads(score)}
    return (*own, *(o for o in spec.operands if o in found))


@functools.lru_cache(maxsize=256)
def compared(spec: AttentionSpec) -> tuple[Operand, ...]:
    """The float operands that scores read, but only compare: no gradient reaches them."""
    has = set(trained(spec))
    in_scores = {n.value for s in spec.score for n in walk(s.expr) if n.op == "load"}
    return tuple(o for o in spec.operands if o.kind == "float" and o in in_scores - has)


def gradients(spec: AttentionSpec) -> dict[str, str]:
    """The gradients that a differentiated kernel returns, in order → what each is of.

    dq, dk, dv, and d_NAME of each operand that has one; each as its array lies, in its dtype.
    """
    if spec.derivatives is None:
        return {}
    named = {f"d_{o.name}": o.name for o in trained(spec)}
    return {"dq": "q", "dk": "k", "dv": "v"} | named


def cotangents(spec: AttentionSpec) -> dict[str, str]:
    """The cotangents that it takes, in order → the output that each is of."""
    return {} if spec.derivatives is None else {f"d{o}": o for o in spec.outputs}
