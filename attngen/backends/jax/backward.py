"""What the templates receive for the backward pass of a plan with derivatives "vjp".

The backward pass has a plan of its own: the choices that begin with "backward". Tiles are made
again, from q, k, v and lse, and each gives p and ds; one pass over the key chunks adds up all
gradients at once, two passes each their own: dq over queries, then dk and dv over keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attngen import slopes
from attngen.backends.jax import shards
from attngen.backends.jax.backward_tile import (
    Lies,
    Loops,
    TileWriter,
    forms_twice,
    head_dims,
    start,
    subscripts,
    trained,
)
from attngen.backends.jax.bounds import bounds
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.loops import WHOLE, level_lines, memory
from attngen.backends.jax.statements import as_tuple, wrapped
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    chosen,
    exponential,
    heads,
    order,
    product_keywords,
    tile,
)
from attngen.joint import backward_part, forward_part, forward_spec
from attngen.plans import Plan
from attngen.spec import AttentionSpec
from attngen.spec_checks import position_variables
from attngen.transposed import renamed, transposed

Level = tuple[str, str]  # the name of a loop's variable, and how many steps it has


def forward_plan(plan: Plan) -> Plan:
    """The plan of the forward pass alone, which keeps lse for the backward pass."""
    own = forward_part(dict(plan.options))
    return dataclasses.replace(
        plan, spec=forward_spec(plan.spec), options=tuple(own.items())
    )


def backward_plan(plan: Plan) -> Plan:
    """The plan of the backward pass, under the names that a forward plan's choices have."""
    options = backward_part(dict(plan.options))
    return dataclasses.replace(
        plan,
        algorithm=str(options.pop("algorithm")),
        q_chunk=int(options.pop("q_chunk")),
        k_chunk=int(options.pop("k_chunk")),
        options=tuple(options.items()),
    )


def backward(plan: Plan) -> dict[str, Any]:
    """What `_backward.jinja` names. See templates/README.md."""
    mine, spec = backward_plan(plan), plan.spec
    at = tile(mine)
    looped = [name for name, _ in _levels(mine, at, "qk")]
    starts = Starts(
        b="b" if "b" in looped else "0",
        g="g" if "g" in looped else "0",
        q="q_start" if "i" in looped else "0",
        k="k_start" if "c" in looped else "0",
    )
    ragged = frozenset(
        a
        for a, length, chunk in (
            ("q", spec.q_len, mine.q_chunk),
            ("k", spec.kv_len, mine.k_chunk),
        )
        if length % chunk
    )
    order_ = PASSES[mine.algorithm]
    passes = [
        _pass(mine, at, starts, ragged, p) | {"first": p == order_[0]} for p in order_
    ]
    summing = None
    if "out" in spec.outputs and mine.option("delta") == "summed":
        summing = _pass(mine, at, starts, ragged, ("q", ()))
    kinds = {kind for p in passes for kind in p["kinds"]}
    kinds |= summing["kinds"] if summing is not None else set()
    loops = Loops(
        tuple(looped), "edge" in kinds, "interior" in kinds, ragged, len(passes)
    )
    both = loops.masked and loops.unmasked
    sums, out = trained(mine), "out" in spec.outputs
    made = ["p", "ds", "rows", "d_rows", "kc"] if out else ["ds", "rows", "kc"]
    twice = out and forms_twice(mine)
    made += ["again"] if twice else []
    summed = out and mine.option("delta") == "summed"
    named = [*looped, *(["masked"] if both else []), *(["delta"] if summed else [])]
    named += ["sums"] if sums else []
    if summing is not None:
        call = [*looped, *(["masked"] if both else []), "None"]
        summing["tile_call"] = ", ".join([*call, *(["None"] if sums else [])])
        summing["loops"] = [
            line for loop in summing["bounds"]["loops"] for line in _loop(loop, both)
        ]
    for p in passes:
        own = {"ds", "again", *(("kc",) if "dq" in p["gradients"] else ())}
        own |= {"p", "rows", "d_rows"} if "dk" in p["gradients"] else set()
        used = [n if n in own else "_" for n in made]
        call = [*looped, *(["masked"] if both else [])]
        call += ["delta"] if summed else []
        if sums:
            used.append("sums" if p["first"] else "_")
            call.append("sums" if p["first"] else "None")
        p |= {"tile_made": ", ".join(used), "tile_call": ", ".join(call)}
        p["loops"] = [
            line for loop in p["bounds"]["loops"] for line in _loop(loop, both)
        ]
        p["carried"] = [*p["gradients"], *(["sums"] if sums and p["first"] else [])]
        p["carried_here"] = [f"{n}_here" if n in p["own"] else n for n in p["carried"]]
    return {
        "tile": TileWriter(mine, at, starts, loops).write(),
        "tile_arguments": ", ".join(named),
        "tile_returns": ", ".join([*made, *(["sums"] if sums else [])]),
        "both": both,
        "twice": twice,
        "sums": {
            f"d_{n}": f"jnp.zeros({n}.shape, jnp.{spec.stats_dtype})" for n in sums
        },
        "passes": passes,
        "summing": summing,
        "starts": {a: start(loops, a) for a in "qk"},
        **_arguments(plan),
        **_arrays(mine, at, starts),
    }


