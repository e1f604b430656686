"""The checks that an AttentionSpec makes of itself: every field, and fields together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attngen import expr, storage
from attngen.dtypes import DTYPES, KV_DTYPES
from attngen.errors import OperandError, SpecError
from attngen.expr import Expr
from attngen.names import is_free_of_backward
from attngen.operands import Operand
from attngen.tracing import Mask, Score
from attngen.units import parse_bytes

if TYPE_CHECKING:
    from attngen.spec import AttentionSpec

CHOICES: dict[str, tuple[object, ...]] = {
    "dtype": DTYPES,
    "out_dtype": (None, *DTYPES),
    "kv_dtype": (None, *KV_DTYPES),
    "layout": ("bthd", "bhtd"),
    "storage": ("dense", "packed", "paged"),
    "derivatives": (None, "vjp", "any"),
    "precision": ("default", "highest"),
    "sink": (False, True),
    "kv_lengths": (False, True),
    "q_lengths": (False, True),
}
SIZES = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "qk_dim", "v_dim")
SHARDS = {"batch_shards": "batch", "head_shards": "kv_heads"}
OFFSETS_HINT = (
    'q_offset=0 aligns them top left (jax.nn, torch is_causal), q_offset="bottom_right" '
    "aligns the last query with the last key (FlashAttention)"
)


def _refuse(
    field: str, got: object, needed: object, hint: str | None = None
) -> SpecError:
    return SpecError(
        f"{field} can't be that.", got=f"{field}={got!r}", needed=needed, hint=hint
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_word(value: object, words: tuple[str | None, ...]) -> bool:
    """Whether a field is one of these: no array is, whatever its `==` says."""
    return (value is None or isinstance(value, str)) and value in words


def check(spec: AttentionSpec) -> None:
    """Every field of a spec; raises as the class says."""
    for name in (*SIZES, *SHARDS):
        size = getattr(spec, name)
        if not _is_int(size) or not 1 <= size < 2**31:
            raise _refuse(name, size, "an integer from 1 to 2**31 - 1")
    if spec.q_heads % spec.kv_heads:
        raise SpecError(
            "The kv heads don't divide the query heads.",
            got=f"q_heads={spec.q_heads}, kv_heads={spec.kv_heads}",
            needed="q_heads a multiple of kv_heads",
        )
    for name, axis in SHARDS.items():
        if getattr(spec, axis) % getattr(spec, name):
            raise SpecError(
                f"{axis} can't be sharded so.",
                got=f"{name}={getattr(spec, name)}, {axis}={getattr(spec, axis)}",
                needed=f"{name} that divides {axis}",
                hint="shard the batch instead, or repeat k and v for as many heads"
                if name == "head_shards"
                else None,
            )
    for name, allowed in CHOICES.items():
        value = getattr(spec, name)
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise _refuse(name, value, "one of " + ", ".join(map(repr, allowed)))
    _check_numbers(spec)
    if spec.outputs not in (("out",), ("lse",), ("out", "lse"), ("lse", "out")):
        raise _refuse(
            "outputs", spec.outputs, '("out",), ("lse",), or both in either order'
        )
    if spec.mask is not None and not isinstance(spec.mask, Mask):
        raise _refuse(
            "mask",
            type(spec.mask).__name__,
            "a Mask or None",
            "attngen.mask(lambda b, h, q, k: …) makes one; masks.dense() takes a boolean array",
        )
    if not isinstance(spec.score, tuple) or not all(
        isinstance(s, Score) for s in spec.score
    ):
        raise _refuse(
            "score", spec.score, "a tuple of Scores", "attngen.score(…) makes one"
        )
    _check_operands(spec)
    _check_offset(spec)
    storage.check(spec)


def _check_numbers(spec: AttentionSpec) -> None:
    scale, dropout, offset = spec.scale, spec.dropout, spec.q_offset
    if scale is not None and (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not math.isfinite(scale)
    ):
        raise _refuse("scale", scale, "a finite number, or None for 1/√qk_dim")
    if (
        isinstance(dropout, bool)
        or not isinstance(dropout, int | float)
        or not 0 <= dropout < 1
    ):
        raise _refuse("dropout", dropout, "a probability, 0 <= dropout < 1")
    if not _is_word(offset, (None, "bottom_right", "operand")) and not (
        _is_int(offset) and abs(offset) < 2**30  # type: ignore[arg-type]
    ):
        needed = 'an integer within ±2**30, "bottom_right", "operand", or None'
        raise _refuse("q_offset", offset, needed)
    if not _is_int(spec.kv_offset) or abs(spec.kv_offset) >= 2**30:
        raise _refuse("kv_offset", spec.kv_offset, "an integer within ±2**30")
    _check_stored(spec)
    if spec.memory_budget is not None:
        parse_bytes(spec.memory_budget)


def _check_stored(spec: AttentionSpec) -> None:
    sizes = "an integer from 1 to 2**31 - 1"
    for name, words, needed in (
        ("page_size", (), sizes),
        ("num_pages", (None,), f"{sizes}, or None"),
        ("kv_scale", ("head", "token"), f'"head", "token", or {sizes}'),
    ):
        value = getattr(spec, name)
        if not _is_word(value, words) and not (_is_int(value) and 1 <= value < 2**31):
            raise _refuse(name, value, needed)


def _check_operands(spec: AttentionSpec) -> None:
    lengths = spec.lengths
    operands = expr.operands(*spec.expressions)  # raises where two share a name
    for operand in operands if spec.derivatives is not None else ():
        if not is_free_of_backward(operand.name):
            raise OperandError(
                f"With derivatives an operand can't be called {operand.name!r}.",
                got=operand.name,
                needed="a name that the emitted file doesn't use itself",
                hint=f"call it {operand.name.strip('_')}_values, say",
            )
    for own in spec.own_operands:
        if any(own.name == o.name for o in operands):
            raise OperandError(
                f"{own.name!r} is an operand of the spec itself.",
                got=own.name,
                needed="another name",
            )
    for node in (
        n for root in spec.expressions for n in expr.walk(root) if n.op == "load"
    ):
        assert isinstance(node.value, Operand)
        for axis, index in zip(node.value.axes, node.args, strict=True):
            size = axis if isinstance(axis, int) else lengths[axis]
            if index.op == "const":
                reach = index.value + 1 if index.value >= 0 else math.inf  # type: ignore[operator]
            elif index.op == "var" and not isinstance(axis, int):
                reach = lengths[str(index.value)]
            else:
                continue  # bounds of other expressions: see intervals.check
            if reach > size:
                raise OperandError(
                    f"Operand {node.value.name!r} is read outside its axis {axis!r}.",
                    got=f"{expr.describe(node)}, with {axis!r} of length {size} and "
                    f"{expr.describe(index)} up to {reach - 1}",
                    needed=f"indices from 0 to {size - 1}",
                )


def _check_offset(spec: AttentionSpec) -> None:
    if spec.q_offset is not None or spec.q_len == spec.kv_len:
        return
    for leaf in relating(spec)[:1]:
        raise SpecError(
            "q_len differs from kv_len, and a mask or score relates q to k: "
            "where do the queries stand among the keys?",
            got=f"q_len={spec.q_len}, kv_len={spec.kv_len}, {expr.describe(leaf)}, "
            "no q_offset",
            needed='q_offset: an integer, "bottom_right" or "operand"',
            hint=OFFSETS_HINT,
        )


def relating(spec: AttentionSpec) -> list[Expr]:
    """The parts of masks and scores that relate positions of queries and of keys."""
    leaves = [leaf for root in spec.expressions for leaf in _leaves(root)]
    return [leaf for leaf in leaves if {"q", "k"} <= position_variables(leaf)]


def _leaves(node: Expr) -> list[Expr]:
    """The parts of an expression that `&`, `|` and `~` join."""
    if node.op in expr.LOGIC:
        return [leaf for a in node.args for leaf in _leaves(a)]
    return [node]


def position_variables(node: Expr) -> frozenset[str]:
    """The variables used as positions: not those that stand alone as an operand's index."""
    if node.op == "var":
        return frozenset((str(node.value),))
    used: frozenset[str] = frozenset()
    for a in node.args:
        if not (node.op == "load" and a.op == "var"):
            used |= position_variables(a)
    return used
