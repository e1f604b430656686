"""What JAX code can be emitted: the choices, and which of them are legal for a spec."""

from __future__ import annotations

import math
from collections.abc import Sequence

from attngen import slopes, storage
from attngen.backends.jax.distance import has_distance, overflows
from attngen.backends.jax.packed import lowered
from attngen.backends.jax.shards import local
from attngen.diagonals import hull_is_seen, rises
from attngen.errors import NotBuiltError
from attngen.intervals import examine
from attngen.lists import unlistable
from attngen.operands import Operand
from attngen.plans import Choice, Option
from attngen.regions import analyse
from attngen.spec import AttentionSpec

LOOPS = ("fori", "scan", "unrolled")
CHUNKED = ("running", "split_kv", "summaries")  # what goes over the keys in chunks
# what an algorithm without that choice does
DEFAULTS: dict[str, Option] = {
    "unroll": 1,
    "scale": "queries",
    "denominator": "sum",
    "qk": "once",
    "slices": "nd",
    "steps": "fori",
    "diagonal": 0,
    "parts": 1,
    "blank": "scores",
    "mask": "positions",
    "skip": "bounds",
    "store": "free",
    "ds": "once",
    "mass": "none",
}
UNROLLED = 16  # key chunks, at most: each is compiled on its own


def refuse(spec: AttentionSpec) -> None:
    """Raise NotBuiltError for what the contract has and this version doesn't do."""
    storage.refuse(spec)
    _refuse_shards(spec)
    if spec.derivatives == "any" and spec.dropout:
        raise NotBuiltError(
            'Dropout with derivatives="any" isn\'t built yet.',
            got=f"dropout={spec.dropout}, derivatives='any'",
            needed="dropout=0.0, or derivatives='vjp'",
        )
    local(lowered(spec))
    _refuse_tables(spec)


def _refuse_shards(spec: AttentionSpec) -> None:
    """Packed sequences are of any length: no two devices would have as many tokens."""
    if spec.devices == 1 or (spec.storage == "dense" and not spec.is_quantised):
        return
    field = "kv_dtype" if spec.storage == "dense" else "storage"
    shards = f"batch_shards={spec.batch_shards}, head_shards={spec.head_shards}"
    raise NotBuiltError(
        f"{field}={getattr(spec, field)!r} isn't built for shards.",
        got=shards,
        needed="batch_shards=1 and head_shards=1",
        hint="inside a jax.shard_map each device calls a kernel of its own part",
    )


def _refuse_tables(spec: AttentionSpec) -> None:
    """A table's gradient is scattered at computed indices, which would gather its shards."""
    if spec.derivatives != "vjp" or spec.devices == 1:
        return
    for node in (n for score in spec.score for n in slopes.reads(score)):
        assert isinstance(node.value, Operand)
        computed = any(i.op not in ("var", "const") for i in node.args)
        if computed and {"b", "h"} & set(map(str, node.value.axes)):
            name = node.value.name
            raise NotBuiltError(
                f"The gradient of {name!r} isn't built for shards.",
                got=f"{name}, read at computed indices, {spec.devices} devices",
                needed="batch_shards=1 and head_shards=1, or derivatives='any'",
            )


def products(spec: AttentionSpec) -> tuple[str, ...]:
    """The dtypes that the matrix products can be made in, the wider first."""
    return tuple(dict.fromkeys((spec.stats_dtype, spec.dtype)))


def exponentials(spec: AttentionSpec) -> tuple[str, ...]:
    """How a tile of scores can be raised, the fastest on a processor first.

    "polynomial" is 2**x by a polynomial of degree 5 and an addition to the exponent, in
    float32, to a relative error of 2e-7.
    """
    own = ("polynomial",) if spec.stats_dtype == "float32" else ()
    return (*own, "exp", "exp2")


def option(choice: Choice, name: str) -> Option:
    """A choice, or what an algorithm that doesn't have it does."""
    return choice.get(name, DEFAULTS[name])


