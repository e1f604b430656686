"""What a backward pass costs on TPUs: XLA's temporaries in HBM, and the compiler's cycles.

Rates of the compiler's estimates of one head of 2^14 tokens, in bfloat16, by keys, ds formed
twice where it can be. v2, v3 and v5p keep all arrays in HBM; elsewhere a tile lies on the chip
if it fits, and beyond that every element of it goes to HBM and back: a cliff.
"""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax.tpu_memory import ALWAYS_HBM, FAR
from attngen.backends.jax.tpu_plan import laid, padded
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import LANES, SUBLANES, Tpu

MIB = 2**20


@dataclass(frozen=True)
class Rates:
    """Cycles of one version.

    Args:
        element: of a tile, its products in the dtype of the inputs.
        forms: more, for what is stored of a tile: p, p narrow, both narrow, what XLA likes.
        once: more, where ds is formed once.
        tile: of each.
        query, key: of a number of a query, of a key, in each tile; of queries only where
            they are in several chunks.
        masked: more, of an element in an edge tile.
    """

    element: float
    forms: tuple[float, float, float, float]
    once: float
    tile: float
    query: float
    key: float
    masked: float = 0.004


RATES = {
    "v2": Rates(0.0570, (0.004, 0, 0.009, 0.015), 0.004, 15000, 0.043, 0.028),
    "v3": Rates(0.0399, (0.004, 0, 0.009, 0.015), 0.004, 11600, 0.043, 0.0284),
    "v4": Rates(0.0141, (0, 0.006, 0.008, 0.012), 0.003, 6700, 0.01, 0.0238),
    "v5e": Rates(0.0109, (0, 0.0082, 0.0123, 0.014), 0.003, 11700, 0.0136, 0.002),
    "v5p": Rates(0.0138, (0.001, 0, 0.004, 0.008), 0.003, 17500, 0.0167, 0.002),
    "v6e": Rates(0.0061, (0.0015, 0.0018, 0, 0.004), 0.001, 2000, 0.051, 0.021),
    "v7x": Rates(0.0061, (0, 0.002, 0.002, 0.004), 0.001, 2000, 0.051, 0.021),
}
FORMS = ("p", "narrow", "both", "free")
TWO_PASSES = 0.28  # of a tile, more
SUMMED = 0.5  # the same, where delta is summed first
BY_QUERIES = 0.05  # more: dk and dv of all keys are read and written
WIDE = 1.5  # times, with products in the statistics' dtype
SCORE = 0.012  # cycles of an element, for each score function and its slope
AGAIN = (
    0.6  # of an element's cycles, for each number of a query: delta made in each tile
)
FITS = 0.62  # of the on-chip memory, that a tile as it is stored may take
SPILLED = 2  # times that each element of one that doesn't is moved
# bytes, as they were found: a chunk of keys, of queries, what is small
KEY_BYTES, QUERY_BYTES, SMALL = 1780, 730, 0.66 * MIB  # per key, per query
KEY_TWICE, QUERY_TWICE, SMALL_TWICE = 800, 1500, 0.3 * MIB  # the same, of two passes
PADDING = 1.03
NEAR = 0.35  # of the chip: with larger tiles what is carried is in HBM


def time_s(spec: AttentionSpec, choice: Choice, tiles: Tiles, tpu: Tpu) -> float:
    """Modelled seconds of a backward pass."""
    return cycles(spec, choice, tiles, tpu) / tpu.clock_hz


def cycles(spec: AttentionSpec, choice: Choice, tiles: Tiles, tpu: Tpu) -> float:
    """Modelled cycles."""
    rate = RATES[tpu.generation]
    matrices = int(choice["head_chunk"]) * int(choice["batch_chunk"])
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    rows = spec.repeats * q
    elements = matrices * padded(rows, SUBLANES) * padded(k, LANES)
    dims = spec.qk_dim + spec.v_dim
    element = rate.element + rate.forms[FORMS.index(str(choice["store"]))]
    element += rate.once if choice["ds"] == "once" and choice["store"] != "both" else 0
    element *= max(
        1.0, dims / (2 * tpu.matrix_side)
    )  # narrower vectors leave lanes empty
    if BYTES[str(choice["product_dtype"])] > 2:
        element *= WIDE
    element += SCORE * len(spec.score)
    again = 1 + TWO_PASSES * (choice["algorithm"] == "two_passes")
    again += SUMMED * (choice["delta"] == "summed")
    again += BY_QUERIES * (choice["algorithm"] == "by_queries")
    spilled = _spilled(choice, elements, tpu) / tpu.bytes_per_cycle
    of_tile = rate.tile + elements * element * again + spilled
    parts = rows * rate.query if q < spec.q_len else 0.0
    if choice["delta"] == "again" and choice["algorithm"] != "by_queries":
        of_tile += matrices * rows * spec.v_dim * AGAIN * rate.element
    of_tile += matrices * dims * (parts + k * rate.key)
    groups = spec.batch * spec.kv_heads / matrices
    edges = tiles.edge * elements * rate.masked
    return float(groups * (tiles.visited * of_tile + edges))


