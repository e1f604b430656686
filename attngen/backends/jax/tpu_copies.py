"""Whole arrays that XLA:TPU puts in another order before or after the loops, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

from attngen.backends.jax.tpu_plan import FEW, NARROW, Plan, laid, least
from attngen.dtypes import BYTES
from attngen.tpus import LANES, SUBLANES


def keys(plan: Plan) -> tuple[int, int]:
    """Copies of whole k and v."""
    spec = plan.spec
    heads, keys = spec.batch * spec.kv_heads, spec.kv_len
    dims = (spec.qk_dim, spec.v_dim)
    if plan.wide:  # heads lie in the rows of arguments
        apart = spec.layout == "bthd" and spec.kv_heads > 1
        apart = apart and (plan.k > 1 or spec.batch > 1 or (plan.dn and spec.q_len > 1))
        apart = apart and (plan.looped or spec.q_len == 1)
        if plan.cut:
            apart = False
        if plan.decoded:
            apart = plan.k < LANES  # no matrix products: taken as they lie
        elif plan.near and spec.q_len == 1 and not plan.some_heads:
            apart = plan.k < 4 * SUBLANES
        return _pair(heads * keys * d * NARROW if apart else 0 for d in dims)
    thin = spec.layout == "bhtd" and plan.groups == 1
    one = thin and plan.batches == 1
    dense = BYTES[spec.dtype] == NARROW
    if dense and (not plan.looped or (plan.dn and heads == 1)):
        return 0, 0
    lone = plan.near and plan.groups == 1 < spec.kv_heads and plan.chunks > 1
    lone = lone and (spec.layout == "bhtd" or not dense) and plan.k <= FEW
    if spec.layout == "bthd" and (plan.k == 1 or lone):  # heads in the rows
        rows, size = spec.batch * keys, BYTES[spec.dtype]
        return _pair(laid(rows, spec.kv_heads, d, size, plan.near) for d in dims)
    slow = heads == 1 or not plan.ones
    if plan.near and plan.q == 1 and spec.layout == "bthd" and slow:
        rows = spec.batch * keys
        return laid(rows, spec.kv_heads, dims[0], BYTES[spec.dtype], near=True), 0
    few = plan.k < LANES or (one and plan.k == LANES)
    if few or (
        one and (plan.q == 1 or lone)
    ):  # slices along the lanes would be of a few lanes
        size = BYTES[spec.dtype] if plan.k == 1 else NARROW
        return _pair(laid(heads, keys, d, size) for d in dims)
    if plan.brought:
        return 0, 0
    if BYTES[spec.dtype] > NARROW:  # converted
        return _pair(least(heads, keys, d, NARROW) for d in dims)
    if thin and plan.batches > 1 and (lone or plan.k == LANES):  # heads first
        return _pair(least(heads, keys, d, NARROW) for d in dims)
    square = (
        not plan.near
        and plan.parts == 1
        and plan.twice
        and plan.chunks > 1
        and plan.q == plan.k > FEW
    )
    return (laid(heads, keys, dims[0], NARROW) if square else 0), 0


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
        lone = plan.groups == 1 < spec.kv_heads and plan.k > 1
        lone = lone and not (plan.near and plan.batches == 1)
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
    if plan.guard and plan.chunks > 1:  # a barrier takes rows along the lanes
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
