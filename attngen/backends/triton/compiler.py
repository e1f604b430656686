"""Triton's compilers as the certifier, for GPUs that need not be here: in a child process.

An emitted file defines the kernel `forward` and how it is launched:

NUM_WARPS, NUM_STAGES   integers
OUT_DTYPE               torch's, of the output; none: as q
CONSTEXPRS              values of its constexpr parameters, where it has any
Q_BLOCK, K_BLOCK, QK_DIM, V_DIM   of a tile, for the bounds of the pipes
BLOCK_SHAPES            of what tensor descriptors load, by name, where there are any
TEMP_BYTES              what the launcher allocates beside outputs; none: as the job says
BACKWARD                kernels of the backward pass by name: constexpr parameters of each
BACKWARD_WARPS, BACKWARD_STAGES   of these
combine                 a kernel that adds up what KV_SPLITS splits of the keys leave
COMBINE_WARPS           of it

A parameter `<name>_ptr` points to the tensor of that name, aligned as torch aligns tensors,
`<name>_desc` is a descriptor of it; a stride within a head that the kernel lets Triton specialise is 1; all others are int32 of
which nothing is known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen import targets
from attngen.backends.triton import assembly
from attngen.backends.triton.loader import import_file
from attngen.backends.triton.pipes import Tile, pipes
from attngen.backends.triton.stored import reads_bits
from attngen.dtypes import BYTES
from attngen.gpus import Gpu

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is by default, unsaid

POINTERS = {
    "float64": "*fp64", "float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16",
    "float8_e4m3": "*fp8e4nv", "int64": "*i64", "int32": "*i32", "int8": "*i8",
    "uint32": "*u32", "bool": "*i1",
}  # fmt: skip
ROWS = (
    "lse",
    "norm",
    "mass",
    "lse_mass",
    "delta",
    "dlse",
)  # float32, one of each query
Shape = tuple[str, Sequence[int], str]


def certify(job: dict[str, Any]) -> dict[str, Any]:
    """Compile a job's kernel for its target and report what came of it.

    Args:
        job: "target", "source" (a path), "shapes" of q, k, v and the operands; "q_block",
            "k_block", "qk_dim", "v_dim" where the module doesn't say.
    """
    target = targets.get(job["target"])
    gpu = target.gpu
    if gpu is None:
        raise ValueError(f"{target.name} is no GPU; Triton compiles for GPUs")
    module = import_file(Path(job["source"]))
    shapes: list[Shape] = [(n, tuple(s), d) for n, s, d in job["shapes"]]
    start = time.perf_counter()
    tile = _tile(job, module, {n: d for n, _, d in shapes})
    found = _kernel(module, "forward", shapes, gpu, tile)
    others = {
        name: _kernel(
            module, name, shapes, gpu, _backward_tile(tile, name, sizes), sizes
        )
        for name, sizes in getattr(module, "BACKWARD", {}).items()
    }
    if hasattr(module, "combine"):
        others["combine"] = _kernel(module, "combine", shapes, gpu, None)
    if others:
        found["kernels"] = others
    seconds = time.perf_counter() - start
    temp = getattr(module, "TEMP_BYTES", job.get("temp_bytes", 0))
    return {
        "compiler": "ptxas, through Triton"
        if gpu.backend == "cuda"
        else "LLVM, Triton's",
        "temp_bytes": int(
            temp({n: s for n, s, _ in shapes}) if callable(temp) else temp
        ),
        "argument_bytes": sum(math.prod(s) * BYTES[d] for _, s, d in shapes),
        "compile_s": round(seconds, 3),
        "versions": {"triton": importlib.metadata.version("triton")},
        **found,
    }


def _kernel(
    module: Any,
    name: str,
    shapes: Sequence[Shape],
    gpu: Gpu,
    tile: Tile | None,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Compile a kernel of an emitted module: what came of it.

    Args:
        sizes: its own constexpr parameters, of the backward pass; None: another's.
    """
    kernel = getattr(module, name)
    signature, constants, attributes = arguments(
        kernel,
        shapes,
        gpu,
        constants=getattr(module, "CONSTEXPRS", {}) | dict(sizes or {}),
        blocks=getattr(module, "BLOCK_SHAPES", {}),
        out_dtype=str(getattr(module, "OUT_DTYPE", "")).removeprefix("torch."),
        splits=int(getattr(module, "KV_SPLITS", 1)),
    )
    of = "NUM" if sizes is None else "BACKWARD"
    warps = int(getattr(module, f"{'COMBINE' if name == 'combine' else of}_WARPS"))
    compiled = compile_kernel(
        kernel,
        gpu,
        signature,
        constants,
        attributes,
        num_warps=warps,
        num_stages=int(getattr(module, f"{of}_STAGES")),
    )
    return figures(compiled, gpu, warps, tile)


