"""Masks and scores by an array library's own functions: the expression's tree, walked.

One walk serves jax.numpy and torch, whole matrices, chunks and single elements: Python's
operators mean the same to both (`//` and `%` floor), and a `Frame` says where an expression
is evaluated.
"""

from __future__ import annotations

import operator as python
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from attngen.expr import Expr
from attngen.operands import LETTERS, Operand
from attngen.spec import AttentionSpec


class Language(Protocol):
    """What differs between array libraries."""

    integer: str  # the dtype of positions

    def cast(self, x: Any, dtype: str) -> Any:
        """An array in another dtype."""

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        """min(max(x, low), high); a limit may be None."""

    def permuted(self, x: Any, axes: tuple[int, ...]) -> Any:
        """An array with its axes in another order."""

    def call(self, name: str, *args: Any) -> Any:
        """arange of a length; where, exp, log, tanh, minimum or maximum of arrays (the latter two of two)."""


@dataclass(frozen=True)
class Frame:
    """Where expressions are evaluated.

    Args:
        index: the index of batch b, query head h, query q and key k, as integer arrays that
            broadcast against each other (whole matrices: [b, 1, 1, 1] … [1, 1, 1, k]).
        operands: by name.
        aligned: an operand whose axes are read at their own letters, shaped to broadcast
            against the indices; None: it is gathered element by element.
    """

    spec: AttentionSpec
    language: Language
    index: Mapping[str, Any]
    operands: Mapping[str, Any]
    aligned: Callable[[Operand, Any], Any] | None = None

    def position(self, letter: str) -> Any:
        """The position of query q or key k: index + offset."""
        if letter == "k":
            return self.index["k"] + self.spec.kv_offset
        return self.index["q"] + self._q_offset()

    def _q_offset(self) -> Any:
        if self.spec.static_q_offset is not None:
            return self.spec.static_q_offset
        name = "q_offset" if self.spec.q_offset == "operand" else "kv_lengths"
        values = self.language.cast(self.operands[name], self.language.integer)
        less = self.spec.q_len if name == "kv_lengths" else 0
        return values[self.index["b"]] - less


def whole(
    spec: AttentionSpec, language: Language, operands: Mapping[str, Any]
) -> Frame:
    """The frame of all scores at once, [b, h, q, k]."""
    shapes = {"b": (-1, 1, 1, 1), "h": (-1, 1, 1), "q": (-1, 1), "k": (-1,)}

    def indices(letter: str) -> Any:
        found = language.call("arange", spec.lengths[letter])
        return language.cast(found, language.integer).reshape(shapes[letter])

    def aligned(operand: Operand, table: Any) -> Any:
        table = language.permuted(table, axis_order(operand))
        return table.reshape(broadcast_shape(operand, spec.lengths))

    index = {letter: indices(letter) for letter in shapes}
    return Frame(spec, language, index, operands, aligned)


def scored(frame: Frame, s: Any) -> Any:
    """Scaled scores after the spec's score functions."""
    for score in frame.spec.score:
        s = evaluate(score.expr, frame, s)
    return s


def summed(frame: Frame, terms: Iterable[Expr]) -> Any:
    """The sum of expressions; None of none."""
    total: Any = None
    for term in terms:
        value = evaluate(term, frame)
        total = value if total is None else total + value
    return total


def masked(frame: Frame) -> Any:
    """Whether the spec's mask lets the query see the key; None without a mask."""
    mask = frame.spec.mask
    return None if mask is None else evaluate(mask.expr, frame)


def seen(frame: Frame) -> Any:
    """As `masked`, and both within their lengths; None where every key is seen."""
    there = masked(frame)
    for name, letter in (("kv_lengths", "k"), ("q_lengths", "q")):
        if getattr(frame.spec, name):
            inside = frame.index[letter] < frame.operands[name][frame.index["b"]]
            there = inside if there is None else there & inside
    return there


