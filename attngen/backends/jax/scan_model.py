"""What the algorithm "scanned" takes: bytes and seconds of forward and backward in one program.

Bytes: a sum of what lives together in the reverse scan, each with the factor by which XLA:CPU
keeps it. Factors are the least with which the sum bounded 288 programs of random specs; that of
guards (singular.py) bounded 30 of three.
"""

from __future__ import annotations

from collections.abc import Iterator

from attngen.backends.jax.scans import steps, visits
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.singular import guarded
from attngen.slopes import trained
from attngen.spec import AttentionSpec

FACTORS = {
    "arguments by step": 2.15,
    "chunk of keys": 2.04,
    "keys": 1.51,
    "keys in reach": 0.74,
    "keys, converted": 1.61,
    "maxima": 1.34,
    "operands": 1.3,
    "operands by step": 3.0,
    "outputs by step": 0.22,
    "outputs by step, converted": 1.44,
    "queries, converted": 0.28,
    "queries, moved": 1.54,
    "ragged": 0.25,
    "rows": 2.74,
    "tile": 4.2,
    "tile, converted": 0.9,
    "tile, guarded": 3.5,
    "tile, of several heads": 0.98,
    "tile, scored": 0.99,
    "tile, single": 1.37,
    "tile, single, scored": 1.03,
    "tile, windowed": 0.68,
}
SLACK, SLACK_BYTES = 1 / 3, 138_664  # of a small program, at most
MARGIN = 1.06  # of programs that were not among them

# Seconds of a processor: times a forward pass, and of what has no part in it.
TIMES = 4.5
STEP_S = 30e-6  # of a key chunk, skipped or not
SUM_S = 1.5e-9  # of an element of keys, whose gradient is added for a chunk of queries
LANES = 128  # of a TPU: the last axis fills them


def parts(spec: AttentionSpec, choice: Choice) -> Iterator[tuple[str, float]]:
    """What lives together, in bytes, by name."""
    wide, narrow = BYTES[spec.stats_dtype], BYTES[spec.dtype]
    out = BYTES[spec.out_dtype_name]
    q_chunk, k_chunk = int(choice["q_chunk"]), int(choice["k_chunk"])
    batches, heads = int(choice["batch_chunk"]), int(choice["head_chunk"])
    groups = steps(spec, choice)
    dims = spec.qk_dim + spec.v_dim
    queries = spec.batch * spec.q_heads * spec.q_len
    keys = spec.batch * spec.kv_heads * spec.kv_len * dims
    own = queries // groups
    own_keys = wide * keys // groups
    every = -(-spec.kv_len // k_chunk)
    most = visits(spec, q_chunk, k_chunk)
    rows = batches * heads * spec.repeats * q_chunk
    several = batches * heads * spec.repeats > 1
    converted, windowed = narrow != wide, most < every
    whole = spec.dtype == "bfloat16"  # converted before loops
    ragged = bool(spec.kv_len % k_chunk)
    masked = spec.mask is not None or spec.kv_lengths or spec.q_lengths or ragged
    tile = wide * rows * k_chunk
    if groups > 1:
        yield "arguments by step", narrow * (queries * spec.qk_dim + keys)
        yield "outputs by step", out * queries * spec.v_dim
        if whole:
            yield "outputs by step, converted", wide * queries * spec.v_dim
    if q_chunk < spec.q_len:
        yield "keys", own_keys
    if every > 1:
        yield "keys in reach", own_keys * most / every
        yield "chunk of keys", wide * batches * heads * k_chunk * dims
    if converted:
        yield "keys, converted", own_keys
    if whole:
        yield "queries, converted", wide * own * dims
    if several:  # laid head by head, and back
        yield "queries, moved", narrow * own * spec.qk_dim + out * own * spec.v_dim
    if ragged or spec.q_len % q_chunk:
        yield "ragged", own_keys + wide * own * dims
    yield "maxima", wide * rows * most
    yield "tile", tile
    if whole:
        yield "tile, converted", tile
    if windowed:
        yield "tile, windowed", tile
    if spec.score:
        yield "tile, scored", tile
    yield "rows", wide * rows * dims
    if guarded(spec) != tuple(score.expr for score in spec.score):
        yield "tile, guarded", tile
    if several:
        yield "tile, of several heads", tile
    if every == 1 and not masked:  # no loop, no switch: one large library fusion
        yield "tile, single", tile
        if spec.score:
            yield "tile, single, scored", tile
    widened = sum(wide * spec.bytes_of(o.name) / BYTES[o.dtype] for o in trained(spec))
    yield ("operands by step" if groups > 1 else "operands"), widened


def temp_bytes(spec: AttentionSpec, choice: Choice, lanes: int = 1) -> int:
    """An upper bound of what XLA allocates beyond inputs and outputs, in bytes.

    Args:
        lanes: that a head dim is padded to.
    """
    padded = max(-(-d // lanes) * lanes / d for d in (spec.qk_dim, spec.v_dim))
    total = 0.0
    for name, size in parts(spec, choice):
        own = 1.0 if name.startswith(("tile", "operands", "maxima")) else padded
        total += FACTORS[name] * size * own
    total += min(total * SLACK, SLACK_BYTES)
    return int(MARGIN * total)


def forward(choice: Choice) -> Choice:
    """The candidate that computes a forward pass alone in the same chunks."""
    return {**choice, "algorithm": "running", "loop": "fori"}


def time_s(spec: AttentionSpec, choice: Choice, forward_s: float) -> float:
    """Modelled seconds, given those of a forward pass."""
    groups = steps(spec, choice)
    q_chunks = -(-spec.q_len // int(choice["q_chunk"]))
    k_chunks = visits(spec, int(choice["q_chunk"]), int(choice["k_chunk"]))
    keys = spec.batch * spec.kv_heads * spec.kv_len * (spec.qk_dim + spec.v_dim)
    summed = q_chunks * keys * SUM_S
    return TIMES * forward_s + groups * q_chunks * k_chunks * STEP_S + summed
