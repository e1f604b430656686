"""Whole arrays that XLA:TPU puts in another order before or after the loops, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from attngen.backends.jax.tpu_plan import FEW, NARROW, Plan, laid, least
from attngen.dtypes import BYTES
from attngen.tpus import LANES, SUBLANES


def keys(plan: Plan) -> tuple[int, int]:
    """Copies of whole k and v."""
    if plan.wide:
        return _wide_keys(plan)
    spec, dense = plan.spec, BYTES[plan.spec.dtype] == NARROW
    heads, length, dims = spec.batch * spec.kv_heads, spec.kv_len, _dims(plan)
    if dense and (not plan.looped or (plan.dn and heads == 1)):
        return 0, 0
    if spec.layout == "bthd":
        rows = _keys_in_rows(plan)
        if rows is not None:
            return rows
    if plan.k < LANES or _alone(plan):  # slices along the lanes would be of a few lanes
        size = BYTES[spec.dtype] if plan.k == 1 else NARROW
        return _pair(laid(heads, length, d, size) for d in dims)
    if plan.brought:
        return 0, 0
    first = spec.layout == "bhtd" and plan.groups == 1 < plan.batches
    if not dense or (first and plan.chunks > 1):  # converted, or heads put first
        return _pair(least(heads, length, d, NARROW) for d in dims)
    square = plan.twice and plan.ones and plan.parts == 1 and plan.q == plan.k > FEW
    square = square and plan.chunks > 1 and not plan.near
    return (laid(heads, length, dims[0], NARROW) if square else 0), 0


def _dims(plan: Plan) -> tuple[int, int]:
    return plan.spec.qk_dim, plan.spec.v_dim


def _wide_keys(plan: Plan) -> tuple[int, int]:
    """Where head dims fill the lanes, and heads lie in the rows of arguments."""
    spec = plan.spec
    apart = spec.layout == "bthd" and spec.kv_heads > 1
    several = spec.batch > 1 and plan.groups > 1
    apart = apart and (plan.k > 1 or several or (plan.dn and spec.q_len > 1))
    apart = apart and (plan.looped or spec.q_len == 1) and not plan.cut
    if plan.decoded:
        few = plan.k < LANES if plan.near else plan.k <= LANES
        apart = few  # else taken as they lie: there are no matrix products
    elif plan.near and spec.q_len == 1 and not plan.some_heads:
        apart = plan.k < 4 * SUBLANES
    heads = spec.batch * spec.kv_heads
    return _pair(heads * spec.kv_len * d * NARROW if apart else 0 for d in _dims(plan))


def _keys_in_rows(plan: Plan) -> tuple[int, int] | None:
    """Copies with the heads in the rows, as arguments have them, if any."""
    spec, size, dims = plan.spec, BYTES[plan.spec.dtype], _dims(plan)
    rows = spec.batch * spec.kv_len
    lone = plan.near and plan.groups == 1 < spec.kv_heads and plan.chunks > 1
    lone = lone and size > NARROW and plan.k <= FEW
    few = plan.q == 1 and plan.groups > 1 and not plan.near
    if plan.k == 1 or lone or few:
        return _pair(laid(rows, spec.kv_heads, d, size, plan.near) for d in dims)
    slow = spec.batch * spec.kv_heads == 1 or (plan.groups == 1 and not plan.ones)
    if plan.near and plan.q == 1 and slow:
        return laid(rows, spec.kv_heads, dims[0], size, near=True), 0
    return None


def _alone(plan: Plan) -> bool:
    """Whether one of several heads is taken from where each is on its own."""
    one = plan.spec.layout == "bhtd" and plan.batches * plan.groups == 1
    joined = plan.ones and plan.chunks > 1
    return one and (plan.k == LANES or plan.q == 1 or joined)


def _pair(sizes: Iterable[int]) -> tuple[int, int]:
    k, v = sizes
    return k, v


def queries(plan: Plan, out: int) -> tuple[int, int]:
    """Copies of whole q, and of the output as steps fill it."""
    spec = plan.spec
    own, result = BYTES[spec.dtype], BYTES[spec.out_dtype_name]
    heads, queries = spec.batch * spec.q_heads, spec.q_len
    whole, filled = 0, 0
    if plan.wide:
        several = spec.layout == "bthd" and spec.q_heads > 1
        lone = plan.groups == 1 < spec.kv_heads
        lone = lone and not plan.near
        if several and spec.batch > 1 and lone and plan.q > 1:
            filled = out
            whole = heads * queries * spec.qk_dim * own
    elif plan.q == 1 and spec.layout == "bthd":  # heads lie in the rows
        rows = spec.batch * queries
        whole = laid(rows, spec.q_heads, spec.qk_dim, own, plan.near)
        filled = laid(rows, spec.q_heads, spec.v_dim, result, plan.near)
    elif plan.q < LANES:  # slices along the lanes would be of a few lanes
        alone = plan.chunks == 1 and heads == 1  # nothing else is done with them
        whole = 0 if alone else laid(heads, queries, spec.qk_dim, own)
        filled = laid(heads, queries, spec.v_dim, result)
    fitting = plan.q > 1 if plan.wide else plan.heads == 1
    if plan.guard and plan.chunks > 1 and fitting:
        # a barrier takes rows along the lanes
        whole = max(whole, laid(heads, queries, spec.qk_dim, own))
    return whole, filled


def stacked(plan: Plan, out: int, hole: int) -> int:
    """The outputs of all steps, before they are put in order.

    One of both orders lies in the output's memory, the other where something is gone.
    """
    spec, size = plan.spec, BYTES[plan.spec.out_dtype_name]
    heads = spec.batch * spec.q_heads
    if plan.near and plan.wide:
        return 0
    if plan.q < LANES:
        steps = -(-spec.q_len // plan.q)
        return max(out, steps * laid(heads, plan.q, spec.v_dim, size))
    in_order = plan.wide and plan.heads == heads
    return 0 if in_order or hole >= out else out