def _loop(loop: tuple[str, str, str], both: bool) -> list[str]:
    """A loop over some chunks, which are all masked, or all not."""
    kind, first, last = loop
    if first.isdigit() and last.isdigit() and int(last) == int(first) + 1:
        masked = f", masked={kind == 'edge'}" if both else ""
        return [f"carry = add({first}, carry{masked})"]
    function = f"partial(add, masked={kind == 'edge'})" if both else "add"
    return wrapped(f"carry = lax.fori_loop({first}, {last}, {function}, carry)", 80)


def _arguments(plan: Plan) -> dict[str, Any]:
    """The names of what goes in and out of the rule, and the dtypes of what comes."""
    spec = plan.spec
    given = ["q", "k", "v", *(o.name for o in spec.operands)]
    if run_time_offset(spec) and "q_offset" not in given:
        given.append("q_offset")
    outputs = list(spec.outputs)
    made = ["out", "lse"] if "out" in outputs else ["lse"]
    pulled = [f"d{o}" for o in outputs]
    gradients = slopes.gradients(spec)
    of = {name: gradient for gradient, name in gradients.items()}
    floats = {o.name for o in spec.operands if o.kind == "float"}
    answer = [
        of.get(name) or (f"jnp.zeros_like({name})" if name in floats else "None")
        for name in given
    ]
    several = len(pulled) > 1
    return {
        "names": ", ".join(given),
        "made": ", ".join(made),
        "returned": ", ".join(outputs),
        "returned_one": f"({', '.join(outputs)})" if several else outputs[0],
        "kept": ", ".join([*given, *made]),
        "pulled": pulled,
        "pulled_one": "cotangents" if several else pulled[0],
        "backward_names": ", ".join([*given, *made, *pulled]),
        "call": wrapped(
            f"{', '.join(gradients)} = _backward({', '.join([*given, *made, *pulled])})",
            84,
        ),
        "found": ", ".join(gradients),
        "answer": ", ".join(answer),
        "compared": [o.name for o in slopes.compared(spec)],
        "gradients": list(gradients),
        "sink": spec.sink and "out" in outputs,
    }


# pass → (what its outer loop goes over, the gradients that it adds up)
PASSES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "one_pass": (("k", ("dq", "dk", "dv")),),
    "two_passes": (("q", ("dq",)), ("k", ("dk", "dv"))),
}


ABOUT = {
    (): "One chunk of queries: the sum of p, and delta, the mean of dp.",
    ("dq", "dk", "dv"): "One chunk of keys, and all queries that see any of it.",
    ("dq",): "One chunk of queries: dq.",
    ("dk", "dv"): "One chunk of keys: dk and dv.",
}


def _levels(plan: Plan, at: Tile, tokens: str) -> list[Level]:
    """The loops that have more than one step, outermost first."""
    spec = plan.spec
    found = []
    if spec.batch != plan.option("batch_chunk"):
        found.append(("b", "B" if at.sizes["b"] == "1" else "(B // B_CHUNK)"))
    if spec.kv_heads != plan.option("head_chunk"):
        found.append(("g", "G" if at.sizes["g"] == "1" else "(G // G_CHUNK)"))
    if "q" in tokens and spec.q_len != plan.q_chunk:
        found.append(("i", "Q_CHUNKS"))
    if "k" in tokens and spec.kv_len != plan.k_chunk:
        found.append(("c", "K_CHUNKS"))
    return found


