"""What Triton kernels can be emitted: the choices, and which are legal for a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attngen import slopes, storage
from attngen.backends.triton import decode, stored
from attngen.backends.triton.slope_code import unplaced
from attngen.dtypes import BYTES
from attngen.errors import NotBuiltError
from attngen.expr import variables, walk
from attngen.gpus import Gpu
from attngen.lists import Blocks, listed, skips, unlistable
from attngen.operands import Operand
from attngen.plans import Choice, Option
from attngen.regions import analyse
from attngen.spec import AttentionSpec
from attngen.targets import Target

BLOCKS = (16, 32, 64, 128, 256)  # of queries and of keys; a matrix product takes 16
WARPS = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3, 4, 5)
DESCRIBED = 16  # bytes that divide the strides of what a tensor descriptor takes
LOADS = ("pointers", "descriptors")  # of keys and values
DTYPES = ("float16", "bfloat16", "float32")
LISTED = {"cuda": 64, "hip": 160}  # registers more where operands tell, as compiled
UNSURE = 1.25  # times the registers that there are: the model may be wrong by so much

# field → (the values that are built, what to do instead)
_BUILT: dict[str, tuple[tuple[object, ...], str]] = {
    "derivatives": (
        (None, "vjp"),
        'backend="jax" has derivatives of any order',
    ),
    "batch_shards": ((1,), "a spec of what one device has"),
    "head_shards": ((1,), "a spec of what one device has"),
    "dtype": (DTYPES, "the jax backend computes in float64"),
}


def refuse(spec: AttentionSpec) -> None:
    """Raise NotBuiltError for what the contract has and this backend doesn't do."""
    for field, (built, hint) in _BUILT.items():
        value = getattr(spec, field)
        if value not in built:
            raise NotBuiltError(
                f"{field}={value!r} isn't built yet for Triton.",
                got=f"{field}={value!r}",
                needed=f"{field}={' or '.join(repr(b) for b in built)}",
                hint=hint,
            )
    if spec.out_dtype_name == "float64":
        raise NotBuiltError(
            "out_dtype='float64' isn't built for Triton.",
            got="out_dtype='float64'",
            needed="out_dtype=None, or one of " + ", ".join(DTYPES),
        )
    storage.refuse(spec)
    reads = [n for score in spec.score for n in slopes.reads(score)]
    for node in reads if spec.derivatives else ():
        if what := unplaced(node, packed=spec.storage == "packed"):
            assert isinstance(node.value, Operand)
            name = node.value.name
            raise NotBuiltError(
                f"The gradient of {name} isn't built for Triton, as a score reads it.",
                got=f"a read of {name} at {what}",
                needed="a read of each axis at another index, and of queries and keys "
                "at their own alone",
                hint='derivatives=None, or backend="jax"',
            )


def pieces(dim: int, choice: Option) -> tuple[tuple[int, int], ...]:
    """A head dim as blocks that a matrix product takes: (start, width) of each.

    "padded" is one block of the next power of two; "split" are several, each a power of
    two, that hold fewer columns of padding: 80 is 64 + 16, 96 is 64 + 32.
    """
    if choice == "padded":
        return ((0, power_above(dim)),)
    made, start = [], 0
    while start < dim:
        rest = dim - start
        width = power_above(rest)
        # two blocks rather than one that is mostly padding
        if width > 16 and rest <= 3 * width // 4:
            width //= 2
        made.append((start, width))
        start += width
    return tuple(made)


