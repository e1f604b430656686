"""What the templates receive for the backward pass of a plan with derivatives "vjp".

The backward pass has a plan of its own: the choices that begin with "backward". Tiles are made
again, from q, k, v and lse, and each gives p and ds; one pass over the key chunks adds up all
gradients at once, two passes each their own: dq over queries, then dk and dv over keys.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from attngen import slopes
from attngen.backends.jax import shards
from attngen.backends.jax.backward_tile import (
    Lies,
    Loops,
    TileWriter,
    forms_twice,
    head_dims,
    keeps_mass,
    start,
    subscripts,
    sums_of,
    trained,
)
from attngen.backends.jax.bounds import bounds
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.loops import WHOLE, level_lines, memory
from attngen.backends.jax.scans import offset_from_lengths
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
from attngen.backends.jax.tile_code import tile_code
from attngen.joint import backward_part, forward_part, forward_spec
from attngen.lists import unlistable
from attngen.plans import Plan
from attngen.transposed import renamed, transposed

Level = tuple[str, str]  # the name of a loop's variable, and how many steps it has


def forward_plan(plan: Plan) -> Plan:
    """The plan of the forward pass alone, which keeps lse for the backward pass."""
    own = forward_part(dict(plan.options))
    if _keeps_mass(plan):
        own["mass"] = "kept"
    return dataclasses.replace(
        plan, spec=forward_spec(plan.spec), options=tuple(own.items())
    )


def _keeps_mass(plan: Plan) -> bool:
    """Whether the forward pass keeps the sum of p; where delta is summed, that is, too."""
    return keeps_mass(backward_plan(plan))


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
    passes = [_pass(mine, at, starts, ragged, p) for p in PASSES[mine.algorithm]]
    summed = "out" in spec.outputs and mine.option("delta") == "summed"
    made = [*passes, _pass(mine, at, starts, ragged, ("q", ()))] if summed else passes
    kinds = {kind for p in made for kind in p["kinds"]}
    loops = Loops(
        tuple(looped), "edge" in kinds, "interior" in kinds, ragged, len(made)
    )
    both = loops.masked and loops.unmasked
    sums = trained(mine)
    for number, p in enumerate(made):
        first = number == 0
        p |= _calls(p, looped, both, sums, first)
        p["twice"] = forms_twice(mine)
        p["listed"] = p["bounds"]["listed"]
        p["loops"] = [x for loop in p["bounds"]["loops"] for x in _loop(loop, both)]

    def writer() -> TileWriter:
        return TileWriter(mine, at, starts, loops)

    heads_ = [n for n in looped if n in "bg"]
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
            f"d_{n}": f"jnp.zeros({_sum_shape(mine, n)}, jnp.{spec.stats_dtype})"
            for n in sums
        },
        "ahead": list(dict.fromkeys(x for p in made for x in p["bounds"]["ahead"])),
        "list_functions": {x for p in made for x in p["bounds"]["functions"]},
        "passes": passes,
        "summing": made[-1] if summed else None,
        "starts": {a: start(loops, a) for a in "qk"},
        "looped_heads": heads_,
        **_arguments(plan),
        **_arrays(mine, at, starts),
    }


def _calls(
    p: dict[str, Any], looped: list[str], both: bool, sums: list[str], first: bool
) -> dict[str, Any]:
    """How a pass calls the functions of chunks and of tiles, and what it carries."""
    tile_call = [*looped, "of_queries", "of_keys", *(["masked"] * both)]
    own_sums = ["sums"] if sums and first else []
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
        "tile_made": (
            "p" if "dv" in p["gradients"] else "_",
            "kc" if "dq" in p["gradients"] else "_",
            *((["sums"] if first else ["_"]) if sums else []),
        ),
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


def _arguments(plan: Plan) -> dict[str, Any]:
    """The names of what goes in and out of the rule, and the dtypes of what comes."""
    spec = plan.spec
    given = ["q", "k", "v", *(o.name for o in spec.operands)]
    if offset_from_lengths(spec) and "q_offset" not in given:
        given.append("q_offset")
    outputs = list(spec.outputs)
    made = ["out", "lse"] if "out" in outputs else ["lse"]
    made += ["mass"] if _keeps_mass(plan) else []
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


# algorithm → its passes: what the outer loop goes over, the gradients that it adds up
PASSES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "by_queries": (("q", ("dq", "dk", "dv")),),
    "by_keys": (("k", ("dq", "dk", "dv")),),
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
    algorithm = plan.algorithm if gradients else ""
    levels = _levels(plan, at, outer)
    inside = levels if algorithm != "by_queries" else [x for x in levels if x[0] == "i"]
    levels = (
        [x for x in levels if x not in inside] if algorithm == "by_queries" else levels
    )
    visited = _visited(plan, at, starts, ragged, outer)
    steps = " * ".join(count for _, count in levels)
    return {
        "outer": outer,
        "algorithm": algorithm,
        "inside": inside[0][1] if inside else "",
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
        found = bounds(plan, at, starts, "k" in ragged, lengths, apart="q" in ragged)
        return found | {"lines": _with_reads(plan, at, starts, found)}
    turned = transposed(plan.spec)
    if turned is None:
        count = -(-plan.spec.q_len // plan.q_chunk)
        about = ["All chunks of queries: where they stand is known at run time alone."]
        return {
            "lines": [],
            "about": about,
            "loops": [("edge", "0", str(count))],
            "ahead": [],
            "functions": set(),
            "listed": False,
        }
    options = dict(plan.options)
    if options.get("skip") == "list" and unlistable(turned) is not None:
        options["skip"] = "bounds"
    other = dataclasses.replace(
        plan,
        spec=turned,
        q_chunk=plan.k_chunk,
        k_chunk=plan.q_chunk,
        options=tuple(options.items()),
    )
    theirs = Starts(starts.b, starts.g, q=renamed(starts.k), k=renamed(starts.q))
    lengths = Lengths(other, at, theirs)
    found = bounds(other, at, theirs, "q" in ragged, lengths, apart="k" in ragged)
    lines = _with_reads(other, at, theirs, found)
    return found | {
        "lines": [renamed(line) for line in lines],
        "ahead": [renamed(line) for line in found["ahead"]],
        "about": [_about(line) for line in found["about"]],
        "loops": [(kind, renamed(a), renamed(b)) for kind, a, b in found["loops"]],
    }


def _with_reads(
    plan: Plan, at: Tile, starts: Starts, found: dict[str, Any]
) -> list[str]:
    """The statements of bounds, after those that define what of operands a list is told by."""
    lines: list[str] = found["lines"]
    if not found["listed"]:
        return lines
    spec = dataclasses.replace(plan.spec, score=())
    code = tile_code(
        dataclasses.replace(plan, spec=spec), at, starts, indent=8, ragged=False
    )
    statements: list[list[str]] = []
    for line in code.rows:
        if line.startswith((" ", ")")):
            statements[-1].append(line)
        else:
            statements.append([line])
    needed = set(_NAME.findall(" ".join(lines)))
    kept: list[list[str]] = []
    for statement in reversed(statements):
        name, _, value = "\n".join(statement).partition(" = ")
        if name in needed:
            needed |= set(_NAME.findall(value))
            kept.insert(0, statement)
    return [*(line for statement in kept for line in statement), *lines]


_NAME = re.compile(r"\w+")
_PHRASES = {
    "Key chunks": "Query chunks",
    "What each key chunk holds": "What each query chunk holds",
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
    batch = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    arrays = [n for n in ("q", "k", "v", "dout", "out") if n in layout]
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