def _pass(
    plan: Plan,
    at: Tile,
    starts: Starts,
    ragged: frozenset[str],
    of: tuple[str, tuple[str, ...]],
) -> dict[str, Any]:
    """One loop over chunks of queries, or of keys, and the loop over the others in it."""
    outer, gradients = of
    inner = "k" if outer == "q" else "q"
    levels = _levels(plan, at, outer)
    visited = _visited(plan, at, starts, ragged, outer)
    steps = " * ".join(count for _, count in levels)
    return {
        "outer": outer,
        "name": ("queries" if outer == "q" else "keys") if gradients else "deltas",
        "about": ABOUT[gradients],
        "gradients": gradients,
        "own": [n for n in gradients if (n == "dq") == (outer == "q")],
        "levels": level_lines(levels, plan, at),
        "count": steps,
        "inner_name": "c" if inner == "k" else "i",
        "bounds": visited,
        "loops": visited["loops"],
        "kinds": {kind for kind, _, _ in visited["loops"]},
        "ragged": outer in ragged,
        "new": _new(plan, outer, rows=not gradients),
    }


def _new(plan: Plan, outer: str, *, rows: bool) -> str:
    """The statement that tells what of an overlapping chunk isn't written yet.

    Args:
        rows: of an array [b, h, t].
    """
    memory_order = order(plan.spec.layout, "bqh" if outer == "q" else "bkg")
    memory_order = "bhq" if rows else memory_order
    axes = shards.axes(plan, memory_order, ahead=True)
    place = axes.index((outer, ""))
    start, chunk, index = {
        "q": ("q_start", "Q_CHUNK", "i"),
        "k": ("k_start", "K_CHUNK", "c"),
    }[outer]
    dn = chosen(plan, "slices") == "dn"
    after = "" if dn else ", None" * (len(axes) - place - rows)
    made = f"new = {start} + jnp.arange({chunk}) >= {index} * {chunk}"
    if not after:
        return made
    name, _, value = made.partition(" = ")
    return f"{name} = ({value})[:{after}]"


