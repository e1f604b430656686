"""Gradients of attention from its definition, in float64 NumPy: what judges backward code.

As `reference`, for each batch and head the whole row. The derivative of scores is a reverse
pass over the values of their expressions' trees: it shares nothing with `slopes`, whose
derivatives as expressions are what kernels compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attngen import expr, sequences, slopes
from attngen.errors import InternalError
from attngen.expr import Expr
from attngen.operands import Operand
from attngen.reference import (
    Array,
    Rounding,
    Scored,
    Softmax,
    by_heads,
    dropped,
    evaluate,
    exact,
    parts,
    places,
    scores,
    softmax,
    weighted,
)
from attngen.spec import AttentionSpec


def gradients(
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    operands: Mapping[str, Array],
    cotangents: Mapping[str, Array],
    *,
    rows: Array | None = None,
    rounding: Rounding | None = None,
    of_outputs: bool = False,
) -> dict[str, Array]:
    """What `slopes.gradients` names, for some queries.

    A row that sees no key adds nothing to any gradient, whatever it and its cotangents
    hold; nor does a key that isn't there.

    Args:
        q, k, v: in the spec's layout and dtypes.
        operands: by name, in their dtypes.
        cotangents: as `slopes.cotangents` names them, each as its output lies.
        rows: indices of the queries wanted: those of all others count as 0. None: all.
        rounding: `reference.exact(spec)` unless given. `reference.plain(spec)` is plain
            attention as it is differentiated: p, dout and ds are rounded before their
            products, and so is dp = dout · v, as the gradient of a rounded p is.
        of_outputs: the mean of dp by p is made as Σ dout · out, FlashAttention-2's way
            (arXiv 2307.08691, algorithm 2), not as Σ p · dp: the same but for rounding.

    Returns:
        dq [batch, q_heads, rows, qk_dim], whatever the layout (see `reference.pick`); dk,
        dv and d_NAME as their arrays lie. All in the dtype of `rounding.wide`.
    """
    how = rounding or exact(spec)
    rows = np.arange(spec.q_len) if rows is None else np.asarray(rows)
    made = {
        name: np.zeros(spec.shape_of(of), how.wide)
        for name, of in slopes.gradients(spec).items()
    }
    if not made:
        return made
    others = {f"d_{o.name}": o for o in _floats(spec) if f"d_{o.name}" not in made}
    made |= {n: np.zeros(spec.shape_of(o.name), how.wide) for n, o in others.items()}
    places = 1 if spec.storage == "packed" else spec.batch
    made["dq"] = np.zeros((places, spec.q_heads, len(rows), spec.qk_dim), how.wide)
    dk, dv = (by_heads(spec, made[name]) for name in ("dk", "dv"))  # views
    dout, dlse = cotangents.get("dout"), cotangents.get("dlse")
    dout = None if dout is None else by_heads(spec, dout)
    if dlse is not None:
        dlse = np.asarray(dlse)[None] if spec.storage == "packed" else np.asarray(dlse)
    known = {name: np.asarray(x) for name, x in operands.items()}
    scale = how.wide(spec.scale_value)
    q = by_heads(spec, q)
    k, v = (
        sequences.plain_keys(spec, n, x, known, how) for n, x in (("k", k), ("v", v))
    )
    for sequence, h, part in parts(spec, rows, known):
        kv = h // spec.repeats
        keys, values = sequence.keys_of(k, v, kv)
        of_k, of_v = sequence.keys_of(dk, dv, kv)  # views
        sink = how.wide(known["sink"][h]) if spec.sink else None
        at = (sequence.place, h, rows[part])
        queries = q[at].astype(how.wide)
        found = scores(spec, how, queries, keys, sequence, h, rows[part], known)
        weights = softmax(found, sink, how)
        ds = np.zeros(found.s.shape, how.wide)
        with np.errstate(all="ignore"):
            if dout is not None:
                given = dout[at].astype(how.wide)
                factors = dropped(spec, found, known, how)
                ds, more_v, of_sink = _of_out(
                    found, weights, values, given, factors, how, of_outputs
                )
                of_v += more_v
                if spec.sink:
                    made["d_sink"][h] += of_sink
            if dlse is not None:
                ds += _of_lse(found, weights, dlse[at].astype(how.wide))
            ds = _through_scores(spec, found, ds, known, made, how)
            ds = _rounded(ds, how)
            of_q = weighted(ds, found.there, keys)
            made["dq"][sequence.place, h, part] = of_q * scale
            of_k += weighted(ds.T, found.there.T, queries) * scale
    for name in others:  # told apart by `slopes`, which is judged here
        if made.pop(name).any():
            raise InternalError(f"{name} isn't 0, and no kernel returns it.")
    return made


def _floats(spec: AttentionSpec) -> list[Operand]:
    """The float operands that scores read."""
    read = expr.operands(*(score.expr for score in spec.score))
    return [o for o in read if o.kind == "float"]


def _rounded(x: Array, how: Rounding) -> Array:
    """As it is rounded before a product."""
    rounded: Array = x.astype(how.product).astype(how.wide)
    return rounded


def _of_out(
    scored: Scored,
    weights: Softmax,
    values: Array,
    dout: Array,
    factors: Any,
    how: Rounding,
    of_outputs: bool,
) -> tuple[Array, Array, Any]:
    """What dout [rows, v_dim] makes of the scores [rows, kv_len], of v, and of the sink.

    Args:
        factors: dropout's, of weights.
    """
    there, total = scored.there, weights.total[:, None]
    share = np.where(there, weights.p * weights.rescale[:, None] / total, 0)
    dout = _rounded(dout, how)
    dp = np.where(there, _rounded(dout @ values.T, how) * factors, 0)
    if of_outputs:
        out = weighted(_rounded(share * factors, how), there, values)
        dp_mean = np.where(weights.seen, (dout * out).sum(-1), 0)
    else:
        dp_mean = np.where(there, share * dp, 0).sum(-1)
    ds = np.where(there, share * (dp - dp_mean[:, None]), 0)
    of_v = weighted(_rounded(share * factors, how).T, there.T, dout)
    of_sink = np.where(weights.seen, -dp_mean * weights.sink / weights.total, 0).sum()
    return ds, of_v, of_sink


def _of_lse(scored: Scored, weights: Softmax, dlse: Array) -> Array:
    """What dlse [rows] makes of the scores [rows, kv_len]: the sink has no part in it."""
    share = weights.p / weights.own[:, None]
    return np.where(scored.there, share * dlse[:, None], 0)


def _through_scores(
    spec: AttentionSpec,
    scored: Scored,
    ds: Array,
    operands: Mapping[str, Array],
    made: dict[str, Array],
    how: Rounding,
) -> Array:
    """The gradient of scale · ⟨q, k⟩, from that of the last score; adds to operands'."""
    stats = np.dtype(spec.stats_dtype).type
    for score, s in zip(reversed(spec.score), reversed(scored.given), strict=True):
        env = {**scored.env, "s": s}
        step = _Reverse(env, operands, how.wide, stats, made, np.zeros_like(ds))
        step.pull(score.expr, ds, scored.there)
        ds = step.ds
    return ds


