"""Attention from its definition, in float64 NumPy: the meaning of a spec.

No chunk, no trick: for each batch and head the whole row of scores, its scores and mask
evaluated element by element from the expressions' trees. It is slow and it is the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attngen import expr, philox, sequences
from attngen.expr import Expr
from attngen.operands import Operand
from attngen.sequences import Sequence
from attngen.sequences import by_heads as by_heads
from attngen.spec import AttentionSpec

Array = np.ndarray[Any, Any]
ROWS = 512  # rows computed at once: bounds the memory, changes nothing


@dataclass(frozen=True)
class Rounding:
    """The scalar types of one way to compute: of everything, and of p before its product."""

    wide: Any
    product: Any


@dataclass(frozen=True)
class Scored:
    """Scores of some rows of one head.

    Args:
        s: [rows, kv_len], −inf where a key isn't there.
        there: [rows, kv_len].
        env: the variables of expressions, but s.
        given: the s that each of the spec's scores was given, [rows, kv_len].
    """

    s: Array
    there: Array
    env: Mapping[str, Any]
    given: tuple[Array, ...]


@dataclass(frozen=True)
class Softmax:
    """The softmax of some rows of one head: weights are p · rescale / total.

    Args:
        p: exp(s − the row's maximum), 0 where a key isn't there, [rows, kv_len].
        own: the sum of p, without the sink, [rows].
        lse: of the scores, without the sink, [rows].
        rescale: 1, but where a sink lies above all scores, [rows].
        sink: the sink's part of total, [rows]; 0 without one.
        total: [rows].
        seen: whether any key is there, [rows].
    """

    p: Array
    own: Array
    lse: Array
    rescale: Array
    sink: Array
    total: Array
    seen: Array


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of one of the language's names."""
    if name in ("bfloat16", "float8_e4m3"):
        import ml_dtypes

        known = {"bfloat16": ml_dtypes.bfloat16, "float8_e4m3": ml_dtypes.float8_e4m3fn}
        found: np.dtype[Any] = np.dtype(known[name])
        return found
    return np.dtype(name)


def exact(spec: AttentionSpec) -> Rounding:
    """float64; wider where the inputs are float64 themselves."""
    wide = np.longdouble if spec.dtype == "float64" else np.float64
    return Rounding(wide, wide)


def plain(spec: AttentionSpec) -> Rounding:
    """The plain baseline: products in the input dtype, all else in float32 (float64)."""
    return Rounding(np.dtype(spec.stats_dtype).type, numpy_dtype(spec.dtype).type)


def attention(
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    operands: Mapping[str, Array],
    *,
    rows: Array | None = None,
    rounding: Rounding | None = None,
) -> dict[str, Array]:
    """The spec's outputs for some queries.

    Args:
        q, k, v: in the spec's layout and dtypes.
        operands: by name, in their dtypes.
        rows: indices of the queries wanted; None: all.
        rounding: `exact(spec)` unless given.

    Returns:
        out [batch, q_heads, rows, v_dim] and lse [batch, q_heads, rows], whatever the
        layout; see `pick` for the same rows of a kernel's outputs.
    """
    how = rounding or exact(spec)
    rows = np.arange(spec.q_len) if rows is None else np.asarray(rows)
    known = {name: np.asarray(x) for name, x in operands.items()}
    q = by_heads(spec, q)
    k, v = (
        sequences.plain_keys(spec, n, x, known, how) for n, x in (("k", k), ("v", v))
    )
    out = np.zeros((q.shape[0], spec.q_heads, len(rows), spec.v_dim), how.wide)
    lse = np.full(out.shape[:-1], -np.inf, how.wide)
    for sequence, h, part in parts(spec, rows, known):
        keys, values = sequence.keys_of(k, v, h // spec.repeats)
        at = sequence.place, h, part
        queries = q[sequence.place, h, rows[part]].astype(how.wide)
        found = scores(spec, how, queries, keys, sequence, h, rows[part], known)
        sink = how.wide(known["sink"][h]) if spec.sink else None
        weights = softmax(found, sink, how)
        factors = dropped(spec, found, known, how)
        out[at] = _mean(weights, found.there, values, factors, how)
        lse[at] = weights.lse
    return {"out": out, "lse": lse}


def parts(
    spec: AttentionSpec, rows: Array, operands: Mapping[str, Array]
) -> Iterator[tuple[Sequence, int, Array]]:
    """Each sequence, query head, and at most ROWS places in `rows` of its queries."""
    for sequence in sequences.of(spec, operands):
        (own,) = np.nonzero(sequence.holds(rows))
        for h in range(spec.q_heads):
            for start in range(0, len(own), ROWS):
                yield sequence, h, own[start : start + ROWS]


def pick(spec: AttentionSpec, name: str, output: Array, rows: Array) -> Array:
    """The rows of a kernel's out, lse or dq, in the order of `attention`'s."""
    if name != "lse":
        return by_heads(spec, output)[:, :, rows]
    x = np.asarray(output)
    return (x[None] if spec.storage == "packed" else x)[:, :, rows]


def scores(
    spec: AttentionSpec,
    how: Rounding,
    queries: Array,
    keys: Array,
    sequence: Sequence,
    h: int,
    rows: Array,
    operands: Mapping[str, Array],
) -> Scored:
    """Scores of one head's queries [rows, qk_dim] and its sequence's keys [keys, qk_dim]."""
    s: Array
    stats = np.dtype(spec.stats_dtype).type
    with np.errstate(all="ignore"):
        s = (queries @ keys.T) * how.wide(spec.scale_value)
    b, k_index = sequence.b, sequence.k_first + np.arange(len(keys))
    env: dict[str, Any] = {
        "b": b,
        "h": h,
        "q_index": rows[:, None],
        "k_index": k_index[None, :],
        "q": (rows - sequence.q_first)[:, None] + sequence.offset,
        "k": (k_index - sequence.k_first)[None, :] + spec.kv_offset,
    }
    given = []
    for score in spec.score:
        given.append(s)
        s = evaluate(score.expr, env | {"s": s}, operands, how.wide, stats)
        s = np.broadcast_to(s, (len(rows), len(keys)))
    there = np.ones(s.shape, bool)
    if spec.mask is not None:
        there &= evaluate(spec.mask.expr, env, operands, np.float32)
    if spec.kv_lengths:
        there &= k_index[None, :] < operands["kv_lengths"][b]
    if spec.q_lengths:
        there &= rows[:, None] < operands["q_lengths"][b]
    with np.errstate(all="ignore"):  # below all of float32, a score is −∞
        there &= s.astype(stats) != -np.inf
    return Scored(np.where(there, s, how.wide(-np.inf)), there, env, tuple(given))


def softmax(scored: Scored, sink: Any, how: Rounding) -> Softmax:
    """The softmax of one head's scores, with its sink, or None."""
    zero = how.wide(0)
    m: Array = scored.s.max(-1, keepdims=True, initial=-np.inf)
    m = np.asarray(np.where(m == -np.inf, zero, m))
    with np.errstate(all="ignore"):
        p = np.where(scored.there, np.exp(scored.s - m), zero)
        own = np.asarray(p.sum(-1, dtype=how.wide))
        lse = m[:, 0] + np.log(own)
        rescale, of_sink = np.ones_like(own), np.zeros_like(own)
        if sink is not None:  # a sink far above the scores: rescaled to it
            top = np.maximum(m[:, 0], sink)
            rescale = np.exp(m[:, 0] - top)
            of_sink = np.exp(sink - top)
        total = own * rescale + of_sink
    seen = np.asarray(scored.there.any(-1))
    return Softmax(p, own, lse, rescale, of_sink, total, seen)


def dropped(
    spec: AttentionSpec, scored: Scored, operands: Mapping[str, Array], how: Rounding
) -> Any:
    """What dropout multiplies weights by: 0 or 1 / (1 − p), [rows, kv_len]; 1 without it."""
    if not spec.dropout:
        return how.wide(1)
    b, h, q, k = (scored.env[name] for name in sequences.counted(spec))
    b = 0 if spec.storage == "packed" else b
    kept = philox.kept(spec.dropout, operands["seed"], b, h, q[:, 0], k[0])
    return np.where(kept, 1 / (1 - how.wide(spec.dropout)), how.wide(0))


def _mean(
    weights: Softmax, there: Array, values: Array, factors: Any, how: Rounding
) -> Array:
    """out [rows, v_dim]: the mean of values [kv_len, v_dim], with dropout's factors."""
    zero, total = how.wide(0), weights.total[:, None]
    with np.errstate(all="ignore"):
        p = weights.p * weights.rescale[:, None] * factors
        sums = weighted(p.astype(how.product).astype(how.wide), there, values)
        out = np.where(total > 0, sums / total, zero)
    out = np.where(np.isnan(total), total, out)
    return np.where(weights.seen[:, None], out, zero)


def weighted(p: Array, there: Array, values: Array) -> Array:
    """Σ p·v over the keys that are there, whatever the others hold."""
    finite = np.isfinite(values)
    if finite.all():
        return p @ values
    clean = p @ np.where(finite, values, 0)
    for column in np.flatnonzero(~finite.all(-1) & there.any(0)):
        seen = there[:, column]
        bad = np.where(finite[column], 0, values[column])
        clean[seen] += p[seen, column, None] * bad
    return clean


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.mod,
    "neg": np.negative,
    "abs": np.abs,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "exp": np.exp,
    "log": np.log,
    "tanh": np.tanh,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "where": np.where,
}


def evaluate(
    node: Expr,
    env: Mapping[str, Any],
    operands: Mapping[str, Array],
    wide: Any,
    compared: Any = np.float32,
) -> Any:
    """The value of an expression, element by element.

    Integers are int64. Floats are `wide`, but a comparison that doesn't read the score is
    made in the dtype `compared`, as everywhere.
    """
    if node.op == "const":
        with np.errstate(over="ignore"):
            return wide(node.value) if node.kind == "float" else node.value
    if node.op == "var":
        return env[str(node.value)]
    if node.op == "load":
        return _read(node, env, operands, wide, compared)
    if node.op in expr.COMPARISONS and "s" not in expr.variables(node):
        wide = compared
    args = [evaluate(a, env, operands, wide, compared) for a in node.args]
    if node.op == "searchsorted":
        assert isinstance(node.value, Operand)
        entries = operands[node.value.name].astype(np.int64)
        return (entries <= np.asarray(args[0])[..., None]).sum(-1)
    if node.op == "float":
        return np.asarray(args[0]).astype(wide)
    if node.op == "int":
        return np.asarray(args[0]).astype(np.int64)
    with np.errstate(all="ignore"):
        return _NUMPY[node.op](*args)


def _read(
    node: Expr,
    env: Mapping[str, Any],
    operands: Mapping[str, Array],
    wide: Any,
    compared: Any,
) -> Any:
    """A read of an operand; outside its axes NaN."""
    assert isinstance(node.value, Operand)
    table = operands[node.value.name]
    index, inside = places(node, env, operands, wide, compared)
    values = table[tuple(np.broadcast_arrays(*index))]
    if node.kind == "bool":
        return values
    if node.kind == "int":
        return values.astype(np.int64)
    return np.where(inside, values.astype(wide), wide(np.nan))


def places(
    node: Expr,
    env: Mapping[str, Any],
    operands: Mapping[str, Array],
    wide: Any,
    compared: Any = np.float32,
) -> tuple[list[Array], Array]:
    """Where a load reads its operand: an index for each axis, and whether it is one."""
    assert isinstance(node.value, Operand)
    shape = operands[node.value.name].shape
    index = []
    for i in node.args:
        name = f"{i.value}_index" if i.op == "var" and i.value in ("q", "k") else None
        at = env[name] if name else evaluate(i, env, operands, wide, compared)
        index.append(np.asarray(at))
    inside = np.ones((), bool)
    for at, size in zip(index, shape, strict=True):
        inside = inside & (at >= 0) & (at < size)
    if not inside.all():
        index = [np.clip(i, 0, n - 1) for i, n in zip(index, shape, strict=True)]
    return index, inside