_OPERATORS: dict[str, Callable[..., Any]] = {
    "add": python.add,
    "sub": python.sub,
    "mul": python.mul,
    "div": python.truediv,
    "floordiv": python.floordiv,
    "mod": python.mod,
    "neg": python.neg,
    "abs": python.abs,
    "lt": python.lt,
    "le": python.le,
    "gt": python.gt,
    "ge": python.ge,
    "eq": python.eq,
    "ne": python.ne,
    "and": python.and_,
    "or": python.or_,
    "not": python.invert,
}


def evaluate(node: Expr, frame: Frame, s: Any = None) -> Any:
    """The value of an expression in a frame, as an array or a Python number."""
    if node.op == "const":
        return node.value
    if node.op == "var":
        if node.value == "s":
            return s
        name = str(node.value)
        return frame.position(name) if name in ("q", "k") else frame.index[name]
    if node.op == "load":
        return _read(node, frame, s)
    args = [evaluate(a, frame, s) for a in node.args]
    if node.op == "searchsorted":
        return _search(node, frame, args[0])
    if node.op in _OPERATORS:
        return _OPERATORS[node.op](*args)
    if node.op in ("int", "float"):
        language = frame.language
        dtype = language.integer if node.op == "int" else frame.spec.stats_dtype
        return language.cast(args[0], dtype)
    return _call(node.op, args, frame.language)


def _call(op: str, args: list[Any], language: Language) -> Any:
    """A function of the language, where some arguments may be Python numbers."""
    numbers = [isinstance(a, bool | int | float) for a in args]
    if op == "where" and numbers[0]:
        return args[1] if args[0] else args[2]
    if op != "where" and all(numbers):
        with np.errstate(all="ignore"):
            return float(getattr(np, op)(*args))
    if op in ("minimum", "maximum") and any(numbers):
        array, limit = args if numbers[1] else reversed(args)
        limits = (None, limit) if op == "minimum" else (limit, None)
        return language.clip(array, *limits)
    return language.call(op, *args)


def _search(node: Expr, frame: Frame, x: Any) -> Any:
    """How many entries are at most x: one by one, as compilers of elements can have it."""
    operand, language = node.value, frame.language
    assert isinstance(operand, Operand)
    entries = language.cast(frame.operands[operand.name], language.integer)
    (length,) = operand.axes
    assert isinstance(length, int)
    found: Any = 0
    for i in range(length):
        found = found + language.cast(entries[i] <= x, language.integer)
    return found


def _read(node: Expr, frame: Frame, s: Any) -> Any:
    """A read of an operand; outside an axis of its own length NaN."""
    operand, language = node.value, frame.language
    assert isinstance(operand, Operand)
    dtype = frame.spec.stats_dtype if node.kind == "float" else language.integer
    table = frame.operands[operand.name]
    table = table if node.kind == "bool" else language.cast(table, dtype)
    own = all(i.op == "var" and i.value == a for i, a in _pairs(node, operand))
    if own and frame.aligned is not None:
        return frame.aligned(operand, table)
    inside: Any = True
    index = []
    for at, axis in _pairs(node, operand):
        if at.op == "var" and at.value in ("q", "k"):
            i = frame.index[str(at.value)]  # by index, not by position
        else:
            i = evaluate(at, frame, s)
        if isinstance(axis, int) and not isinstance(i, int):
            inside = inside & ((i >= 0) & (i < axis))
            i = language.clip(i, 0, axis - 1)
        index.append(i)
    values = table[tuple(index)]
    if inside is True or node.kind != "float":
        return values
    return language.call("where", inside, values, float("nan"))


def _pairs(node: Expr, operand: Operand) -> list[tuple[Expr, str | int]]:
    return list(zip(node.args, operand.axes, strict=True))


def broadcast_shape(operand: Operand, lengths: Mapping[str, int]) -> tuple[int, ...]:
    """The shape [b, h, q, k] in which an operand in that order of axes broadcasts."""
    return tuple(lengths[a] if a in operand.axes else 1 for a in LETTERS)


def axis_order(operand: Operand) -> tuple[int, ...]:
    """The permutation that brings lettered axes into the order b, h, q, k."""
    return tuple(operand.axes.index(a) for a in LETTERS if a in operand.axes)
