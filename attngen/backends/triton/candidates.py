"""What Triton kernels can be emitted: the choices, and which are legal for a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attngen.dtypes import BYTES
from attngen.errors import NotBuiltError
from attngen.gpus import Gpu
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

# field → (the values that are built, what to do instead)
_BUILT: dict[str, tuple[tuple[object, ...], str]] = {
    "derivatives": (
        (None,),
        "dataclasses.replace(spec, derivatives=None) computes forward",
    ),
    "dropout": ((0.0,), "dataclasses.replace(spec, dropout=0.0)"),
    "storage": (("dense",), 'pad into storage="dense" with kv_lengths=True'),
    "kv_dtype": ((None,), "convert k and v to spec.dtype first"),
    "batch_shards": ((1,), "a spec of what one device has"),
    "head_shards": ((1,), "a spec of what one device has"),
    "dtype": (DTYPES, "the jax backend computes in float64"),
}


def refuse(spec: AttentionSpec) -> None:
    """Raise NotBuiltError for what the contract has and this backend doesn't do."""
    for field, (built, hint) in _BUILT.items():
        value = getattr(spec, field)
        if value not in built and not (field == "kv_dtype" and value == spec.dtype):
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
    return {
        "running": {
            "q_chunk": _blocks(spec.q_len, 256 if amd else widest),  # it has registers
            "k_chunk": _blocks(spec.kv_len, widest),
            "num_warps": WARPS if whole else (1, 2, 4, 8),
            "num_stages": STAGES if whole else _stages(target),
            "order": ("forward", "reverse") if whole else (_order(spec),),
            "head_dim": ("split", "padded") if odd else ("padded",),
            "loads": LOADS if whole else ("pointers",),  # which take any strides
        }
    }


def _blocks(length: int, widest: int) -> tuple[int, ...]:
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
}


def illegal(spec: AttentionSpec, target: Target, choice: Choice) -> str | None:
    """The reason why a candidate can't be emitted, or can't run on the target, or None."""
    for name, values in VALUES.items():
        value = choice[name]
        if isinstance(value, bool) or value not in values:
            return f"{name} is one of {', '.join(map(str, values))}"
    gpu = target.gpu
    if gpu is None:
        return f"Triton makes kernels for GPUs; {target.name} is none"
    threads = int(choice["num_warps"]) * gpu.warp_size
    if threads > 1024:
        return f"{choice['num_warps']} warps are {threads} threads; a block has 1024"
    if choice["loads"] == "descriptors" and (reason := _undescribed(spec, choice, gpu)):
        return reason.format(target.name)
    shared = shared_bytes(spec, choice)
    if shared > gpu.shared_bytes:
        return (
            f"tiles need {shared} bytes of shared memory; "
            f"{target.name} has {gpu.shared_bytes} a block"
        )
    need = registers(spec, choice, gpu)
    most = min(gpu.max_registers, gpu.registers // threads)
    if need > most:
        return (
            f"tiles need {need} registers a thread; {target.name} has {most} for each"
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


def shared_bytes(spec: AttentionSpec, choice: Choice) -> int:
    """Modelled: tiles of keys and values for each stage, and the queries."""
    size = BYTES[spec.dtype]
    qk = sum(width for _, width in pieces(spec.qk_dim, choice["head_dim"]))
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    stages = max(1, int(choice["num_stages"]) - 1)
    return size * stages * int(choice["k_chunk"]) * (qk + v)


def registers(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> int:
    """Modelled, of a thread: weighted sums, scores, weights, queries, and addresses.

    Hopper's and Blackwell's products read the queries from shared memory; scores come out
    of Blackwell's tensor memory into registers of their own. Where nothing copies into
    shared memory but by way of registers, keys and values of the stages are there, too.
    """
    qk = sum(width for _, width in pieces(spec.qk_dim, choice["head_dim"]))
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    size, q, k = BYTES[spec.dtype], int(choice["q_chunk"]), int(choice["k_chunk"])
    threads = int(choice["num_warps"]) * gpu.warp_size
    narrow = k if gpu.architecture in ("sm90", "sm100") else k + qk
    tile = q * (4 * (v + k) + size * narrow) // 4
    if gpu.architecture == "sm100":
        tile += q * k
    if gpu.backend == "hip":
        staged = not gpu.copies_to_shared and int(choice["num_stages"]) > 1
        tile += k * (qk + v) * size // 4 * (3 if staged else 1)
        return tile // threads + 100
    # whole float32 products on NVIDIA's are multiply-adds, whose factors lie in registers
    factors = 64 if spec.dtype == "float32" else 0
    addresses = 56 if choice["loads"] == "pointers" else 24
    return tile // threads + addresses + factors


def crowded(spec: AttentionSpec, choice: Choice, gpu: Gpu) -> bool:
    """Whether a plan likely spills as it multiplies whole float32 numbers on NVIDIA's.

    These products are multiply-adds, and their factors are loaded for many at once. What was
    compiled (Triton 3.9, head dims 64 and 128) spills from 16 scores or 32 weighted sums a
    thread on, and with keys fewer than half of a head dim.
    """
    if spec.dtype != "float32" or gpu.backend != "cuda":
        return False
    v = sum(width for _, width in pieces(spec.v_dim, choice["head_dim"]))
    q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
    threads = int(choice["num_warps"]) * gpu.warp_size
    return q * k > 8 * threads or q * v > 16 * threads or 2 * k < v


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
    return f"{choice['algorithm']} · {' · '.join(parts)}"
