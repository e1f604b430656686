"""What the JAX templates receive: a plan, spelled as the text of shapes and bounds."""

from __future__ import annotations

from typing import Any

from attngen import philox
from attngen.backends.jax import backward, packed, shards, stored
from attngen.backends.jax.loops import chunked, unrolls
from attngen.backends.jax.scans import offset_from_lengths, scanned
from attngen.backends.jax.statements import rebound
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    all_bits,
    axes_text,
    chosen,
    drops,
    exponential,
    guards,
    inverse,
    inverse_keys,
    order,
    outputs_of,
    permutation,
    product_keywords,
    tile,
    without_keys,
)
from attngen.backends.jax.tile_code import TileCode, tile_code
from attngen.plans import Plan


def context(plan: Plan) -> dict[str, Any]:
    """Everything a template names, by section. See templates/README.md."""
    spec, found = plan.spec, _context(packed.lowered_plan(plan))
    return found | {
        "checks": stored.checks(spec),
        "constants": stored.constants(spec, found["constants"]),
        "operands": [o.name for o in spec.operands],
        "out_shape": stored.out_shape(spec),
        "lse_whole": "(H, T)" if spec.storage == "packed" else "(B, H, T)",
        "q_offset": spec.q_offset if spec.static_q_offset is None else None,
        "batches": "SEQUENCES" if spec.storage == "packed" else "B",
        "packed": stored.wrapper(spec),
        "paged": spec.storage == "paged",
    }


def _context(plan: Plan) -> dict[str, Any]:
    """Of a plan of dense sequences, or of paged ones."""
    if plan.spec.derivatives != "vjp":
        found = _forward(plan)
        return found | {
            "scale": found["factor"],
            "returned": plan.spec.outputs,
            "back": None,
        }
    found = _forward(backward.forward_plan(plan))
    back, mine = backward.backward(plan), backward.backward_plan(plan)
    exps = (str(plan.option("exp")), str(mine.option("exp")))
    return found | {
        "constants": _with_backward(found["constants"], mine, exps),
        "scale": "SCALE_2" if found["base_2"] else "SCALE",
        "returned": plan.spec.outputs,
        "back": back,
        "polynomial": "polynomial" in exps,
        "keywords": found["keywords"] or back["keywords"],
        "uses_lax": True,
    }


Constant = tuple[str, str, str]


def _with_backward(
    lines: list[Constant], plan: Plan, exps: tuple[str, str]
) -> list[Constant]:
    """The constants of a forward pass, and those of the backward pass beside them."""
    named = [name for name, _, _ in lines]
    at, spec = tile(plan), plan.spec
    chunks = (f"{plan.q_chunk}, {plan.k_chunk}", "of a tile, backward")
    own = [("Q_BLOCK, K_BLOCK", *chunks)]
    for name, length, chunk, whole in (
        ("Q_BLOCK", "T", plan.q_chunk, spec.q_len),
        ("K_BLOCK", "S", plan.k_chunk, spec.kv_len),
    ):
        if chunk != whole:
            own.append((f"{name}S", f"-(-{length} // {name})", ""))
    for letter, name, option, about in (
        ("b", "B_BLOCK", "batch_chunk", "batches of a tile, backward"),
        ("g", "G_BLOCK", "head_chunk", "kv heads of a tile, backward"),
    ):
        if letter in at.letters:
            own.append((name, str(plan.option(option)), about))
    first = next(i for i, name in enumerate(named) if name in ("LOG2E", "SCALE"))
    after = [line for line in lines[first:] if line[0] not in ("LOG2E", "SCALE")]
    scale: list[Constant] = [("SCALE", repr(spec.scale_value), "")]
    if exps != ("exp", "exp"):
        scale.insert(0, ("LOG2E", "1.4426950408889634", "exp(s) is 2**(s * LOG2E)"))
        if not spec.score:
            scale.append(("SCALE_2", "SCALE * LOG2E", ""))
    return [*lines[:first], *own, *scale, *after]


