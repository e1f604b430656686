"""What the Triton template receives: a plan, spelled as names, pointers and statements."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attngen import philox, targets
from attngen.backends.triton.arguments import arguments, axes_of, kept, unpacked
from attngen.backends.triton.backward import Backward
from attngen.backends.triton.bounds import (
    Bounds,
    bounds,
    end_of_keys,
    offset_source,
)
from attngen.backends.triton.candidates import pieces, power_above
from attngen.backends.triton.combining import combining
from attngen.backends.triton.decode import COLUMNS, splits
from attngen.backends.triton.guards import Guards, guards, overflows
from attngen.backends.triton.limits import is_exact, limited, wide
from attngen.backends.triton.listing import Listing, listing
from attngen.backends.triton.slope_code import SIZES
from attngen.backends.triton.stored import Stored
from attngen.backends.triton.tile_code import Writer, fours
from attngen.expr import walk
from attngen.intervals import (
    Interval,
    domain,
    interval,
    limit_leaves_int32,
)
from attngen.operands import Operand
from attngen.plans import Option, Plan, grouped
from attngen.regions import spans
from attngen.spec import AttentionSpec
from attngen.spec_checks import relating

LOG2E = 1.4426950408889634


def context(plan: Plan) -> dict[str, Any]:
    """Everything the template names. See templates/README.md."""
    spec = plan.spec
    own_lengths = limited(spec)
    env = domain(spec) if own_lengths else wide(spec)
    index_dtype = "int64" if _leaves_int32(spec, env) else plan.index_dtype
    helpers: set[str] = set()
    writer = Writer(plan, env, index_dtype, helpers)
    tiles = listing(plan) if plan.choice.get("skip") == "list" else None
    where = bounds(plan, env, helpers) if tiles is None else _listed(tiles)
    interior = writer.write(edge=False)
    edge = writer.write(edge=True)
    dropping = overflows(spec, env)
    guard = guards(writer, env) if where.interior else Guards(dropping, dropping)
    if guard.lines:
        where.only_where("tame")
    out, lse = "out" in spec.outputs, "lse" in spec.outputs
    folded = not spec.score and spec.scale_value > 0 and not spec.is_quantised
    gpu = targets.get(plan.target).gpu
    assert gpu is not None
    parts = combining(plan, axes_of(spec))
    if parts:
        where.split()
    back = None
    if spec.derivatives == "vjp":
        made = Backward(plan, env, index_dtype, helpers, axes_of(spec), guard.interior)
        back = made.context() | _back_dims(plan, made.head_dim)
    runtime = back["runtime"] if back else parts["runtime"] if parts else []
    rows_code = [*writer.rows, *guard.lines]
    return {
        **_constants(plan, folded, guard.interior),
        **arguments(plan, out, lse, runtime, listed=tiles is not None),
        **_loads(plan, out),
        **_dims(spec, plan.option("head_dim"), out),
        **unpacked(spec),
        "outputs": list(spec.outputs),
        "out": out,
        "lse": lse,
        "interior": interior,
        "edge": edge,
        "rows_code": rows_code,
        "bounds": where,
        "tiles": tiles,
        "parts": parts,
        "grouped": writer.heads > 1,
        "reads_start": _reads("q_start", where.lines),
        "reads_stop": _reads("q_stop", where.lines),
        "end": end_of_keys(spec),
        "wide": ".to(tl.int64)" if index_dtype == "int64" else "",
        "reverse": plan.option("order") == "reverse",
        "folded": folded,
        "factor": "SCALE_LOG2" if folded else "LOG2E",
        "guard": guard,
        "precision": ', input_precision="ieee"' if spec.dtype == "float32" else "",
        "precise_tanh": spec.dtype == "float32",
        "sink": spec.sink,
        "kv_lengths": spec.kv_lengths,
        "q_lengths": spec.q_lengths,
        "q_offset": offset_source(spec)
        if _reads("offset", [*where.lines, *writer.rows])
        else "",
        "scalar_offset": spec.q_offset == "operand",
        "same_length": spec.q_offset is None and bool(relating(spec)),
        "longest": (spec.batch, spec.q_heads, spec.q_len, spec.kv_len)
        if own_lengths
        else None,
        "sizes": _sizes(spec),
        "helpers": helpers,
        "back": back,
        "kept": kept(spec),
        "mass": "mass" in kept(spec),
        "dropout": spec.dropout,
        "aligned": fours(spec),
        "packed": spec.storage == "packed",
        "paged": spec.storage == "paged",
        "stored": Stored(plan, gpu, there=guard.interior),
        "threshold": philox.threshold(spec.dropout),
        "narrow": spec.out_dtype_name != spec.dtype,
    }


def _back_dims(plan: Plan, head_dim: Option) -> dict[str, Any]:
    """Head dims of the backward pass in pieces; what a tile returns of its keys."""
    found = _dims(plan.spec, head_dim, "out" in plan.spec.outputs)
    qk = found["qk_pieces"]
    return {
        "qk": qk,
        "v": found["v_pieces"],
        "dims": found["dims"],
        "tile_keys": "".join(f", k{piece['suffix']}" for piece in qk),
        "no_keys": "".join(f", _k{piece['suffix']}" for piece in qk),
    }


def _sizes(spec: AttentionSpec) -> list[str]:
    """What must be true of B, H, T and S for operands to be read inside their axes.

    Axes of a number are proven, or guarded; these are axes of batches, heads, queries, keys
    that are read elsewhere than there.
    """
    found: list[str] = []
    loads = (n for e in spec.expressions for n in walk(e) if n.op == "load")
    for node in loads:
        assert isinstance(node.value, Operand)
        for axis, index in zip(node.value.axes, node.args, strict=True):
            if not isinstance(axis, str) or (index.op, index.value) == ("var", axis):
                continue
            if index.op == "var":
                found.append(f"{SIZES[str(index.value)]} <= {SIZES[axis]}")
            elif index.op == "const":
                found.append(f"{SIZES[axis]} > {index.value}")
            else:
                own = spec.batch, spec.q_heads, spec.q_len, spec.kv_len
                found.append(f"(B, H, T, S) == {own}")
    return list(dict.fromkeys(found))


def _leaves_int32(spec: AttentionSpec, env: Mapping[str, Interval]) -> bool:
    limits = [limit for span in spans(spec) for limit in span.limits]
    if any(limit_leaves_int32(limit, spec.kv_offset, env) for limit in limits):
        return True
    for root in spec.expressions:
        for node in walk(root):
            if node.kind == "int":
                low, high = interval(node, env)
                if high > 2**31 - 1 or low < -(2**31):
                    return True
    return False


def _reads(name: str, lines: list[str]) -> bool:
    return any(re.search(rf"\b{name}\b", line) for line in lines)


def _constants(plan: Plan, folded: bool, natural: bool) -> dict[str, Any]:
    spec = plan.spec
    scale = spec.scale_value
    rows = "rows" if grouped(spec, plan.choice) > 1 else "queries"
    lines: list[tuple[str, str, str]] = [
        ("Q_BLOCK", str(plan.q_chunk), f"{rows} of a tile"),
        ("K_BLOCK", str(plan.k_chunk), "keys of a tile"),
        ("R", str(spec.repeats), "query heads that share a kv head"),
        ("QK_DIM", str(spec.qk_dim), ""),
    ]
    if "out" in spec.outputs:
        lines.append(("V_DIM", str(spec.v_dim), ""))
    if folded:
        value = repr(scale * LOG2E)
        lines.append(
            (
                "SCALE_LOG2",
                value,
                f"{scale!r}, times log2(e): exp(s) is 2**(s * log2(e))",
            )
        )
    if splits(plan.choice) > 1:
        lines.append(
            ("KV_SPLITS", str(splits(plan.choice)), "programs that share keys")
        )
        if "out" in spec.outputs:
            lines.append(("COLUMNS", str(COLUMNS), "of out, of a program of `combine`"))
    back = spec.derivatives == "vjp"
    if back or not folded:
        lines.append(("SCALE", repr(scale), ""))
    if not folded or spec.sink:
        lines.append(("LOG2E", repr(LOG2E), "exp(s) is 2**(s * LOG2E)"))
    if spec.dropout:
        lines.append(("DROPOUT", repr(spec.dropout), "share of weights that are 0"))
    if "lse" in spec.outputs or (back and natural):
        lines.append(("LN2", "0.6931471805599453", ""))
    if spec.storage == "paged":
        lines.append(("PAGE_SIZE", str(spec.page_size), "keys of a page"))
        if is_exact(spec):
            lines.append(("KV_LEN", str(spec.kv_len), "keys of each sequence"))
    if offset_source(spec) == "constant" and (spec.expressions or spec.dropout):
        lines.append(("Q_OFFSET", str(spec.q_offset), "position of query 0"))
    if spec.kv_offset:
        lines.append(("K_OFFSET", str(spec.kv_offset), "position of key 0"))
    return {
        "constants": lines,
        "num_warps": plan.option("num_warps"),
        "num_stages": plan.option("num_stages"),
    }


def _listed(tiles: Listing) -> Bounds:
    """Runs within a row of the launcher's list."""
    interiors = [("0", "full")] if tiles.interior else []
    edges = [("full" if tiles.interior else "0", "visited")]
    lines = [
        "tiles = tiles_ptr + b_index * tiles_stride_0 + h_index * tiles_stride_1",
        "tiles += (q_start // Q_BLOCK).to(tl.int64) * tiles_stride_2",
    ]
    if tiles.interior:
        lines.append("full = tl.load(tiles)")
    lines.append("visited = tl.load(tiles + 1)")
    about = [
        "A row of the list of tiles: how many key blocks only hold what every query"
    ]
    about += ["here sees, how many hold what any does, and which these are."]
    ends = ("0", "full", "visited") if tiles.interior else ("0", "visited")
    return Bounds(lines, about, interiors, edges, listed=True, visits=[ends])


