"""The algorithm "scanned": differentiable to any order, by JAX's own rules alone.

Scans over chunks of queries and of keys, both rematerialised. Chunks are what the scans go
over, not slices of what they close over: the transpose of a slice is an array as long as all
keys, for every tile. How many chunks of keys there are is fixed; a switch on the bounds, which
depend on the chunk's place alone, leaves out those that no query sees.
"""

from __future__ import annotations

import functools
from typing import Any

from attngen.backends.jax.bounds import bounds
from attngen.backends.jax.guarded import tile_code
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.tile import Starts, Tile, guards, heads, order, without_keys
from attngen.plans import Choice, Plan
from attngen.slopes import trained
from attngen.spec import AttentionSpec
from attngen.spec_checks import position_variables
from attngen.tiles import Limits, chunk_limits, key_chunks

CHUNKS = 4096  # of queries, at most, whose key chunks are all looked at


@functools.lru_cache(maxsize=64)
def _limits(spec: AttentionSpec, q_chunk: int) -> frozenset[tuple[Limits, ...]]:
    return frozenset(chunk_limits(spec, q_chunk))


@functools.lru_cache(maxsize=1024)
def visits(spec: AttentionSpec, q_chunk: int, k_chunk: int) -> int:
    """The most key chunks between the first and the last that a chunk of queries visits."""
    every = -(-spec.kv_len // k_chunk)
    if spec.static_q_offset is None or -(-spec.q_len // q_chunk) > CHUNKS:
        return every
    most = 1
    for limits in _limits(spec, q_chunk):
        visited = key_chunks(limits, k_chunk)
        most = max(most, visited[-1][-1] - min(first for first, *_ in visited))
    return min(most, every)


def steps(spec: AttentionSpec, choice: Choice) -> int:
    """How many groups of batches and heads are computed one after another."""
    batches = spec.batch // int(choice["batch_chunk"])
    return batches * (spec.kv_heads // int(choice["head_chunk"]))


def scanned(plan: Plan, at: Tile) -> dict[str, Any]:
    """What `scanned.py.jinja` names, beside what all templates do."""
    spec = plan.spec
    own = [("b", "batch_chunk", spec.batch), ("g", "head_chunk", spec.kv_heads)]
    levels = [name for name, choice, whole in own if plan.option(choice) != whole]
    ragged = spec.kv_len % plan.k_chunk != 0
    starts = Starts(
        b="b" if "b" in levels else "0",
        g="g" if "g" in levels else "0",
        q="q_start" if spec.q_len != plan.q_chunk else "0",
        k="k_start",
    )
    code, reads_seen = tile_code(plan, at, starts, indent=16, ragged=ragged)
    visited = bounds(plan, at, starts, ragged, Lengths(plan, at, starts), width=76)
    given = ["q", "k", "v", *(o.name for o in trained(spec))]
    known = [o.name for o in spec.operands if o.name not in given]
    known += ["q_offset"] if offset_from_lengths(spec) else []
    wide = f"jnp.{spec.stats_dtype}"
    product = str(plan.option("product_dtype"))
    uses = [*code.keys, *code.score]
    return {
        "code": code,
        "starts": starts,
        "bounds": visited,
        "visit": _visit(plan, visited["loops"]),
        "levels": _levels(plan, at, levels),
        "given": given,
        "known": known,
        "widened": [o.name for o in trained(spec) if o.dtype != spec.stats_dtype],
        "widen": "" if spec.dtype == spec.stats_dtype else f".astype({wide})",
        "narrow": "" if product == spec.stats_dtype else f".astype(jnp.{product})",
        "guard": bool(plan.option("guard") and levels),
        "ragged": ragged,
        "q_ragged": spec.q_len % plan.q_chunk != 0,
        "scores_start": any("k_start" in line for line in uses),
        "edge_start": any("k_start" in line for line in code.edge),
        "reads_seen": reads_seen,
        "tile_shape": at.shape(at.letters),
        "token_axis": order(spec.layout, "bqh").index("q"),
        "head_axis": order(spec.layout, "bqh").index("h"),
        "looped_heads": starts.g != "0",
        "sink_begin": f"({'g' if spec.repeats == 1 else 'g * R'},)",
        "sink_size": f"({heads(at)},)",
        "sink_shape": without_keys(at.spread("gr")),
        "rows_shape": at.shape(order(spec.layout, "bqgr")),
        "out_tile_shape": _tile_shape(spec, at),
        "lse_shape": f"{at.sizes['b']}, {heads(at)}, Q_CHUNK",
        "acc_dim": "D" if spec.qk_dim == spec.v_dim else "V_DIM",
        "unseen": guards(plan),
    }


def offset_from_lengths(spec: AttentionSpec) -> bool:
    """Whether positions of queries are counted back from the keys that are there."""
    counted = spec.q_offset == "bottom_right" and spec.kv_lengths
    return counted and any("q" in position_variables(e) for e in spec.expressions)


def _tile_shape(spec: AttentionSpec, at: Tile) -> str:
    size = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    dim = "D" if spec.qk_dim == spec.v_dim else "V_DIM"
    return ", ".join([*(size[a] for a in order(spec.layout, "bqh")), dim])


def _levels(plan: Plan, at: Tile, names: list[str]) -> dict[str, Any]:
    """The loop over groups of batches and heads: what is cut, and where a step begins."""
    counts = {"b": "B // B_CHUNK", "g": "G // G_CHUNK"}
    if at.sizes["b"] == "1":
        counts["b"] = "B"
    if at.sizes["g"] == "1":
        counts["g"] = "G"
    size = {"b": at.sizes["b"], "g": at.sizes["g"]}

    def chunk(index: str, name: str) -> str:
        return index if size[name] == "1" else f"{index} * {size[name]}"

    lines = []
    if names == ["b", "g"]:
        inner = counts["g"] if " " not in counts["g"] else f"({counts['g']})"
        lines = [
            f"b = {chunk(f'step // {inner}', 'b')}",
            f"g = {chunk(f'step % {inner}', 'g')}",
        ]
    elif names:
        lines = [f"{names[0]} = {chunk('step', names[0])}"]
    return {
        "names": names,
        "lines": lines,
        "count": " * ".join(
            f"({counts[n]})" if " " in counts[n] and len(names) > 1 else counts[n]
            for n in names
        ),
        "batches": size["b"],
        "heads": heads(at),
        "kv_heads": size["g"],
    }


def _visit(plan: Plan, loops: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Which key chunks a chunk of queries goes over, and which kind each is of."""
    spec, every = plan.spec, -(-plan.spec.kv_len // plan.k_chunk)
    most = visits(spec, plan.q_chunk, plan.k_chunk)
    runs: list[list[str]] = []
    for _, first, last in loops:
        if runs and runs[-1][1] == first:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    begin = "0"
    if loops and most < every and loops[0][1] != "0":
        begin = f"jnp.minimum({loops[0][1]}, K_CHUNKS - VISITS)"
    inside = [(a, b) for kind, a, b in loops if kind == "interior"]
    kinds = {kind for kind, _, _ in loops}
    whole = [("0", str(every))]
    everywhere = [tuple(run) for run in runs] == whole
    return {
        "kinds": kinds,
        "most": most if most < every else None,
        "begin": begin,
        "interior": _within(inside, every) if kinds == {"edge", "interior"} else "",
        "some": "" if everywhere or not loops else _within(runs, every),
    }


def _within(runs: Any, every: int) -> str:
    """Whether c lies in one of some runs of chunks, as text."""
    texts = []
    for first, last in runs:
        parts = [f"({first} <= c)"] if first != "0" else []
        parts += [f"(c < {last})"] if last != str(every) else []
        if len(parts) == 1 and len(runs) == 1:
            parts = [parts[0][1:-1]]
        texts.append(" & ".join(parts) or "(c >= 0)")
    return texts[0] if len(texts) == 1 else " | ".join(f"({t})" for t in texts)
