"""Scores whose derivatives are finite also where their values aren't used: the double `where`.

A mask, a score of −inf and a branch that isn't taken hide a value, not its slope: to automatic
differentiation a hidden 1 / 0 passes on 0 · inf, which is NaN. So where a part of a score can be
infinite, or have an infinite slope, what goes into it is replaced by a harmless number wherever
what comes out isn't used. A chosen number has no derivative: what it replaces gets none there.

Values that are used stay as they are, to the bit; a score that is infinite there is the user's.
Intervals tell what can be singular; sums and products are taken not to overflow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

from attngen import expr
from attngen.dtypes import FLOAT32_LIMIT
from attngen.errors import ExpressionError
from attngen.expr import Expr, apply, const
from attngen.intervals import (
    EVERYTHING,
    SCORES,
    TAME,
    Interval,
    domain,
    interval,
    proven,
)
from attngen.spec import AttentionSpec

LIVE = Expr("var", (), "bool", "live")  # whether a key is there, for a query
TAMED = expr.var("tame", "float")
OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}  # of integers


@functools.lru_cache(maxsize=64)
def hides_keys(spec: AttentionSpec) -> bool:
    """Whether a score of −inf may hide a key, as a mask does.

    What scores are divided by is taken not to be 0 for a whole row, nor numbers of a head
    to be infinite: that doesn't hide some keys, it leaves none that is right.
    """

    def tamed(node: Expr) -> Expr | None:
        if node.op == "load" and node.kind == "float" and _of_head(node):
            return TAMED
        if node.op != "div" or expr.variables(node.args[1]) & {"k", "s"}:
            return None
        return apply("mul", expr.substitute(node.args[0], tamed), TAMED)

    limit = FLOAT32_LIMIT if spec.stats_dtype == "float32" else math.inf
    env: dict[str, Interval] = {**domain(spec), "s": SCORES, "tame": (-TAME, TAME)}
    for score in spec.score:
        env["s"] = interval(expr.substitute(score.expr, tamed), env)
        if not env["s"][0] > -limit:
            return True
    return False


@functools.lru_cache(maxsize=64)
def guarded(spec: AttentionSpec) -> tuple[Expr, ...]:
    """The spec's scores, with what guards them: conditions on `LIVE` and on branches.

    Returns:
        One expression a score: the score's own where nothing in it can be singular.

    Raises:
        ExpressionError: with its guards, a score is nested too deeply.
    """
    hidden = [spec.mask.expr] if spec.mask is not None else []
    hidden += [score.expr for score in spec.score] if hides_keys(spec) else []
    hides = bool(hidden) or spec.kv_lengths or spec.q_lengths
    by_head = any("h" in expr.axes(x) for x in hidden)
    env: dict[str, Interval] = domain(spec) | {"s": SCORES, "live": (0, 1)}
    limit = math.log(FLOAT32_LIMIT) if spec.stats_dtype == "float32" else 709.0
    finite, made = True, []
    for score in spec.score:
        guard = _Guard(env, limit, finite, by_head)
        try:
            own = guard.of(score.expr, (LIVE,) if hides else (), used=False)
            finite = own == guard.of(score.expr, (LIVE,) if hides else (), used=True)
        except ExpressionError as error:
            raise ExpressionError(
                "A score is nested too deeply for guards of what can be infinite in it.",
                got=f"{score.expr.depth} operations inside each other",
                needed=f"at most {expr.DEEPEST}, guards included",
                hint='make it several scores, or ask for derivatives="vjp"',
            ) from error
        made.append(own)
        env["s"] = interval(own, env) if finite else EVERYTHING
    return tuple(made)


class _Guard:
    """Guards one score.

    Args:
        env: where variables can lie.
        limit: beyond which exp overflows.
        finite: whether s is, where a key isn't there.
        by_head: whether all keys of a head may be hidden.
    """

    def __init__(
        self, env: Mapping[str, Interval], limit: float, finite: bool, by_head: bool
    ) -> None:
        self.env, self.limit = env, limit
        self.finite, self.by_head = finite, by_head
        self.known: dict[tuple[Expr, tuple[Expr, ...], bool], Expr] = {}

    def of(self, node: Expr, live: tuple[Expr, ...], used: bool) -> Expr:
        """A node whose slopes are finite, whatever is live.

        Args:
            live: conditions that hold together where the node's value is used.
            used: whether the value is multiplied with a derivative: then it is finite, too.
        """
        if node.kind != "float" or not (used or _differs(node)):
            return node
        key = node, live, used
        if key not in self.known:
            if node.op == "div":
                self.known[key] = self._quotient(node, live, used)
            elif node.op in _RISKS:
                self.known[key] = self._risk(node, live)
            elif node.args and node.op != "load":
                self.known[key] = self._inside(node, live, used)
            else:
                wild = used and self._wild(node)
                self.known[key] = self._replaced(node, live, 0) if wild else node
        return self.known[key]

    def _inside(self, node: Expr, live: tuple[Expr, ...], used: bool) -> Expr:
        """A node that is finite wherever its arguments are, and so are its slopes."""
        args = list(node.args)
        lives, by_each = [live] * len(args), [used] * len(args)
        if node.op == "where":
            c = args[0]
            lives = [live, _joined(live, c), _joined(live, _negated(c))]
        elif node.op == "mul":
            by_each = [used or _differs(args[1]), used or _differs(args[0])]
        elif node.op in ("tanh", "abs"):
            by_each = [True]
        for i, a in enumerate(node.args):
            args[i] = self.of(a, lives[i], by_each[i])
        return _with(node, *args)

    def _risk(self, node: Expr, live: tuple[Expr, ...]) -> Expr:
        """exp and log."""
        (x,) = node.args
        harmless, risky = _RISKS[node.op]
        safe = self.of(x, live, used=True)
        if risky(interval(safe, self.env), self.limit):
            safe = self._replaced(self.of(x, live, used=False), live, harmless)
        return _with(node, safe)

    def _quotient(self, node: Expr, live: tuple[Expr, ...], used: bool) -> Expr:
        x, y = node.args
        safe = self.of(y, live, used=True)
        low, high = interval(safe, self.env)
        if low <= 0 <= high:
            safe = self._replaced(self.of(y, live, used=False), live, 1)
        return _with(node, self.of(x, live, used or _differs(y)), safe)

    def _replaced(self, node: Expr, live: tuple[Expr, ...], harmless: float) -> Expr:
        """The node where it is live, and a number elsewhere.

        What all keys of a head share is used by a key that is there, or by none at all: a
        mask doesn't hide it, unless it hides whole heads.
        """
        if not self.by_head and _of_head(node):
            live = tuple(c for c in live if c != LIVE)
        if not live:
            return node
        condition = live[0]
        for c in live[1:]:
            condition = apply("and", condition, c)
        return apply("where", condition, node, const(float(harmless)))

    def _wild(self, node: Expr) -> bool:
        """Whether a constant, a variable or a read can be infinite or NaN.

        A number of a head is a parameter, and finite.
        """
        if node.op == "const":
            return isinstance(node.value, float) and math.isinf(node.value)
        if node.op == "var":
            return not self.finite
        return not (proven(node, self.env) and _of_head(node))


# What exp and log are given instead, and whether an interval holds what they can't take.
_RISKS: dict[str, tuple[float, Callable[[Interval, float], bool]]] = {
    "exp": (0, lambda x, limit: x[1] > limit),
    "log": (1, lambda x, limit: x[0] <= 0),
}


def _of_head(node: Expr) -> bool:
    """Whether a value is the same for all queries and keys of a head, in every batch."""
    return expr.variables(node) <= {"h"}


def _differs(node: Expr) -> bool:
    """Whether a value has a derivative in s, or in an operand that is read."""
    if node.kind != "float" or node.op in ("const", "float"):
        return False
    if node.op in ("var", "load"):
        return True
    return any(_differs(a) for a in node.args)


def _with(node: Expr, *args: Expr) -> Expr:
    return node if args == node.args else Expr(node.op, args, node.kind, node.value)


def _joined(live: tuple[Expr, ...], condition: Expr) -> tuple[Expr, ...]:
    return live if condition in live else (*live, condition)


def _negated(condition: Expr) -> Expr:
    """Where a condition doesn't hold. NaN is neither less than x nor at least x."""
    if condition.op == "not":
        return condition.args[0]
    if condition.op in OPPOSITE and all(a.kind == "int" for a in condition.args):
        return apply(OPPOSITE[condition.op], *condition.args)
    return apply("not", condition)
