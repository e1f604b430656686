"""What the JAX templates receive: a plan, spelled as the text of shapes and bounds."""

from __future__ import annotations

from typing import Any

from attngen.backends.jax.bounds import Lengths, bounds
from attngen.backends.jax.tile import Starts, Tile, heads, order, tile
from attngen.backends.jax.tile_code import TileCode, tile_code
from attngen.plans import Plan
from attngen.spec import AttentionSpec
from attngen.spec_checks import position_variables


def context(plan: Plan) -> dict[str, Any]:
    """Everything a template names, by section. See templates/README.md."""
    spec, at = plan.spec, tile(plan)
    return (
        _constants(plan, at)
        | _arrays(plan, at)
        | _products(plan, at)
        | (_dense(plan, at) if plan.algorithm == "dense" else _running(plan, at))
        | {"operands": [o.name for o in spec.operands]}
    )


def _constants(plan: Plan, at: Tile) -> dict[str, Any]:
    """The named constants at the top of the file, as (names, values, comment)."""
    spec = plan.spec
    dims: tuple[str, str]
    if spec.qk_dim == spec.v_dim:
        dims, dim_line = ("D", "D"), ("D", str(spec.qk_dim), "head dim")
    else:
        dims = ("QK_DIM", "V_DIM")
        dim_line = ("QK_DIM, V_DIM", f"{spec.qk_dim}, {spec.v_dim}", "head dims")
    lines = [
        (
            "B, T, S",
            f"{spec.batch}, {spec.q_len}, {spec.kv_len}",
            "batch, queries, keys",
        ),
        ("H, G", f"{spec.q_heads}, {spec.kv_heads}", "query heads, kv heads"),
        ("R", "H // G", "query heads that share a kv head"),
        dim_line,
    ]
    if plan.algorithm == "running":
        lines.append(
            ("Q_CHUNK, K_CHUNK", f"{plan.q_chunk}, {plan.k_chunk}", "of a tile")
        )
        if "b" in at.letters:
            lines.append(
                ("B_CHUNK", str(plan.option("batch_chunk")), "batches of a tile")
            )
        if "g" in at.letters:
            lines.append(
                ("G_CHUNK", str(plan.option("head_chunk")), "kv heads of a tile")
            )
    base_2 = _exponential(plan)["base_2"]
    if plan.option("exp") != "exp":
        lines.append(("LOG2E", "1.4426950408889634", "exp(s) is 2**(s * LOG2E)"))
    scale = repr(spec.scale_value)
    lines.append(("SCALE", f"{scale} * LOG2E" if base_2 else scale, ""))
    if spec.static_q_offset not in (0, None):
        lines.append(("Q_OFFSET", str(spec.static_q_offset), "position of query 0"))
    if spec.kv_offset:
        lines.append(("K_OFFSET", str(spec.kv_offset), "position of key 0"))
    return {"constants": lines, "QK": dims[0], "V": dims[1]}


def _arrays(plan: Plan, at: Tile) -> dict[str, Any]:
    """Shapes and dtypes of arguments, for the check at the function's head."""
    spec = plan.spec
    qk, v = ("D", "D") if spec.qk_dim == spec.v_dim else ("QK_DIM", "V_DIM")
    names = {"b": "B", "q": "T", "k": "S", "h": "H", "g": "G"}

    def shape(axes: str, dim: str) -> str:
        return f"({', '.join(names[a] for a in order(spec.layout, axes))}, {dim})"

    kv = spec.dtype_of("k")
    checks = [
        ("q", shape("bqh", qk), spec.dtype),
        ("k", shape("bkg", qk), kv),
        ("v", shape("bkg", v), kv),
    ]
    for operand in spec.operands:
        if operand.name == "q_offset":
            continue  # [B] or a scalar: broadcast, then checked
        items = [names[a] if isinstance(a, str) else str(a) for a in operand.axes]
        text = f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        checks.append((operand.name, text, operand.dtype))
    return {
        "checks": checks,
        "out_shape": shape("bqh", v),
        "stats": f"jnp.{spec.stats_dtype}",
        "out_dtype": f"jnp.{spec.out_dtype_name}",
        "out_cast": spec.out_dtype_name != spec.stats_dtype,
        "outputs": spec.outputs,
        "sink": spec.sink,
        "x64": "float64" in (spec.dtype, spec.out_dtype_name)
        or plan.index_dtype == "int64",
        "q_offset": spec.q_offset if spec.static_q_offset is None else None,
        "offset_from_lengths": spec.q_offset == "bottom_right"
        and spec.kv_lengths
        and any("q" in position_variables(e) for e in spec.expressions),
    }


