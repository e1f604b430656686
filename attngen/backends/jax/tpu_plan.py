"""A plan of an XLA:TPU program as numbers, and how its arrays are tiled."""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax.candidates import option
from attngen.dtypes import BYTES
from attngen.expr import axes
from attngen.plans import Choice
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles
from attngen.tpus import LANES, SUBLANES

NARROW = 2  # bytes of a number that matrix units take, also for products of float32
FEW_ROWS = 4096  # of a tile, that leave room in VMEM
FEW = 512  # a chunk's length: longer ones are sliced as they lie


def padded(count: int, step: int) -> int:
    return -(-count // step) * step


def laid(matrices: int, rows: int, lanes: int, size: int, near: bool = False) -> int:
    """Bytes of matrices with their last dimension along the lanes; few rows are packed.

    Args:
        near: as all but v2 and v3 do, twice as tightly.
    """
    fewest = (2 if size > NARROW else 4) // (2 if near else 1)
    high = padded(rows, SUBLANES if rows > 4 else 4 if rows > 2 else fewest)
    return matrices * high * padded(lanes, LANES) * size


def least(matrices: int, a: int, b: int, size: int) -> int:
    """The same, of the order that pads less."""
    return min(laid(matrices, a, b, size), laid(matrices, b, a, size))


@dataclass(frozen=True)
class Plan:
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
    blanked: bool  # a pass over the masked scores tells which keys no query sees
    apart: frozenset[str]  # axes, of b and h, along which the mask differs

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


def apart(spec: AttentionSpec) -> frozenset[str]:
    """The axes, of b and h, along which the mask differs."""
    if spec.mask is None:
        return frozenset()
    return axes(spec.mask.expr) & {"b", "h"}


def numbers(
    spec: AttentionSpec, choice: Choice, tiles: Tiles | None, near: bool
) -> Plan:
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    b, g = int(choice["batch_chunk"]), int(choice["head_chunk"])
    parts, unroll = int(option(choice, "parts")), int(option(choice, "unroll"))
    # rounds of tiles without a mask are gone where there are too few, as is known then
    few = tiles is not None and tiles.full < max(parts, unroll)
    gone = few and q == spec.q_len
    return Plan(
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
        blanked=option(choice, "blank") == "scores" and "out" in spec.outputs,
        apart=apart(spec),
    )
