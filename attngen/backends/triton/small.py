"""A smaller spec for the interpreter: the same file, but where its mask reaches far."""

from __future__ import annotations

import dataclasses
from typing import Any

from attngen.backends.triton.decode import splits
from attngen.backends.triton.limits import is_exact
from attngen.errors import OperandError, SpecError
from attngen.expr import COMPARISONS, Expr, const, substitute
from attngen.linear import affine
from attngen.plans import Plan, grouped
from attngen.regions import largest_constant
from attngen.spec import AttentionSpec
from attngen.tracing import mask_of

SHARED = 15  # more blocks of keys where splits share them, at most
TILE_S = 2e-3  # of one tile, however small
FAR = 600  # keys: beyond them the interpreter takes minutes


def small(plan: Plan, *, rebuild: bool) -> tuple[AttentionSpec, dict[str, Any]] | None:
    """A smaller spec with every kind of tile, in the plan's own blocks.

    Two blocks of queries and three of keys, the last of each ragged, more keys where splits
    share them, and as many more as a constant of the mask reaches. The plan's file computes it as it is: lengths come
    at run time. Where that would be many keys and the file can be made anew (rebuild),
    limits of the mask are moved closer instead. None where the spec can't be made smaller
    (an operand that is read at a fixed index beyond the smaller size, say).
    """
    spec = plan.spec
    if rebuild and largest_constant(spec) > FAR and spec.mask is not None:
        near = mask_of(_nearer(spec.mask.expr, 2 * max(plan.q_chunk, plan.k_chunk)))
        spec = dataclasses.replace(spec, mask=near)
    reach = largest_constant(spec)
    if isinstance(spec.q_offset, int):
        reach = max(reach, abs(spec.q_offset) + abs(spec.kv_offset))
    whole = 2 + min(splits(plan.choice) - 1, SHARED)
    length = reach + whole * plan.k_chunk + plan.k_chunk // 2 + 3
    length = min(spec.kv_len, length)
    q_length = min(spec.q_len, plan.q_chunk + plan.q_chunk // 2 + 5)
    if spec.q_len == spec.kv_len:
        length = q_length = min(spec.q_len, max(length, q_length))
    heads = min(spec.kv_heads, 2 if length <= FAR else 1)
    sizes: dict[str, Any] = {
        "batch": min(spec.batch, 2 if length <= FAR else 1),
        "kv_heads": heads,
        "q_heads": heads * spec.repeats,
        "q_len": q_length,
        "kv_len": length,
    }
    if spec.storage == "packed":
        sizes["batch"] = min(spec.batch, 3)
    if spec.storage == "paged":
        sizes["num_pages"] = None
        if is_exact(spec):  # the file has that number of keys
            sizes["kv_len"] = spec.kv_len
    try:
        made = dataclasses.replace(spec, **sizes, memory_budget=None)
    except (OperandError, SpecError):
        return None
    return made, plan.choice


def _nearer(mask: Expr, most: int) -> Expr:
    """The mask with the constants of its affine limits at about `most`, at most."""

    def moved(node: Expr) -> Expr | None:
        if (
            node.op == "const"
            and isinstance(node.value, int)
            and abs(node.value) > most
        ):
            value = most + abs(node.value) % 16
            return const(value if node.value > 0 else -value)
        return None

    def limit(node: Expr) -> Expr | None:
        if node.op in COMPARISONS and all(affine(a) for a in node.args):
            return substitute(node, moved)
        return None

    return substitute(mask, limit)


def interpreted_s(plan: Plan) -> float:
    """About how long the interpreter takes over every pair, in seconds of a patient user.

    A second here is a sixth of one: what takes longer than five is judged when small. Tiles
    of few queries take as long as larger ones.
    """
    spec = plan.spec
    pairs = spec.batch * spec.q_heads * spec.q_len * spec.kv_len
    if spec.storage == "packed":
        pairs //= spec.batch**2
    heads = spec.batch * spec.q_heads // grouped(spec, plan.choice)
    return max(pairs * 1.2e-5, heads * plan.tiles.visited * TILE_S)