def _stored(choice: Choice, elements: int) -> int:
    """Bytes of a tile as it is stored: p, or p and ds."""
    narrow = BYTES[str(choice["product_dtype"])]
    each = {"p": 4, "free": 8, "narrow": narrow, "both": 2 * narrow}
    return each[str(choice["store"])] * elements


def _spilled(choice: Choice, elements: int, tpu: Tpu) -> float:
    """Bytes to and from HBM of a tile that doesn't fit the chip."""
    if tpu.generation in ALWAYS_HBM or not _too_large(choice, elements, tpu):
        return 0.0
    return float(2 * SPILLED * _stored(choice, elements))


def _too_large(choice: Choice, elements: int, tpu: Tpu) -> bool:
    return _stored(choice, elements) > FITS * tpu.on_chip_bytes


def temp_bytes(spec: AttentionSpec, choice: Choice, tpu: Tpu) -> int:
    """An upper bound of what XLA:TPU allocates in HBM beyond inputs and outputs."""
    matrices = int(choice["head_chunk"]) * int(choice["batch_chunk"])
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    rows = matrices * spec.repeats * padded(q, LANES)
    keys = matrices * padded(k, LANES)
    elements = rows * padded(k, LANES)
    carried = _carried(spec, choice, tpu, matrices)
    stored = _stored(choice, elements)
    if tpu.generation not in ALWAYS_HBM:
        if stored + carried <= NEAR * tpu.on_chip_bytes:
            return int(SMALL_TWICE)
        if not _too_large(choice, elements, tpu):
            return int(PADDING * carried + SMALL)
    wide = max(1.0, (spec.qk_dim + spec.v_dim) / LANES)
    if choice["algorithm"] == "two_passes":
        own = stored + wide * (KEY_TWICE * keys + QUERY_TWICE * rows) + SMALL_TWICE
        return int(PADDING * own) + carried
    second = min(stored, carried / 2)  # ds takes the room of what isn't in use
    own = stored + second + wide * (KEY_BYTES * keys + QUERY_BYTES * rows) + SMALL
    return int(PADDING * own) + carried


def kept_bytes(spec: AttentionSpec, tpu: Tpu) -> int:
    """Of lse, as it lies: of one head in rows of two on v2 and v3."""
    if "lse" in spec.outputs:
        return 0
    near = tpu.generation not in FAR
    size = BYTES[spec.stats_dtype]
    return laid(spec.batch, spec.q_heads, spec.q_len, size, near) // spec.devices


def _carried(spec: AttentionSpec, choice: Choice, tpu: Tpu, matrices: int) -> int:
    """Of all rows, and gradients that are carried whole, in float32, tokens last."""
    size = BYTES[spec.stats_dtype]
    rows = spec.batch * spec.q_heads * padded(spec.q_len, LANES)
    kept = {"kept": 1, "again": 0, "summed": 2}[str(choice["delta"])]
    near = tpu.generation not in FAR
    whole = laid(spec.batch, spec.q_heads, spec.q_len, size, near)
    found = kept_bytes(spec, tpu) * spec.devices + kept * whole
    if choice["algorithm"] == "by_keys":
        found += size * rows * padded(spec.qk_dim, SUBLANES)
    if choice["algorithm"] == "by_queries":
        dims = padded(spec.qk_dim, SUBLANES) + padded(spec.v_dim, SUBLANES)
        found += size * matrices * padded(spec.kv_len, LANES) * dims
    if choice["slices"] == "nd":  # rows of fewer than 128 numbers take 128
        found *= max(1, 2 * LANES // (spec.qk_dim + spec.v_dim))
    return found
