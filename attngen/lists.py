"""Which masks' tiles can be listed, and by what: verdicts told by operands' least and greatest.

A list of tiles (the choice skip = list) is computed at run time from the verdict on each
(verdicts.py). Where a mask reads an operand at the position of a query or a key, the verdict
is told by the least and the greatest value that it has in the tile: O(n / chunk) numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attngen.expr import Expr, var, variables, walk
from attngen.extremes import FALSE, TRUE, Ends, Truth
from attngen.intervals import INT_LIMITS, Interval, domain, examine, interval
from attngen.linear import linear
from attngen.operands import Operand
from attngen.printer import read_name
from attngen.reach import is_solved
from attngen.spec import AttentionSpec
from attngen.terms import alternatives
from attngen.verdicts import Verdict, verdict


@dataclass(frozen=True)
class Extremes:
    """A read whose least and greatest value in a tile are known, by their names."""

    node: Expr
    least: str
    greatest: str

    @property
    def of_keys(self) -> bool:
        return "k" in variables(self.node)


@functools.lru_cache(maxsize=64)
def listed(mask: Expr) -> tuple[Verdict, tuple[Extremes, ...]]:
    """The verdict on a tile of a mask, and the reads of operands that it is told by."""
    found: dict[str, Extremes] = {}

    def ends(node: Expr, kind: str) -> tuple[Expr, Expr] | None:
        if not _is_told(node):
            return None
        assert isinstance(node.value, Operand)
        name = read_name(node)
        of = found.setdefault(name, Extremes(node, f"{name}_min", f"{name}_max"))
        return var(of.least, kind), var(of.greatest, kind)  # type: ignore[arg-type]

    def read(node: Expr) -> Ends | None:
        known = ends(node, "int")
        return None if known is None else (linear(known[0]), linear(known[1]))

    def told(node: Expr) -> Truth | None:
        return ends(node, "bool")

    made = verdict(mask, read, told)
    names = variables(made.some) | variables(made.every)
    used = tuple(x for x in found.values() if names & {x.least, x.greatest})
    return made, used


def _is_told(node: Expr) -> bool:
    """Whether a read is at one position, that of the query or the key, or at none."""
    assert isinstance(node.value, Operand)
    letters = [str(i.value) for i in node.args if i.op == "var"]
    plain = all(i.op in ("var", "const") for i in node.args)
    own = any(isinstance(a, int) and i.op != "const" for a, i in pairs(node))
    once = len(set(letters)) == len(letters)
    return plain and once and not own and not {"q", "k"} <= set(letters)


def pairs(node: Expr) -> list[tuple[str | int, Expr]]:
    assert isinstance(node.value, Operand)
    return list(zip(node.value.axes, node.args, strict=True))


def unlistable(spec: AttentionSpec) -> str | None:
    """Why the tiles of a spec can't be listed, or None."""
    if spec.mask is None:
        return "skip = list needs a mask"
    made, _ = listed(spec.mask.expr)
    if (made.some, made.every) == (TRUE, FALSE):
        return "skip = list needs a mask of which something is known of whole tiles"
    if spec.devices > 1:
        return "skip = list isn't for shards"
    if examine(spec).index_dtype != "int32" or _leaves_int32(spec):
        return "skip = list needs positions of 32 bits"
    return None


@functools.lru_cache(maxsize=64)
def _leaves_int32(spec: AttentionSpec) -> bool:
    assert spec.mask is not None
    made, reads = listed(spec.mask.expr)
    env: dict[str, Interval] = {}
    around = domain(spec)
    for name in "qkbh":
        low, high = around[name]
        env |= {f"{name}_lo": (low, high), f"{name}_hi": (low + 1, high + 1)}
    for x in reads:
        limit = INT_LIMITS["int32"]
        env |= dict.fromkeys((x.least, x.greatest), (-limit, limit))
    for root in (made.some, made.every):
        for node in walk(root):
            if node.kind == "int":
                low, high = interval(node, env)
                if high > 2**31 - 1 or low < -(2**31):
                    return True
    return False


def finds_full(spec: AttentionSpec) -> bool:
    """Whether a list can tell that all of a tile's queries see all of its keys."""
    return spec.mask is not None and listed(spec.mask.expr)[0].every != FALSE


@functools.lru_cache(maxsize=64)
def worth_listing(spec: AttentionSpec) -> bool:
    """Whether a list can skip more than bounds in closed form do.

    Not where each condition of the mask is solved for k; nor where nothing is known but
    what these say.
    """
    if unlistable(spec) is not None:
        return False
    assert spec.mask is not None
    terms = alternatives(spec.mask.expr)
    return terms is None or not all(is_solved(atom) for term in terms for atom in term)


def skips(spec: AttentionSpec, *, whole: bool = False) -> Mapping[str, Sequence[str]]:
    """The choice `skip`, its values the best first; empty where bounds say all there is.

    A list where a mask reads operands, whose values decide; for other masks a count of
    tiles tells which is better.

    Args:
        whole: all that can be emitted.
    """
    if not worth_listing(spec):
        return {}
    assert spec.mask is not None
    if not listed(spec.mask.expr)[1]:
        return {"skip": ("bounds", "list")}
    return {"skip": ("list", "bounds") if whole else ("list",)}
