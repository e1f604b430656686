"""The loops of an emitted file: over batches, heads and queries, and over key chunks."""

from __future__ import annotations

from typing import Any

from attngen.backends.jax import shards, stored
from attngen.backends.jax.bounds import bounds
from attngen.backends.jax.candidates import bounded
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    chosen,
    drops,
    guards,
    heads,
    order,
    outputs_of,
    triangle,
    without_keys,
)
from attngen.backends.jax.tile_code import tile_code
from attngen.backends.jax.unseen import unseen
from attngen.diagonals import rises
from attngen.plans import Plan
from attngen.spec import AttentionSpec

Loop = tuple[str, str, str]  # the function of a step, the first chunk, the last


def chunked(plan: Plan, at: Tile) -> dict[str, Any]:
    """What `_chunked.jinja` and the templates that use it name."""
    spec = plan.spec
    levels = _levels(plan, at)
    indexed = {name for name, _ in levels}
    diagonal = bool(chosen(plan, "diagonal"))
    # a diagonal ends where whole chunks do
    ragged = spec.kv_len % plan.k_chunk != 0 and not diagonal
    starts = Starts(
        b="b" if "b" in indexed else "0",
        g="g" if "g" in indexed else "0",
        q="q_start" if "i" in indexed else "0",
        k="k_start",
    )
    part, edge, moved = triangle(at, starts) if diagonal else (at, None, starts)
    code = tile_code(plan, part, moved, indent=12, ragged=ragged, edge=edge)
    visited = bounds(plan, at, starts, ragged, Lengths(plan, at, starts))
    loops = visited["loops"]
    kinds = {kind for kind, _, _ in loops}
    there = None
    if "edge" in kinds and not diagonal:
        there = unseen(plan, visited["limits"], ragged, code.edge)
    steps = " * ".join(count for _, count in levels)
    ones = chosen(plan, "denominator") == "ones"
    v = _value_dim(spec)
    of_stored = stored.context(plan, at, starts)
    return {
        "code": code,
        "levels": level_lines(levels, plan, at),
        "steps": steps,
        "count": "steps" if len(steps) > 30 else steps,
        "bare_count": "steps" if len(steps) > 30 else _bare(steps),
        "looped": bool(levels),
        "carried": ", ".join(f"{o}_all" for o in outputs_of(plan)),
        "q_start": starts.q != "0",
        "q_ragged": spec.q_len % plan.q_chunk != 0,
        "ragged": ragged,
        "edge_start": any("k_start" in line for line in (*code.edge, *(there or ()))),
        "there": there,
        "tile_shape": part.shape(at.letters),
        "tile_made": ", ".join(_made(plan, of_stored["stored"]["scaled"])),
        "starts": starts,
        "guard": bool(plan.option("guard")),
        "loop_kind": str(plan.option("loop")),
        "bounds": visited,
        "kinds": kinds,
        "unseen": guards(plan),
        "ones": ones,
        "acc_dim": f"{v} + 1" if ones else v,
        "statistics": "m, acc" if ones else "m, total, acc",
        "twice": chosen(plan, "qk") == "twice",
        "unroll": int(chosen(plan, "unroll")),
        "unrolled_by": _unrolled(plan, loops),
        "split": _split(plan, loops),
        "map_steps": chosen(plan, "steps") == "map",
        "stacked": _stacked(plan, at, levels),
        **of_stored,
        **memory(plan, at, part, starts),
        **_triangle(plan, at, loops),
    }


def _made(plan: Plan, scaled: str) -> list[str]:
    """What a tile returns."""
    return ["s", "vc", *(["kept"] * drops(plan)), *([scaled] if scaled else [])]


def _bare(text: str) -> str:
    """A text without parentheses around all of it."""
    inner = text[1:-1]
    whole = text.startswith("(") and text.endswith(")") and "(" not in inner
    return inner if whole else text


def _value_dim(spec: AttentionSpec) -> str:
    return "D" if spec.qk_dim == spec.v_dim else "V_DIM"


def _triangle(plan: Plan, at: Tile, loops: list[Loop]) -> dict[str, Any]:
    """How the tiles of a diagonal are cut from those of all queries of a chunk."""
    diagonal = chosen(plan, "diagonal")
    lead = len(at.rows) - 1
    axes = ":, " * lead
    end = loops[0][2] if loops else "0"
    arguments = "c, rows" if chosen(plan, "qk") == "twice" else "c"
    return {
        "diagonal": bool(diagonal),
        "triangle_start": "low" if end == "0" else f"{end} * K_CHUNK + low",
        "q_axes": axes,
        "stats_axis": str(lead),
        "tile_arguments": "k_start, keys, low" if diagonal else arguments,
        "tile_rows": f"rows[{axes}low:]" if diagonal else "rows",
    }