def power_above(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def space(
    spec: AttentionSpec, target: Target, *, whole: bool = False
) -> Mapping[str, Mapping[str, Sequence[Option]]]:
    dims = {spec.qk_dim, spec.v_dim}
    odd = any(len(pieces(d, "split")) > 1 for d in dims)
    widest = 256 if whole else 128
    amd = target.gpu is not None and target.gpu.backend == "hip"
    of_one = spec if whole else storage.typical(spec)
    return {
        "running": {
            # AMD's have registers
            "q_chunk": blocks(decode.rows(of_one), 256 if amd else widest),
            "k_chunk": blocks(spec.kv_len, widest),
            "num_warps": WARPS if whole else (1, 2, 4, 8),
            "num_stages": STAGES if whole else _stages(target),
            "order": ("forward", "reverse") if whole else (_order(spec),),
            "head_dim": ("split", "padded") if odd else ("padded",),
            "loads": LOADS if whole else ("pointers",),  # which take any strides
            **skips(spec),
            **decode.space(of_one, target, whole=whole),
        }
    }


def blocks(length: int, widest: int) -> tuple[int, ...]:
    return tuple(n for n in BLOCKS if n <= min(power_above(length), widest))


def _stages(target: Target) -> tuple[int, ...]:
    """More than two go through registers where nothing copies past them."""
    straight = target.gpu is None or target.gpu.copies_to_shared
    return (1, 2, 3, 4) if straight else (1, 2)


def _order(spec: AttentionSpec) -> str:
    """Programs with the most tiles first, so that the last to end are short ones."""
    span = analyse(spec)
    return "reverse" if span.high is not None and span.low is None else "forward"


VALUES: dict[str, tuple[Option, ...]] = {
    "q_chunk": BLOCKS,
    "k_chunk": BLOCKS,
    "num_warps": WARPS,
    "num_stages": STAGES,
    "order": ("forward", "reverse"),
    "head_dim": ("split", "padded"),
    "loads": LOADS,
    "skip": ("bounds", "list"),
}


def illegal(spec: AttentionSpec, target: Target, choice: Choice) -> str | None:
    """The reason why a candidate can't be emitted, or can't run on the target, or None."""
    for name, values in VALUES.items():
        value = choice.get(name, values[0])
        if isinstance(value, bool) or value not in values:
            return f"{name} is one of {', '.join(map(str, values))}"
    if choice.get("skip") == "list" and (reason := _unlisted(spec)) is not None:
        return reason
    if (reason := decode.illegal(spec, choice)) is not None:
        return reason
    gpu = target.gpu
    if gpu is None:
        return f"Triton makes kernels for GPUs; {target.name} is none"
    threads = int(choice["num_warps"]) * gpu.warp_size
    if threads > 1024:
        return f"{choice['num_warps']} warps are {threads} threads; a block has 1024"
    if (reason := stored.refusal(spec, choice["loads"])) is not None:
        return reason
    if choice["loads"] == "descriptors" and (reason := _undescribed(spec, choice, gpu)):
        return reason.format(target.name)
    shared = shared_bytes(spec, choice, gpu)
    if shared > gpu.shared_bytes:
        return (
            f"tiles need {shared} bytes of shared memory; "
            f"{target.name} has {gpu.shared_bytes} a block"
        )
    need, most = registers(spec, choice, gpu), most_registers(choice, gpu)
    if need > UNSURE * most:
        return (
            f"tiles need {need} registers a thread; {target.name} has {most} for each"
        )
    return None


def _unlisted(spec: AttentionSpec) -> str | None:
    """Why the launcher can't list tiles, or None."""
    if spec.storage != "dense":
        return f"skip = list isn't built for {spec.storage} storage"
    if (reason := unlistable(spec)) is not None:
        return reason
    assert spec.mask is not None
    blocks = [x for x in listed(spec.mask.expr).told if isinstance(x, Blocks)]
    if spec.static_q_offset is None and any(x.letters for x in blocks):
        return (
            "skip = list has no blocks of batches or heads with offsets of each batch"
        )
    return None


def _undescribed(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> str | None:
    """Why tensor descriptors can't load keys and values, or None."""
    if not gpu.tensor_descriptors:
        return "{} has no tensor descriptors"
    if choice["head_dim"] != "padded":
        return "a tensor descriptor loads a head dim in one piece"
    for dim in (spec.qk_dim, spec.v_dim):
        if (size := dim * BYTES[spec.dtype]) % DESCRIBED:
            return (
                f"{dim} {spec.dtype} are {size} bytes; a tensor descriptor takes "
                f"multiples of {DESCRIBED}"
            )
    return None


def shared_bytes(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> int:
    """Modelled: tiles of keys and values for each stage but the one at work, and queries.

    AMD's that load past the registers keep that one, too, in rows that are padded, but no
    queries.
    """
    size = BYTES[spec.dtype]
    qk = sum(width for _, width in pieces(spec.qk_dim, choice["head_dim"]))
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    stages, keys, converted = int(choice["num_stages"]), int(choice["k_chunk"]), 0
    each = BYTES[spec.dtype_of("k")] * keys * (qk + v)
    if spec.is_narrow:  # beside them one of both, as products take it
        converted = size * keys * max(qk, v)
    if gpu.backend == "hip" and gpu.copies_to_shared:
        return each * stages * 33 // 32 + converted
    # products that don't wait for the next read keys and values of the tile before
    stages += in_groups(choice, gpu) and spec.dtype != "float32" and stages > 1
    more = converted
    if gpu.backend == "cuda":
        q = int(choice["q_chunk"])
        more += q * qk * size
        if q < 16 * int(choice["num_warps"]):  # warps that share rows exchange weights
            more += q * int(choice["k_chunk"]) * size
    ahead = max(0 if converted else 1, stages - 1)
    return each * ahead + more


# architecture → (registers of a thread that no tile accounts for, of each 16 bytes that it
# loads). Fitted to which of the model's best plans for presets in 16 bits (head dims 40 to
# 256) spill when Triton 3.9 compiles them: 58 on sm90, of which 2 are misjudged, 63 on sm80
# (10, most of these spill 8 bytes), 84 on gfx942 (20, of which 15 don't spill); on the others
# to the first plan of each preset. Cards with slow matrix units lose nothing by a margin.
_OWN = {
    "sm80": (55, 3), "sm86": (105, 3), "sm89": (105, 3), "sm90": (28, 4), "sm100": (40, 2),
    "sm120": (105, 3), "gfx942": (130, 4), "gfx950": (100, 4),
}  # fmt: skip
_APART = (75, 3)  # of sm90 and sm100, where each warp issues its own products


GROUPED = ("sm90", "sm100")
GROUP = 4  # warps that issue Hopper's and Blackwell's products together
GROUP_ROWS = 64  # queries of one of those products, which reads keys and values anew


def in_groups(choice: Choice, gpu: Gpu) -> bool:
    """Whether warps issue products together, from shared memory; else each its own."""
    few = int(choice["num_warps"]) < GROUP or int(choice["q_chunk"]) < GROUP_ROWS
    return gpu.architecture in GROUPED and not few


def registers(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> int:
    """Modelled, of a thread: weighted sums, scores, weights, queries, addresses of loads.

    Hopper's and Blackwell's products read the queries from shared memory; scores come out
    of Blackwell's tensor memory into registers of their own, and AMD's are there twice. On
    NVIDIA's others weights take the place of the scores. Where nothing copies into shared
    memory but by way of registers, keys and values of the stages are there, too; AMD's have
    them there with one stage.
    """
    qk = sum(width for _, width in pieces(spec.qk_dim, choice["head_dim"]))
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    size, q, k = BYTES[spec.dtype], int(choice["q_chunk"]), int(choice["k_chunk"])
    threads = int(choice["num_warps"]) * gpu.warp_size
    stages = int(choice["num_stages"])
    from_shared = in_groups(choice, gpu)
    narrow = k if from_shared else qk
    narrow += k if gpu.backend == "hip" else 0
    twice = (gpu.architecture == "sm100" and from_shared) or gpu.backend == "hip"
    tile = q * (4 * (v + k + k * twice) + size * narrow) // 4
    tile += q * k * gathers(spec) * (2 if from_shared else 4)  # an address, an index
    tile += (
        q * k * 3 // 2 if spec.dropout else 0
    )  # Philox's words, as compiled for sm90
    own, each = _OWN[gpu.architecture]
    if from_shared and q < 16 * int(choice["num_warps"]):  # warps share rows
        own += qk // 4 if gpu.architecture == "sm90" else qk // 16
    elif gpu.architecture in GROUPED and not from_shared:
        own, each = _APART
    if gpu.architecture == "sm90" and from_shared and stages > 2:
        own += 16
    if gpu.backend == "hip":
        tile += _of_wide(q * v, k * (qk + v) * size, threads, gpu) * threads
    if gpu.backend == "hip" and stages > 1:
        each *= 0 if gpu.copies_to_shared else 3
    if choice["loads"] == "descriptors":
        each = 0
    # whole float32 products on NVIDIA's are multiply-adds, whose factors lie in registers
    if spec.dtype == "float32" and gpu.backend == "cuda":
        own, each = own + 64, 0
    return (tile + each * k * (qk + v) * size // 16) // threads + own


def _of_wide(sums: int, read: int, threads: int, gpu: Gpu) -> int:
    """Registers more of AMD's with wide heads, as compiled (head dims 256 to 576).

    From 256 weighted sums a thread on these are there twice; MI355X reads all of a wide tile
    of keys and values before it multiplies, each wavefront the whole tile.

    Args:
        sums, read: of a tile, the weighted sums and the bytes of keys and values.
    """
    more = sums // threads if sums // threads >= 256 else 0
    if gpu.copies_to_shared and read >= 2 * 16 * 1024:
        more += max(0, read // (4 * gpu.warp_size) - 128)
    return more


def gathers(spec: AttentionSpec) -> int:
    """How many reads of its scores differ for each of them."""
    return sum(
        node.op == "load" and variables(node) >= {"q", "k"}
        for score in spec.score
        for node in walk(score.expr)
    )


def crowding(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> float:
    """What a thread holds, modelled, over what it can: from 1 on a plan likely spills.

    Tune may try such a plan, but it is ranked as slow.

    Whole float32 products on NVIDIA's are multiply-adds, and their factors are loaded for
    many at once. What was compiled (Triton 3.9, head dims 64 and 128) spills from 16 scores
    or 32 weighted sums a thread on, and with keys fewer than half of a head dim; where
    scores read positions from half of that on, where they read a table from a quarter.
    """
    if spec.dtype != "float32" or gpu.backend != "cuda":
        more = LISTED[gpu.backend] if choice.get("skip") == "list" else 0
        return (registers(spec, choice, gpu) + more) / (most_registers(choice, gpu) + 1)
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    threads = int(choice["num_warps"]) * gpu.warp_size
    if gathers(spec):
        threads //= 4
    elif any("k" in variables(score.expr) for score in spec.score):
        threads //= 2
    held = (q * k / (8 * threads + 1), q * v / (16 * threads + 1), v / (2 * k + 1))
    return max(held)


def most_registers(choice: Choice, gpu: Gpu) -> int:
    """Registers that a thread can have."""
    threads = int(choice["num_warps"]) * gpu.warp_size
    return min(gpu.max_registers, gpu.registers // threads)


def describe(choice: Choice) -> str:
    """In words; choices that are left out aren't said."""
    parts = [f"{choice['q_chunk']} queries × {choice['k_chunk']} keys"]
    for name, word in (("num_warps", "warp"), ("num_stages", "stage")):
        if (n := choice.get(name)) is not None:
            parts.append(f"{n} {word}{'s' * (n != 1)}")
    said = {
        ("order", "reverse"): "last queries first",
        ("head_dim", "split"): "head dim in pieces",
        ("loads", "descriptors"): "tensor descriptors",
    }
    parts += [words for (n, value), words in said.items() if choice.get(n) == value]
    parts += decode.describe(choice)
    return f"{choice['algorithm']} · {' · '.join(parts)}"