def _backward_tile(
    tile: Tile | None, name: str, sizes: Mapping[str, int]
) -> Tile | None:
    """A tile of a kernel of the backward pass, whose products it makes anew."""
    if tile is None:
        return None
    q, k = int(sizes["Q_BLOCK"]), int(sizes["K_BLOCK"])
    products = {"backward_queries": (2, 1), "backward_keys": (2, 2)}.get(name, (1, 1))
    return dataclasses.replace(
        tile, q_block=q, k_block=k, qk_products=products[0], v_products=products[1]
    )


def arguments(
    kernel: Any,
    shapes: Sequence[Shape],
    gpu: Gpu,
    *,
    constants: Mapping[str, Any],
    blocks: Mapping[str, Sequence[int]] = {},
    out_dtype: str = "",
    splits: int = 1,
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """A kernel's signature, constants and what is known of its pointers."""
    dtypes = {n: d for n, _, d in shapes}
    dtypes["out"] = dtypes["dout"] = out_dtype or dtypes["q"]
    shape_of = {n: s for n, s, _ in shapes}
    dtypes["tiles"], shape_of["tiles"] = "int32", ()  # the list of tiles
    rows = shape_of["q"][:-1]
    shape_of["out"] = shape_of["dout"] = (*rows, shape_of["v"][-1])
    for name in "qkv":
        dtypes[f"d{name}"], shape_of[f"d{name}"] = dtypes[name], shape_of[name]
    pointers = [p.name for p in kernel.params if p.name.endswith("_ptr")]
    for name in (p.removesuffix("_ptr") for p in pointers):
        if name in ROWS or name.startswith(
            "d_"
        ):  # what operands' gradients are made of
            dtypes[name], shape_of[name] = "float32", rows
            of = [s for n, s, _ in shapes if name.startswith(f"d_{n}")]
            shape_of[name] = max([rows, *of], key=math.prod)
        elif name.startswith("part_"):  # what splits leave
            last = shape_of["v"][-1:] if name == "part_acc" else ()
            dtypes[name], shape_of[name] = "float32", (*rows, splits, *last)
    sizes = {n: math.prod(s) * BYTES[dtypes[n]] for n, s in shape_of.items()}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            dtype = dtypes[name.removesuffix("_ptr")]
            bits = reads_bits(dtype, gpu)
            signature[name] = "*u8" if bits else POINTERS[dtype]
            attributes[i,] = [["tt.divisibility", 16]]
            # as the launcher says of small tensors: AMD's buffer loads take 32-bit offsets
            small = sizes[name.removesuffix("_ptr")] < 2**31
            if gpu.backend == "hip" and small:
                attributes[i,].append(["tt.pointer_range", 32])
        elif name.endswith("_desc"):
            own = name.removesuffix("_desc")
            kind = POINTERS[dtypes[own]].removeprefix("*")
            signature[name] = f"tensordesc<{kind}{list(blocks[own])}>"
        elif name.endswith("_stride_d") and free:
            signature[name], values[name] = "constexpr", 1
        else:
            signature[name] = "i32"
    return signature, values, attributes


def compile_kernel(
    kernel: Any,
    gpu: Gpu,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    attributes: Mapping[tuple[int, ...], Any],
    **options: Any,
) -> Any:
    """Triton's compiled kernel for a GPU's architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs=dict(attributes),
    )
    arch: str | int = gpu.architecture
    if gpu.backend == "cuda":
        arch = int(gpu.architecture.removeprefix("sm"))
    where = GPUTarget(gpu.backend, arch, gpu.warp_size)
    with contextlib.redirect_stdout(io.StringIO()):
        return triton.compile(source, target=where, options=options)


def figures(compiled: Any, gpu: Gpu, warps: int, tile: Tile | None) -> dict[str, Any]:
    """What assembly and metadata say of a compiled kernel."""
    program, used = program_of(compiled, gpu)
    shared = int(compiled.metadata.shared)
    # warp specialisation adds warps
    held = int(getattr(compiled.metadata, "num_warps", warps) or warps)
    blocks = gpu.resident(
        registers=used["registers"],
        warps=held,
        shared_bytes=shared,
        tensor_columns=int(getattr(compiled.metadata, "tmem_size", 0) or 0),
    )
    made = {
        **used,
        "warps": held,
        "shared_bytes": shared,
        "blocks_per_multiprocessor": blocks,
        "occupancy": round(blocks * held / gpu.max_warps, 4),
    }
    loops = assembly.main_loops(program)
    if not loops:
        return made
    inner = loops[0]
    matrix = [x.opcode for x in inner if assembly.is_matrix(x.opcode)]
    made["matrix_instruction"] = matrix[0] if matrix else None
    made["mix"] = assembly.mix(inner)
    if tile is not None:
        found = dataclasses.asdict(pipes(inner, gpu, tile, warps))
        made |= {"pipe_cycles": found.pop("cycles"), **found}
    return made


def program_of(compiled: Any, gpu: Gpu) -> tuple[assembly.Program, dict[str, Any]]:
    """A compiled kernel's assembly; its registers, and the bytes that it spills."""
    if gpu.backend == "cuda":
        return _nvidia(compiled.asm["cubin"])
    return _amd(compiled.asm["amdgcn"])


def _nvidia(cubin: bytes) -> tuple[assembly.Program, dict[str, Any]]:
    """A stack alone is no spill: ptxas reserves some for calls that never come."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory(prefix="attngen-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "-res-usage", path)
        program = assembly.parse_sass(_run(tools / "nvdisasm", "-c", path))
    registers, stack = (
        int(_found(rf"\b{name}:(\d+)", usage)) for name in ("REG", "STACK")
    )
    spills = any(x.opcode.startswith(("LDL", "STL")) for x in program.instructions)
    return program, {"registers": registers, "spill_bytes": stack if spills else 0}


def _run(*command: str | Path) -> str:
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {ran.stderr.strip()}")
    return ran.stdout


def _amd(text: str) -> tuple[assembly.Program, dict[str, Any]]:
    """Scalar registers spill into vector registers' lanes, which costs no memory."""
    scratch = int(_found(r"^; ScratchSize: (\d+)", text))
    spilled = int(_found(r"\.vgpr_spill_count:\s+(\d+)", text))
    return assembly.parse_amdgcn(text), {
        "registers": int(_found(r"^; TotalNumVgprs: (\d+)", text)),
        "spill_bytes": max(scratch, 4 * spilled),
        "scalar_spills": int(_found(r"\.sgpr_spill_count:\s+(\d+)", text)),
    }


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the compiler's output lacks {pattern}")
    return found[1]


def _tile(
    job: Mapping[str, Any], module: Any, dtypes: Mapping[str, str]
) -> Tile | None:
    """The job's sizes of a tile, else the module's; None where one isn't said."""
    found = {}
    for name in ("q_block", "k_block", "qk_dim", "v_dim"):
        value = job.get(name, getattr(module, name.upper(), None))
        if value is None:
            return None
        found[name] = int(getattr(value, "value", value))
    return Tile(**found, item_bytes=BYTES[dtypes["k"]])
