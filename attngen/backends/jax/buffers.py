"""The arrays of one tile, in bytes, and how an emitted program walks over tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

from attngen.dtypes import BYTES
from attngen.expr import READS, Expr, variables, walk
from attngen.intervals import examine
from attngen.plans import Choice
from attngen.regions import Span, analyse
from attngen.spec import AttentionSpec
from attngen.tiles import key_limits

FUSED_BYTES = 2**14  # of an element of each row: from here on the library chains rows
LENT_BYTES = 2**16  # an output of less isn't counted on
_LEAVES = ("var", "const", "load")


class Facts(NamedTuple):
    """What the spec alone says about buffers."""

    edges: bool  # some keys aren't seen: by a mask, by lengths, by scores of -inf
    masked: bool  # by a mask or by lengths: scores are replaced
    interior: bool  # there can be steps that evaluate no mask
    static_edge: bool  # the mask is of keys alone: its edge is a step outside the loop
    window: int  # keys that a query sees where there are edges on both sides; else 0
    bounded: bool  # queries or lengths say which key chunks are visited, or masked
    movable: bool  # bounds of key loops depend on nothing but the queries' position
    letters: frozenset[str]  # axes that the mask, or else the last score, spans
    score_ops: int  # elementwise operations of the scores
    placed: bool  # scores depend on the positions themselves
    gathers: bool  # a score reads a table at computed indices
    bhtd: bool
    sink: bool
    out: bool
    single: bool  # one output


@functools.lru_cache(maxsize=64)
def facts(spec: AttentionSpec) -> Facts:
    span, lengths = analyse(spec), spec.kv_lengths or spec.q_lengths
    masked = spec.mask is not None or lengths
    drops = examine(spec).drops_keys
    nodes = [n for s in spec.score for n in walk(s.expr)]
    return Facts(
        edges=masked or drops,
        masked=masked,
        interior=span.any_full and not drops,
        static_edge=spec.mask is not None and not lengths and _of_keys(spec.mask.expr),
        window=_window(spec, span),
        bounded=bool(lengths or span.limits),
        movable=masked and not lengths and spec.static_q_offset is not None,
        letters=_letters(spec),
        score_ops=sum(n.op not in _LEAVES for n in nodes),
        placed=any(_placed(n) for n in nodes),
        gathers=any(
            a.op not in _LEAVES for n in nodes if n.op == "load" for a in n.args
        ),
        bhtd=spec.layout == "bhtd",
        sink=spec.sink,
        out="out" in spec.outputs,
        single=len(spec.outputs) == 1,
    )


def _window(spec: AttentionSpec, span: Span) -> int:
    if span.full_low is None or span.full_high is None:
        return 0
    low, high, *_ = key_limits(spec, span, spec.q_len // 2, 1)
    return high - low


def _placed(node: Expr) -> bool:
    return node.op != "load" and any(
        a.op == "var" and a.value in ("q", "k") for a in node.args
    )


def _of_keys(mask: Expr) -> bool:
    loads = any(n.op in READS for n in walk(mask))
    return set(variables(mask)) <= {"k"} and not loads


def _letters(spec: AttentionSpec) -> frozenset[str]:
    letters: set[str] = set()
    if spec.mask is not None:
        letters |= set(variables(spec.mask.expr))
    elif spec.score:
        letters |= set(variables(spec.score[-1].expr))
    letters |= {"b", "k"} if spec.kv_lengths else set()
    letters |= {"b", "q"} if spec.q_lengths else set()
    letters |= {"b"} if spec.q_offset == "operand" else set()
    return frozenset(letters)


class Tile(NamedTuple):
    """Bytes of the arrays of one tile, and how the program walks over the tiles."""

    scores: int
    seen: int  # a byte for each score
    row: int  # an element of each row: a maximum, a sum
    rows: int  # queries
    acc: int  # weighted sums; 0 where only lse is asked for
    key: int  # an element of each key
    keys: int
    values: int
    pairs: int  # a byte for each pair of a query and a key, heads and batches aside
    hoisted: (
        int  # what XLA makes of positions before the loops, where all are in one tile
    )
    lent: (
        int  # of the output, which lends itself to temporaries where no loop carries it
    )
    width: int  # keys
    chunks: int
    unroll: int  # steps of the loop over key chunks; 0: no loop
    edge_unroll: int  # … where it goes over an edge
    rest: int  # chunks that an unrolled loop leaves over
    tail: int  # 1 where the last chunk is a step of its own
    outside: int  # rest + tail
    dense: bool
    batched: bool  # several matrices are multiplied at once
    grouped: bool  # several query heads share a kv head
    many: bool  # one or the other: queries are copied as they are transposed
    lone: bool  # one query a matrix
    moved: bool  # keys and values are transposed
    sliced: bool  # … or sliced, where there is one tile of all keys
    all_heads: bool  # of kv, and all batches
    cast: bool  # keys and values are converted
    eager: bool  # they are converted, or sliced, for all steps at once
    twice: bool  # … and then transposed into another buffer
    poly: bool
    apart: bool  # masked scores are another buffer, for the mask is broadcast to them
    fused: bool  # the library takes chains of rows
    looped: bool  # a loop carries the output
    fixed: bool  # XLA knows the bounds of key loops: all queries are in one chunk
    parts: int  # chains of steps that are independent of each other
    twice_made: bool  # scores are made for their maximum, and made again
    scaled: bool  # scores are scaled, not queries
    strip: int  # scores of the longest static step down a diagonal
    triangle: int  # scores of all of these steps
    ones: bool  # a column of ones among values sums what scores are raised to


def tile(spec: AttentionSpec, choice: Choice, know: Facts) -> Tile:
    size, dense = BYTES[spec.stats_dtype], choice["algorithm"] == "dense"
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    b, g, r = int(choice["batch_chunk"]), int(choice["head_chunk"]), spec.repeats
    row, key = b * g * r * q * size, b * g * k * size
    chunks, unroll, rest, tail = _walk(spec, choice, know)
    cast = spec.dtype != choice["product_dtype"]
    all_heads = g == spec.kv_heads and b == spec.batch
    looped = q != spec.q_len or not all_heads
    moved = g > 1 and not know.bhtd
    late = all_heads and _late(choice, chunks, tail)
    out = BYTES[spec.out_dtype_name] * (row // size) * spec.v_dim
    ones = choice.get("denominator") == "ones"
    columns = spec.v_dim + ones
    chained = chunks == 1 and choice["exp"] != "polynomial"
    stacked = choice["algorithm"] == "summaries" and not chained
    width = int(choice.get("diagonal", 0))
    summed = know.out or ones
    sliced = key // size * BYTES[str(choice["product_dtype"])]
    return Tile(
        scores=row * k,
        seen=row * k // size,
        row=row,
        rows=row * spec.qk_dim,
        acc=row * columns if summed else 0,
        key=key,
        keys=sliced * spec.qk_dim,
        values=sliced * columns if summed else 0,
        pairs=q * k,
        hoisted=_hoisted(spec, know, row * k, q * k)
        if looped and q == spec.q_len
        else 0,
        lent=0 if looped or not know.out or out < LENT_BYTES else out,
        width=k,
        chunks=chunks,
        unroll=unroll,
        edge_unroll=1 if know.bounded else unroll,
        rest=rest,
        tail=tail,
        outside=rest + tail,
        dense=dense,
        batched=b * g > 1,
        grouped=r > 1,
        many=b * g * r > 1,
        lone=q * r == 1,
        moved=moved,
        sliced=moved or not all_heads,
        all_heads=all_heads,
        cast=cast,
        eager=cast or late,
        twice=moved and all_heads and (cast or late),
        poly=choice["exp"] == "polynomial",
        apart=not _spans(know.letters, b, g * r),
        fused=row >= FUSED_BYTES and size == 4 and k > 1 and not stacked,
        looped=looped,
        fixed=know.movable and q == spec.q_len,
        parts=int(choice.get("parts", 1)),
        twice_made=choice.get("qk") == "twice",
        scaled=choice.get("scale", "queries") != "queries",
        strip=row * width,
        triangle=row * width * (q // width + 1) // 2 if width else 0,
        ones=ones,
    )


def _walk(spec: AttentionSpec, choice: Choice, know: Facts) -> tuple[int, ...]:
    """Chunks of keys; steps of the loop's body; those outside: left over, and the tail."""
    k, unroll = int(choice["k_chunk"]), int(choice.get("unroll", 1))
    chunks = -(-spec.kv_len // k)
    ragged = spec.kv_len % k and not know.masked
    tail = int(chunks > 1 and bool(ragged or know.static_edge))
    if choice["loop"] == "unrolled" or choice["algorithm"] == "dense":
        return chunks, 0, 0, tail
    if parts := int(choice.get("parts", 0)):  # chunks left over: a loop, or one step
        return chunks, parts, int((chunks - tail) % parts == 1), tail
    if know.bounded and not know.static_edge:
        return chunks, unroll, 0, tail  # what is left over is a loop of its own
    if (chunks - tail) // unroll <= 1:  # a loop of one round is none
        return chunks, 0, 0, tail
    return chunks, unroll, (chunks - tail) % unroll, tail


def _late(choice: Choice, chunks: int, tail: int) -> bool:
    """Whether an unrolled loop of one round has steps beside it: slices are dynamic."""
    unroll = int(choice.get("unroll", 1))
    rounds = (chunks - tail) // unroll
    if choice["guard"]:  # which keeps slices where they are, too
        return chunks > 1
    return choice["loop"] != "unrolled" and rounds == 1 < unroll < chunks


def _spans(letters: frozenset[str], batches: int, heads: int) -> bool:
    """Whether a mask of these axes has every axis of the tile."""
    return (
        letters >= {"q", "k"}
        and (batches == 1 or "b" in letters)
        and (heads == 1 or "h" in letters)
    )


def _hoisted(spec: AttentionSpec, know: Facts, scores: int, pairs: int) -> int:
    """A mask of positions, or what scores make of them, for all heads."""
    if not know.placed:
        return pairs if know.masked else 0
    return 4 * pairs + (scores if "h" in know.letters and spec.batch > 1 else 0)
