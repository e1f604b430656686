"""Which candidates are worth considering on a target: the values of each choice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from attngen.backends.jax.candidates import (
    CHUNKED,
    LOOPS,
    bounded,
    distant,
    exponentials,
    is_stored,
    limited,
    products,
    unrollable,
)
from attngen.diagonals import rises
from attngen.lists import skips
from attngen.plans import Option
from attngen.spec import AttentionSpec
from attngen.targets import Target

Space = Mapping[str, Mapping[str, Sequence[Option]]]
FEW = 64  # rows of a kv head: so few queries leave a processor waiting for keys
LARGEST_CHUNK = 8192  # that the planner considers by itself
LARGEST_KEYS = 16384  # on an accelerator
MOST_KEYS = 2**17  # there, for few queries
SMALL_CHUNKS = (1, 8, 32)  # where little memory is left
LANES = 128  # a TPU's: chunks of fewer leave them empty


def space(spec: AttentionSpec, target: Target, *, whole: bool = False) -> Space:
    """For each algorithm, the values of each choice that are worth considering.

    Args:
        whole: all that can be emitted, also what seldom pays: for a search that goes from
            a plan to its neighbours, since the product is too large.
    """
    if spec.derivatives == "any":
        return _scanned(spec, target, whole=whole)
    if target.kind == "cpu":
        found = _processor(spec, whole=whole)
    else:
        found = _accelerator(spec, target, whole=whole)
    return _stored(spec, found) if is_stored(spec) else found


def _stored(spec: AttentionSpec, found: Space) -> Space:
    """Of these what there is for pages, or for K/V of another dtype."""
    only: dict[str, Sequence[Option]] = {"slices": ("nd",), "diagonal": (0,)}
    if spec.is_narrow:
        only["guard"] = (True,)
    if spec.is_quantised and spec.kv_scale != "head":
        only["denominator"] = ("sum",)
    return {
        kind: {n: only.get(n, values) for n, values in axes.items()}
        if kind in CHUNKED
        else axes
        for kind, axes in found.items()
    }


def _processor(
    spec: AttentionSpec, *, whole: bool
) -> Mapping[str, Mapping[str, Sequence[Option]]]:
    """What pays on a processor; whole: also what seldom does."""
    product = products(spec) if whole else products(spec)[:1]
    guard = (products(spec)[0] != spec.dtype,)
    rare = {
        "scale": ("queries", "scores"),
        "denominator": ("sum", "ones"),
        "qk": ("once", "twice"),
        "slices": ("nd", "dn"),
        "steps": ("fori", "map"),
        "blank": ("scores",),
        "mask": ("positions",),
    }
    scale = rare["scale"] if whole or len(products(spec)) > 1 else ("queries",)
    common: dict[str, Sequence[Option]] = {
        "q_chunk": _chunks(spec.q_len),
        "k_chunk": _chunks(spec.kv_len),
        "head_chunk": _of_each(
            _parts(spec.kv_heads // spec.head_shards), spec.head_shards
        ),
        "batch_chunk": tuple(dict.fromkeys((spec.batch_shards, spec.batch))),
        "loop": ("fori",),
        "exp": exponentials(spec) if whole else exponentials(spec)[:1],
        "product_dtype": product,
        "guard": (True, False) if whole else guard,
    }
    common |= {n: v if whole else v[:1] for n, v in rare.items()}
    if len(products(spec)) > 1:
        common["scale"] = rare["scale"]
    skip = skips(spec)
    diagonal = (0, 128, 256, 512) if whole else (0, 128, 256)
    unroll = (1, 2, 4, 8) if whole else (1, 2)
    running = common | {
        "loop": LOOPS
        if whole
        else ("fori",)
        if bounded(spec)
        else ("fori", "unrolled"),
        "unroll": unroll if unrollable(spec) else (1,),
        "diagonal": diagonal if rises(spec, 2, 2) else (0,),
        **skip,
    }
    few = {
        "q_chunk": tuple(n for n in (1024,) if n < spec.q_len) or (spec.q_len,),
        "k_chunk": tuple(n for n in (64, 512, 4096) if 2 * n <= spec.kv_len)[-2:]
        or (1,),
    }
    split = common if whole or spec.q_len * spec.repeats <= FEW else common | few
    return {
        "running": running,
        "dense": _dense(spec, product, scale),
        "split_kv": split | {"parts": (2, 4, 8, 16) if whole else (2, 8)},
        "summaries": common
        | ({} if whole else few)
        | {"loop": ("fori", "map") if whole else ("fori",)},
    }


def _chunks(length: int) -> tuple[int, ...]:
    powers = [2**i for i in range(14) if 2**i < min(length, 2 * LARGEST_CHUNK)]
    return (*powers, length) if length <= LARGEST_CHUNK else tuple(powers)


def _parts(heads: int) -> tuple[int, ...]:
    """A few divisors: 1, the powers of two, all."""
    return tuple(
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n & (n - 1) == 0 or n == heads)
    )


def _accelerator(spec: AttentionSpec, target: Target, *, whole: bool) -> Space:
    """What pays on a TPU, or on a GPU by XLA; whole: also what seldom does.

    Products in the narrow dtype, which the matrix units take; a column of ones where lse
    isn't asked for, so that no exponential is made twice; queries scaled where that is
    exact; keys that aren't seen told by the limits.
    """
    narrow = products(spec)[::-1]
    exps = ("exp", *(e for e in exponentials(spec) if e != "exp"))
    tpu = target.tpu is not None
    ones = tpu and (len(narrow) == 1 or "lse" not in spec.outputs)
    ones = ones and not spec.dropout  # which would leave some out of the sum
    power = math.frexp(spec.scale_value)[0] == 0.5 and not spec.is_quantised
    exact = len(narrow) == 1 or power
    if (
        target.tpu is not None and target.tpu.matrix_side == LANES
    ):  # the scale of scores costs nothing there
        exact = len(narrow) == 1
    first: dict[str, tuple[Option, Option]] = {
        "scale": ("queries", "scores") if exact else ("scores", "queries"),
        "denominator": ("ones", "sum") if ones else ("sum", "ones"),
        "slices": ("nd", "dn"),
        "steps": ("fori", "map"),
        "blank": ("limits", "scores") if limited(spec, False) else ("scores", "limits"),
    }
    first["mask"] = ("positions", "distance")
    if tpu and distant(spec):
        first["mask"] = ("distance", "positions")
    rows = spec.q_len * spec.repeats
    if rows <= FEW:  # keys are read once: a column of ones would copy the values
        first["denominator"] = ("sum", "ones")
    lesser: dict[str, Sequence[Option]] = {
        "exp": exps if whole else exps[:1],
        "product_dtype": narrow if whole else narrow[:1],
        "guard": (False, True) if whole else (False,),
        **{n: v if whole else v[:1] for n, v in first.items()},
    }
    common: dict[str, Sequence[Option]] = {
        "q_chunk": _lanes(spec.q_len, LARGEST_CHUNK),
        "k_chunk": _lanes(spec.kv_len, LARGEST_KEYS if rows > FEW else MOST_KEYS),
        "head_chunk": _of_each(
            _parts(spec.kv_heads // spec.head_shards), spec.head_shards
        ),
        "batch_chunk": tuple(dict.fromkeys((spec.batch_shards, spec.batch))),
        "loop": ("fori",),
        **lesser,
        "qk": ("once", "twice") if tpu or whole else ("once",),
    }
    static = LOOPS if whole else ("fori",)
    diagonal = (0, 128, 256, 512, 1024) if whole or not tpu else (0,)
    running = common | {
        "loop": static,
        "unroll": ((1, 2, 4) if whole else (1, 2)) if unrollable(spec) else (1,),
        "diagonal": diagonal if rises(spec, 2, 2) else (0,),
        **skips(spec),
    }
    few: dict[str, Sequence[Option]] = {
        "q_chunk": (min(1024, spec.q_len),),
        "k_chunk": tuple(n for n in (512, 4096) if 2 * n <= spec.kv_len) or (1,),
    }
    parts = {"parts": (2, 4, 8, 16) if whole else (2, 8)}
    return {
        "running": running,
        "dense": _dense(spec, lesser["product_dtype"], lesser["scale"]),
        "split_kv": common | ({} if whole else few) | parts,
        "summaries": common
        | ({} if whole else few)
        | {"loop": ("fori", "map") if whole else ("fori",)},
    }


# the choices of scans: those of other loops over keys, but for what scans have no form of
SCANNED = (
    "q_chunk",
    "k_chunk",
    "head_chunk",
    "batch_chunk",
    "scale",
    "exp",
    "product_dtype",
    "guard",
)


def _scanned(spec: AttentionSpec, target: Target, *, whole: bool) -> Space:
    """What is differentiable to any order: one form, with fewer choices."""
    forward = dataclasses.replace(spec, derivatives=None)
    axes = space(forward, target, whole=whole)["summaries" if whole else "running"]
    found = {name: axes[name] for name in SCANNED} | {"loop": ("scan",)}
    if spec.batch_shards > 1 or spec.head_shards > 1:
        found |= {"head_chunk": (spec.kv_heads,), "batch_chunk": (spec.batch,)}
    return {"scanned": found}


def _dense(
    spec: AttentionSpec, product: Sequence[Option], scale: Sequence[Option]
) -> Mapping[str, Sequence[Option]]:
    """The whole square at once."""
    return {
        "q_chunk": (spec.q_len,),
        "k_chunk": (spec.kv_len,),
        "head_chunk": (spec.kv_heads,),
        "batch_chunk": (spec.batch,),
        "loop": ("unrolled",),
        "exp": ("exp",),
        "product_dtype": product,
        "guard": (False,),
        "scale": scale,
    }


def _of_each(parts: tuple[int, ...], shards: int) -> tuple[int, ...]:
    return tuple(n * shards for n in parts)


def _lanes(length: int, most: int) -> tuple[int, ...]:
    """Chunks of whole lanes, a few smaller ones, and the whole length where it is short."""
    whole = []
    n = LANES
    while n <= most:
        whole.append(n)
        n *= 2
    found = [n for n in (*SMALL_CHUNKS, *whole) if n < length]
    return (*found, length) if length <= most else tuple(found)
