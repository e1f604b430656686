"""Everything that needs a GPU, in one command: `make gpu`.

For each file of the gallery: the kernel is built for the GPU that is here, validated
compiled, tuned, and timed in turns beside compiled flex_attention, and torch's
scaled_dot_product_attention where it can say the same; with derivatives forward and backward
together. Writes results/gpu_<target>.json.

    python benchmarks/gpu.py [--only llama3_8b,t5_large] [--rounds 15] [--seconds 30]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import gallery

import attngen
from attngen import AttentionSpec, backends, gpus, inputs, masks, slopes
from attngen.backends.triton.loader import gpu_here, has_gpu, target_here
from attngen.errors import CALL_FAULTS, AttngenError
from attngen.peers import torch_peers

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


def here() -> str:
    """The target that the GPU here is, or one of its architecture."""
    if not has_gpu():
        raise SystemExit("make gpu needs a GPU that torch sees; there is none here")
    target = target_here()
    if target is None:
        raise SystemExit(f"no target has the architecture of this GPU: {gpu_here()}")
    return target


def heads_first(spec: AttentionSpec, arrays: dict[str, Any]) -> dict[str, Any]:
    """q, k and v as torch's own are at home: contiguous [b, h, t, d]; operands as they are."""
    if spec.layout == "bhtd" or spec.storage != "dense":
        return arrays
    moved = {
        n: arrays[n].transpose(1, 2).contiguous()
        for n in ("q", "k", "v", "dout")
        if n in arrays
    }
    return arrays | moved


def sdpa(spec: AttentionSpec, given: dict[str, Any]) -> Call | None:
    """scaled_dot_product_attention; None where it can't say the spec without a matrix."""
    import torch
    import torch.nn.functional as F

    causal = spec.mask == masks.causal() and spec.q_len == spec.kv_len
    said = spec.outputs == ("out",) and not (
        spec.score or spec.operands
    )  # nor dropout, pages
    if not said or not (spec.mask is None or causal):
        return None
    q, k, v = (given[n] for n in "qkv")
    dtype = getattr(torch, spec.out_dtype_name)
    options = {"is_causal": causal, "scale": spec.scale_value}
    options["enable_gqa"] = spec.repeats > 1
    return lambda: (F.scaled_dot_product_attention(q, k, v, **options).to(dtype),)


def flex_attention(
    spec: AttentionSpec,
    given: dict[str, Any],
    compiled: Callable[..., Any] | None = None,
) -> Call | None:
    """flex_attention with the spec's own expressions as mask_mod and score_mod.

    A sink is applied with its lse, as its users do. None with dropout, which it lacks, and
    for packed, paged or quantised K/V, which it doesn't take as they are.

    Args:
        compiled: None: torch.compile, for these shapes alone.
    """
    import torch
    from torch.nn.attention import flex_attention as flex

    if spec.dropout or spec.storage != "dense" or spec.is_narrow:
        return None
    compiled = compiled or functools.partial(torch.compile, dynamic=False)
    torch.compiler.reset()  # what was compiled for another spec counts as a variant
    q, k, v = (given[n] for n in "qkv")
    dtype = getattr(torch, spec.out_dtype_name)
    options = torch_peers.flex_options(spec, given)
    options["block_mask"] = torch_peers.flex_block_mask(
        spec, given, compiled(flex.create_block_mask)
    )
    if spec.sink or "lse" in spec.outputs:
        options |= lse_asked(flex)
    attend = compiled(flex.flex_attention)

    def call() -> Any:
        made = attend(q, k, v, **options)
        if not isinstance(made, tuple):
            return (made.to(dtype),)
        out, lse = made[0], getattr(made[1], "lse", made[1])
        if spec.sink:
            out = out * torch.sigmoid(lse - given["sink"][:, None])[..., None]
        found = {"out": out.to(dtype), "lse": lse.float()}
        return tuple(found[name] for name in spec.outputs)

    return call


CONTENDERS: dict[str, Callable[..., Call | None]] = {
    "torch SDPA": sdpa,
    "flex_attention": flex_attention,
}


def lse_asked(flex: Any) -> dict[str, Any]:
    """How flex_attention is asked for its lse: newer ones have a word for it."""
    if hasattr(flex, "AuxRequest"):
        return {"return_aux": flex.AuxRequest(lse=True)}
    return {"return_lse": True}


def with_gradients(spec: AttentionSpec, call: Call, given: dict[str, Any]) -> Call:
    """A contender's call that returns gradients behind its outputs, as attngen's does.

    Args:
        given: its tensors, which require gradients, and cotangents.
    """
    import torch

    of = [given[name] for name in slopes.gradients(spec).values()]
    pulled = [given[name] for name in slopes.cotangents(spec)]

    def both() -> Any:
        outputs = call()
        return (*outputs, *torch.autograd.grad(outputs, of, pulled))

    return both


