"""What the templates receive for the backward pass of a plan with derivatives "vjp".

The backward pass has a plan of its own: the choices that begin with "backward". Tiles are made
again, from q, k, v, and lse with what rounding leaves of it, and each gives p and ds. One pass
adds up all gradients, over chunks of queries or of keys; or two do, dq over queries, then dk
and dv over keys. Where delta is summed a pass before them does that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from attngen import slopes
from attngen.backends.jax import shards
from attngen.backends.jax.backward_chunks import (
    Loops,
    forms_twice,
    keeps_mass,
    start,
    trained,
)
from attngen.backends.jax.backward_passes import PASSES, levels_of, one_pass
from attngen.backends.jax.backward_tile import TileWriter
from attngen.backends.jax.lies import Lies, head_dims, subscripts, sums_of
from attngen.backends.jax.loops import WHOLE, memory
from attngen.backends.jax.scans import offset_from_lengths
from attngen.backends.jax.statements import as_tuple, wrapped
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    chosen,
    exponential,
    order,
    product_keywords,
    tile,
)
from attngen.joint import backward_part, forward_part, forward_spec
from attngen.plans import Plan
from attngen.spec import AttentionSpec


def forward_plan(plan: Plan) -> Plan:
    """The plan of the forward pass alone, which keeps lse for the backward pass."""
    own = forward_part(dict(plan.options))
    if keeps_mass(backward_plan(plan)):
        own["mass"] = "kept"
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
    looped = [name for name, _ in levels_of(mine, at, "qk")]
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
    passes = [one_pass(mine, at, starts, ragged, p) for p in PASSES[mine.algorithm]]
    summed = "out" in spec.outputs and mine.option("delta") == "summed"
    made = (
        [*passes, one_pass(mine, at, starts, ragged, ("q", ()))] if summed else passes
    )
    kinds = {kind for p in made for kind in p["kinds"]}
    loops = Loops(
        tuple(looped), "edge" in kinds, "interior" in kinds, ragged, len(made)
    )
    both = loops.masked and loops.unmasked
    sums = trained(mine)
    for number, p in enumerate(made):
        p |= _calls(p, looped, both, sums if number == 0 else [])
        p["twice"] = forms_twice(mine)
        p["listed"] = p["bounds"]["listed"]
        p["loops"] = [x for loop in p["bounds"]["loops"] for x in _loop(loop, both)]

    def writer() -> TileWriter:
        return TileWriter(mine, at, starts, loops)

    arguments = [*looped, "of_queries", "of_keys"]
    arguments += ["masked"] * both + (
        ["sums=None" if len(made) > 1 else "sums"] if sums else []
    )
    return {
        "queries": writer().queries(),
        "keys": writer().keys(),
        "tile": writer().tile(),
        "queries_arguments": ", ".join(
            [*(n for n in looped if n != "c"), *(["summing=False"] * summed)]
        ),
        "keys_arguments": ", ".join(n for n in looped if n != "i"),
        "tile_arguments": ", ".join(arguments),
        "of_queries": writer().of_queries,
        "both": both,
        "sums": {
            f"d_{n}": _zeros(n, _sum_shape(mine, n), f"jnp.{spec.stats_dtype}")
            for n in sums
        },
        "adds": bool(sums) or mine.algorithm != "two_passes",
        "ahead": list(dict.fromkeys(x for p in made for x in p["bounds"]["ahead"])),
        "list_functions": {x for p in made for x in p["bounds"]["functions"]},
        "passes": passes,
        "summing": made[-1] if summed else None,
        "starts": {a: start(loops, a) for a in "qk"},
        **_arguments(plan),
        **_arrays(mine, at, starts),
    }


def _calls(
    p: dict[str, Any], looped: list[str], both: bool, sums: list[str]
) -> dict[str, Any]:
    """How a pass calls the functions of chunks and of tiles, and what it carries.

    sums: the operands whose gradients this pass adds up.
    """
    tile_call = [*looped, "of_queries", "of_keys", *(["masked"] * both)]
    own_sums = ["sums"] if sums else []
    carried = [*p["gradients"], *own_sums]
    here = p["own"] if p["algorithm"] != "by_queries" else p["gradients"]
    return {
        "queries_call": ", ".join(
            [
                *(n for n in looped if n != "c"),
                *(["summing=True"] * (not p["gradients"])),
            ]
        ),
        "keys_call": ", ".join(n for n in looped if n != "i"),
        "tile_call": ", ".join([*tile_call, *own_sums]),
        "carried": carried,
        "carried_here": [f"{n}_here" if n in here else n for n in carried],
        "sums": bool(own_sums),
    }


def _loop(loop: tuple[str, str, str], both: bool) -> list[str]:
    """A loop over some chunks, which are all masked, or all not."""
    kind, first, last = loop
    if first.isdigit() and last.isdigit() and int(last) == int(first) + 1:
        masked = f", masked={kind == 'edge'}" if both else ""
        return [f"carry = add({first}, carry{masked})"]
    function = f"partial(add, masked={kind == 'edge'})" if both else "add"
    return wrapped(f"carry = lax.fori_loop({first}, {last}, {function}, carry)", 80)


def arguments(spec: AttentionSpec) -> list[str]:
    """The names of all arrays that gradients and loops read."""
    given = ["q", "k", "v", *(o.name for o in spec.operands)]
    if offset_from_lengths(spec) and "q_offset" not in given:
        given.append("q_offset")
    return given


def _arguments(plan: Plan) -> dict[str, Any]:
    """The names of what goes in and out of the rule, and the dtypes of what comes."""
    spec = plan.spec
    given = arguments(spec)
    outputs = list(spec.outputs)
    made = ["out", "lse"] if "out" in outputs else ["lse"]
    made += ["mass"] if keeps_mass(backward_plan(plan)) else []
    summed = backward_plan(plan).option("delta") == "summed"
    kept = [n for n in made if not (n == "out" and summed)]
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
        "wanted": ", ".join(n if n in outputs else "_" for n in made),
        "returned": ", ".join(outputs),
        "returned_one": f"({', '.join(outputs)})" if several else outputs[0],
        "kept": ", ".join([*given, *kept]),
        "pulled": pulled,
        "pulled_one": "cotangents" if several else pulled[0],
        "backward_names": ", ".join([*given, *kept, *pulled]),
        "call": wrapped(
            f"{', '.join(gradients)} = _backward({', '.join([*given, *kept, *pulled])})",
            84,
        ),
        "found": ", ".join(gradients),
        "answer": ", ".join(answer),
        "compared": [o.name for o in slopes.compared(spec)],
        "gradients": list(gradients),
        "sink": spec.sink and "out" in outputs,
    }


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
    out, delta = "out" in spec.outputs, str(plan.option("delta"))
    layout = {"q": rows + "d", "k": keys + "d", "lse": "bhq"}
    value = "d" if qk == v else "v"
    layout |= {"v": keys + value, "dout": rows + value} if out else {}
    layout |= {"out": rows + value} if out and delta == "again" else {}
    layout |= {"delta": "bhq"} if out and delta == "kept" else {}
    layout |= {"mass": "bhq"} if keeps_mass(plan) else {}
    layout |= {"dlse": "bhq"} if "lse" in spec.outputs else {}
    layout |= {o.name: "".join(map(str, o.axes)) for o in spec.own_operands}
    base_2 = exponential(plan)["base_2"]
    scaled = chosen(plan, "scale") == "queries"
    arrays = [n for n in ("q", "k", "v", "dout", "out") if n in layout]
    return {
        "views": shards.views(plan, layout),
        "across": arrays if chosen(plan, "slices") == "dn" else [],
        "lies": lies,
        "lse": {
            "begin": known["memory"]["lse_begin"],
            "all": known["lse_all_shape"],
            "shape": known["lse_shape"],
            "rows": at.shape(at.rows),
            "moved": shards.moved(plan, "bhq"),
            "beside": shards.moved(plan, "bhq", back=True),
        },
        "subscripts": {"dq": dq, "dk": dkv, **_of_heads(plan, at, starts, lies)},
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


def _of_heads(
    plan: Plan, at: Tile, starts: Starts, lies: dict[str, Lies]
) -> dict[str, Any]:
    """With queries outermost: dk and dv of all keys of a tile's heads, tokens last."""
    every = Tile(at.letters, at.sizes | {"k": "S"})
    first = dataclasses.replace(starts, k="0")
    whole = {n: Lies(plan, every, first, "k", lies[n].dim) for n in ("dk", "dv")}
    summed, rows = sums_of(plan, at), lies["dq"].subscripts
    across = "".join(a for a in rows if a in "bg") + "d"
    across += "".join(a for a in rows if a in "rq")
    place = ["0"] * (len(summed) - 1) + [starts.k]
    return {
        "whole": whole,
        "rows_across": f"({', '.join(str(rows.index(a)) for a in across)})"
        if rows != across
        else "",
        "dk_across": f"{across},{at.letters}->{summed}",
        "place": as_tuple(place),
    }


