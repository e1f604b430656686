"""The arrays of an emitted program as XLA:TPU lays them out, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attngen.backends.jax.candidates import option
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.regions import Tiles
from attngen.spec import AttentionSpec
from attngen.tpus import LANES, SUBLANES

NARROW = 2  # bytes of a number that matrix units take, also for products of float32
LARGE = 2**21  # bytes of a tile: a smaller one is made before it is needed
STACKED_PARTS = 4  # more are combined as one array
LARGE_MASK = 2**25  # bytes of a mask that isn't made in VMEM
FEW_ROWS = 4096  # of a tile, that leave room in VMEM
FEW = 512  # a tile's sides from which a square one has its keys relaid


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
    scanned: bool
    sliced_dn: bool
    brought: int
    relaid: int


def padded(count: int, step: int) -> int:
    return -(-count // step) * step


def laid(matrices: int, rows: int, lanes: int, size: int, near: bool = False) -> int:
    """Bytes of matrices with their last dimension along the lanes; few rows are packed.

    Args:
        near: as v5p does, twice as tightly.
    """
    fewest = (2 if size > NARROW else 4) // (2 if near else 1)
    high = padded(rows, SUBLANES if rows > 4 else 4 if rows > 2 else fewest)
    return matrices * high * padded(lanes, LANES) * size


def least(matrices: int, a: int, b: int, size: int) -> int:
    """The same, of the order that pads less."""
    return min(laid(matrices, a, b, size), laid(matrices, b, a, size))


@dataclass(frozen=True)
class _Plan:
    """What spec, choice and tiles say, as numbers."""

    spec: AttentionSpec
    q: int
    k: int
    batches: int
    groups: int
    parts: int
    unroll: int
    diagonal: int
    kind: str
    ones: bool
    twice: bool
    dn: bool
    guard: bool
    looped: bool
    gone: bool
    near: bool
    chunks: int

    @property
    def heads(self) -> int:
        """Of queries, in a tile, of all its batches."""
        return self.batches * self.groups * self.spec.repeats

    @property
    def wide(self) -> bool:
        """Whether head dims fill the lanes."""
        return self.spec.qk_dim % LANES == 0 and self.spec.v_dim % LANES == 0

    @property
    def some_heads(self) -> bool:
        """Whether steps take some of the kv heads."""
        return self.groups < self.spec.kv_heads

    @property
    def decoded(self) -> bool:
        """Whether the keys of all heads are read as they lie, for one query."""
        return self.spec.q_len == 1 and not self.some_heads and not self.ones

    @property
    def cut(self) -> bool:
        """Whether whole keys are sliced by heads, and then relaid."""
        rows = self.wide and self.groups % 4 == 0 and self.some_heads
        return rows and self.chunks == 1 and self.spec.q_len > 1

    @property
    def brought(self) -> bool:
        """Whether keys and values, once converted, are brought to VMEM."""
        few = self.heads * self.q < FEW_ROWS and self.k >= LANES
        lone = self.groups == 1 < self.spec.kv_heads and self.chunks > 1
        lone = lone and self.k <= FEW
        wide = self.wide or BYTES[self.spec.dtype] == NARROW
        return self.near and few and not lone and not wide and self.kind == "running"

    @property
    def masked(self) -> bool:
        return self.spec.mask is not None or self.spec.kv_lengths


def arrays(
    spec: AttentionSpec, choice: Choice, tiles: Tiles | None, near: bool = False
) -> Arrays:
    """The arrays of a plan.

    Args:
        tiles: of a head, which tell whether any needs no mask; without them, some do.
        near: whether what is sliced, masks and biases are made in VMEM, as on v5p.
    """
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    b, g = int(choice["batch_chunk"]), int(choice["head_chunk"])
    parts, unroll = int(option(choice, "parts")), int(option(choice, "unroll"))
    # rounds of tiles without a mask are gone where there are too few, as is known then
    few = tiles is not None and tiles.full < max(parts, unroll)
    gone = few and q == spec.q_len
    plan = _Plan(
        spec=spec,
        q=q,
        k=k,
        batches=b,
        groups=g,
        parts=parts,
        unroll=1 if gone else unroll,
        diagonal=int(option(choice, "diagonal")),
        kind=str(choice["algorithm"]),
        ones=option(choice, "denominator") == "ones",
        twice=option(choice, "qk") == "twice",
        dn=option(choice, "slices") == "dn",
        guard=bool(choice["guard"]),
        looped=(b, g, q) != (spec.batch, spec.kv_heads, spec.q_len),
        gone=gone,
        near=near,
        chunks=-(-spec.kv_len // k),
    )
    size = BYTES[spec.out_dtype_name]
    out = spec.batch * spec.q_heads * least(1, spec.q_len, spec.v_dim, size)
    whole_k, whole_v = _keys(plan)
    whole_q, filled = _queries(plan, out) if plan.looped else (0, 0)
    stacked = option(choice, "steps") == "map"
    if stacked:
        filled = _stacked(plan, out, max(whole_k, whole_q))
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
        queries=q,
        parts=plan.parts,
        near=plan.near,
        looped=plan.looped,
        single=plan.chunks == 1,
        dense=plan.kind == "dense",
        wide=plan.wide,
        decoded=plan.decoded,
        masked=plan.masked,
        twice=plan.twice,
        scanned=choice["loop"] == "scan",
        sliced_dn=plan.dn,
        brought=2 * relaid if plan.brought else 0,
        relaid=relaid,
        unroll=1 if plan.chunks == 1 else plan.unroll,
        **_step(plan),
    )


def _keys(plan: _Plan) -> tuple[int, int]:
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
    if few or (one and (plan.q == 1 or lone)):  # slices along the lanes would be of a few lanes
        size = BYTES[spec.dtype] if plan.k == 1 else NARROW
        return _pair(laid(heads, keys, d, size) for d in dims)
    if plan.brought:
        return 0, 0
    if BYTES[spec.dtype] > NARROW:  # converted
        return _pair(least(heads, keys, d, NARROW) for d in dims)
    if thin and plan.batches > 1 and (lone or plan.k == LANES):  # heads first
        return _pair(least(heads, keys, d, NARROW) for d in dims)
    square = not plan.near and plan.parts == 1 and plan.twice and plan.chunks > 1 and plan.q == plan.k > FEW
    return (laid(heads, keys, dims[0], NARROW) if square else 0), 0


def _pair(sizes: Iterable[int]) -> tuple[int, int]:
    k, v = sizes
    return k, v


def _queries(plan: _Plan, out: int) -> tuple[int, int]:
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


def _stacked(plan: _Plan, out: int, hole: int) -> int:
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


def _step(plan: _Plan) -> dict[str, int]:
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


def _bodies(plan: _Plan) -> int:
    """Beside the first: of a round, of what rounds leave over, of edges, of the tail."""
    round_of = max(plan.unroll, plan.parts)
    left = round_of > 1 and (plan.masked or plan.chunks % round_of)
    tail = plan.spec.kv_len % plan.k
    return round_of - 1 + bool(left) + bool(plan.masked) + bool(tail)


def _sums(plan: _Plan, stats: int) -> int:
    """Of one head. Products with a single key are no matrix products."""
    lanes = plan.spec.v_dim + plan.ones
    if plan.k == 1:
        return laid(1, plan.q, lanes, stats)
    return least(1, plan.q, lanes, stats)


def _partial(plan: _Plan, sums: int) -> int:
    """Sums that a tile is added to, beside the running ones."""
    if plan.chunks == 1:
        return sums
    if plan.decoded:  # not sums, but keys, gone before values are sliced
        return _values(plan)
    tail = plan.spec.kv_len % plan.k and not plan.masked and not plan.near
    several = plan.unroll > 1 or plan.diagonal or tail
    return sums if several and plan.k > 1 else 0


def _rows(plan: _Plan) -> int:
    """Queries as they are multiplied, if not as they were sliced."""
    spec = plan.spec
    if plan.wide:
        rows = plan.heads * laid(1, plan.q, spec.qk_dim, BYTES[spec.dtype])
        return 0 if plan.near and rows < LARGE else rows
    if plan.heads > 1 or plan.chunks == 1 or plan.guard or plan.q < LANES:
        return 0
    return laid(1, plan.q, spec.qk_dim, NARROW)


def _values(plan: _Plan) -> int:
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


def _positions(plan: _Plan) -> dict[str, int]:
    """Masks and biases, stored once for several heads."""
    pairs = plan.q * plan.k if plan.heads > 1 and plan.k > 1 else 0
    if plan.near and plan.kind != "dense" and pairs < LARGE_MASK:
        pairs = 0
    each = plan.heads // plan.groups if plan.kind == "dense" else 1
    biases = min(plan.parts, 2) * BYTES[plan.spec.stats_dtype] * pairs
    if not plan.spec.score or (plan.near and plan.kind == "dense"):
        biases = 0
    return {
        "mask": each * pairs if plan.masked else 0,
        "bias": biases,
    }


def _finish(plan: _Plan, sums: int) -> int:
    """What is made of the sums when all tiles are gone.

    Those of parts become one; heads that fill the rows are put there.
    """
    spec, heads = plan.spec, plan.heads
    stats, lanes = BYTES[spec.stats_dtype], spec.v_dim + plan.ones
    if plan.wide and not plan.looped:  # heads go back to their places
        return heads * plan.q * spec.v_dim * BYTES[spec.out_dtype_name]
    if plan.near and (plan.parts == 1 or plan.groups == 1):
        return 0
    if plan.parts > 1:
        return sums * (plan.parts if plan.parts > STACKED_PARTS else 1)
    if plan.ones and plan.groups % SUBLANES == 0:
        return laid(heads // plan.groups * lanes, plan.groups, plan.q, stats)
    return 0


def _tile(plan: _Plan) -> tuple[int, int]:
    """Scores that are stored at once, and those of one tile."""
    spec = plan.spec
    size = BYTES[spec.stats_dtype]
    one = plan.heads * least(1, plan.q, plan.k, size)
    single = plan.chunks == 1
    if plan.k == 1:
        return 0, 0
    if plan.twice:  # one fusion makes and uses them, if nothing else does
        stored = spec.score
        weights = one if plan.near else one // 2  # as they are, or as multiplied
        tile = one if stored else 0 if plan.ones else weights
    else:
        # one round of steps of one head: no loop, and one tile after the other
        alone = plan.chunks <= plan.unroll and plan.heads == 1 and not plan.masked
        tile = one if alone else one * plan.unroll
    if plan.parts > 1 and not plan.gone:
        few = min(plan.q, plan.k) < LANES  # all are made before any is used
        tile *= plan.parts if few else 2 if one < LARGE else 1
    tail = spec.kv_len % plan.k and not plan.masked and not single
    tail = tail and (one < LARGE or (plan.near and plan.unroll > 1))
    if tail and (
        plan.heads == 1 or plan.unroll > 1
    ):  # made before the loop, used after
        tile += one
    if plan.diagonal:
        strip = plan.heads * least(1, plan.q, plan.diagonal, size)
        steps = plan.q // plan.diagonal
        most = 2.0 if plan.q == spec.q_len else 3.5 if steps < 8 else 2.5
        tile = max(tile, int(strip * min((steps + 3) / 2, most)))
    return tile, one