def _products(plan: Plan, at: Tile) -> dict[str, Any]:
    """The two matrix products: subscripts, casts before them, keywords."""
    spec = plan.spec
    product = str(plan.option("product_dtype"))
    keys = "".join(a for a in order(spec.layout, "bkg") if a in at.letters)
    keywords = []
    if spec.precision == "highest":
        keywords.append("precision=lax.Precision.HIGHEST")
    if product != spec.stats_dtype:
        keywords.append(f"preferred_element_type=jnp.{spec.stats_dtype}")
    return {
        "qk_subscripts": f"{at.rows}d,{keys}d->{at.letters}",
        "pv_subscripts": f"{at.letters},{keys}d->{at.rows}d",
        "einsum": "_product" if keywords else "jnp.einsum",
        "keywords": keywords,
        "cast": f".astype(jnp.{product})" if product != spec.dtype else "",
        "cast_p": f".astype(jnp.{product})" if product != spec.stats_dtype else "",
        "scale_rows": product == spec.stats_dtype,
        "keys_shape": _keys_shape(spec.layout, at),
        "rows_permutation": _permutation(order(spec.layout, "bqgr"), at.letters),
        "out_permutation": _inverse(order(spec.layout, "bqgr"), at.letters),
        "stats_shape": at.shape(at.rows),
        "tile_shape": at.shape(at.letters),
        "guards": _guards(plan),
        **_exponential(plan),
        "drops_keys": plan.drops_keys,
        "row_axes": _axes_text([at.letters.index(a) for a in at.rows if a in "rq"]),
        "there_order": _inverse_keys(keys, at.letters),
    }


def _exponential(plan: Plan) -> dict[str, Any]:
    """How a tile, and a row, are raised.

    base_2: scores come in units of log 2. Not where there are score functions: their
    values can be large, and another rounding of them costs more than the difference's.
    """
    kind = str(plan.option("exp"))
    base_2 = kind != "exp" and not plan.spec.score
    rows = "jnp.exp2" if base_2 else "jnp.exp"
    return {
        "base_2": base_2,
        "exp_scaled": kind != "exp" and not base_2,
        "polynomial": kind == "polynomial",
        "exp": {"exp": "jnp.exp", "exp2": "jnp.exp2"}.get(kind, "_exp2"),
        "exp_rows": rows,
    }


def _keys_shape(layout: str, at: Tile) -> str:
    """The shape of keys without axes of length 1; "" where there are none to drop."""
    axes = order(layout, "bkg")
    return (
        ""
        if set(axes) <= set(at.letters)
        else ", ".join(at.sizes[a] for a in axes if a in at.letters)
    )


def _guards(plan: Plan) -> bool:
    """Whether a row may see no key, in a tile or at all."""
    spec = plan.spec
    lengths = spec.kv_lengths or spec.q_lengths
    return plan.drops_keys or lengths or spec.mask is not None


