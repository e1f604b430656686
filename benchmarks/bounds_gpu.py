"""Useful FLOP a bound cycle of forward kernels, from their main loop's assembly: no GPU.

For each target, head dim, and causal or not: of the kernel that attngen emits, or of emitted
files; and with --tutorial, of the fused-attention tutorial of Triton's own repository
(python/tutorials/06-fused-attention.py), compiled by the same compiler for the same target.
Of the tutorial's configurations that fit and don't spill, the one with the best bound counts;
it is float16, without warp specialisation, and takes tensor descriptors from sm90 on, as its
launcher does. The bound is of the interior loop: what no kernel with these instructions can
beat, not what a device will do.

    python benchmarks/bounds_gpu.py [FILE …] [--tutorial PATH] [--targets a100,h100,mi300x]

All cases with the tutorial take about five minutes; each is written when it is done.

Writes benchmarks/results/bounds_gpu.json when no FILE is given.
"""

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import attngen
from attngen import (
    AttentionSpec,
    backends,
    certifier,
    descent,
    masks,
    planner,
    targets,
)
from attngen.backends.triton import compiler
from attngen.backends.triton.pipes import Tile
from attngen.gpus import Gpu

RESULTS = Path(__file__).parent / "results" / "bounds_gpu.json"
TARGETS = ("a100", "h100", "mi300x")  # sm80, sm90, gfx942
DIMS = (64, 128)
LENGTH, HEADS = 8192, 16
SHOWN = (
    "registers", "spill_bytes", "shared_bytes", "warps", "blocks_per_multiprocessor",
    "matrix_instruction", "pipe_cycles", "bound_cycles", "bound_pipe",
    "flops_per_cycle",
)  # fmt: skip


def of_file(path: Path, target: str, shapes: list[compiler.Shape]) -> dict[str, Any]:
    """Figures of an emitted file, as its certificate has them."""
    text = path.read_text()
    made = certifier.certify(
        "attngen.backends.triton.compiler", target, shapes=shapes, source=text
    )
    return {name: getattr(made, name) for name in SHOWN}


def of_attngen(target: str, dim: int, causal: bool) -> dict[str, Any]:
    """Figures of the kernel that attngen builds: of the first plan that fits."""
    spec = AttentionSpec(
        q_heads=HEADS,
        q_len=LENGTH,
        qk_dim=dim,
        dtype="float16",
        layout="bhtd",
        outputs=("out", "lse"),
        mask=masks.causal() if causal else None,
    )
    device, by = targets.get(target), backends.get("triton")
    ranked = planner.rank(spec, device, by, None, smallest=descent.TRIES)
    plan, _, certificate = descent.first_certified(ranked, by)
    figures = {name: getattr(certificate, name) for name in SHOWN}
    return {"choice": dict(plan.choice)} | figures


# The tutorial.

KERNEL = "_attn_fwd"
BLOCKS = {"BLOCK_M": (128, 64), "BLOCK_N": (128, 64, 32)}  # its own, as all here
WARPS, STAGES = (4, 8), {"cuda": (2, 3, 4), "hip": (1,)}


def tutorials_kernel(path: Path, folder: Path, kernel: str = KERNEL) -> Any:
    """A kernel of the tutorial and what it calls, without what needs a device."""
    tree = ast.parse(path.read_text())
    functions = {x.name: x for x in tree.body if isinstance(x, ast.FunctionDef)}
    if kernel not in functions:
        sys.exit(f"{path} defines no {kernel}: it isn't the fused-attention tutorial")
    for function in functions.values():
        function.decorator_list = []  # of autotuning, which asks for a device
    needed, known = [kernel], []
    while needed:
        name = needed.pop()
        known.append(name)
        used = {x.id for x in ast.walk(functions[name]) if isinstance(x, ast.Name)}
        needed += [x for x in used & set(functions) if x not in [*needed, *known]]
    text = "import triton\nimport triton.language as tl\n"
    for name, function in functions.items():
        if name in known:
            text += f"\n\n@triton.jit\n{ast.unparse(function)}\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    extracted = folder / f"tutorial_{digest}.py"
    extracted.write_text(text)
    specification = importlib.util.spec_from_file_location(extracted.stem, extracted)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return getattr(module, kernel)