def _loads(plan: Plan, out: bool) -> dict[str, Any]:
    """How keys and values are loaded; what tensor descriptors load at once."""
    described = plan.option("loads") == "descriptors"
    dims = {"k": plan.spec.qk_dim} | ({"v": plan.spec.v_dim} if out else {})
    shapes = {n: f"[1, 1, K_BLOCK.value, {power_above(d)}]" for n, d in dims.items()}
    return {"described": described, "block_shapes": shapes if described else {}}


def _dims(spec: AttentionSpec, choice: Option, out: bool) -> dict[str, Any]:
    """The pieces of both head dims; those of v share the names of q's where they agree."""
    qk = _pieces("d", "QK_DIM", spec.qk_dim, choice)
    v = qk if spec.v_dim == spec.qk_dim else _pieces("e", "V_DIM", spec.v_dim, choice)
    dims = qk if v is qk or not out else qk + v
    return {"qk_pieces": qk, "v_pieces": v, "dims": dims}


def _pieces(letter: str, constant: str, dim: int, choice: Any) -> list[dict[str, Any]]:
    made = pieces(dim, choice)
    several = len(made) > 1
    listed = []
    for i, (start, width) in enumerate(made):
        name = f"{letter}_{i}" if several else letter
        padded = start + width > dim
        listed.append(
            {
                "name": name,
                "suffix": f"_{i}" if several else "",
                "start": start,
                "width": width,
                "dim": constant,
                "there": f"{name}_there" if padded else "",
            }
        )
    return listed