def _axes_text(axes: list[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else f"({', '.join(map(str, axes))})"


def _inverse_keys(keys: str, letters: str) -> str:
    """How the keys that are there, in tile order, line up with the values' axes."""
    present = [a for a in letters if a in keys]
    order_ = [present.index(a) for a in keys]
    return "" if order_ == sorted(order_) else f".transpose{tuple(order_)}"


def _permutation(memory: str, letters: str) -> str:
    """How to transpose rows [memory order, d] to [tile order, d]; "" where they agree."""
    present = [a for a in memory if a in letters]
    wanted = [a for a in letters if a in present]
    if present == wanted:
        return ""
    return f"({', '.join(str(present.index(a)) for a in wanted)}, {len(present)})"


def _inverse(memory: str, letters: str) -> str:
    present = [a for a in letters if a in memory]
    wanted = [a for a in memory if a in letters]
    if present == wanted:
        return ""
    return f"({', '.join(str(present.index(a)) for a in wanted)}, {len(present)})"


def _dense(plan: Plan, at: Tile) -> dict[str, Any]:
    spec = plan.spec
    code = tile_code(plan, at, Starts("0", "0", "0", "0"), indent=4, ragged=False)
    own, v = (
        {"b": "B", "q": "T", "h": "H"},
        "D" if spec.qk_dim == spec.v_dim else "V_DIM",
    )
    return {
        "code": code,
        "rows_shape": at.shape(order(spec.layout, "bqgr")),
        "out_tile_shape": f"{', '.join(own[a] for a in order(spec.layout, 'bqh'))}, {v}",
        "lse_shape": "B, H, T",
        "sink_shape": _without_keys(at.spread("gr")),
        "looped_heads": False,
        "uses_lax": _uses_lax(plan, code),
    }


def _uses_lax(plan: Plan, code: TileCode) -> bool:
    lines = [*code.rows, *code.keys, *code.score, *code.edge]
    return plan.spec.precision == "highest" or any("lax." in line for line in lines)


def _running(plan: Plan, at: Tile) -> dict[str, Any]:
    spec = plan.spec
    levels = _levels(plan, at)
    indexed = {name for name, _ in levels}
    ragged = spec.kv_len % plan.k_chunk != 0
    starts = Starts(
        b="b" if "b" in indexed else "0",
        g="g" if "g" in indexed else "0",
        q="q_start" if "i" in indexed else "0",
        k="k_start",
    )
    sizes = {"b": at.sizes["b"], "q": "Q_CHUNK", "k": "K_CHUNK"}
    memory: dict[str, Any] = {
        "rows": _slice_texts(
            spec.layout, "bqh", sizes | {"h": heads(at)}, starts, spec
        ),
        "keys": _slice_texts(
            spec.layout, "bkg", sizes | {"g": at.sizes["g"]}, starts, spec
        ),
    }
    code = tile_code(plan, at, starts, indent=12, ragged=ragged)
    visited = bounds(plan, at, starts, ragged, Lengths(plan, at, starts))
    kinds = {kind for kind, _, _ in visited["loops"]}
    v = "D" if spec.qk_dim == spec.v_dim else "V_DIM"
    unit = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    head_begin = starts.g if starts.g == "0" or spec.repeats == 1 else f"{starts.g} * R"
    unroll = int(plan.option("unroll"))
    memory["lse_begin"] = f"({starts.b}, {head_begin}, {starts.q})"
    return {
        "code": code,
        "levels": _level_lines(levels, spec, at),
        "steps": " * ".join(count for _, count in levels),
        "looped": bool(levels),
        "looped_heads": starts.g != "0",
        "sink_begin": head_begin,
        "sink_shape": _without_keys(at.spread("gr")),
        "carried": ", ".join(f"{o}_all" for o in spec.outputs),
        "q_start": starts.q != "0",
        "q_ragged": spec.q_len % plan.q_chunk != 0,
        "ragged": ragged,
        "edge_start": any("k_start" in line for line in code.edge),
        "memory": memory,
        "rows_shape": at.shape(order(spec.layout, "bqgr")),
        "out_tile_shape": f"{', '.join(unit[a] for a in order(spec.layout, 'bqh'))}, {v}",
        "lse_shape": f"{unit['b']}, {unit['h']}, Q_CHUNK",
        "heads": heads(at),
        "starts": starts,
        "guard": bool(plan.option("guard")),
        "loop_kind": str(plan.option("loop")),
        "unroll": "" if unroll == 1 else f", unroll={unroll}",
        "bounds": visited,
        "kinds": kinds,
        "unseen": _guards(plan)
        or ("edge" in kinds and plan.option("exp") == "polynomial"),
    }


def _without_keys(shape: str) -> str:
    """A shape that lines up with a tile → one that lines up with its statistics."""
    items = [x for x in shape.strip("()").split(", ") if x][:-1]
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _slice_texts(
    layout: str, axes: str, sizes: dict[str, str], starts: Starts, spec: AttentionSpec
) -> dict[str, str]:
    """Text of the start and of the size of a slice, without the last axis."""
    head = starts.g if starts.g == "0" or spec.repeats == 1 else f"{starts.g} * R"
    begin = {"b": starts.b, "q": starts.q, "k": starts.k, "h": head, "g": starts.g}
    ordered = order(layout, axes)
    return {
        "begin": f"({', '.join(begin[a] for a in ordered)}, 0)",
        "size": ", ".join(sizes[a] for a in ordered),
    }


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


def _level_lines(
    levels: list[tuple[str, str]], spec: AttentionSpec, at: Tile
) -> list[str]:
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
        chunk = {"b": "B_CHUNK", "g": "G_CHUNK", "i": ""}[name]
        if chunk and at.sizes[name] != "1":
            text += f" * {chunk}"
        lines.append(f"{name} = {text}")
        inner.insert(0, count)
    return lines
