"""What a backward pass costs: temporaries and time."""

from __future__ import annotations

from attngen.cost import Cost
from attngen.dtypes import BYTES
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

DROPOUT_S = 1.5e-9  # of an element: its word of dropout's generator


def dropout_bytes(spec: AttentionSpec, scores: int) -> int:
    """Of a tile: which weights are kept, and the weights that are left.

    Args:
        scores: bytes of a tile.
    """
    return 2 * scores if spec.dropout else 0


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    """Modelled bytes and seconds."""
    size = BYTES[spec.stats_dtype]
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    many = int(choice["batch_chunk"]) * int(choice["head_chunk"])
    rows = many * spec.repeats * q
    scores = rows * k * size
    dims = spec.qk_dim + spec.v_dim
    temp = 3 * scores + 3 * size * (rows + many * k) * dims
    all_rows = spec.batch * spec.q_heads * spec.q_len
    temp += size * all_rows * (1 + (choice["delta"] == "kept"))
    if choice["algorithm"] == "by_keys" and spec.dtype != spec.stats_dtype:
        temp += size * all_rows * spec.qk_dim
    temp += dropout_bytes(spec, scores)
    groups = spec.batch * spec.kv_heads / many
    again = choice["algorithm"] == "two_passes"
    flop = 2 * rows * k * ((3 + again) * spec.qk_dim + (2 + again) * spec.v_dim)
    element = 1e-9 + (DROPOUT_S if spec.dropout else 0)
    seconds = groups * tiles.visited * (flop / 150e9 + rows * k * element + 20e-6)
    return Cost(int(temp), seconds)