def _sum_shape(plan: Plan, name: str) -> str:
    """The shape of an operand's gradient as it is summed up: its shards apart."""
    operand = next(o for o in plan.spec.operands if o.name == name)
    letters = [a for a in operand.axes if isinstance(a, str)]
    if not any(shards.is_split(plan, a) for a in letters):
        return f"{name}.shape"
    shape: list[str] = []
    for a in operand.axes:
        letter = str(a)
        shape += shards.shape(plan, letter, WHOLE) if letter in letters else [letter]
    return as_tuple(shape)


def _zeros(name: str, shape: str, dtype: str) -> str:
    """What the sum of an operand's gradient begins with."""
    own = [] if shape == f"{name}.shape" else [shape]
    return f"jnp.zeros_like({', '.join([name, dtype, *own])})"


def _answers(plan: Plan, lies: dict[str, Lies]) -> list[str]:
    """The gradients as they are returned: in their dtypes, with shards beside the rest."""
    spec, dtypes = plan.spec, {o.name: o.dtype for o in plan.spec.operands}
    qk, v = head_dims(plan)
    summed = ["dq"] if plan.algorithm == "by_keys" else []
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
        else:
            if _sum_shape(plan, of) != f"{of}.shape" and of != "sink":
                text += f".reshape({of}.shape)"
            if dtypes[of] != spec.stats_dtype:
                text += f".astype(jnp.{dtypes[of]})"
        answers.append(text)
    return answers