@dataclass(frozen=True)
class _Reverse:
    """A reverse pass over a score's tree, with the values that its nodes have.

    A cotangent counts where it is live: not where a key isn't there, nor in a branch that
    wasn't taken, where it may be NaN.

    Args:
        env, operands, wide, compared: as for `reference.evaluate`.
        made: operands' gradients as d_NAME, which are added to.
        ds: the gradient of s, which is added to.
    """

    env: Mapping[str, Any]
    operands: Mapping[str, Array]
    wide: Any
    compared: Any
    made: dict[str, Array]
    ds: Array

    def pull(self, node: Expr, cotangent: Array, live: Array) -> None:
        """Add what a node's cotangent [rows, kv_len] makes of s, and of operands."""
        if node.kind != "float" or node.op in ("const", "float"):
            return  # what is compared, or indexes a table, has no derivative
        if node.op == "var":
            self.ds[...] += np.where(live, cotangent, 0)
        elif node.op == "load":
            self._read(node, cotangent, live)
        elif node.op == "where":
            condition, *branches = node.args
            taken = self._value(condition)
            self.pull(branches[0], cotangent, live & taken)
            self.pull(branches[1], cotangent, live & ~taken)
        elif node.op in ("minimum", "maximum"):
            self._of_extreme(node, cotangent, live)
        elif len(node.args) == 1:
            slope = self._unary(node)
            self.pull(node.args[0], cotangent * slope, live)
        else:
            for arg, slope in zip(node.args, self._binary(node), strict=True):
                self.pull(arg, cotangent * slope, live)

    def _value(self, node: Expr) -> Any:
        value = evaluate(node, self.env, self.operands, self.wide, self.compared)
        return np.asarray(value)

    def _unary(self, node: Expr) -> Any:
        if node.op == "neg":
            return self.wide(-1)
        if node.op == "exp":
            return self._value(node)
        if node.op == "tanh":
            return 1 - self._value(node) ** 2
        x = self._value(node.args[0])
        if node.op == "log":
            return 1 / x
        assert node.op == "abs", node.op
        return np.where(x < 0, self.wide(-1), self.wide(1))

    def _binary(self, node: Expr) -> tuple[Any, Any]:
        one = self.wide(1)
        if node.op == "add":
            return one, one
        if node.op == "sub":
            return one, -one
        x, y = (self._value(a) for a in node.args)
        if node.op == "mul":
            return y, x
        assert node.op == "div", node.op
        return 1 / y, -x / y / y

    def _of_extreme(self, node: Expr, cotangent: Array, live: Array) -> None:
        """To the argument that is the extreme; half to each where both are."""
        x, y = (self._value(a) for a in node.args)
        of_x = x < y if node.op == "minimum" else x > y
        tied = x == y
        cotangent = np.where(tied, cotangent / 2, cotangent)
        self.pull(node.args[0], cotangent, live & (of_x | tied))
        self.pull(node.args[1], cotangent, live & ~of_x)

    def _read(self, node: Expr, cotangent: Array, live: Array) -> None:
        assert isinstance(node.value, Operand)
        name = f"d_{node.value.name}"
        if name not in self.made:
            return
        index, inside = places(node, self.env, self.operands, self.wide, self.compared)
        found = np.where(live & inside, cotangent, 0)
        full = np.broadcast_arrays(*index, np.zeros((1, 1)))[:-1]
        for axis in (1, 0):  # where all read one entry, their sum is added
            if full[0].shape[axis] == 1:
                found = found.sum(axis, keepdims=True)
        np.add.at(self.made[name], tuple(full), found)
