"""What values an expression can take: interval arithmetic, sound for every operation.

A bool is an interval of 0 and 1: (0, 0) never, (1, 1) always, (0, 1) perhaps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from attngen import expr
from attngen.dtypes import FLOAT32_LIMIT
from attngen.errors import ExpressionError, OperandError
from attngen.expr import Expr, describe
from attngen.operands import Operand
from attngen.spec import AttentionSpec

Interval = tuple[float, float]
# one less than a power: the difference of two stays within their dtype
INT_LIMITS = {"int32": 2**30 - 1, "int64": 2**62 - 1}
EVERYTHING: Interval = (-math.inf, math.inf)
SCORES: Interval = (-1e30, 1e30)  # where q·k is taken to lie
TAME = 1e6  # floats of an operand within ±TAME: times SCORES they are finite in float32


def interval(node: Expr, env: Mapping[str, Interval]) -> Interval:
    """An interval that holds every value of the expression, given its variables'.

    Ends are Python integers for integer expressions, so that nothing is rounded.
    """
    if node.op == "const":
        return (node.value, node.value)  # type: ignore[return-value]
    if node.op == "var":
        return env[str(node.value)]
    if node.op == "load":
        assert isinstance(node.value, Operand)
        if node.kind == "bool":
            return (0, 1)
        if node.value.rises_to is not None:
            return (0, node.value.rises_to)
        limit = INT_LIMITS.get(node.value.dtype, math.inf)
        return (-limit, limit)
    if node.op == "searchsorted":  # rises with its argument; the entries aren't known
        return (0, node.value.axes[0])  # type: ignore[union-attr, return-value]
    if node.op == "sub" and _is_place(*node.args):
        return (0, max(0, interval(node.args[0], env)[1]))
    return _OPERATIONS[node.op](*(interval(a, env) for a in node.args))


def _is_place(x: Expr, first: Expr) -> bool:
    """Whether x − first is a token's place in its sequence: behind the last offset at or
    before it, as backends/jax/packed.py finds that."""
    if first.op != "load" or first.args[0].op != "maximum":
        return False
    assert isinstance(first.value, Operand)
    found = (n for n in expr.walk(first.args[0]) if n.op == "searchsorted")
    rises = first.value.rises_to is not None
    return rises and any(n.value == first.value and n.args == (x,) for n in found)


def _add(x: Interval, y: Interval) -> Interval:
    return (_sum(x[0], y[0], -math.inf), _sum(x[1], y[1], math.inf))


def _sum(a: float, b: float, undefined: float) -> float:
    total = a + b
    return undefined if total != total else total


def _neg(x: Interval) -> Interval:
    return (-x[1], -x[0])


def _mul(x: Interval, y: Interval) -> Interval:
    products = [0 if a == 0 or b == 0 else a * b for a in x for b in y]
    return (min(products), max(products))


def _div(x: Interval, y: Interval) -> Interval:
    if y[0] <= 0 <= y[1]:
        return EVERYTHING
    quotients = [0.0 if abs(b) == math.inf else a / b for a in x for b in y]
    return (min(quotients), max(quotients))


def _floordiv(x: Interval, y: Interval) -> Interval:
    if y[0] <= 0 <= y[1]:
        return EVERYTHING
    quotients = [_floor(a, b) for a in x for b in y]
    return (min(quotients), max(quotients))


def _floor(a: float, b: float) -> float:
    if abs(a) == math.inf:
        return a if b > 0 else -a
    return a // b


def _mod(x: Interval, y: Interval) -> Interval:
    if y[0] == y[1] > 0 and abs(x[0]) < math.inf and x[0] // y[0] == x[1] // y[0]:
        return (x[0] % y[0], x[1] % y[0])
    return (min(0, y[0] + 1), max(0, y[1] - 1))


def _abs(x: Interval) -> Interval:
    if x[0] <= 0 <= x[1]:
        return (0, max(-x[0], x[1]))
    return (min(abs(x[0]), abs(x[1])), max(abs(x[0]), abs(x[1])))


def _monotone(f: Callable[[float], float]) -> Callable[[Interval], Interval]:
    return lambda x: (f(x[0]), f(x[1]))


def _exp(x: float) -> float:
    return math.inf if x > 700 else math.exp(x)


def _log(x: float) -> float:
    return -math.inf if x <= 0 else math.inf if x == math.inf else math.log(x)


def _less(x: Interval, y: Interval, *, strict: bool) -> Interval:
    always = x[1] < y[0] if strict else x[1] <= y[0]
    never = x[0] >= y[1] if strict else x[0] > y[1]
    return (int(always), int(not never))


def _equal(x: Interval, y: Interval) -> Interval:
    always = x[0] == x[1] == y[0] == y[1]
    never = x[1] < y[0] or y[1] < x[0]
    return (int(always), int(not never))


def _not(x: Interval) -> Interval:
    return (1 - x[1], 1 - x[0])


def _where(c: Interval, x: Interval, y: Interval) -> Interval:
    if c[0] == 1:
        return x
    if c[1] == 0:
        return y
    return (min(x[0], y[0]), max(x[1], y[1]))


_OPERATIONS: dict[str, Callable[..., Interval]] = {
    "add": _add,
    "sub": lambda x, y: _add(x, _neg(y)),
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "mod": _mod,
    "neg": _neg,
    "abs": _abs,
    "minimum": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "maximum": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "exp": _monotone(_exp),
    "log": _monotone(_log),
    "tanh": _monotone(math.tanh),
    "lt": lambda x, y: _less(x, y, strict=True),
    "le": lambda x, y: _less(x, y, strict=False),
    "gt": lambda x, y: _less(y, x, strict=True),
    "ge": lambda x, y: _less(y, x, strict=False),
    "eq": _equal,
    "ne": lambda x, y: _not(_equal(x, y)),
    "and": lambda x, y: (min(x[0], y[0]), min(x[1], y[1])),
    "or": lambda x, y: (max(x[0], y[0]), max(x[1], y[1])),
    "not": _not,
    "where": _where,
    "int": lambda x: x,
    "float": lambda x: x,
}


def domain(spec: AttentionSpec) -> dict[str, Interval]:
    """Where the variables of the spec's mask and scores can lie."""
    static = spec.static_q_offset
    if static is not None:
        offset = (static, static)
    elif spec.q_offset == "bottom_right":
        offset = (-spec.q_len, spec.kv_len - spec.q_len)
    else:
        offset = (-INT_LIMITS["int32"], INT_LIMITS["int32"])
    return {
        "b": (0, spec.batch - 1),
        "h": (0, spec.q_heads - 1),
        "q": (offset[0], offset[1] + spec.q_len - 1),
        "k": (spec.kv_offset, spec.kv_offset + spec.kv_len - 1),
        "s": EVERYTHING,
        "q_index": (0, spec.q_len - 1),
        "k_index": (0, spec.kv_len - 1),
    }


