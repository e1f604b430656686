"""Everything that needs a GPU, in one command: `make gpu`.

For each file of the gallery: the kernel is built for the GPU that is here, validated
compiled, tuned, and timed in turns beside torch's scaled_dot_product_attention and compiled
flex_attention where these can say the same. Writes results/gpu_<target>.json.

    python benchmarks/gpu.py [--only llama3_8b,t5_large] [--rounds 15] [--seconds 30]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import gallery

import attngen
from attngen import AttentionSpec, backends, gpus, inputs, masks
from attngen.backends.triton.loader import gpu_here
from attngen.errors import AttngenError

RESULTS = Path(__file__).parent / "results"
Call = Callable[[], Any]


def target_here() -> str:
    """The target that the GPU here is, or the representative of its architecture."""
    found = gpu_here()
    if found is None:
        raise SystemExit("make gpu needs a GPU that torch sees; there is none here")
    architecture, model = found
    if model is not None:
        return model
    for known, gpu in gpus.GPUS.items():
        if gpu.architecture == architecture:
            return known
    raise SystemExit(f"no target has the architecture of this GPU, {architecture}")


def contenders(spec: AttentionSpec, arrays: dict[str, Any]) -> dict[str, Call]:
    """torch's own, where they compute the spec: no operands, a mask they can say."""
    import torch
    import torch.nn.functional as F

    plain = not spec.score and not spec.operands and spec.mask in (None, masks.causal())
    if not plain or (spec.mask is not None and spec.q_len != spec.kv_len):
        return {}
    order = (0, 2, 1, 3) if spec.layout == "bthd" else (0, 1, 2, 3)
    q, k, v = (arrays[n].permute(order) for n in "qkv")
    causal, scale, gqa = spec.mask is not None, spec.scale_value, spec.repeats > 1

    def sdpa() -> Any:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa
        )

    from torch.nn.attention import flex_attention as flex

    block_mask = None
    if causal:
        block_mask = flex.create_block_mask(
            lambda b, h, i, j: i >= j, None, None, spec.q_len, spec.kv_len, q.device
        )
    compiled = torch.compile(flex.flex_attention)

    def flex_attention() -> Any:
        return compiled(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=gqa)

    return {"torch SDPA": sdpa, "flex_attention": flex_attention}


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
    entry = gallery.TRITON[name]
    spec, fix = entry.spec(), dict(entry.fix)
    by = backends.get("triton")
    estimate = attngen.build(spec, target, "triton", fix=fix)
    attngen.tune(spec, target, "triton", fix=fix, seconds=allowance)
    tuned = attngen.build(spec, target, "triton", "measure", fix)
    made = inputs.arrays(spec, nan=False)
    arrays = {n: by.array(x, spec.dtype_of(n)) for n, x in made.items()}
    calls: dict[str, Call] = {"attngen": lambda: tuned(**arrays)}
    if estimate.plan.choice != tuned.plan.choice:
        calls["attngen, estimate"] = lambda: estimate(**arrays)
    samples = in_turns(calls | contenders(spec, arrays), rounds)
    ours = samples["attngen"]
    return {
        "plan": tuned.plan.choice,
        "estimated_plan": estimate.plan.choice,
        "report": tuned.report.to_dict() if tuned.report else None,
        "certificate": tuned.certificate.to_dict() if tuned.certificate else None,
        "flop_per_s": tuned.plan.flop / statistics.median(ours),
        "samples_s": samples,
        "times_as_fast_as": {
            other: statistics.quantiles(
                [t / o for t, o in zip(times, ours, strict=True)], n=4
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
    target = target_here()
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
        print(f"{name:<18}{row.get('failed') or said or 'alone'}", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    failed = [n for n, row in found["kernels"].items() if "failed" in row]
    print(f"wrote {path}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
