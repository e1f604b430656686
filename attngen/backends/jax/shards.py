"""Batch and heads that are sharded over devices, under automatic partitioning.

XLA gathers a sharded axis that is sliced. So an axis that is gone through in chunks is seen
as two, [shards, part of each]: the first is always taken whole, and stays where it is; the
second lies on one device, and is sliced. A chunk then has as much of every shard.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

from attngen import slopes
from attngen.errors import NotBuiltError, OperandError
from attngen.plans import Choice, Option, Plan
from attngen.spec import AttentionSpec

# axis → how many shards, what each has, what a chunk takes of it; g: kv heads, h: queries'
SHARDS = {"b": "B_SHARDS", "g": "H_SHARDS", "h": "H_SHARDS"}
PARTS = {"b": "B_PART", "g": "G_PART", "h": "H_PART"}
EACH = {"b": "B_EACH", "g": "G_EACH"}
MESH = ("batch", "heads")  # axes of the mesh that a certificate is of


@functools.lru_cache(maxsize=64)
def local(spec: AttentionSpec) -> AttentionSpec:
    """What one device computes.

    Raises:
        NotBuiltError: a mask or score reads an operand at a fixed batch or head.
    """
    if spec.devices == 1:
        return spec
    heads, batches = spec.head_shards, spec.batch_shards
    try:
        return dataclasses.replace(
            spec,
            batch=spec.batch // batches,
            q_heads=spec.q_heads // heads,
            kv_heads=spec.kv_heads // heads,
            batch_shards=1,
            head_shards=1,
        )
    except OperandError as error:
        raise NotBuiltError(
            "An operand that is read at a fixed batch or head can't be sharded yet.",
            got=str(error.got),
            needed="an index that is b or h, or batch_shards=1 and head_shards=1",
        ) from error


def local_choice(spec: AttentionSpec, choice: Choice) -> Choice:
    """A candidate as one device sees it."""
    if spec.devices == 1:
        return choice
    of = {"head_chunk": spec.head_shards, "batch_chunk": spec.batch_shards}
    mine: dict[str, Option] = {
        name: int(choice[name]) // count
        for chunk, count in of.items()
        for name in (chunk, f"backward_{chunk}")
        if name in choice
    }
    return {**choice, **mine}


def split(plan: Plan) -> frozenset[str]:
    """The axes (b, g) that are sharded and gone through in chunks.

    Also heads that are not, where each shard has one: see `axes`.
    """
    spec = plan.spec
    if plan.algorithm == "dense":
        return frozenset()
    found = []
    if spec.batch_shards > 1 and plan.option("batch_chunk") != spec.batch:
        found.append("b")
    if (spec.head_shards > 1 and plan.option("head_chunk") != spec.kv_heads) or (
        found and spec.head_shards == spec.kv_heads > 1
    ):
        found.append("g")
    return frozenset(found)


def is_split(plan: Plan, axis: str) -> bool:
    return {"h": "g"}.get(axis, axis) in split(plan)


def _part(plan: Plan, axis: str) -> int:
    """What a shard has of an axis."""
    spec = plan.spec
    if axis == "b":
        return spec.batch // spec.batch_shards
    return (spec.q_heads if axis == "h" else spec.kv_heads) // spec.head_shards


def each(plan: Plan, axis: str) -> int:
    """What a chunk takes of each shard: of the batch, of kv heads."""
    spec = plan.spec
    if axis == "b":
        return int(plan.option("batch_chunk")) // spec.batch_shards
    return int(plan.option("head_chunk")) // spec.head_shards


def each_text(plan: Plan, axis: str) -> str:
    """The same as text; of query heads for h."""
    if axis == "h":
        factors = [each_text(plan, "g"), "R" if plan.spec.repeats > 1 else "1"]
        return " * ".join(f for f in factors if f != "1") or "1"
    return EACH[axis] if each(plan, axis) != 1 else "1"


Axis = tuple[str, str]  # a letter, and "shards" or "part" of it, or ""


def axes(plan: Plan, letters: Iterable[str], *, ahead: bool = False) -> list[Axis]:
    """Each axis of an array as it is sliced; `ahead`: those of shards come first.

    Where each device has one shard XLA sees axes of length 1. Those that it doesn't find
    ahead it lays there, and copies the array. So there is no axis of parts of length 1.
    """
    found: list[Axis] = []
    for letter in letters:
        if not is_split(plan, letter):
            found.append((letter, ""))
            continue
        found.append((letter, "shards"))
        if _part(plan, letter) > 1:
            found.append((letter, "part"))
    return sorted(found, key=lambda axis: axis[1] != "shards") if ahead else found


def moved(plan: Plan, letters: str, *, back: bool = False) -> str:
    """How the axes of shards are transposed ahead of the others, or back; "" if they are."""
    beside, ahead = axes(plan, letters), axes(plan, letters, ahead=True)
    if beside == ahead:
        return ""
    before, after = (ahead, beside) if back else (beside, ahead)
    return f"({', '.join(str(before.index(axis)) for axis in after)})"


def sizes(
    plan: Plan, letters: Iterable[str], of: dict[str, str], *, ahead: bool = False
) -> list[str]:
    """The text of a slice's sizes; `of` those that aren't split."""
    return [
        SHARDS[a] if part == "shards" else each_text(plan, a) if part else of[a]
        for a, part in axes(plan, letters, ahead=ahead)
    ]


def begins(
    plan: Plan, letters: Iterable[str], of: dict[str, str], *, ahead: bool = False
) -> list[str]:
    """The text of where a slice begins; `of` within each shard where an axis is split."""
    return [
        "0" if part == "shards" else of[a]
        for a, part in axes(plan, letters, ahead=ahead)
    ]


def shape(
    plan: Plan, letters: Iterable[str], of: dict[str, str], *, ahead: bool = False
) -> list[str]:
    """The text of an array's shape, with its shards apart."""
    return [
        SHARDS[a] if part == "shards" else PARTS[a] if part else of[a]
        for a, part in axes(plan, letters, ahead=ahead)
    ]