@dataclass(frozen=True)
class Ranges:
    """What the intervals say of a whole spec."""

    index_dtype: str  # int64 where an integer subexpression can leave int32
    drops_keys: bool  # whether a score can be −inf


@functools.lru_cache(maxsize=64)
def examine(spec: AttentionSpec, limits: Iterable[Expr] = ()) -> Ranges:
    """Check divisors and indices against the spec's sizes; find the integer width.

    Args:
        limits: of the key loops, expressions of q_lo and q_hi (see regions.py).

    Raises:
        ExpressionError: a divisor can be zero, an integer can leave int64.
        OperandError: an index is sure to leave its axis, or could in an integer operand.
    """
    env = domain(spec)
    wide = any(limit_leaves_int32(limit, spec.kv_offset, env) for limit in limits)
    for root in spec.expressions:
        for node in expr.walk(root):
            if node.kind == "int":
                low, high = interval(node, env)
                if high > 2**63 - 1 or low < -(2**63):
                    raise ExpressionError(
                        "An integer of a mask or score can leave int64.",
                        got=f"{describe(node)}, within [{low}, {high}]",
                        needed="values within ±2**63",
                    )
                wide = wide or high > 2**31 - 1 or low < -(2**31)
            if node.op in expr.INTEGER_ONLY:  # floats divide as IEEE says
                _check_divisor(node, env)
            if node.op == "load":
                _check_index(node, env)
    return Ranges("int64" if wide else "int32", drops_keys(spec, env))