def _visited(
    plan: Plan, at: Tile, starts: Starts, ragged: frozenset[str], outer: str
) -> dict[str, Any]:
    """The chunks that a pass visits, as the forward pass would."""
    if outer == "q":
        lengths = Lengths(plan, at, starts)
        return bounds(plan, at, starts, "k" in ragged, lengths, apart="q" in ragged)
    turned = transposed(plan.spec)
    if turned is None:
        count = -(-plan.spec.q_len // plan.q_chunk)
        about = ["All chunks of queries: where they stand is known at run time alone."]
        return {
            "lines": [],
            "about": about,
            "loops": [("edge", "0", str(count))],
            "ahead": [],
        }
    other = dataclasses.replace(
        plan, spec=turned, q_chunk=plan.k_chunk, k_chunk=plan.q_chunk
    )
    theirs = Starts(starts.b, starts.g, q=renamed(starts.k), k=renamed(starts.q))
    lengths = Lengths(other, at, theirs)
    found = bounds(other, at, theirs, "q" in ragged, lengths, apart="k" in ragged)
    return found | {
        "lines": [renamed(line) for line in found["lines"]],
        "about": [_about(line) for line in found["about"]],
        "loops": [(kind, renamed(a), renamed(b)) for kind, a, b in found["loops"]],
    }


_PHRASES = {
    "Key chunks": "Query chunks",
    "hold what any query here sees": "hold what sees any key here",
    "only what every one of them sees": "only what sees every one of them",
    "No query sees any key": "No key is seen by any query",
}


def _about(line: str) -> str:
    for phrase, other in _PHRASES.items():
        line = line.replace(phrase, other)
    return line


def _arrays(plan: Plan, at: Tile, starts: Starts) -> dict[str, Any]:
    """How gradients lie in memory and in a tile; the products' subscripts and casts."""
    spec = plan.spec
    product = str(plan.option("product_dtype"))
    known = memory(plan, at, at, starts)
    qk, v = head_dims(plan)
    lies = {
        "dq": Lies(plan, at, starts, "q", qk),
        "dk": Lies(plan, at, starts, "k", qk),
        "dv": Lies(plan, at, starts, "k", v),
    }
    _, dq, dkv = subscripts(plan, at)
    rows, keys = order(spec.layout, "bqh"), order(spec.layout, "bkg")
    layout = {"q": rows + "d", "k": keys + "d"}
    layout["dout"] = rows + ("d" if qk == v else "v")
    layout |= {"out": layout["dout"], "v": keys + ("d" if qk == v else "v")}
    layout |= dict.fromkeys(("lse", "dlse", "delta"), "bhq")
    base_2 = exponential(plan)["base_2"]
    scaled = chosen(plan, "scale") == "queries"
    batch = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    arrays = ["q", "k", *(("v", "dout") if "out" in spec.outputs else ())]
    arrays += (
        ["out"] if plan.option("delta") == "again" and "out" in spec.outputs else []
    )
    return {
        "views": shards.views(plan, layout),
        "across": arrays if chosen(plan, "slices") == "dn" else [],
        "lies": lies,
        "lse": {
            "begin": known["memory"]["lse_begin"],
            "size": as_tuple(shards.sizes(plan, "bhq", batch, ahead=True)),
            "all": known["lse_all_shape"],
            "shape": known["lse_shape"],
            "rows": at.shape(at.rows),
            "moved": shards.moved(plan, "bhq"),
        },
        "subscripts": {"dq": dq, "dk": dkv},
        "cast_p": f".astype(jnp.{product})"
        if product != spec.stats_dtype and chosen(plan, "store") in ("free", "p")
        else "",
        "cast_ds": f".astype(jnp.{product})"
        if product != spec.stats_dtype and chosen(plan, "store") != "both"
        else "",
        "stats": f"jnp.{spec.stats_dtype}",
        "dtype": f"jnp.{spec.dtype}",
        "narrow": spec.dtype != spec.stats_dtype,
        # rows came scaled, for exp2 by log2(e) too
        "dk_scale": ("" if not base_2 else " / LOG2E") if scaled else " * SCALE",
        "delta": str(plan.option("delta")),
        "out": "out" in spec.outputs,
        "cast_out": f".astype(jnp.{spec.stats_dtype})"
        if spec.out_dtype_name != spec.stats_dtype
        else "",
        "delta_order": ".transpose(0, 2, 1)" if spec.layout == "bthd" else "",
        "answers": _answers(plan, lies),
        "einsum": "_product" if product_keywords(plan) else "jnp.einsum",
        "keywords": product_keywords(plan),
    }


def _answers(plan: Plan, lies: dict[str, Lies]) -> list[str]:
    """The gradients as they are returned: in their dtypes, with shards beside the rest."""
    spec, dtypes = plan.spec, {o.name: o.dtype for o in plan.spec.operands}
    qk, v = head_dims(plan)
    summed = ["dq"] if plan.algorithm == "one_pass" else []
    answers = []
    for name, of in slopes.gradients(spec).items():
        text = name
        if of in ("q", "k", "v"):
            letters = order(spec.layout, "bqh" if of == "q" else "bkg")
            if lies[name].dn:
                text += f".transpose{lies[name].along}"
            elif any(shards.is_split(plan, a) for a in letters):
                if moved := shards.moved(plan, letters + "d", back=True):
                    text += f".transpose{moved}"
                shape = [*(WHOLE[a] for a in letters), v if of == "v" else qk]
                text += f".reshape({', '.join(shape)})"
            narrow = name in summed and spec.dtype != spec.stats_dtype
            text += f".astype(jnp.{spec.dtype})" if narrow else ""
        elif dtypes[of] != spec.stats_dtype:
            text += f".astype(jnp.{dtypes[of]})"
        answers.append(text)
    return answers


def run_time_offset(spec: AttentionSpec) -> bool:
    """Whether `attention` makes q_offset of lengths, before it calls anything."""
    return (
        spec.q_offset == "bottom_right"
        and spec.kv_lengths
        and any("q" in position_variables(e) for e in spec.expressions)
    )