def constants(plan: Plan) -> list[tuple[str, str, str]]:
    """The constants at the top of the file: names, values, comment."""
    spec, found = plan.spec, []
    apart = split(plan)
    if "b" in apart:
        count, part = spec.batch_shards, spec.batch // spec.batch_shards
        about = "of the batch: each on its own devices"
        found.append(("B_SHARDS, B_PART", f"{count}, {part}", about))
    if "g" in apart:
        count = spec.head_shards
        parts = f"{spec.q_heads // count}, {spec.kv_heads // count}"
        about = "of the heads: each on its own devices"
        found.append(("H_SHARDS, H_PART, G_PART", f"{count}, {parts}", about))
    for axis, of in (("b", "batches"), ("g", "kv heads")):
        if axis in apart and each(plan, axis) != 1:
            about = f"{of} of a tile, of each shard"
            found.append((EACH[axis], str(each(plan, axis)), about))
    return found


def views(plan: Plan, layout: dict[str, str]) -> list[tuple[str, str, str]]:
    """(name, shape, transposition) of the arguments whose shards are seen apart.

    Args:
        layout: the axes of each argument, a last dimension as its text.
    """
    of = {"b": "B", "h": "H", "g": "G", "q": "T", "k": "S", "d": "D"}
    if plan.spec.qk_dim != plan.spec.v_dim:
        of |= {"d": "QK_DIM", "v": "V_DIM"}
    return [
        (name, ", ".join(shape(plan, letters, of)), moved(plan, letters))
        for name, letters in layout.items()
        if any(is_split(plan, a) for a in letters)
    ]


def mesh(spec: AttentionSpec) -> dict[str, Any]:
    """What the compiler is told: the mesh's sizes, and which axis of it each array has.

    Lengths and offsets are small, and on every device: loops over chunks depend on them.
    """
    if spec.devices == 1:
        return {}
    layout = {name: ("bqh?" if name in "q" else "bkg?") for name in "qkv"}
    layout["out"] = "bqh?"
    if spec.layout == "bhtd":
        layout = {n: a[0] + a[2] + a[1] + a[3] for n, a in layout.items()}
    layout["lse"] = "bhq"
    everywhere = ("kv_lengths", "q_lengths", "q_offset", "seed")
    for operand in spec.operands:
        names = (a if isinstance(a, str) else "?" for a in operand.axes)
        text = "".join(names)
        layout[operand.name] = "?" * len(text) if operand.name in everywhere else text
    layout |= {name: layout[of] for name, of in slopes.cotangents(spec).items()}
    of = {"b": MESH[0], "h": MESH[1], "g": MESH[1]}
    arrays = {n: [of.get(a) for a in letters] for n, letters in layout.items()}
    return {
        "mesh": [spec.batch_shards, spec.head_shards],
        "arrays": arrays,
        "outputs": list(spec.outputs),
    }
