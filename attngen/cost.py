"""What an attention costs, whatever computes it: operations and bytes moved."""

from __future__ import annotations

from dataclasses import dataclass

from attngen.dtypes import BYTES
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles


@dataclass(frozen=True)
class Cost:
    """What a backend's model says of a candidate.

    temp_bytes is meant as an upper bound of what the compiler will allocate beyond inputs
    and outputs; library_bytes is what of it is inside the largest call of a library, which
    compilers count beside the worst moment of all other buffers; time_s is a guide for
    ranking; edge_share is the part of an edge tile that is computed.
    """

    temp_bytes: int
    time_s: float
    edge_share: float = 1.0
    library_bytes: int = 0

    @property
    def own_bytes(self) -> int:
        """Of temp_bytes all but the library's."""
        return self.temp_bytes - self.library_bytes


def tile_flop(spec: AttentionSpec, q_chunk: int, k_chunk: int) -> int:
    """Multiplications and additions of the two matrix products of one tile, one head."""
    return 2 * q_chunk * k_chunk * (spec.qk_dim + spec.v_dim)


def executed_flop(
    spec: AttentionSpec,
    tiles: Tiles,
    q_chunk: int,
    k_chunk: int,
    edge_share: float = 1.0,
) -> int:
    """Of all tiles visited, over all batches and query heads."""
    visited = tiles.full + tiles.edge * edge_share
    heads = spec.batch * spec.q_heads
    return round(heads * visited * tile_flop(spec, q_chunk, k_chunk))


def moved_bytes(spec: AttentionSpec, tiles: Tiles, k_chunk: int) -> int:
    """Bytes of q, k, v and the outputs that are read and written, as slices.

    q and the outputs once; keys and values anew for each chunk of queries that visits
    them. What caches keep is not known here, nor what a tile's own arrays move.
    """
    size = BYTES[spec.dtype_of("k")]
    keys = tiles.visited * k_chunk * (spec.qk_dim + spec.v_dim) * size
    once = spec.bytes_of("q", *spec.outputs)
    return once + spec.batch * spec.kv_heads * keys


def sharding(spec: AttentionSpec) -> str:
    """How a spec is sharded, in words."""
    axes = (("batch", spec.batch_shards), ("heads", spec.head_shards))
    parts = [f"{name} in {count} shards" for name, count in axes if count > 1]
    return f"over {spec.devices} devices: {', '.join(parts)}"


def square_flop(spec: AttentionSpec) -> int:
    """Of every pair of query and key, as an attention that skips nothing computes."""
    return spec.batch * spec.q_heads * tile_flop(spec, spec.q_len, spec.kv_len)
