"""What JAX code can be emitted: the choices, and which of them are legal for a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attngen.errors import NotBuiltError
from attngen.plans import Choice, Option
from attngen.regions import analyse
from attngen.spec import AttentionSpec

LOOPS = ("fori", "scan", "unrolled")
UNROLLED = 16  # key chunks, at most: each is compiled on its own
LARGEST_CHUNK = 8192  # that the planner considers by itself

# field → (the values that are built, what to do instead)
_BUILT: dict[str, tuple[tuple[object, ...], str]] = {
    "derivatives": (
        (None,),
        "dataclasses.replace(spec, derivatives=None) computes forward",
    ),
    "dropout": ((0.0,), "dataclasses.replace(spec, dropout=0.0)"),
    "storage": (("dense",), 'pad into storage="dense" with kv_lengths=True'),
    "kv_dtype": ((None,), "convert k and v to spec.dtype first"),
}


def refuse(spec: AttentionSpec) -> None:
    """Raise NotBuiltError for what the contract has and this version doesn't do."""
    for field, (built, hint) in _BUILT.items():
        value = getattr(spec, field)
        if value not in built and not (field == "kv_dtype" and value == spec.dtype):
            raise NotBuiltError(
                f"{field}={value!r} isn't built yet.",
                got=f"{field}={value!r}",
                needed=f"{field}={built[0]!r}",
                hint=hint,
            )


def space(spec: AttentionSpec) -> Mapping[str, Mapping[str, Sequence[Option]]]:
    """For each algorithm, the values of each choice that are worth considering."""
    product = products(spec)[:1]
    guard = (product[0] != spec.dtype,)
    dense: dict[str, Sequence[Option]] = {
        "q_chunk": (spec.q_len,),
        "k_chunk": (spec.kv_len,),
        "head_chunk": (spec.kv_heads,),
        "batch_chunk": (spec.batch,),
        "loop": ("unrolled",),
        "unroll": (1,),
        "exp": ("exp",),
        "product_dtype": product,
        "guard": (False,),
    }
    running: dict[str, Sequence[Option]] = {
        "q_chunk": _chunks(spec.q_len),
        "k_chunk": _chunks(spec.kv_len),
        "head_chunk": _parts(spec.kv_heads),
        "batch_chunk": tuple(dict.fromkeys((1, spec.batch))),
        "loop": ("fori", "unrolled"),
        "unroll": (1,) if bounded(spec) else (1, 2),
        "exp": exponentials(spec)[:1],
        "product_dtype": product,
        "guard": guard,
    }
    return {"running": running, "dense": dense}


def products(spec: AttentionSpec) -> tuple[str, ...]:
    """The dtypes that the matrix products can be made in, the wider first."""
    return tuple(dict.fromkeys((spec.stats_dtype, spec.dtype)))


def exponentials(spec: AttentionSpec) -> tuple[str, ...]:
    """How a tile of scores can be raised, the fastest on a processor first.

    "polynomial" is 2**x by a polynomial of degree 5 and an addition to the exponent, in
    float32, to a relative error of 3e-7.
    """
    own = ("polynomial",) if spec.stats_dtype == "float32" else ()
    return (*own, "exp", "exp2")


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


def illegal(spec: AttentionSpec, choice: Choice) -> str | None:
    """The reason why a candidate can't be emitted, or None."""
    limits = {
        "q_chunk": ("q_len", spec.q_len),
        "k_chunk": ("kv_len", spec.kv_len),
        "head_chunk": ("kv_heads", spec.kv_heads),
        "batch_chunk": ("batch", spec.batch),
    }
    for name, (field, limit) in limits.items():
        value = choice[name]
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not 1 <= value <= limit
        ):
            return f"{name} must be an integer from 1 to {field} = {limit}"
        if name in ("head_chunk", "batch_chunk") and limit % value:
            return f"{name} must divide {field} = {limit}"
        if choice["algorithm"] == "dense" and value != limit:
            return f"dense has one tile: {name} = {field} = {limit}"
    if choice["loop"] not in LOOPS:
        return "loop must be one of " + ", ".join(LOOPS)
    if choice["product_dtype"] not in products(spec):
        return "product_dtype must be " + " or ".join(products(spec))
    if not isinstance(choice["guard"], bool):
        return "guard must be true or false"
    if choice["exp"] not in exponentials(spec):
        return "exp must be one of " + ", ".join(exponentials(spec))
    unroll = choice["unroll"]
    if isinstance(unroll, bool) or unroll not in (1, 2, 4, 8):
        return "unroll must be 1, 2, 4 or 8"
    if choice["algorithm"] == "dense" and (unroll, choice["exp"]) != (1, "exp"):
        return "dense has no loop to unroll, and exp = exp"
    if choice["algorithm"] == "dense":
        return (
            None
            if choice["loop"] == "unrolled"
            else "dense has no loop: loop = unrolled"
        )
    chunks = -(-spec.kv_len // int(choice["k_chunk"]))
    if choice["loop"] == "unrolled" and chunks > UNROLLED:
        return f"unrolled only for at most {UNROLLED} key chunks"
    if unroll != 1 and (choice["loop"] != "fori" or bounded(spec)):
        return "only fori loops with constant bounds can be unrolled by a number"
    if int(unroll) > chunks:
        return f"unroll can't exceed the key chunks, {chunks}"
    if choice["loop"] != "fori" and chunks > 1 and bounded(spec):
        return "only fori skips key chunks whose bounds depend on the query chunk"
    return None


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
    text = f"running · {choice['q_chunk']} queries × {choice['k_chunk']} keys · {heads}{batch} a step"
    if choice["unroll"] != 1:
        return f"{text} · {choice['loop']} by {choice['unroll']}"
    return f"{text} · {choice['loop']}"
