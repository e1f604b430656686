"""Hypothesis strategies: random expressions of the mask and score language.

Every expression is total and tame, so that any two evaluators must agree on it up to
rounding: divisors are nonzero constants, exp is given at most 2 and log at least ½, an
axis of an operand's own length is indexed modulo that length, and integers stay within
int32 for positions up to 10⁵. Floats are compared only where a test asks for it.
"""

import functools

from hypothesis import strategies as st

from attngen.expr import COMPARISONS, Expr, apply, const, load, searchsorted, var
from attngen.operands import Operand
from attngen.tracing import mask_of, score_of

IDS = Operand("ids", ("b", "k"), "int32")
FLAGS = Operand("flags", ("q", "k"), "bool")
SLOPES = Operand("slopes", ("h",), "float32")
TABLE = Operand("table", ("h", 8), "float32")
OFFSETS = Operand("offsets", (3,), "int32")
OPERANDS = (IDS, FLAGS, SLOPES, TABLE, OFFSETS)

small = st.integers(-9, 9).map(const)
nonzero = st.integers(1, 9).flatmap(lambda n: st.sampled_from((n, -n))).map(const)
quarters = st.integers(-16, 16).map(lambda n: const(n / 4))  # exact in every dtype


def one_of(*choices):
    """One of the choices, as likely: Hypothesis counts a nested one_of's parts."""
    return st.builds(lambda x: x, st.one_of(choices))


def node(op, *args):
    """Nodes of an operation, or of one of several."""
    ops = st.just(op) if isinstance(op, str) else st.sampled_from(op)
    return st.builds(apply, ops, *args)


def expressions(
    kind,
    *,
    score=False,
    operands=OPERANDS,
    compare_floats=False,
    depth=3,
):
    """Expressions of a kind: "bool", "int" or "float".

    score: whether they may read s.
    operands: which they may read. An axis k is also read at q: let q_len <= kv_len.
    compare_floats: whether comparisons of floats occur (rounding may decide those).
    depth: how many operations lie between the root and a leaf, at most.
    """
    letters = st.sampled_from([var(name) for name in "qkbh"])
    leaves = {
        "int": [letters, small],
        "float": [quarters, st.just(var("s"))] if score else [quarters],
        "bool": [
            node(COMPARISONS, letters, one_of(letters, small)),
            node(COMPARISONS, letters, small),
            st.booleans().map(const),
        ],
    }

    def ints(below):
        number = one_of(below("int"), below("int"), below("bool"))
        yield node(("add", "sub", "minimum", "maximum"), number, number)
        yield node(("mul", "floordiv", "mod"), number, nonzero)
        yield node(("neg", "abs"), number)
        yield node("where", below("bool"), below("int"), number)
        yield node("int", below("bool"))

    def floats(below):
        real = below("float")
        number = one_of(real, below("int"), below("bool"))
        yield node(("add", "sub", "mul", "minimum", "maximum"), real, number)
        yield node("div", number, nonzero)
        yield node(("neg", "abs", "tanh"), real)
        yield node("exp", node("minimum", real, st.just(const(2.0))))
        yield node("log", node("maximum", real, st.just(const(0.5))))
        yield node("where", below("bool"), number, real)
        yield node("float", below("int"))

    def bools(below):
        truth, number = below("bool"), below("int")
        yield node(COMPARISONS, number, number)
        yield node(("and", "or"), truth, truth)
        yield node("not", truth)
        yield node(("eq", "ne"), truth, truth)
        yield node("where", truth, truth, truth)
        yield node(COMPARISONS, number, truth)
        if compare_floats:
            yield node(COMPARISONS, below("float"), one_of(below("float"), number))

    @functools.cache
    def tree(kind, depth):
        choices = [one_of(*leaves[kind])]
        if depth:
            below = functools.partial(tree, depth=depth - 1)
            reads = [read(o, below("int")) for o in operands if o.kind == kind]
            reads += [search(o) for o in operands if kind == "int" and o == OFFSETS]
            choices += [one_of(*reads)] if reads else []
            choices += {"bool": bools, "int": ints, "float": floats}[kind](below)
        return one_of(*choices)

    return tree(kind, depth)


def read(operand: Operand, numbers: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    """Reads of an operand, each within its axes."""

    def index(axis):
        if isinstance(axis, int):
            return node("mod", numbers, st.just(const(axis)))
        names = {"k": "kq"}.get(axis, axis)
        return st.sampled_from([*map(var, names), const(0)])

    return st.builds(lambda *i: load(operand, i), *map(index, operand.axes))


def search(operand: Operand) -> st.SearchStrategy[Expr]:
    """Searches of an operand, for what depends on one position at most."""
    place = st.sampled_from([var(name) for name in "qkbh"])
    moved = node(("add", "sub", "floordiv", "mod", "minimum"), place, nonzero)
    return st.builds(lambda x: searchsorted(operand, x), one_of(place, moved, small))


def masks(**how):
    """Masks of random expressions; `how` as for `expressions`."""
    return expressions("bool", **how).map(mask_of)


def scores(**how):
    """Scores s + f and any others that may read s; `how` as for `expressions`."""
    change = expressions("float", score=True, **how)
    return one_of(node("add", st.just(var("s")), change), change).map(score_of)
