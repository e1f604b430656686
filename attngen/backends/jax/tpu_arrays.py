"""The arrays of an emitted program as XLA:TPU lays them out, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax import tpu_copies
from attngen.backends.jax.candidates import option
from attngen.backends.jax.tpu_plan import NARROW, Plan, laid, least, numbers
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import LANES, SUBLANES

LARGE = 2**21  # bytes of a tile: a smaller one is made before it is needed
STACKED_PARTS = 4  # more are combined as one array
PART = 60  # percent of the small buffers of a tile, that one of a part has
LARGE_MASK = 2**25  # bytes of a mask that isn't made in VMEM


@dataclass(frozen=True)
class Arrays:
    """Bytes of each buffer; 0 where there is none.

    Args:
        k, v, q: whole, relaid before the loops.
        filled: the whole output, in the order that steps fill it in, if not its own.
        out: the output itself.
        sliced, rows: a step's queries, as they are read, and as they are multiplied.
        sums: running sums, of all parts, or of all summaries.
        partial: more of them: of the tile before, or of all parts as one array.
        tile: scores that are stored at once.
        keys: slices of values.
        mask, bias: of positions, shared by the heads of a tile.
        finish: sums with their heads in the rows, to be divided.
        one_tile, one_sums: of each of several.
        made, rows_made: scores of a tile, stored or not; of few of its keys.
        bodies: places in the program that make a tile.
        heads, queries: of a tile.
        brought: whole k and v, gone before the loops.
        relaid: whole k, in another order.
        looped: there are steps around the key loop.
        single: there is no key loop.
        stacked: the outputs of steps are put in order at the end.
    """

    k: int
    v: int
    q: int
    filled: int
    out: int
    sliced: int
    rows: int
    sums: int
    partial: int
    tile: int
    keys: int
    mask: int
    bias: int
    finish: int
    one_tile: int
    made: int
    rows_made: int
    bodies: int
    one_sums: int
    heads: int
    queries: int
    parts: int
    unroll: int
    near: bool
    looped: bool
    single: bool
    stacked: bool
    scored: bool
    dense: bool
    wide: bool
    decoded: bool
    masked: bool
    twice: bool
    ones: bool
    scanned: bool
    brought: int
    relaid: int


def arrays(
    spec: AttentionSpec, choice: Choice, tiles: Tiles | None, near: bool = False
) -> Arrays:
    """The arrays of a plan.

    Args:
        tiles: of a head, which tell whether any needs no mask; without them, some do.
        near: whether what is sliced, masks and biases are made in VMEM, as by all but v2, v3.
    """
    plan = numbers(spec, choice, tiles, near)
    size = BYTES[spec.out_dtype_name]
    out = spec.batch * spec.q_heads * least(1, spec.q_len, spec.v_dim, size)
    whole_k, whole_v = tpu_copies.keys(plan)
    whole_q, filled = tpu_copies.queries(plan, out) if plan.looped else (0, 0)
    stacked = option(choice, "steps") == "map"
    if stacked:
        filled = tpu_copies.stacked(plan, out, max(whole_k, whole_q))
    relaid = spec.batch * spec.kv_heads * least(1, spec.kv_len, spec.qk_dim, NARROW)
    return Arrays(
        k=whole_k,
        v=whole_v,
        q=whole_q,
        filled=filled,
        out=out,
        stacked=stacked,
        scored=bool(spec.score),
        heads=plan.heads,
        queries=plan.q,
        parts=plan.parts,
        near=plan.near,
        looped=plan.looped,
        single=plan.chunks == 1,
        dense=plan.kind == "dense",
        wide=plan.wide,
        decoded=plan.decoded,
        masked=plan.masked,
        twice=plan.twice,
        ones=plan.ones,
        scanned=choice["loop"] == "scan",
        brought=2 * relaid if plan.brought else 0,
        relaid=relaid,
        unroll=1 if plan.chunks == 1 else plan.unroll,
        **_step(plan),
    )


def _step(plan: Plan) -> dict[str, int]:
    """What one step of queries holds."""
    spec, heads = plan.spec, plan.heads
    stats, own = BYTES[spec.stats_dtype], BYTES[spec.dtype]
    single = plan.chunks == 1
    sums = heads * _sums(plan, stats)
    tile, one_tile = _tile(plan)
    if plan.kind == "summaries":
        rows = 3 * laid(plan.chunks, heads, plan.q, stats)  # statistics
        held, partial = plan.chunks * sums + rows, 0
    else:
        carried = 1 if plan.gone else plan.parts
        held, partial = (0 if single else carried * sums), _partial(plan, sums)
    sliced = heads * least(1, plan.q, spec.qk_dim, own)
    sliced = sliced if plan.looped and not plan.near else 0
    return {
        "sliced": sliced,
        "rows": _rows(plan),
        "sums": held,
        "one_sums": sums if held else 0,
        "partial": partial,
        "tile": tile,
        "one_tile": one_tile if tile else 0,
        "made": heads * laid(1, plan.q, plan.k, stats),
        "rows_made": heads * laid(1, plan.q, LANES, stats),
        "bodies": _bodies(plan),
        "keys": _values(plan),
        "finish": _finish(plan, sums),
        **_positions(plan),
    }


def _bodies(plan: Plan) -> int:
    """Beside the first: of a round, of what rounds leave over, of edges, of the tail."""
    round_of = max(plan.unroll, plan.parts)
    left = round_of > 1 and (plan.masked or plan.chunks % round_of)
    tail = plan.spec.kv_len % plan.k
    further = plan.unroll - 1 + (plan.parts - 1) * PART // 100
    return further + bool(left) + bool(plan.masked) + bool(tail)


def _sums(plan: Plan, stats: int) -> int:
    """Of one head. Products with a single key are no matrix products."""
    lanes = plan.spec.v_dim + plan.ones
    if plan.k == 1:
        return laid(1, plan.q, lanes, stats)
    return least(1, plan.q, lanes, stats)


def _partial(plan: Plan, sums: int) -> int:
    """Sums that a tile is added to, beside the running ones."""
    if plan.chunks == 1:
        return sums
    if plan.decoded:  # not sums, but keys, gone before values are sliced
        return _values(plan)
    tail = plan.spec.kv_len % plan.k and not plan.masked and not plan.near
    several = plan.unroll > 1 or plan.diagonal or tail
    return sums if several and plan.k > 1 else 0


def _rows(plan: Plan) -> int:
    """Queries as they are multiplied, if not as they were sliced."""
    spec = plan.spec
    if plan.wide:
        rows = plan.heads * laid(1, plan.q, spec.qk_dim, BYTES[spec.dtype])
        return 0 if plan.near and rows < LARGE else rows
    if plan.heads > 1 or plan.chunks == 1 or plan.guard or plan.q < LANES:
        return 0
    return laid(1, plan.q, spec.qk_dim, NARROW)


def _values(plan: Plan) -> int:
    """Slices of values, where a column of ones is joined to them, or all heads' at once."""
    spec = plan.spec
    all_heads = spec.layout == "bhtd" and plan.heads == spec.batch * spec.q_heads
    single = plan.chunks == 1
    inside = all_heads or (single and not plan.some_heads)
    joined = plan.ones or plan.decoded
    if inside or plan.k == 1 or not joined or plan.near:
        return 0
    one = plan.batches * plan.groups * least(1, plan.k, spec.v_dim, NARROW)
    if plan.cut:
        return 2 * one  # and keys
    return one * (1 if single else max(plan.unroll, plan.parts))