def edge_share(choice: Choice) -> float:
    """The part of a chunk's edge tiles that is computed: below a diagonal, in steps."""
    step = int(option(choice, "diagonal"))
    return (1 + step / int(choice["q_chunk"])) / 2 if step else 1.0


def illegal(spec: AttentionSpec, choice: Choice) -> str | None:
    """The reason why a candidate can't be emitted, or None."""
    return (
        _bad_size(spec, choice)
        or _bad_word(spec, choice)
        or _bad_stored(spec, choice)
        or (
            _bad_dense(choice)
            if choice["algorithm"] == "dense"
            else _bad_scan(spec, choice)
            if choice["algorithm"] == "scanned"
            else _bad_loop(spec, choice) or _bad_tile(spec, choice)
        )
    )


def _bad_size(spec: AttentionSpec, choice: Choice) -> str | None:
    limits = {
        "q_chunk": ("q_len", spec.q_len),
        "k_chunk": ("kv_len", spec.kv_len),
        "head_chunk": ("kv_heads", spec.kv_heads),
        "batch_chunk": ("batch", spec.batch),
    }
    for name, (field, limit) in limits.items():
        value = choice[name]
        if not _integer(value) or not 1 <= int(value) <= limit:
            return f"{name} must be an integer from 1 to {field} = {limit}"
        if name in ("head_chunk", "batch_chunk") and limit % int(value):
            return f"{name} must divide {field} = {limit}"
        shards = {"head_chunk": spec.head_shards, "batch_chunk": spec.batch_shards}
        if int(value) % shards.get(name, 1):
            return f"{name} must be as much of each of {shards[name]} shards"
        if choice["algorithm"] == "dense" and value != limit:
            return f"dense has one tile: {name} = {field} = {limit}"
    return None


def _integer(value: Option) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad_word(spec: AttentionSpec, choice: Choice) -> str | None:
    """Of choices that are one of a few values."""
    words: dict[str, Sequence[Option]] = {
        "loop": (*LOOPS, "map") if choice["algorithm"] == "summaries" else LOOPS,
        "product_dtype": products(spec),
        "exp": exponentials(spec),
        "scale": ("queries", "scores"),
        "denominator": ("sum", "ones"),
        "qk": ("once", "twice"),
        "slices": ("nd", "dn"),
        "steps": ("fori", "map"),
        "unroll": (1, 2, 4, 8),
        "blank": ("scores", "limits"),
        "mask": ("positions", "distance"),
        "skip": ("bounds", "list"),
    }
    for name, values in words.items():
        if (value := choice.get(name, values[0])) not in values or value is True:
            return f"{name} must be " + " or ".join(str(v) for v in values)
    if not isinstance(choice["guard"], bool):
        return "guard must be true or false"
    if option(choice, "scale") == "queries" and not scalable(spec, choice):
        return (
            f"only products in {spec.stats_dtype} take queries that are scaled, or a "
            "scale that is a power of two"
        )
    return None


def is_stored(spec: AttentionSpec) -> bool:
    """Whether K/V are pages, or of another dtype: then they are read chunk by chunk."""
    return spec.storage == "paged" or spec.is_narrow


def _bad_stored(spec: AttentionSpec, choice: Choice) -> str | None:
    """Of K/V that are pages, or of another dtype."""
    if not is_stored(spec):
        return None
    kind, narrow = choice["algorithm"], spec.is_narrow
    what = "convert" if narrow else "gather"
    if kind not in CHUNKED:
        return f"{kind} would {what} all of K/V at once: chunks of them are read"
    if option(choice, "slices") == "dn":
        return f"slices = dn would {what} all of K/V at once: slices = nd"
    if narrow and not choice["guard"]:
        return "XLA would convert all of K/V before the loops: guard = true"
    if option(choice, "diagonal"):
        return "diagonal is for K/V in order, in dtype: diagonal = 0"
    own_scale = spec.is_quantised and spec.kv_scale != "head"
    if own_scale and option(choice, "denominator") == "ones":
        return "denominator = ones would sum p times scales of v: denominator = sum"
    return None


