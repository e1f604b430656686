"""XLA:CPU's temporaries of a backward pass, as an upper bound.

A sum of what is alive at the worst moment, as buffer assignments of random plans showed it:
lse and delta of all rows, what the pass carries for a whole head or all of them, so many
tiles, and chunks of queries and of keys as they are sliced, transposed and summed up. Beside
that lies what the largest library fusion holds inside (scratch.py): two tiles where p and ds
are chained in one, all of out · dout where delta is made of it at once.
benchmarks/model_backward.py compares with the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax.buffers import facts
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec

ROW = 12  # numbers of each row of a tile: lse, delta, what is known of it
SMALL_BYTES = 3072
SLACK, SLACK_BYTES = 1 / 9, 2**16  # what is left to chance: of the buffers, and at most
LENT = 0.8  # of dk and dv, which aren't written yet
CHAINED_ROWS, CHAINED_MANY = 32, 256  # queries of a chunk: of one matrix, of several


@dataclass(frozen=True)
class Moment:
    """How many tiles, chunks of queries and chunks of keys there are at once."""

    tiles: float
    queries: float
    keys: float


# algorithm → of one query head for each kv head, of several
USUAL = {
    "by_queries": (Moment(2, 5, 3.2), Moment(5, 7.2, 3.2)),
    "by_keys": (Moment(2, 4, 5), Moment(5, 3.4, 5)),
    "two_passes": (Moment(2, 4, 5), Moment(4.1, 3.6, 5.2)),
}
CHAINED = {  # the library holds two tiles, and these are beside it
    "by_keys": (Moment(1, 4, 5), Moment(2.1, 5, 5)),
    "two_passes": (Moment(2, 3.7, 3.3), Moment(3, 3.2, 3.3)),
}
# more: keys and values that no query sees are 0
MASKED = {
    "by_queries": Moment(0, 0, 1),
    "by_keys": Moment(0, 0, 1),
    "two_passes": Moment(0, 0, 1),
}
BATCHED_RAGGED = Moment(1.1, 0, 0)  # of one pass: scores, as they are blanked
# by queries: sums of queries, and what is written before
RAGGED = (Moment(0, 2, 0), Moment(0, 0, 2))
POLYNOMIAL = Moment(1, 0, 0)  # of one query head: p isn't made in place
SUMMED = Moment(0, -1.5, 0)  # by keys: delta isn't made in each tile
NARROW = Moment(-1.8, -3, 0)  # of several query heads, products in a narrow dtype
LENGTHS = Moment(0, 0, 1.5)
# of several heads or batches: their keys are transposed
BATCHED = {
    "by_queries": Moment(0, 0, 1),
    "by_keys": Moment(0, 0, 2),
    "two_passes": Moment(0, 0, 1),
}
# loops of one round beside others: both kinds of tiles
INLINE = {
    "by_queries": Moment(3, 0, 0),
    "by_keys": Moment(1.1, 0, 0),
    "two_passes": Moment(2, 0, 0),
}
# of several query heads, as sums of queries are put in order: chunks of queries
ORDERED = {"by_queries": 7.2, "by_keys": 4.5, "two_passes": 6.2}
ORDERED_RAGGED = {"by_queries": 10.2, "by_keys": 8.2, "two_passes": 6.2}
WHOLE_ROWS = 3.3  # tiles at most, where a mask is in every tile, of all keys


@dataclass(frozen=True)
class At:
    """Bytes of a tile, of chunks of queries and of keys, and how they are passed over."""

    algorithm: str
    tile: int
    queries: int
    keys: int
    rows: int  # a number of each
    matrices: int
    q: int
    all_rows: int  # a number of each row there is
    grouped: bool
    masked: bool
    ragged: tuple[bool, bool]
    single: tuple[bool, bool]  # one chunk of queries, of keys


def arrays(spec: AttentionSpec, choice: Choice) -> At:
    size = BYTES[spec.stats_dtype]
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    matrices = int(choice["batch_chunk"]) * int(choice["head_chunk"])
    rows, dims = matrices * spec.repeats * q, spec.qk_dim + spec.v_dim
    return At(
        algorithm=str(choice["algorithm"]),
        tile=size * rows * k,
        queries=size * rows * dims // 2,
        keys=size * matrices * k * dims // 2,
        rows=size * rows,
        matrices=matrices,
        q=q,
        all_rows=size * spec.batch * spec.q_heads * spec.q_len,
        grouped=spec.repeats > 1,
        masked=facts(spec).edges,
        ragged=(spec.q_len % q > 0, spec.kv_len % k > 0),
        single=(spec.q_len == q, spec.kv_len == k),
    )


def temp_bytes(spec: AttentionSpec, choice: Choice) -> tuple[int, int]:
    """An upper bound of what XLA:CPU allocates beyond inputs and outputs, in bytes.

    Of the whole program, if its forward pass needs no more; and what of it is inside a
    library fusion.
    """
    at = arrays(spec, choice)
    moment = _moment(spec, at, choice)
    held = moment.tiles * at.tile + moment.queries * at.queries
    held += moment.keys * at.keys
    if at.grouped:
        ordered = ORDERED_RAGGED if at.ragged[0] else ORDERED
        held = max(held, ordered[at.algorithm] * at.queries)
    held += ROW * at.rows + _more(spec, choice, at)
    held = max(0.0, held - _lent(spec, choice, at))
    library = _library(spec, choice, at)
    slack = min(SLACK_BYTES, SLACK * (held + library))
    own = int(_carried(spec, choice, at) + held + slack) + SMALL_BYTES
    return own + library, library


def _moment(spec: AttentionSpec, at: At, choice: Choice) -> Moment:
    chained = _chained(spec, choice, at) and not any(at.ragged)
    table = CHAINED if chained else USUAL
    first = table[at.algorithm][at.grouped]
    found = [first]
    masked, one = at.masked or any(at.ragged), at.algorithm != "two_passes"
    found += [MASKED[at.algorithm]] if masked else []
    if any(at.ragged) and at.matrices > 1 and one and not at.grouped:
        found += [BATCHED_RAGGED]
    found += [POLYNOMIAL] if choice["exp"] == "polynomial" and not at.grouped else []
    if choice["delta"] == "summed" and at.algorithm == "by_keys" and not at.grouped:
        found += [SUMMED]
    if choice["product_dtype"] != spec.stats_dtype and at.grouped and one:
        found += [NARROW]
    if at.algorithm == "by_queries":
        found += [m for m, ragged in zip(RAGGED, at.ragged, strict=True) if ragged]
    if (spec.kv_lengths or spec.q_lengths) and (one or at.matrices == 1):
        found += [LENGTHS]
    found += [BATCHED[at.algorithm]] if at.matrices > 1 else []
    found += [INLINE[at.algorithm]] if _inline(at) else []
    tiles = sum(m.tiles for m in found)
    if at.masked and at.single[1] and not spec.score and at.algorithm == "two_passes":
        tiles = min(tiles, WHOLE_ROWS)
    return Moment(tiles, sum(m.queries for m in found), sum(m.keys for m in found))


def _inline(at: At) -> bool:
    """Whether one axis is a single chunk and the other ragged: tiles of both kinds are
    in one body."""
    ragged, single = at.ragged, at.single
    mixed = (ragged[0] and single[1]) or (ragged[1] and single[0])
    return mixed and not at.masked


def _chained(spec: AttentionSpec, choice: Choice, at: At) -> bool:
    """Whether the library makes ds in one fusion, which holds two tiles."""
    if at.algorithm == "by_queries":
        return False
    if choice["delta"] != "again" and not all(at.single):
        return False
    mixed = any(at.ragged) and (at.single[0] or at.single[1])
    if at.masked or mixed or "lse" in spec.outputs or spec.score:
        return False
    many = at.grouped or at.matrices > 1
    return at.q >= (CHAINED_MANY if many else CHAINED_ROWS)


def _carried(spec: AttentionSpec, choice: Choice, at: At) -> int:
    """Of all rows, and of all keys of a head: what lives as long as the pass."""
    size = BYTES[spec.stats_dtype]
    kept = {"kept": 1, "again": 0, "summed": 2}[str(choice["delta"])]
    if spec.sink and not kept:
        kept = 1
    rows = kept + ("lse" not in spec.outputs)
    found = rows * at.all_rows
    if at.algorithm == "by_queries":
        found += size * at.matrices * spec.kv_len * (spec.qk_dim + spec.v_dim)
    if at.algorithm == "by_keys" and spec.dtype != spec.stats_dtype:
        found += at.all_rows * spec.qk_dim
    if spec.dtype == "float16" and choice["delta"] == "kept":
        found += 2 * at.all_rows * spec.v_dim  # out and dout, converted
    return found


def _lent(spec: AttentionSpec, choice: Choice, at: At) -> float:
    """What temporaries find room in: dk and dv of all heads, until they are written."""
    every = at.matrices == spec.batch * spec.kv_heads
    if at.algorithm != "by_queries" or not every or spec.dtype != spec.stats_dtype:
        return 0.0
    if _inline(at):
        return 0.0
    dims = spec.qk_dim + spec.v_dim
    return LENT * BYTES[spec.dtype] * at.matrices * spec.kv_len * dims


def _library(spec: AttentionSpec, choice: Choice, at: At) -> int:
    """What the largest library fusion holds inside."""
    value = at.queries * 2 * spec.v_dim // (spec.qk_dim + spec.v_dim)
    narrow = spec.out_dtype_name == "bfloat16"
    chained = 2 * at.tile + at.rows if _chained(spec, choice, at) else 0
    delta = choice["delta"]
    if delta == "summed":
        return 2 * at.tile + at.rows
    if delta == "kept" or spec.sink:
        whole = at.all_rows * (spec.v_dim * (3 if narrow else 1) + 1)
        return max(whole, chained)
    return int(value * (2.5 if narrow and not at.grouped else 1)) + chained


def _more(spec: AttentionSpec, choice: Choice, at: At) -> float:
    """What rarer choices and specs have beside."""
    size, found = BYTES[spec.dtype], float(_copied(spec, choice, at))
    if choice["slices"] == "dn":  # all arrays, and gradients, across
        rows = spec.batch * spec.q_heads * spec.q_len * (spec.qk_dim + 2 * spec.v_dim)
        keys = spec.batch * spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
        found += size * (rows + keys) + 2 * at.tile
    if choice["product_dtype"] != spec.stats_dtype:  # tiles and chunks, converted
        found += at.tile + at.queries + at.keys
    elif spec.dtype == "bfloat16" and not choice["guard"]:  # all arrays, outside loops
        rows = spec.batch * spec.q_heads * spec.q_len * (spec.qk_dim + spec.v_dim)
        keys = spec.batch * spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
        found += BYTES[spec.stats_dtype] * (rows + keys)
    return found


def _copied(spec: AttentionSpec, choice: Choice, at: At) -> int:
    """Narrow gradients of some heads among others, of which a ragged chunk reads before it
    writes: copies of all of them."""
    some = int(choice["head_chunk"]) < spec.kv_heads and spec.layout == "bthd"
    if not some or spec.dtype != "bfloat16":
        return 0
    found, (queries, keys) = 0, at.ragged
    if queries and at.algorithm != "by_keys":
        found += spec.q_heads * spec.q_len * spec.qk_dim
    if keys and at.algorithm != "by_queries":
        found = max(found, spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim))
    return found * spec.batch * BYTES[spec.dtype]