def _positions(plan: Plan) -> dict[str, int]:
    """Masks and biases, stored once for several heads."""
    pairs = plan.q * plan.k if plan.heads > 1 and plan.k > 1 else 0
    if plan.near and plan.kind != "dense" and pairs < LARGE_MASK:
        pairs = 0
    each = plan.heads // plan.groups if plan.kind == "dense" else 1
    if "h" in plan.apart:
        each = plan.heads
    elif "b" in plan.apart:
        each = max(each, plan.batches)
    biases = min(max(plan.parts, plan.unroll), 2) * BYTES[plan.spec.stats_dtype] * pairs
    if not plan.spec.score or (plan.near and plan.kind == "dense"):
        biases = 0
    return {
        "mask": each * pairs if plan.masked else 0,
        "bias": biases,
    }


def _finish(plan: Plan, sums: int) -> int:
    """What is made of the sums when all tiles are gone.

    Those of parts become one; heads that fill the rows are put there.
    """
    spec, heads = plan.spec, plan.heads
    stats, lanes = BYTES[spec.stats_dtype], spec.v_dim + plan.ones
    if (
        plan.wide and not plan.looped and plan.parts == 1
    ):  # heads go back to their places
        return heads * plan.q * spec.v_dim * BYTES[spec.out_dtype_name]
    if plan.near and (plan.parts == 1 or plan.groups == 1):
        return 0
    if plan.parts > 1:
        apart = sums if plan.ones else heads * laid(1, plan.q, lanes, stats)
        return apart * plan.parts if plan.parts > STACKED_PARTS else sums
    if plan.ones and plan.groups % SUBLANES == 0:
        return laid(heads // plan.groups * lanes, plan.groups, plan.q, stats)
    return 0


def _tile(plan: Plan) -> tuple[int, int]:
    """Scores that are stored at once, and those of one tile."""
    spec = plan.spec
    size = BYTES[spec.stats_dtype]
    one = plan.heads * least(1, plan.q, plan.k, size)
    single = plan.chunks == 1
    if plan.k == 1:
        return 0, 0
    if plan.twice:  # one fusion makes and uses them, if nothing else does
        stored = spec.score or (plan.blanked and plan.masked)
        weights = one if plan.near else one // 2  # as they are, or as multiplied
        fused = plan.ones and plan.q >= LANES
        tile = one if stored else 0 if fused else weights * plan.unroll
    else:
        # one round of steps of one head: no loop, and one tile after the other
        alone = plan.chunks <= plan.unroll and plan.heads == 1 and not plan.masked
        tile = one if alone else one * plan.unroll
    if plan.parts > 1 and not plan.gone:
        few = min(plan.q, plan.k) < LANES  # all are made before any is used
        some = plan.masked or plan.near
        tile *= plan.parts if few else 2 if some and one <= LARGE else 1
    tail = spec.kv_len % plan.k and not plan.masked and not single
    small = one <= LARGE or plan.twice or (plan.near and plan.unroll > 1)
    small = small or (plan.heads == 1 and not plan.near)
    tail = tail and small
    if tail and (
        plan.heads == 1 or plan.unroll > 1 or plan.twice
    ):  # made before the loop, used after
        tile += one
    if plan.diagonal:
        strip = plan.heads * least(1, plan.q, plan.diagonal, size)
        steps = plan.q // plan.diagonal
        most = 2.0 if plan.q == spec.q_len else 3.5 if steps < 8 else 2.5
        tile = max(tile, int(strip * min((steps + 3) / 2, most)))
    return tile, one