def drops_keys(
    spec: AttentionSpec,
    env: Mapping[str, Interval],
    tame: Collection[Expr] = (),
    limit: float = FLOAT32_LIMIT,
) -> bool:
    """Whether a score can be −inf.

    Args:
        env: where variables can lie.
        tame: reads of operands whose floats are taken to lie within ±TAME.
        limit: of float32 scores, at which they are infinite.
    """

    def tamed(node: Expr) -> Expr | None:
        return expr.var("tame", "float") if node in tame else None

    limit = math.inf if spec.stats_dtype == "float64" else limit
    around = {**env, "s": SCORES, "tame": (-TAME, TAME)}
    for score in spec.score:
        around["s"] = interval(expr.substitute(score.expr, tamed), around)
        if not around["s"][0] > -limit:
            return True
    return False


def limit_leaves_int32(
    limit: Expr, kv_offset: int, env: Mapping[str, Interval]
) -> bool:
    """Whether a part of a limit of the key loops can, as a position or a key's index."""
    low, high = env["q"]
    around = {"q_lo": (low, high), "q_hi": (low + 1, high + 1)}
    for node in expr.walk(limit):
        low, high = interval(node, around)
        most, least = max(high, high - kv_offset), min(low, low - kv_offset)
        if most > 2**31 - 1 or least < -(2**31):
            return True
    return False


def _check_divisor(node: Expr, env: Mapping[str, Interval]) -> None:
    divisor = node.args[1]
    low, high = interval(divisor, env)
    if low <= 0 <= high:
        raise ExpressionError(
            "A divisor of a mask or score can be zero.",
            got=f"{describe(node)}, divided by a value within [{low}, {high}]",
            needed="a divisor that is never zero",
            hint="attngen.maximum(divisor, 1), say",
        )


def proven(node: Expr, env: Mapping[str, Interval]) -> bool:
    """Whether no index of a load can leave an axis of its own length."""
    assert isinstance(node.value, Operand)
    for axis, index in zip(node.value.axes, node.args, strict=True):
        if isinstance(axis, int):
            low, high = _index_interval(index, env)
            if low < 0 or high >= axis:
                return False
    return True


def _index_interval(index: Expr, env: Mapping[str, Interval]) -> Interval:
    """A bare q or k is an index, not a position."""
    if index.op == "var" and index.value in ("q", "k"):
        return env[f"{index.value}_index"]
    return interval(index, env)


def _check_index(node: Expr, env: Mapping[str, Interval]) -> None:
    assert isinstance(node.value, Operand)
    for axis, index in zip(node.value.axes, node.args, strict=True):
        if not isinstance(axis, int):
            continue
        low, high = _index_interval(index, env)
        outside = high < 0 or low >= axis or (index.op == "var" and high >= axis)
        if outside or (node.kind != "float" and (low < 0 or high >= axis)):
            raise OperandError(
                f"Operand {node.value.name!r} is read outside its axis of length {axis}.",
                got=f"{describe(node)}, with {describe(index)} within [{low}, {high}]",
                needed=f"indices from 0 to {axis - 1}",
                hint=f"attngen.minimum(attngen.maximum(i, 0), {axis - 1})",
            )