def difference(spec: AttentionSpec, call: Call, ours: Any) -> float:
    """The largest of a contender's outputs to attngen's: what says that both do the same.

    Gradients count as shares of the largest.
    """
    ours = ours if isinstance(ours, tuple) else (ours,)
    largest = 0.0
    names = (*spec.outputs, *slopes.gradients(spec))
    for name, x, y in zip(names, call(), ours, strict=True):
        if name in ("out", "dq", "dk", "dv") and spec.layout == "bthd":
            x = x.transpose(1, 2)
        if name not in spec.outputs:
            most = y.abs().max()
            x, y = x / most, y / most
        apart = (x.float() - y.float()).abs()
        largest = max(largest, float(apart[x != y].max()) if (x != y).any() else 0.0)
    return largest


def seconds(call: Call, repeats: int) -> float:
    """Of one call, on the device's own clock."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats


def in_turns(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # compiled
    repeats = {n: max(1, round(0.02 / seconds(c, 3))) for n, c in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(seconds(call, repeats[name]))
    return samples


def measured(name: str, target: str, rounds: int, allowance: float) -> dict[str, Any]:
    """A kernel of the gallery built, tuned, and timed beside the contenders."""
    entry = gallery.TRITON[name]
    spec, fix = entry.spec(), dict(entry.fix)
    by = backends.get("triton")
    estimate = attngen.build(spec, target, "triton", fix=fix)
    attngen.tune(spec, target, "triton", fix=fix, seconds=allowance)
    tuned = attngen.build(spec, target, "triton", "measure", fix)
    made = inputs.arrays(spec, nan=False) | inputs.cotangents(spec)
    of = slopes.cotangents(spec)
    arrays = {n: by.array(x, spec.dtype_of(of.get(n, n))) for n, x in made.items()}
    programs = {"attngen": by.program(spec, tuned)}
    if estimate.plan.choice != tuned.plan.choice:
        programs["attngen, estimate"] = by.program(spec, estimate)
    calls: dict[str, Call] = {
        n: functools.partial(p, **arrays) for n, p in programs.items()
    }
    given, ours = heads_first(spec, arrays), calls["attngen"]()
    for wanted in slopes.gradients(spec).values():
        given[wanted] = given[wanted].detach().requires_grad_()
    apart, left_out = {}, {}
    for other, make in CONTENDERS.items():
        try:
            if (call := make(spec, given)) is not None:
                if spec.derivatives is not None:
                    call = with_gradients(spec, call, given)
                apart[other] = difference(spec, call, ours)
                calls[other] = call
        except CALL_FAULTS as error:  # no memory for a block mask, say
            left_out[other] = f"{type(error).__name__}: {error!s:.300}"
    samples = in_turns(calls, rounds)
    own = samples["attngen"]
    return {
        "plan": tuned.plan.choice,
        "estimated_plan": estimate.plan.choice,
        "report": tuned.report.to_dict() if tuned.report else None,
        "certificate": tuned.certificate.to_dict() if tuned.certificate else None,
        "flop_per_s": tuned.plan.flop / statistics.median(own),
        "samples_s": samples,
        "largest_difference": apart,
        "left_out": left_out,
        "times_as_fast_as": {
            other: statistics.quantiles(
                [t / o for t, o in zip(times, own, strict=True)], n=4
            )
            for other, times in samples.items()
            if other != "attngen"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(gallery.TRITON), help="files")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=30, help="of each tuning")
    given = parser.parse_args()
    target = here()
    import torch
    import triton

    found: dict[str, Any] = {
        "target": target,
        "device": torch.cuda.get_device_name(),
        "versions": {
            "attngen": attngen.__version__,
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "kernels": {},
    }
    path = RESULTS / f"gpu_{target}.json"
    described = gpus.GPUS[target].tensor_descriptors
    for name in given.only.split(","):
        if "loads" in gallery.TRITON[name].fix and not described:
            continue
        try:
            row = measured(name, target, given.rounds, given.seconds)
        except AttngenError as error:
            row = {"failed": str(error)}
        found["kernels"][name] = row
        ratios = row.get("times_as_fast_as", {})
        said = ", ".join(f"{n} {q[1]:.2f}×" for n, q in ratios.items())
        for other, reason in row.get("left_out", {}).items():
            said += f", no {other} ({reason.splitlines()[0]})"
        print(f"{name:<18}{row.get('failed') or said or 'alone'}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    failed = [n for n, row in found["kernels"].items() if "failed" in row]
    print(f"wrote {path}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