def _constant(loop: Loop) -> int | None:
    """How many chunks a loop goes over, where that is known."""
    _, first, last = loop
    known = first.isdigit() and last.isdigit()
    return int(last) - int(first) if known else None


def main_loop(kinds: list[str]) -> int | None:
    """Which of the loops goes over most chunks: the last that evaluates no mask, or edge."""
    if not kinds:
        return None
    kind = "interior" if "interior" in kinds else "edge"
    last = len(kinds) - 1 - kinds[::-1].index(kind)
    return last if kind == "interior" else 0


def unrolls(plan: Plan) -> bool:
    """Whether tiles go several to a step, a number of steps that isn't known."""
    return chosen(plan, "unroll") != 1 and bounded(plan.spec)


def _unrolled(plan: Plan, loops: list[Loop]) -> dict[str, Any] | None:
    """How tiles without a mask go several to a step, where their number isn't known."""
    main = main_loop([kind for kind, _, _ in loops])
    if not unrolls(plan) or main is None or loops[main][0] != "interior":
        return None
    several = int(chosen(plan, "unroll")) * plan.k_chunk
    whole = bool(chosen(plan, "diagonal"))
    whole = whole and rises(plan.spec, plan.q_chunk, several)
    lines, chunk = _grouped(loops[main], "UNROLL", "interiors", "carry", "carry", whole)
    return {"lines": lines, "chunk": chunk, "index": main}


def _split(plan: Plan, loops: list[Loop]) -> dict[str, Any] | None:
    """How the key chunks of one loop are dealt out to parts; others go to the first."""
    parts = int(chosen(plan, "parts"))
    if parts == 1 or not loops:
        return None
    kinds = [kind for kind, _, _ in loops]
    index = main_loop(kinds) or 0
    count = _constant(loops[index])
    if count is not None and count < parts:
        return {"kind": kinds[index], "index": -1, "lines": [], "chunk": "c"}
    whole = count is not None and not count % parts
    lines, chunk = _grouped(
        loops[index], "PARTS", "together", "parts", "parts[0]", whole
    )
    chunk = chunk.removesuffix(" + i")
    return {"kind": kinds[index], "index": index, "lines": lines, "chunk": chunk}


def _grouped(
    loop: Loop, size: str, group: str, state: str, one: str, whole: bool
) -> tuple[list[str], str]:
    """Statements that run a loop `size` chunks at a time; and the text of chunk i of step c.

    Args:
        group: the function of a step; state: what it takes and returns.
        one: what the loop's own function takes, for the chunks that are left over.
        whole: none are.
    """
    kind, first, last = loop
    count = last if first == "0" else f"({last} - {first})"
    chunk = f"{size} * c + i" if first == "0" else f"{first} + {size} * c + i"
    lines = []
    steps = f"{count} // {size}"
    if _constant(loop) is None and not whole:  # a limit may lie before the first key
        steps = f"jnp.maximum({steps}, 0)"
    if not whole:
        lines.append(f"steps = {steps}")
        steps = "steps"
    lines.append(f"{state} = lax.fori_loop(0, {steps}, {group}, {state})")
    if not whole:
        rest = f"steps * {size}"
        if first != "0":
            lines.append(f"rest = {first} + {rest}")
            rest = "rest"
        lines.append(f"{one} = lax.fori_loop({rest}, {last}, {kind}, {one})")
    return lines, chunk