def of_tutorial(kernel: Any, target: str, dim: int, causal: bool) -> dict[str, Any]:
    """The best bound of its configurations that fit and don't spill."""
    gpu = targets.get(target).gpu
    assert gpu is not None
    found = []
    for q, k, warps in itertools.product(*BLOCKS.values(), WARPS):
        # what it leaves out itself
        if k > dim or (causal and k > q):
            continue
        if gpu.architecture == "sm90" and q * k < 128 * 128 and warps == 8:
            continue
        for stages in STAGES[gpu.backend]:
            made = _tutorial(kernel, gpu, dim, causal, (q, k, warps, stages))
            if made["shared_bytes"] > gpu.shared_bytes or made["spill_bytes"]:
                continue
            choice = {"q_chunk": q, "k_chunk": k, "warps": warps, "stages": stages}
            found.append({"choice": choice} | {x: made.get(x) for x in SHOWN})
            break  # more stages change what fits, hardly the loop
        if found and found[-1]["flops_per_cycle"] >= 2 * gpu.matrix_fma_per_cycle:
            break  # none is better
    return max(found, key=lambda x: x["flops_per_cycle"])


def _tutorial(
    kernel: Any, gpu: Gpu, dim: int, causal: bool, choice: tuple[int, int, int, int]
) -> dict[str, Any]:
    q, k, warps, stages = choice
    constants = {
        "HEAD_DIM": dim,
        "BLOCK_M": q,
        "BLOCK_N": k,
        "FP8_OUTPUT": False,
        "STAGE": 3 if causal else 1,
        "warp_specialize": False,
        "IS_HOPPER": gpu.architecture == "sm90",
    }
    kinds = {"sm_scale": "fp32", "M": "*fp32", "Z": "i32", "H": "i32", "N_CTX": "i32"}
    described = gpu.backend == "cuda" and int(gpu.architecture.removeprefix("sm")) >= 90
    for name, rows in {"q": q, "k": k, "v": k, "o": q}.items():
        kind = f"tensordesc<fp16[{rows}, {dim}]>" if described else "*fp16"
        kinds[f"desc_{name}"] = kind
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        signature[name] = "constexpr" if name in constants else kinds[name]
        # as the launcher of aligned tensors, and lengths and heads that 16 divides
        if signature[name].startswith("*") or name in ("N_CTX", "H"):
            attributes[i,] = [["tt.divisibility", 16]]
            if gpu.backend == "hip" and signature[name].startswith("*"):
                attributes[i,].append(["tt.pointer_range", 32])
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if gpu.backend == "hip":
        options["waves_per_eu"] = 3 if dim <= 64 else 2
        options["allow_flush_denorm"] = True
    compiled = compiler.compile_kernel(
        kernel, gpu, signature, constants, attributes, **options
    )
    return compiler.figures(compiled, gpu, warps, Tile(q, k, dim, dim))


def show(name: str, made: dict[str, Any]) -> None:
    print(
        f"{name:<34} {made['flops_per_cycle'] or 0:>6.0f} FLOP a cycle  "
        f"{made['bound_pipe']!s:<7} {made['registers']:>4} registers  "
        f"{made['matrix_instruction']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--tutorial", type=Path)
    parser.add_argument("--targets", default=",".join(TARGETS))
    given = parser.parse_args()
    names = given.targets.split(",")
    for path, target in itertools.product(given.files, names):
        plan = attngen.api.plan_of(path)
        spec = plan.spec
        inputs = ("q", "k", "v", *(x.name for x in spec.operands))
        shapes = [(x, spec.shape_of(x), spec.dtype_of(x)) for x in inputs]
        show(f"{path.name} {target}", of_file(path, target, shapes))
    if given.files:
        return
    cases = []
    versions = {"triton": importlib.metadata.version("triton")}
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        kernel = given.tutorial and tutorials_kernel(given.tutorial, Path(name))
        for target, dim, causal in itertools.product(names, DIMS, (False, True)):
            what = f"{target} d={dim}{' causal' if causal else ''}"
            case = {"target": target, "dim": dim, "causal": causal}
            case["attngen"] = of_attngen(target, dim, causal)
            show(f"{what} attngen", case["attngen"])
            if kernel:
                case["tutorial"] = of_tutorial(kernel, target, dim, causal)
                show(f"{what} tutorial", case["tutorial"])
            cases.append(case)
            made = {"versions": versions, "cases": cases}
            RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
