"""A smaller spec for the same file: its lengths, batch and heads come at run time."""

from __future__ import annotations

import dataclasses
from typing import Any

from attngen.errors import OperandError, SpecError
from attngen.plans import Plan
from attngen.regions import largest_constant
from attngen.spec import AttentionSpec


def small(
    spec: AttentionSpec, plan: Plan
) -> tuple[AttentionSpec, dict[str, Any]] | None:
    """A spec that the plan's file computes as it is, with every kind of tile.

    Two blocks of queries and three of keys, the last of each ragged, and as many more keys
    as a constant of the mask reaches. None where the spec can't be made smaller (an
    operand that is read at a fixed index beyond the smaller size, say).
    """
    reach = largest_constant(spec)
    if isinstance(spec.q_offset, int):
        reach = max(reach, abs(spec.q_offset) + abs(spec.kv_offset))
    length = min(spec.kv_len, reach + 2 * plan.k_chunk + plan.k_chunk // 2 + 3)
    q_length = min(spec.q_len, plan.q_chunk + plan.q_chunk // 2 + 5)
    if spec.q_len == spec.kv_len:
        length = q_length = min(spec.q_len, max(length, q_length))
    heads = min(spec.kv_heads, 2)
    sizes: dict[str, Any] = {
        "batch": min(spec.batch, 2),
        "kv_heads": heads,
        "q_heads": heads * spec.repeats,
        "q_len": q_length,
        "kv_len": length,
    }
    try:
        made = dataclasses.replace(spec, **sizes, memory_budget=None)
    except (OperandError, SpecError):
        return None
    return made, plan.choice


def interpreted_s(spec: AttentionSpec) -> float:
    """About how long the interpreter takes over every pair, in seconds of a patient user.

    A second here is a sixth of one: what takes longer than five is judged when small.
    """
    return spec.batch * spec.q_heads * spec.q_len * spec.kv_len * 1.2e-5