def memory(plan: Plan, at: Tile, part: Tile, starts: Starts) -> dict[str, Any]:
    """Where slices begin and how large they are, in memory and as rows of a tile."""
    spec = plan.spec
    qk = "D" if spec.qk_dim == spec.v_dim else "QK_DIM"
    head = starts.g if starts.g == "0" or spec.repeats == 1 else f"{starts.g} * R"
    begin = {"b": starts.b, "q": starts.q, "k": starts.k, "h": head, "g": starts.g}
    size = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    rows = order(spec.layout, "bqh")
    dn = chosen(plan, "slices") == "dn"
    keys = "bgk" if dn else order(spec.layout, "bkg")
    begins = shards.begins(plan, keys, begin, ahead=True)
    sizes = shards.sizes(plan, keys, part.sizes, ahead=True)

    def with_dim(items: list[str], dim: str) -> str:
        return ", ".join([*items[:-1], dim, items[-1]] if dn else [*items, dim])

    own = ", ".join(shards.sizes(plan, rows, size))
    lse = shards.begins(plan, "bhq", begin, ahead=True)
    at_rows = shards.begins(plan, rows, begin, ahead=True)
    row_sizes = shards.sizes(plan, rows, size, ahead=True)
    return {
        "memory": {
            "rows": {
                "begin": f"({', '.join(at_rows)}, 0)",
                "size": ", ".join(row_sizes),
                "back": shards.moved(plan, rows + "d", back=True),
            },
            "keys": {
                "begin": f"({with_dim(begins, '0')})",
                "back": shards.moved(
                    plan, f"{keys[:-1]}dk" if dn else keys + "d", back=True
                ),
            },
            "lse_begin": f"({', '.join(lse)})",
        },
        "k_size": with_dim(sizes, qk),
        "v_size": with_dim(sizes, _value_dim(spec)),
        "rows_shape": at.shape(order(spec.layout, "bqgr")),
        "out_tile_shape": f"{own}, {_value_dim(spec)}",
        "lse_shape": ", ".join(shards.sizes(plan, "bhq", size)),
        "sink_size": _tuple(shards.sizes(plan, "h", size)),
        "looped_heads": starts.g != "0",
        "sink_begin": _tuple(shards.begins(plan, "h", begin)),
        "all_shape": _tuple(
            [*shards.shape(plan, rows, WHOLE, ahead=True), _value_dim(spec)]
        ),
        "ahead": {
            "out": shards.moved(plan, rows + "d"),
            "lse": shards.moved(plan, "bhq"),
            "mass": shards.moved(plan, "bhq"),
        },
        "beside": {
            "out": shards.moved(plan, rows + "d", back=True),
            "lse": shards.moved(plan, "bhq", back=True),
            "mass": shards.moved(plan, "bhq", back=True),
        },
        "whole_shape": {
            "out": ", ".join([*(WHOLE[a] for a in rows), _value_dim(spec)]),
            "lse": "B, H, T",
            "mass": "B, H, T",
        },
        "lse_all_shape": _tuple(shards.shape(plan, "bhq", WHOLE, ahead=True)),
        "sink_shape": without_keys(at.spread("gr")),
    }


WHOLE = {"b": "B", "q": "T", "h": "H", "k": "S", "g": "G"}


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _levels(plan: Plan, at: Tile) -> list[tuple[str, str]]:
    """The loops around the key loop that have more than one step, outermost first."""
    spec = plan.spec
    found = []
    if spec.batch != plan.option("batch_chunk"):
        found.append(("b", "B" if at.sizes["b"] == "1" else "(B // B_CHUNK)"))
    if spec.kv_heads != plan.option("head_chunk"):
        found.append(("g", "G" if at.sizes["g"] == "1" else "(G // G_CHUNK)"))
    if spec.q_len != plan.q_chunk:
        found.append(("i", "Q_CHUNKS"))
    return found


def level_lines(levels: list[tuple[str, str]], plan: Plan, at: Tile) -> list[str]:
    """Statements that take the flat step apart, the innermost loop first."""
    lines = []
    inner: list[str] = []
    for name, count in reversed(levels):
        text = "step"
        if inner:
            divisor = inner[0] if len(inner) == 1 else f"({' * '.join(inner)})"
            text += f" // {divisor}"
        if len(inner) + 1 < len(levels):
            text += f" % {count}"
        chunk = "" if name in ("i", "c") else shards.sizes(plan, name, at.sizes)[-1]
        if chunk not in ("", "1"):
            text += f" * {chunk}"
        lines.append(f"{name} = {text}")
        inner.insert(0, count)
    return lines


def _stacked(plan: Plan, at: Tile, levels: list[tuple[str, str]]) -> dict[str, Any]:
    """How outputs that were stacked by steps [step, *tile] are put in order."""
    spec = plan.spec
    counts = [count.strip("()") for _, count in levels]
    size = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    level_of = {"b": "b", "q": "i", "h": "g"}
    names = [name for name, _ in levels]
    found: dict[str, Any] = {}
    for output in outputs_of(plan):
        axes = order(spec.layout, "bqh") if output == "out" else "bhq"
        tail = [_value_dim(spec)] if output == "out" else []
        own = [*(size[a] for a in axes), *tail]
        if shards.split(plan):  # too many to name them again
            own = [f"*{output}.shape[1:]"]
        moved: list[int] = []
        apart = shards.axes(plan, axes)
        for i, (axis, part_of) in enumerate(apart):
            if (level := level_of[axis]) in names and part_of != "shards":
                moved.append(names.index(level))
            moved.append(len(names) + i)
        moved += [len(names) + len(apart)] * len(tail)
        found[output] = {
            "shape": ", ".join([*counts, *own]),
            "order": ", ".join(map(str, moved)),
            "whole": ", ".join([*(WHOLE[a] for a in axes), *tail]),
        }
    return found