def _forward(plan: Plan) -> dict[str, Any]:
    """Of a plan without derivatives."""
    at = tile(plan)
    return (
        _constants(plan, at)
        | _arrays(plan, at)
        | _products(plan, at)
        | _ALGORITHMS.get(plan.algorithm, chunked)(plan, at)
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
    if plan.algorithm != "dense":
        lines.append(
            ("Q_CHUNK, K_CHUNK", f"{plan.q_chunk}, {plan.k_chunk}", "of a tile")
        )
        if chosen(plan, "diagonal"):
            lines.append(
                ("K_STEP", str(chosen(plan, "diagonal")), "keys, along the diagonal")
            )
        if chosen(plan, "parts") != 1:
            lines.append(
                ("PARTS", str(chosen(plan, "parts")), "that keys are split in")
            )
        if unrolls(plan):
            lines.append(
                (
                    "UNROLL",
                    str(chosen(plan, "unroll")),
                    "tiles of a step, without a mask",
                )
            )
        if plan.algorithm == "summaries" or chosen(plan, "skip") == "list":
            lines.append(("K_CHUNKS", "-(-S // K_CHUNK)", ""))
        if "b" in at.letters:
            lines.append(
                ("B_CHUNK", str(plan.option("batch_chunk")), "batches of a tile")
            )
        if "g" in at.letters:
            lines.append(
                ("G_CHUNK", str(plan.option("head_chunk")), "kv heads of a tile")
            )
    lines += shards.constants(plan)
    base_2 = exponential(plan)["base_2"]
    if plan.option("exp") != "exp":
        lines.append(("LOG2E", "1.4426950408889634", "exp(s) is 2**(s * LOG2E)"))
    scale = repr(spec.scale_value)
    lines.append(("SCALE", f"{scale} * LOG2E" if base_2 else scale, ""))
    if spec.static_q_offset not in (0, None):
        lines.append(("Q_OFFSET", str(spec.static_q_offset), "position of query 0"))
    if spec.kv_offset:
        lines.append(("K_OFFSET", str(spec.kv_offset), "position of key 0"))
    if drops(plan):
        lines.append(("DROPOUT", repr(spec.dropout), "probability, of each weight"))
    return {"constants": lines, "QK": dims[0], "V": dims[1]}


def _arrays(plan: Plan, at: Tile) -> dict[str, Any]:
    """How arguments and outputs lie, and their dtypes."""
    spec = plan.spec
    qk, v = ("D", "D") if spec.qk_dim == spec.v_dim else ("QK_DIM", "V_DIM")
    keys = order(spec.layout, "bkg")
    layout = {"q": order(spec.layout, "bqh") + "d", "k": keys + "d"}
    layout["v"] = keys + ("d" if qk == v else "v")
    layout |= {o.name: "".join(map(str, o.axes)) for o in spec.own_operands}
    return {
        "views": shards.views(plan, layout),
        "sharded": bool(shards.split(plan)),
        "stats": f"jnp.{spec.stats_dtype}",
        "out_dtype": f"jnp.{spec.out_dtype_name}",
        "out_cast": spec.out_dtype_name != spec.stats_dtype,
        "outputs": outputs_of(plan),
        "sink": spec.sink,
        "dropout": drops(plan),
        "philox": philox_words(spec.dropout) if drops(plan) else {},
        "x64": "float64" in (spec.dtype, spec.out_dtype_name)
        or plan.index_dtype == "int64",
        "offset_from_lengths": offset_from_lengths(spec),
        "alike": rebound("_alike", backward.arguments(spec), 84),
        "partitioned": spec.devices > 1,
    }


def philox_words(dropout: float) -> dict[str, str]:
    """The numbers of dropout's generator, as text."""
    multipliers, weyl = philox.MULTIPLIERS, philox.WEYL
    return {
        "multipliers": ", ".join(f"0x{m:X}" for m in multipliers),
        "weyl": ", ".join(f"0x{w:X}" for w in weyl),
        "rounds": str(philox.ROUNDS),
        "threshold": str(philox.threshold(dropout)),
    }


def _products(plan: Plan, at: Tile) -> dict[str, Any]:
    """The two matrix products: subscripts, casts before them, keywords."""
    spec = plan.spec
    product = str(plan.option("product_dtype"))
    keywords = product_keywords(plan)
    return {
        "einsum": "_product" if keywords else "jnp.einsum",
        "keywords": keywords,
        "cast": f".astype(jnp.{product})" if product != spec.dtype else "",
        "cast_keys": f".astype(jnp.{product})" if product != spec.dtype_of("k") else "",
        "cast_p": f".astype(jnp.{product})" if product != spec.stats_dtype else "",
        "scale_rows": chosen(plan, "scale") == "queries",
        "rows_permutation": permutation(order(spec.layout, "bqgr"), at.letters),
        "out_permutation": inverse(order(spec.layout, "bqgr"), at.letters),
        "stats_shape": at.shape(at.rows),
        "guards": guards(plan),
        "stored": stored.NOTHING,
        "factor": "SCALE",
        **exponential(plan),
        "drops_keys": plan.drops_keys,
        "row_axes": axes_text([at.letters.index(a) for a in at.rows if a in "rq"]),
        **_keys(plan, at),
    }


def _keys(plan: Plan, at: Tile) -> dict[str, Any]:
    """How a slice of keys, or of values, lies: [.., n, d], or [.., d, n]."""
    spec = plan.spec
    dn = chosen(plan, "slices") == "dn"
    memory = "bgk" if dn else order(spec.layout, "bkg")
    keys = "".join(a for a in memory if a in at.letters)
    last = f"{keys[:-1]}dk" if dn else f"{keys}d"
    sizes = [at.sizes[a] for a in keys]
    if chosen(plan, "diagonal"):  # some have fewer keys
        sizes = ["keys" if a == "k" else at.sizes[a] for a in keys]

    def shape(dim: str) -> str:
        return ", ".join([*sizes[:-1], dim, sizes[-1]] if dn else [*sizes, dim])

    qk, v = ("D", "D") if spec.qk_dim == spec.v_dim else ("QK_DIM", "V_DIM")
    dropped = not set(memory) <= set(at.letters) or bool(shards.split(plan))
    dropped = dropped or spec.storage == "paged"
    return {
        "qk_subscripts": f"{at.rows}d,{last}->{at.letters}",
        "pv_subscripts": f"{at.letters},{last}->{at.rows}d",
        "k_shape": shape(qk) if dropped else "",
        "v_shape": shape(v) if dropped else "",
        "ones_shape": f"({shape('1')})",
        "ones_axis": "-2" if dn else "-1",
        "there_order": inverse_keys(keys, at.letters),
        "there_axes": "None, :" if dn else "None",
        "there_keys": "" if dn else f"[:{', None' * (len(keys) - keys.index('k'))}]",
        "dn": _keys_last(plan) if dn else "",
    }


def _keys_last(plan: Plan) -> str:
    """How keys and values [.., d] in memory are transposed to [.., d, keys]."""
    memory = shards.axes(plan, order(plan.spec.layout, "bkg") + "d", ahead=True)
    wanted = shards.axes(plan, "bgdk", ahead=True)
    return f"({', '.join(str(memory.index(a)) for a in wanted)})"


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
        "sink_shape": without_keys(at.spread("gr")),
        "looped_heads": False,
        "uses_lax": _uses_lax(plan, code),
    }


_ALGORITHMS = {"dense": _dense, "scanned": scanned}


def _uses_lax(plan: Plan, code: TileCode) -> bool:
    lines = [*code.rows, *code.keys, *code.score, *code.edge]
    uses = all_bits(plan) or (drops(plan) and plan.spec.devices == 1)
    return uses or any("lax." in line for line in lines)
