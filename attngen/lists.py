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
from attngen.extremes import FALSE, TRUE, Around, Ends, Truth, ends
from attngen.intervals import INT_LIMITS, Interval, domain, examine, interval
from attngen.linear import Linear, expression, linear, number
from attngen.operands import Operand
from attngen.printer import ArrayPrinter, read_name
from attngen.reach import is_solved
from attngen.spec import AttentionSpec
from attngen.terms import alternatives
from attngen.verdicts import Verdict, verdict

SHORT = 76  # columns of a line
SPAN = 1024  # keys that a query is taken to see, where operands decide: a guess


@dataclass(frozen=True)
class Extremes:
    """A read whose least and greatest value in a tile are known, by their names."""

    node: Expr
    least: str
    greatest: str

    @property
    def of_keys(self) -> bool:
        return "k" in variables(self.node)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.least, self.greatest)

    @property
    def made_from(self) -> tuple[Expr, ...]:
        return ()


@dataclass(frozen=True)
class Search:
    """How many entries of an operand are at most the end of a sum, by name."""

    node: Expr
    name: str
    end: Expr

    @property
    def of_keys(self) -> bool:
        return bool(variables(self.end) & {"k_lo", "k_hi"})

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def made_from(self) -> tuple[Expr, ...]:
        return (self.end,)


@dataclass(frozen=True)
class Blocks:
    """A boolean for each block of queries and of keys; whether all, or any, hold in a tile.

    Args:
        rows, columns: the blocks [first, last) that the tile meets, as expressions.
        letters: the axes before them.
    """

    node: Expr
    every: str
    some: str
    rows: tuple[Expr, Expr]
    columns: tuple[Expr, Expr]
    letters: tuple[str, ...]
    of_keys = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.every, self.some)

    @property
    def made_from(self) -> tuple[Expr, ...]:
        return (*self.rows, *self.columns)


@dataclass(frozen=True)
class Offset(Search):
    """A number of an operand that rises, where `end` indexes it, by name."""

    keyed: bool

    @property
    def of_keys(self) -> bool:
        return self.keyed


Told = Extremes | Search | Blocks


@dataclass(frozen=True)
class Listed:
    """The verdict on a tile of a mask, and what of operands it is told by."""

    verdict: Verdict
    told: tuple[Told, ...]


@functools.lru_cache(maxsize=64)
def listed(mask: Expr) -> Listed:
    return _Reader().read(mask)


class _Reader:
    """Names what a verdict asks of operands."""

    def __init__(self) -> None:
        self.found: dict[object, Told] = {}

    def read(self, mask: Expr) -> Listed:
        made = verdict(mask, self.integer, self.boolean)
        names = variables(made.some) | variables(made.every)
        used: list[Told] = []
        for x in reversed(self.found.values()):  # a search's end may be told by a read
            if names & set(x.names):
                used.append(x)
                names |= frozenset(v for e in x.made_from for v in variables(e))
        return Listed(made, tuple(reversed(used)))

    def integer(self, node: Expr, around: Around) -> Ends | None:
        if node.op == "searchsorted":
            low, high = ends(linear(node.args[0]), around)
            if low is None or high is None:
                return None
            return self._search(node, low), self._search(node, high)
        assert isinstance(node.value, Operand)
        if node.value.rises_to is not None and node.args[0].op != "var":
            first, last = ends(linear(node.args[0]), around)
            if first is None or last is None:
                return None
            return self._offset(node, first), self._offset(node, last)
        if not _is_told(node):
            return None
        known = self._extremes(node)
        return linear(var(known.least, "int")), linear(var(known.greatest, "int"))

    def boolean(self, node: Expr, around: Around) -> Truth | None:
        if _is_told(node):
            known = self._extremes(node)
            return var(known.least, "bool"), var(known.greatest, "bool")
        blocks = self._blocks(node, around)
        if blocks is None:
            return None
        return var(blocks.every, "bool"), var(blocks.some, "bool")

    def _extremes(self, node: Expr) -> Extremes:
        name = read_name(node)
        made = Extremes(node, f"{name}_min", f"{name}_max")
        self.found.setdefault(node, made)
        return made

    def _search(self, node: Expr, end: Linear) -> Linear:
        assert isinstance(node.value, Operand)
        x = expression(end)
        key = (node.value, x)
        if key not in self.found:
            count = sum(isinstance(s, Search) for s in self.found.values())
            self.found[key] = Search(node, f"{node.value.name}_at_ends_{count + 1}", x)
        known = self.found[key]
        return linear(var(known.names[0], "int"))

    def _offset(self, node: Expr, end: Linear) -> Linear:
        assert isinstance(node.value, Operand)
        index = expression(end)
        key = (node.value, "at", index)
        if key not in self.found:
            count = sum(isinstance(s, Offset) for s in self.found.values())
            of_keys = {"k_lo", "k_hi"}
            of_keys |= {n for x in self.found.values() if x.of_keys for n in x.names}
            name = f"{node.value.name}_at_tile_{count + 1}"
            keyed = bool(variables(index) & of_keys)
            self.found[key] = Offset(node, name, index, keyed)
        known = self.found[key]
        return linear(var(known.names[0], "int"))

    def _blocks(self, node: Expr, around: Around) -> Blocks | None:
        *before, row, column = [None, None, *pairs(node)]
        plain = all(
            x is not None and isinstance(x[0], str) and x[1].value in ("b", "h")
            for x in before[2:]
        )
        if row is None or column is None or not plain:
            return None
        own = all(isinstance(axis, int) for axis, _ in (row, column))
        reads = [variables(i) for _, i in (row, column)]
        if not own or reads != [{"q"}, {"k"}]:
            return None
        found = [ends(linear(i), around) for _, i in (row, column)]
        if any(x is None for pair in found for x in pair):
            return None
        assert isinstance(node.value, Operand)
        spans = [
            (expression(low), expression(high + number(1)))
            for low, high in found
            if low is not None and high is not None
        ]
        letters = tuple(str(x[1].value) for x in before[2:] if x is not None)
        name = f"{node.value.name}_at_tiles"
        count = sum(isinstance(s, Blocks) for s in self.found.values())
        name += f"_{count + 1}" if count else ""
        made = Blocks(node, f"{name}_all", f"{name}_any", *spans, letters)
        known = self.found.setdefault(node, made)
        assert isinstance(known, Blocks)
        return known