def scalable(spec: AttentionSpec, choice: Choice) -> bool:
    """Whether queries can be scaled with no other rounding than scores would have.

    A power of two rounds nothing, unless it comes in units of log 2.
    """
    if choice["product_dtype"] == spec.stats_dtype:
        return True
    if spec.is_quantised:  # scales of keys are of no power
        return False
    exact = math.frexp(spec.scale_value)[0] == 0.5
    return exact and (choice["exp"] == "exp" or bool(spec.score))


def _bad_dense(choice: Choice) -> str | None:
    if choice["exp"] != "exp":
        return "dense has exp = exp"
    return (
        None if choice["loop"] == "unrolled" else "dense has no loop: loop = unrolled"
    )


def _bad_scan(spec: AttentionSpec, choice: Choice) -> str | None:
    """Of scans that are differentiable to any order."""
    if choice["loop"] != "scan":
        return "scanned has loop = scan"
    whole = (
        ("batch_chunk", "batch", spec.batch),
        ("head_chunk", "kv_heads", spec.kv_heads),
    )
    for name, field, length in whole:
        if spec.devices > 1 and choice[name] != length:
            return f"scanned takes all that is sharded in a step: {name} = {field}"
    return None


def _bad_loop(spec: AttentionSpec, choice: Choice) -> str | None:
    """Of the loop over key chunks, and of the one around it."""
    chunks = -(-spec.kv_len // int(choice["k_chunk"]))
    loop, unroll = choice["loop"], int(option(choice, "unroll"))
    kind = choice["algorithm"]
    if loop == "unrolled" and chunks > UNROLLED:
        return f"unrolled only for at most {UNROLLED} key chunks"
    if loop in ("scan", "unrolled") and kind != "running":
        return f"{kind} has no loop {loop}"
    if loop == "map" and (spec.kv_len % int(choice["k_chunk"]) or bounded(spec)):
        return "map is for whole key chunks that are all alike"
    if unroll != 1 and (loop != "fori" or not unrollable(spec)):
        return "only fori loops over tiles without a mask can be unrolled by a number"
    if unroll > chunks:
        return "unroll can't exceed the key chunks"
    if loop != "fori" and chunks > 1 and bounded(spec):
        return "only fori skips key chunks whose bounds depend on the query chunk"
    if option(choice, "steps") == "map":
        if spec.q_len % int(choice["q_chunk"]):
            return "steps = map needs chunks of queries that are all whole"
        if not _steps(spec, choice):
            return "steps = map needs more than one step"
    if option(choice, "skip") == "list":
        if kind != "running" or loop != "fori":
            return "skip = list is for running with loop = fori"
        if chunks == 1:
            return "skip = list is for more than one key chunk"
        if (reason := unlistable(spec)) is not None:
            return reason
    parts = choice.get("parts", 2)
    if kind == "split_kv" and (not _integer(parts) or not 2 <= int(parts) <= chunks):
        return "parts must be an integer from 2 to the number of key chunks"
    if kind == "split_kv" and int(parts) > UNROLLED:
        return f"parts can't exceed {UNROLLED}"
    return None


def _steps(spec: AttentionSpec, choice: Choice) -> bool:
    """Whether there is a loop around the one over key chunks."""
    pairs = (
        (spec.batch, "batch_chunk"),
        (spec.kv_heads, "head_chunk"),
        (spec.q_len, "q_chunk"),
    )
    return any(choice[name] != length for length, name in pairs)


def _bad_tile(spec: AttentionSpec, choice: Choice) -> str | None:
    """Of what a tile computes, and of the triangle at a causal edge."""
    if spec.dropout and option(choice, "denominator") == "ones":
        return "denominator = ones would sum p as dropout leaves it: denominator = sum"
    twice = option(choice, "qk") == "twice"
    if twice and choice["algorithm"] == "summaries":
        return "qk = twice is for a running maximum, which summaries don't have"
    many = int(choice["batch_chunk"]) > 1
    listed = option(choice, "skip") == "list"
    if listed and (option(choice, "blank") == "limits" or option(choice, "diagonal")):
        return "skip = list has no limits: blank = scores, diagonal = 0"
    if option(choice, "blank") == "limits" and not limited(spec, many):
        return (
            "blank = limits needs each key between a chunk's limits to be seen by one of "
            "its queries"
        )
    diagonal, q_chunk = option(choice, "diagonal"), int(choice["q_chunk"])
    if option(choice, "mask") == "distance" and (diagonal or not distant(spec)):
        return (
            "mask = distance needs a mask that relates k to q by one, an offset that is "
            "known, 32 bits, and diagonal = 0"
        )
    if diagonal == 0 and diagonal is not False:
        return None
    if not _integer(diagonal) or int(diagonal) < 1 or q_chunk % int(diagonal):
        return "diagonal must be 0 or divide q_chunk"
    if q_chunk // int(diagonal) > UNROLLED:
        return f"diagonal only for at most {UNROLLED} steps, of q_chunk / diagonal keys"
    if twice or choice["loop"] != "fori":
        return "diagonal needs loop = fori and qk = once"
    if not rises(spec, q_chunk, int(choice["k_chunk"])):
        return (
            "diagonal needs a causal mask alone, whole chunks, and q_chunk a multiple of "
            "k_chunk"
        )
    return None


def limited(spec: AttentionSpec, many: bool) -> bool:
    """Whether a chunk's limits tell which keys none of its queries sees.

    Args:
        many: whether a tile has several batches, whose limits may differ at run time.
    """
    run_time = spec.kv_lengths or spec.static_q_offset is None
    bare = spec.mask is None and not spec.kv_lengths
    if bare or (run_time and many) or examine(spec).drops_keys:
        return False
    return hull_is_seen(spec)


def distant(spec: AttentionSpec) -> bool:
    """Whether the mask can be told by distances."""
    if spec.mask is None or spec.static_q_offset is None:
        return False
    return (
        has_distance(spec.mask.expr)
        and examine(spec).index_dtype == "int32"
        and not overflows(spec)
    )


def unrollable(spec: AttentionSpec) -> bool:
    """Whether there are tiles without a mask."""
    span = analyse(spec)
    return span.some and span.any_full


def bounded(spec: AttentionSpec) -> bool:
    """Whether the key chunks to visit, or to mask, depend on queries or on lengths."""
    span = analyse(spec)
    limits = [span.low, span.high]
    if span.any_full:
        limits += [span.full_low, span.full_high]
    own = spec.kv_lengths or spec.q_lengths
    return own or not span.some or any(x is not None for x in limits)


def describe(choice: Choice) -> str:
    """A candidate in a few words."""
    if choice["algorithm"] == "dense":
        return "dense"
    heads = f"{choice['head_chunk']} kv head" + (
        "s" if choice["head_chunk"] != 1 else ""
    )
    batch = f" of {choice['batch_chunk']} batches" if choice["batch_chunk"] != 1 else ""
    text = (
        f"{choice['algorithm']} · {choice['q_chunk']} queries × {choice['k_chunk']} keys"
        f" · {heads}{batch} a step · {choice['loop']}"
    )
    if (unroll := option(choice, "unroll")) != 1:
        text += f" by {unroll}"
    if (parts := option(choice, "parts")) != 1:
        text += f" · {parts} parts"
    if diagonal := option(choice, "diagonal"):
        text += f" · diagonal {diagonal}"
    rare = ("denominator", "qk", "slices", "steps", "skip")
    unusual = [n for n in rare if option(choice, n) != DEFAULTS[n]]
    return text + "".join(f" · {n} {choice[n]}" for n in unusual)
