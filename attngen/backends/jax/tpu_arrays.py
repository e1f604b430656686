"""The arrays of an emitted program as XLA:TPU lays them out, in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from attngen.backends.jax.candidates import option
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import LANES, SUBLANES

NARROW = 2  # bytes of a number that matrix units take, also for products of float32
LARGE = 2**21  # bytes of a tile: a smaller one is made before it is needed
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
        tile: scores that are stored at once.
        keys: slices of values.
        mask, bias: of positions, shared by the heads of a tile.
        one_tile, one_sums: of each of several.
        heads, queries: of a tile.
        looped: there are steps around the key loop.
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
    tile: int
    keys: int
    mask: int
    bias: int
    one_tile: int
    one_sums: int
    heads: int
    queries: int
    parts: int
    unroll: int
    looped: bool
    stacked: bool
    scored: bool
    dense: bool


def padded(count: int, step: int) -> int:
    return -(-count // step) * step


def laid(matrices: int, rows: int, lanes: int, size: int) -> int:
    """Bytes of matrices with their last dimension along the lanes; few rows are packed."""
    few = 4 if rows == 3 else rows
    high = padded(rows, SUBLANES) if rows > 4 else few
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
    def masked(self) -> bool:
        return self.spec.mask is not None or self.spec.kv_lengths


def arrays(spec: AttentionSpec, choice: Choice, tiles: Tiles | None) -> Arrays:
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    b, g = int(choice["batch_chunk"]), int(choice["head_chunk"])
    # loops over tiles without a mask are gone where the limits of all queries are known
    gone = tiles is not None and not tiles.full and q == spec.q_len
    plan = _Plan(
        spec=spec,
        q=q,
        k=k,
        batches=b,
        groups=g,
        parts=int(option(choice, "parts")),
        unroll=1 if gone else int(option(choice, "unroll")),
        diagonal=int(option(choice, "diagonal")),
        kind=str(choice["algorithm"]),
        ones=option(choice, "denominator") == "ones",
        twice=option(choice, "qk") == "twice",
        dn=option(choice, "slices") == "dn",
        guard=bool(choice["guard"]),
        looped=(b, g, q) != (spec.batch, spec.kv_heads, spec.q_len),
        chunks=-(-spec.kv_len // k),
    )
    size = BYTES[spec.out_dtype_name]
    out = spec.batch * spec.q_heads * least(1, spec.q_len, spec.v_dim, size)
    whole_k, whole_v = _keys(plan)
    whole_q, filled = _queries(plan, out) if plan.looped else (0, 0)
    stacked = option(choice, "steps") == "map"
    return Arrays(
        k=whole_k,
        v=whole_v,
        q=whole_q,
        filled=max(filled, out) if stacked else filled,
        out=out,
        stacked=stacked,
        scored=bool(spec.score),
        heads=plan.heads,
        queries=q,
        parts=plan.parts,
        looped=plan.looped,
        dense=plan.kind == "dense",
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
        apart = apart and (plan.k > 1 or spec.batch > 1)
        return _pair(heads * keys * d * NARROW if apart else 0 for d in dims)
    thin = spec.layout == "bhtd" and plan.batches * plan.groups == 1
    dense = BYTES[spec.dtype] == NARROW
    if dense and (not plan.looped or (plan.dn and heads == 1)):
        return 0, 0
    few = plan.k < LANES or (thin and plan.k == LANES)
    if few or (thin and plan.q == 1):  # slices along the lanes would be of a few lanes
        fill = 4 if plan.k == 1 and heads == 1 else 1
        size = BYTES[spec.dtype] if plan.k == 1 else NARROW
        return _pair(fill * laid(heads, keys, d, size) for d in dims)
    if BYTES[spec.dtype] > NARROW:  # converted
        return _pair(least(heads, keys, d, NARROW) for d in dims)
    square = plan.twice and plan.chunks > 1 and plan.q == plan.k > FEW
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
        if several and spec.batch > 1 and lone:
            filled = out
            whole = heads * queries * spec.qk_dim * own
    elif plan.q == 1 and spec.layout == "bthd":  # heads lie in the rows
        rows = spec.batch * queries
        whole = laid(rows, padded(spec.q_heads, 4), spec.qk_dim, own)
        filled = laid(rows, padded(spec.q_heads, 4), spec.v_dim, result)
    elif plan.q < LANES:  # slices along the lanes would be of a few lanes
        whole = laid(heads, queries, spec.qk_dim, own)
        filled = laid(heads, queries, spec.v_dim, result)
    if plan.guard:  # a barrier takes rows along the lanes
        whole = max(whole, laid(heads, queries, spec.qk_dim, own))
    return whole, filled


def _step(plan: _Plan) -> dict[str, int]:
    """What one step of queries holds."""
    spec, heads = plan.spec, plan.heads
    stats, own = BYTES[spec.stats_dtype], BYTES[spec.dtype]
    single = plan.chunks == 1
    pairs = plan.q * plan.k if heads > 1 else 0
    sums = heads * least(1, plan.q, spec.v_dim + plan.ones, stats)
    tile, one_tile = _tile(plan)
    held, one = 0 if single else sums, sums
    if plan.kind == "summaries":
        held = one = plan.chunks * sums
    elif plan.parts > 1:  # combined as one array, when the tiles are gone
        held = plan.parts * sums
        tile = one_tile = max(tile, held)
    elif plan.diagonal:
        held *= 2
    elif plan.unroll > 1 and not (plan.twice and plan.wide):
        held += held // 4
    values = plan.batches * plan.groups * least(1, plan.k, spec.v_dim, NARROW)
    all_heads = spec.layout == "bhtd" and plan.heads == spec.batch * spec.q_heads
    if all_heads or (single and not (plan.wide and plan.some_heads)):
        values = 0
    sliced = heads * least(1, plan.q, spec.qk_dim, own) if plan.looped else 0
    if not plan.wide and plan.groups > 1 and plan.groups % 2:  # padded: once more
        sliced *= 2
    return {
        "sliced": sliced,
        "rows": heads * laid(1, plan.q, spec.qk_dim, own if plan.wide else NARROW),
        "sums": held,
        "one_sums": one if held else 0,
        "tile": tile,
        "one_tile": one_tile if tile else 0,
        "keys": values * (1 if single else plan.unroll),
        "mask": (pairs or plan.q * plan.k // 2) if plan.masked else 0,
        "bias": stats * pairs if spec.score else 0,
    }


def _tile(plan: _Plan) -> tuple[int, int]:
    """Scores that are stored at once, and those of one tile."""
    spec = plan.spec
    size = BYTES[spec.stats_dtype]
    one = plan.heads * least(1, plan.q, plan.k, size)
    single = plan.chunks == 1
    if plan.twice:  # one fusion makes and uses them, if nothing else does
        stored = spec.score or (single and (plan.masked or not plan.ones))
        tile = one if stored else 0 if plan.ones else one // 2
    else:
        # one round of steps of one head: no loop, and one tile after the other
        alone = plan.chunks <= plan.unroll and plan.heads == 1 and not plan.masked
        tile = one if alone else one * plan.unroll
    tail = spec.kv_len % plan.k and not plan.masked and not single and one < LARGE
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
