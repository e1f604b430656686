"""The backward pass as choices of its own: which there are, which are legal, what they cost.

Under the names that a forward plan's choices have; in a plan they begin with "backward". One
kernel holds `q_chunk` queries and goes over their keys, `k_chunk` at a time; another holds as
many keys and goes over the queries that see them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from attngen import slopes, storage
from attngen.backends.triton import model
from attngen.backends.triton.arguments import kept
from attngen.backends.triton.candidates import (
    BLOCKS,
    GROUPED,
    WARPS,
    blocks,
    in_groups,
    most_registers,
    pieces,
)
from attngen.backends.triton.slope_code import entries_of, kind_of
from attngen.cost import Cost
from attngen.dtypes import BYTES
from attngen.expr import variables
from attngen.gpus import Gpu
from attngen.plans import Choice, Option
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

STAGES = (1, 2, 3, 4)
VALUES: dict[str, tuple[Option, ...]] = {
    "q_chunk": BLOCKS, "k_chunk": BLOCKS, "num_warps": WARPS, "num_stages": STAGES,
    "head_dim": ("padded", "split"),
}  # fmt: skip
DROPPING = 96  # registers more with dropout, as compiled for sm90
PRODUCTS = 7  # of a tile: three for dq, four for dk and dv


class Passes:
    """See `backends.Backward`."""

    spills = True

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        longest = max(spec.q_len, spec.kv_len)
        # others load ahead by way of registers, of which there are none left
        ahead = target.gpu is None or target.gpu.copies_to_shared
        return {
            "two_passes": {
                "q_chunk": blocks(longest, 256 if whole else 128),
                "k_chunk": blocks(longest, 256 if whole else 64),
                "num_warps": WARPS if whole else (2, 4, 8),
                "num_stages": STAGES if whole else (1, 2) if ahead else (1,),
                **pieced(spec),
            }
        }

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        for name, values in VALUES.items():
            value = choice.get(name, values[0])
            if isinstance(value, bool) or value not in values:
                return f"{name} must be one of {', '.join(map(str, values))}"
        gpu = target.gpu
        if gpu is None:
            return f"Triton makes kernels for GPUs; {target.name} is none"
        threads = int(choice["num_warps"]) * gpu.warp_size
        if threads > 1024:
            return (
                f"{choice['num_warps']} warps are {threads} threads; a block has 1024"
            )
        if (shared := shared_bytes(spec, choice, gpu)) > gpu.shared_bytes:
            return (
                f"tiles need {shared} bytes of shared memory; "
                f"{target.name} has {gpu.shared_bytes} a block"
            )
        need, most = registers(spec, choice, gpu), most_registers(choice, gpu)
        if need > most:
            return f"tiles need {need} registers a thread; {target.name} has {most} for each"
        return None

    def kept_bytes(self, spec: AttentionSpec, target: Target) -> int:
        """norm of each row, and what goes with it (see arguments.py)."""
        return _rows(spec) * len(kept(spec))

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        """Modelled as so many products of the forward pass in such tiles."""
        own = {
            "algorithm": "running", "order": "forward", "head_dim": "padded",
            "loads": "pointers", **choice,
        }  # fmt: skip
        forward = model.cost(replace(spec, derivatives=None), target, own, tiles)
        bytes_ = self.kept_bytes(spec, target) + _rows(spec) + _sums(spec, choice)
        time_s = forward.time_s * PRODUCTS / 2
        gpu = target.gpu
        if spec.dropout and gpu is not None:
            need = registers(spec, choice, gpu) + DROPPING
            time_s *= 4 if need > most_registers(choice, gpu) else 1  # it likely spills
        return replace(forward, temp_bytes=bytes_, time_s=time_s)

    def flop(self, spec: AttentionSpec, choice: Choice, tiles: Tiles) -> int:
        """Of the products: three for dq, four for dk and dv."""
        dims = 4 * spec.qk_dim + 3 * spec.v_dim
        tile = 2 * int(choice["q_chunk"]) * int(choice["k_chunk"]) * dims
        return spec.batch * spec.q_heads * tiles.visited * tile

    def describe(self, choice: Choice) -> str:
        """A candidate in a few words."""
        warps, stages = choice.get("num_warps"), choice.get("num_stages")
        text = f"{choice['q_chunk']} held × {choice['k_chunk']}"
        if warps is not None:
            text += f" · {warps} warp{'s' * (warps != 1)}"
        if stages is not None:
            text += f" · {stages} stage{'s' * (stages != 1)}"
        pieced_ = choice.get("head_dim") == "split"
        return text + " · head dim in pieces" * pieced_


def pieced(spec: AttentionSpec) -> Mapping[str, Sequence[Option]]:
    """The choice of pieces, where a head dim has several."""
    odd = any(len(pieces(d, "split")) > 1 for d in (spec.qk_dim, spec.v_dim))
    return {"head_dim": ("split", "padded")} if odd else {}


def _widths(spec: AttentionSpec, choice: Choice) -> list[int]:
    """Of the pieces of both head dims, with padding."""
    how = choice.get("head_dim", "padded")
    return [width for d in (spec.qk_dim, spec.v_dim) for _, width in pieces(d, how)]


def _rows(spec: AttentionSpec) -> int:
    """Bytes of one float32 a row."""
    return 4 * math.prod(storage.shape_of(spec, "lse"))


def _sums(spec: AttentionSpec, choice: Choice) -> int:
    """What kernels write for operands' gradients before it is added up."""
    total = 0
    for operand in slopes.trained(spec):
        total += 2 * 4 * spec.bytes_of(operand.name) // BYTES[operand.dtype]
    heads, total = _rows(spec) // (4 * spec.q_len), total + _rows(spec) * spec.sink
    blocks = -(-spec.q_len // int(choice["q_chunk"]))
    sizes = {
        "rows": spec.q_len, "row_entries": spec.q_len, "columns": spec.kv_len,
        "column_entries": spec.kv_len, "entries": blocks + (spec.storage == "packed") * spec.batch,
    }  # fmt: skip
    for node in dict.fromkeys(n for s in spec.score for n in slopes.reads(s)):
        kind = kind_of(node)
        if kind == "pairs":
            reads = variables(node)
            shared = spec.batch ** ("b" in reads) * spec.q_heads ** ("h" in reads)
            total += 4 * shared * spec.q_len * spec.kv_len
        else:
            total += 4 * heads * sizes[kind] * entries_of(node)
    return total


def shared_bytes(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> int:
    """Modelled: what a program holds of two tensors, what it visits of two, p and ds.

    AMD's hold what they hold in registers; with one stage tensors take turns, piece by piece.
    """
    size, dims = BYTES[spec.dtype], _widths(spec, choice)
    held, step = int(choice["q_chunk"]), int(choice["k_chunk"])
    if gpu.backend == "hip" and int(choice["num_stages"]) == 1:
        return size * max(held, step) * max(dims)
    if gpu.backend == "hip":
        return 2 * size * step * sum(dims) * int(choice["num_stages"])
    stages = max(1, int(choice["num_stages"]) - 1)
    return size * (held * sum(dims) + step * sum(dims) * stages + held * step)


# architecture → registers of a thread that no tile accounts for; others of NVIDIA's: 96
_OWN = {"sm90": 78, "sm100": 78, "gfx942": 150, "gfx950": 150}
# head dims together from which more is held at once than of narrower ones
WIDE = 256
# over 5, what a tile of float32 takes on AMD's times that of others, as compiled for d = 64
AMD_FLOAT32 = 17
_APART = 136  # of sm90 and sm100, where each warp issues its own products of wide heads


def registers(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> int:
    """Modelled, of a thread: dk and dv, and a tile of s, p and ds.

    What else there is was fitted to which tiles spill on sm80, sm90 and gfx942, compiled by
    Triton 3.9 (head dims 64 and 128, causal); of wider heads to those of 256 to 576.
    """
    dims = sum(_widths(spec, choice))
    held, step = int(choice["q_chunk"]), int(choice["k_chunk"])
    threads = int(choice["num_warps"]) * gpu.warp_size
    own = _OWN.get(gpu.architecture, 96)
    # whole float32 products on NVIDIA's are multiply-adds, whose factors lie in registers
    own += 64 if spec.dtype == "float32" and gpu.backend == "cuda" else 0
    if dims > WIDE:
        if in_groups(choice, gpu):
            own += dims // 8 if held < 16 * int(choice["num_warps"]) else 0
        elif gpu.architecture in GROUPED:
            own = max(own, _APART)
        own += _of_wide(dims, held, step, threads, gpu, BYTES[spec.dtype])
    tile = held * (dims + 3 * step)
    if spec.dtype == "float32" and gpu.backend == "hip" and dims <= WIDE:
        tile = tile * AMD_FLOAT32 // 5
    return tile // threads + own


# over 5, what a tile of float32 takes on AMD's times that of others, as compiled for d = 64
AMD_FLOAT32 = 17
WIDE = (
    256  # both head dims together, of which more is held at once than of narrower ones
)


def _of_wide(dims: int, held: int, step: int, threads: int, gpu: Gpu, size: int) -> int:
    """Registers more with wide heads: what products read, of which AMD's hold all."""
    if gpu.backend == "hip":
        return step * step * dims // 2048 + held * dims * size // (4 * threads)
    return step * (dims - WIDE) * size // (4 * threads)
