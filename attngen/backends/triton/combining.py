"""What splits of the keys leave, and the kernel `combine` that adds it up, for the templates.

A split leaves, of each row of queries, its running maximum, sum and weighted sum as they are:
added up they are what one loop would have come to, so that what follows a loop is the same.
"""

from __future__ import annotations

from typing import Any

from attngen.backends.triton.decode import COLUMNS, WARP_SPLITS, splits
from attngen.plans import Plan


def combining(plan: Plan, axes: tuple[str, ...]) -> dict[str, Any] | None:
    """Of a plan with splits: `.scratch`, (name, shape) each, and of `combine` what it takes.

    `.operands` are those that `forward` doesn't read.

    Args:
        axes: of out, as its strides are named.
    """
    count = splits(plan.choice)
    if count == 1:
        return None
    spec = plan.spec
    out, lse = "out" in spec.outputs, "lse" in spec.outputs
    packed = spec.storage == "packed"
    rows = ("H", "T") if packed else ("B", "H", "T")
    each = f"{', '.join(rows)}, KV_SPLITS.value"
    scratch = [("part_m", f"({each})"), ("part_total", f"({each})")]
    if out:
        scratch.append(("part_acc", f"({each}, {spec.v_dim})"))
    heads = spec.is_quantised and spec.kv_scale == "head"
    own = (["sink"] * spec.sink + ["v_scale"] * heads) if out else []
    tensors = [n for n, _ in scratch] + [n for n in spec.outputs if n == "out"]
    tensors += [*(["lse"] if lse else []), *own]
    strides = [f"out_stride_{a}" for a in axes] if out else []
    strides += [f"{name}_stride_0" for name in own]
    launched = [f"{name}," for name in tensors]
    lengths = {"q_tokens": "T"} if packed else {"q_len": "T", "heads": "H"}
    launched += [
        *(f"{n}," for n in lengths.values()),
        *(f"*{n}.stride()," for n in (*["out"] * out, *own)),
    ]
    return {
        "scratch": scratch,
        "rows": " * ".join(rows),
        "operands": own,
        "parameters": [*(f"{n}_ptr" for n in tensors), *lengths, *strides],
        "launch_arguments": launched,
        "runtime": strides,
        "ragged": spec.v_dim % COLUMNS != 0,
        "pieces": -(-spec.v_dim // COLUMNS) if out else 1,
        "num_warps": max(1, count // WARP_SPLITS) if out else 1,
    }
