"""The passes of a backward program over its tiles: their loops, and what they visit."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from attngen.backends.jax import shards
from attngen.backends.jax.bounds import bounds
from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.loops import level_lines
from attngen.backends.jax.tile import Starts, Tile, chosen, order
from attngen.backends.jax.tile_code import tile_code
from attngen.lists import unlistable
from attngen.plans import Plan
from attngen.transposed import renamed, transposed

Level = tuple[str, str]  # the name of a loop's variable, and how many steps it has

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


def levels_of(plan: Plan, at: Tile, tokens: str) -> list[Level]:
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


def one_pass(
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
    levels = levels_of(plan, at, outer)
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
