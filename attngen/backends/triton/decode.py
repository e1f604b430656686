"""Choices for few queries: query heads packed into a tile, and keys split over programs.

pack_gqa: the query heads that share a kv head are the rows of one tile, query by query, which
loads their keys and values once (the term of FlashAttention-3, arXiv 2407.08608).

kv_splits: each program takes a share of the key blocks that its queries visit and leaves a
maximum, a sum and a weighted sum; a second kernel, `combine`, adds these up (flash decoding:
Dao, Haziza, Massa and Sizov, 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attngen.gpus import Gpu
from attngen.plans import Choice, Option, grouped
from attngen.spec import AttentionSpec
from attngen.targets import Target

SPLITS = (1, 2, 4, 8, 16, 32, 64, 128)
ROWS = 256  # query rows of a kv head: with more of them nothing is gained by packing
SHARE = 256  # keys of a split, at least
WAVES = 4  # programs of few queries for a multiprocessor, as most wait for memory
WORTH = 1024  # keys that are worth splitting: fewer are done before `combine` begins
COLUMNS = 32  # of the output, of a program of `combine`
WARP_SPLITS = 32  # of a warp of `combine`: each lane holds as many numbers
COMBINE_S = 4e-6  # a launch, and the wait for it


def space(
    spec: AttentionSpec, target: Target, *, whole: bool
) -> Mapping[str, Sequence[Option]]:
    """Of each choice the values that are worth considering; none where only the first is."""
    if whole:
        return {"pack_gqa": (False, True), "kv_splits": SPLITS}
    if spec.derivatives is not None:
        return {}
    packs = _packs(spec)
    splits = _splits(spec, target.gpu, spec.repeats if packs else 1)
    return ({"pack_gqa": (False, True)} if packs else {}) | (
        {"kv_splits": splits} if len(splits) > 1 else {}
    )


def _packs(spec: AttentionSpec) -> bool:
    few = spec.q_len * spec.repeats <= ROWS
    return spec.derivatives is None and spec.repeats > 1 and few


def rows(spec: AttentionSpec) -> int:
    """Of a tile, at most: queries, or those of the heads that may be packed."""
    return spec.q_len * (spec.repeats if _packs(spec) else 1)


def _splits(spec: AttentionSpec, gpu: Gpu | None, heads: int) -> tuple[int, ...]:
    """1, and about as many as fill the multiprocessors, where programs alone don't.

    Args:
        heads: that a program can take.
    """
    if gpu is None or spec.kv_len < WORTH:
        return (1,)
    blocks = -(-spec.q_len * heads // 16)
    programs = spec.batch * spec.q_heads // heads * blocks
    waves = WAVES if spec.q_len * heads <= ROWS else 1
    fill = waves * gpu.multiprocessors / programs
    most = min(2 * fill, spec.kv_len // SHARE) if fill > 1 else 1
    worth = (n for n in SPLITS[1:] if fill / 16 < n <= most)
    return (1, *worth)


def illegal(spec: AttentionSpec, choice: Choice) -> str | None:
    """Why these choices can't be emitted, or None."""
    packs, splits = choice.get("pack_gqa", False), choice.get("kv_splits", 1)
    if not isinstance(packs, bool):
        return "pack_gqa is True or False"
    if isinstance(splits, bool) or splits not in SPLITS:
        return f"kv_splits is one of {', '.join(map(str, SPLITS))}"
    if spec.derivatives is not None and (packs or splits != 1):
        name = "pack_gqa" if packs else "kv_splits"
        return f"{name} = {choice[name]} needs derivatives=None"
    if packs and spec.repeats == 1:
        return "pack_gqa needs query heads that share a kv head"
    if packs and choice.get("skip") == "list":
        return "pack_gqa needs bounds: the list of tiles is of each query head"
    return None


def programs(spec: AttentionSpec, choice: Choice) -> int:
    """Of the forward kernel, without splits."""
    heads = grouped(spec, choice)
    blocks = -(-spec.q_len * heads // int(choice["q_chunk"]))
    return spec.batch * spec.q_heads // heads * blocks


def splits(choice: Choice) -> int:
    return int(choice.get("kv_splits", 1))


def scratch_bytes(spec: AttentionSpec, choice: Choice) -> int:
    """What the launcher allocates for what splits leave: float32."""
    if splits(choice) == 1:
        return 0
    rows = spec.q_heads * spec.q_len * (1 if spec.storage == "packed" else spec.batch)
    columns = spec.v_dim if "out" in spec.outputs else 0
    return 4 * rows * splits(choice) * (columns + 2)


def describe(choice: Choice) -> list[str]:
    """In words, what isn't the default."""
    said = ["heads packed"] if choice.get("pack_gqa") else []
    return said + ([f"{splits(choice)} splits of the keys"] * (splits(choice) > 1))