def _is_told(node: Expr) -> bool:
    """Whether a read is at one position, that of the query or the key, or at none."""
    letters = [str(i.value) for i in node.args if i.op == "var"]
    plain = all(i.op in ("var", "const") for i in node.args)
    own = any(isinstance(a, int) and i.op != "const" for a, i in pairs(node))
    once = len(set(letters)) == len(letters)
    return plain and once and not own and not {"q", "k"} <= set(letters)


def pairs(node: Expr) -> list[tuple[str | int, Expr]]:
    """The axes of the operand that a node reads, each with its index."""
    assert isinstance(node.value, Operand)
    return list(zip(node.value.axes, node.args, strict=True))


def held(x: Blocks, sums: str, printer: ArrayPrinter) -> list[str]:
    """How many blocks of a tile hold, and how many there are."""
    assert isinstance(x.node.value, Operand)
    name = x.node.value.name
    (first, last), (left, right) = (
        [printer.text(e) for e in ends] for ends in (x.rows, x.columns)
    )
    return [
        f"{name}_at_rows = {first}, {last}",
        f"{name}_at_columns = {left}, {right}",
        *_called(
            f"{name}_at_tiles, {name}_at_area = _held",
            f"{sums}, {name}_at_rows, {name}_at_columns",
        ),
    ]


def _called(start: str, arguments: str) -> list[str]:
    line = f"{start}({arguments})"
    return [line] if len(line) <= SHORT else [f"{start}(", f"    {arguments}", ")"]


def unlistable(spec: AttentionSpec) -> str | None:
    """Why the tiles of a spec can't be listed, or None."""
    if spec.mask is None:
        return "skip = list needs a mask"
    made = listed(spec.mask.expr).verdict
    known = (made.some, made.every)
    if known == (TRUE, FALSE) or made.some == FALSE or made.every == TRUE:
        return "skip = list needs a mask of which single tiles can be told something"
    if spec.devices > 1:
        return "skip = list isn't for shards"
    if examine(spec).index_dtype != "int32" or _leaves_int32(spec):
        return "skip = list needs positions of 32 bits"
    return None


@functools.lru_cache(maxsize=64)
def _leaves_int32(spec: AttentionSpec) -> bool:
    assert spec.mask is not None
    found = listed(spec.mask.expr)
    made = found.verdict
    env: dict[str, Interval] = {}
    around = domain(spec)
    for name in "qkbh":
        low, high = around[name]
        env |= {f"{name}_lo": (low, high), f"{name}_hi": (low + 1, high + 1)}
    limit = INT_LIMITS["int32"]
    roots = [made.some, made.every]
    for x in found.told:
        within: Interval = (-limit, limit)
        roots += x.made_from
        if isinstance(x, Offset):
            assert isinstance(x.node.value, Operand)
            within = (0, x.node.value.rises_to or 0)
        elif isinstance(x, Search):
            within = interval(x.node, env)
        env |= dict.fromkeys(x.names, within)
    for root in roots:
        for node in walk(root):
            if node.kind == "int":
                low, high = interval(node, env)
                if high > 2**31 - 1 or low < -(2**31):
                    return True
    return False


def finds_full(spec: AttentionSpec) -> bool:
    """Whether a list can tell that all of a tile's queries see all of its keys."""
    return spec.mask is not None and listed(spec.mask.expr).verdict.every != FALSE


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


def skips(spec: AttentionSpec) -> Mapping[str, Sequence[str]]:
    """The choice `skip`; empty where bounds say all that there is."""
    return {"skip": ("bounds", "list")} if worth_listing(spec) else {}


def decided(spec: AttentionSpec) -> bool:
    """Whether operands decide at run time which tiles a list holds."""
    return spec.mask is not None and bool(listed(spec.mask.expr).told)
