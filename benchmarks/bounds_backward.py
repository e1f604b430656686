"""Useful FLOP a bound cycle of backward kernels, from their main loops' assembly: no GPU.

As bounds_gpu.py, of the kernels of the backward pass: attngen's, of the plan that it builds, and
the fused-attention tutorial's of Triton's own repository, compiled by the same compiler for the
same target, float16, as the tutorial launches it (blocks of 128 and 32, 4 warps, 5 stages) and
with 8 warps, which spill less. Of each loop, the masked ones apart: seven products of a pair of
tiles in all, three for dq and four for dk and dv.

    python benchmarks/bounds_backward.py [--tutorial PATH] [--targets a100,h100,mi300x]

Writes benchmarks/results/bounds_backward.json.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from bounds_gpu import DIMS, HEADS, LENGTH, TARGETS, tutorials_kernel

from attngen import AttentionSpec, backends, descent, masks, planner, targets
from attngen.backends.triton import assembly, compiler
from attngen.backends.triton.pipes import Tile, pipes

RESULTS = Path(__file__).parent / "results" / "bounds_backward.json"
NAMES = {"backward_keys": "dk, dv", "backward_queries": "dq"}
HELD, STEP, SLICES = 128, 32, 2  # of the tutorial; masked loops go in halves of a step


def of_attngen(target: str, dim: int, causal: bool) -> dict[str, Any]:
    """Figures of the kernels that attngen builds: of the first plan that fits."""
    spec = AttentionSpec(
        q_heads=HEADS,
        q_len=LENGTH,
        qk_dim=dim,
        dtype="float16",
        layout="bhtd",
        mask=masks.causal() if causal else None,
        derivatives="vjp",
    )
    device, by = targets.get(target), backends.get("triton")
    ranked = planner.rank(spec, device, by, None, smallest=descent.TRIES)
    plan, _, certificate = descent.first_certified(ranked, by)
    kernels = certificate.kernels or {}
    shown = ("registers", "spill_bytes", "bound_pipe", "flops_per_cycle")
    return {
        "choice": dict(plan.choice),
        "kernels": {NAMES[n]: {x: kernels[n].get(x) for x in shown} for n in NAMES},
    }


def of_tutorial(
    kernel: Any, target: str, dim: int, warps: int, stages: int
) -> dict[str, Any]:
    """Figures of the tutorial's kernel: one with four loops, two of them masked."""
    gpu = targets.get(target).gpu
    assert gpu is not None
    constants: dict[str, Any] = {
        "BLOCK_M1": STEP, "BLOCK_N1": HELD, "BLOCK_M2": HELD, "BLOCK_N2": STEP,
        "BLK_SLICE_FACTOR": SLICES, "HEAD_DIM": dim, "stride_d": 1,
    }  # fmt: skip
    kinds = dict.fromkeys(("Q", "K", "V", "DO", "DQ", "DK", "DV"), "*fp16")
    kinds |= {"M": "*fp32", "D": "*fp32", "sm_scale": "fp32"}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        kind = "constexpr" if name in constants else kinds.get(name, "i32")
        signature[name] = kind
        if kind not in ("constexpr", "fp32"):  # as aligned tensors and lengths are
            attributes[i,] = [["tt.divisibility", 16]]
            if gpu.backend == "hip" and kind.startswith("*"):
                attributes[i,].append(["tt.pointer_range", 32])
    compiled = compiler.compile_kernel(
        kernel,
        gpu,
        signature,
        constants,
        attributes,
        num_warps=warps,
        num_stages=stages,
    )
    program, used = compiler.program_of(compiled, gpu)
    inner = Tile(HELD, STEP, dim, dim, qk_products=2, v_products=2)
    tiles = [
        ("dk, dv, masked", dataclasses.replace(inner, k_block=STEP // SLICES)),
        ("dk, dv", inner),
        (
            "dq, masked",
            dataclasses.replace(inner, k_block=STEP // SLICES, v_products=1),
        ),
        ("dq", dataclasses.replace(inner, v_products=1)),
    ]
    loops = assembly.main_loops(program)
    kernels = {}
    if len(loops) == len(
        tiles
    ):  # else a compiler has taken them apart: which is which?
        for loop, (name, tile) in zip(loops, tiles, strict=True):
            found = pipes(loop, gpu, tile, warps)
            kernels[name] = {
                "bound_pipe": found.bound_pipe, "flops_per_cycle": found.flops_per_cycle,
            }  # fmt: skip
    return {"warps": warps, "stages": stages, **used, "kernels": kernels}


def show(name: str, made: dict[str, Any]) -> None:
    kernels = made["kernels"]
    rates = ", ".join(
        f"{n} {kernels[n]['flops_per_cycle']:.0f}"
        for n in NAMES.values()
        if n in kernels
    )
    spilled = max(
        [
            made.get("spill_bytes", 0),
            *(k.get("spill_bytes", 0) for k in kernels.values()),
        ]
    )
    print(
        f"{name:<34} {rates or 'loops not told apart':<26} spills {spilled} B",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tutorial", type=Path)
    parser.add_argument("--targets", default=",".join(TARGETS))
    given = parser.parse_args()
    versions = {"triton": importlib.metadata.version("triton")}
    cases = []
    with tempfile.TemporaryDirectory(prefix="attngen-") as name:
        kernel = given.tutorial and tutorials_kernel(
            given.tutorial, Path(name), "_attn_bwd"
        )
        for target, dim in itertools.product(given.targets.split(","), DIMS):
            case: dict[str, Any] = {"target": target, "dim": dim}
            for causal in (False, True):
                what = "causal" if causal else "full"
                case[what] = of_attngen(target, dim, causal)
                show(f"{target} d={dim} {what} attngen", case[what])
            if kernel:
                hip = targets.get(target).kind == "hip"
                ways = [(4, 1 if hip else 5), (8, 1 if hip else 5)]
                case["tutorial"] = [of_tutorial(kernel, target, dim, *w) for w in ways]
                for made in case["tutorial"]:
                    show(f"{target} d={dim} tutorial, {made['warps']} warps", made)
            cases.append(case)
            made = {"versions": versions, "cases": cases}
            RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
