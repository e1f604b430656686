"""The language: what each operator means, constants, and walking a tree."""

import json
import math

import pytest
from brute import OPERATIONS, evaluate
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from strategies import IDS, OPERANDS, TABLE, expressions

from attngen import expr, expr_data
from attngen.errors import ExpressionError
from attngen.expr import ARITY, apply, const, load, var
from attngen.operands import Operand
from attngen.symbols import (
    Symbol,
    exp,
    log,
    maximum,
    minimum,
    tanh,
    where,
)
from attngen.tracing import mask, operand, score

KINDS = ("bool", "int", "float")
DECLARED = {o.name: o for o in OPERANDS}


ANY = st.one_of(expressions(k, score=True, compare_floats=True) for k in KINDS)


def traced(function):
    """The expression of a function of (q, k)."""
    return function(Symbol(var("q")), Symbol(var("k"))).expr


# What the operators mean.

PYTHON = {
    "q + k": lambda q, k: q + k,
    "3 + k": lambda q, k: 3 + k,
    "q - k": lambda q, k: q - k,
    "3 - k": lambda q, k: 3 - k,
    "q * k": lambda q, k: q * k,
    "3 * k": lambda q, k: 3 * k,
    "q / 4": lambda q, k: q / 4,
    "4 / k": lambda q, k: 4 / (k * k + 1),
    "q // 3": lambda q, k: q // 3,
    "q // -3": lambda q, k: q // -3,
    "7 // k": lambda q, k: 7 // (k * k + 1),
    "q % 3": lambda q, k: q % 3,
    "q % -3": lambda q, k: q % -3,
    "7 % k": lambda q, k: 7 % (k * k + 1),
    "-q": lambda q, k: -q,
    "+q": lambda q, k: +q,
    "abs": lambda q, k: abs(q - k),
    "q < k": lambda q, k: q < k,
    "q <= k": lambda q, k: q <= k,
    "q > k": lambda q, k: q > k,
    "q >= k": lambda q, k: q >= k,
    "q == k": lambda q, k: q == k,
    "q != k": lambda q, k: q != k,
    "1 < k": lambda q, k: k > 1,
    "0.5 * q": lambda q, k: 0.5 * q,
    "q + True": lambda q, k: q + True,
    "bool + bool": lambda q, k: (q < k) + (q > 2),
    "bool < bool": lambda q, k: (q < k) < (q > 2),
    "bool == bool": lambda q, k: (q < k) == (q > 2),
    "and": lambda q, k: (q < k) & (k < 3),
    "True and": lambda q, k: True & (k < 3),
    "or": lambda q, k: (q < k) | (k < 3),
    "False or": lambda q, k: False | (k < 3),
}


@pytest.mark.parametrize("function", PYTHON.values(), ids=PYTHON)
def test_an_operator_means_what_it_means_in_python(function):
    node = traced(function)
    for q in range(-4, 5):
        for k in range(-4, 5):
            assert evaluate(node, {"q": q, "k": k}) == function(q, k)


NAMED = {
    "not": (lambda q, k: ~(q < k), lambda q, k: not q < k),
    "minimum": (lambda q, k: minimum(q, k + 0.5), lambda q, k: min(q, k + 0.5)),
    "maximum": (lambda q, k: maximum(3, k), lambda q, k: max(3, k)),
    "where": (lambda q, k: where(q < k, q, -k), lambda q, k: q if q < k else -k),
    "exp": (lambda q, k: exp(q / 2), lambda q, k: math.exp(q / 2)),
    "log": (lambda q, k: log(abs(k) + 1), lambda q, k: math.log(abs(k) + 1)),
    "tanh": (lambda q, k: tanh(q), lambda q, k: math.tanh(q)),
    "-inf": (
        lambda q, k: where(q < k, -math.inf, 0.0),
        lambda q, k: -math.inf if q < k else 0.0,
    ),
}


@pytest.mark.parametrize(("symbolic", "plain"), NAMED.values(), ids=NAMED)
def test_a_named_operation_means_its_name(symbolic, plain):
    node = traced(symbolic)
    for q in range(-4, 5):
        for k in range(-4, 5):
            assert evaluate(node, {"q": q, "k": k}) == plain(q, k)


def test_every_operation_is_tested_above():
    functions = [*PYTHON.values(), *(symbolic for symbolic, _ in NAMED.values())]
    used = {node.op for f in functions for node in expr.walk(traced(f))}
    assert used - {"const", "var"} == set(ARITY)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda q, k: q + k, "int"),
        (lambda q, k: q + 1.0, "float"),
        (lambda q, k: q / 2, "float"),
        (lambda q, k: q // 2, "int"),
        (lambda q, k: (q < k) + (q < k), "int"),
        (lambda q, k: -(q < k), "int"),
        (lambda q, k: q < 0.5, "bool"),
        (lambda q, k: where(q < k, q < 1, k < 1), "bool"),
        (lambda q, k: where(q < k, q < 1, k), "int"),
        (lambda q, k: where(q < k, q, 0.0), "float"),
        (lambda q, k: minimum(q, 1.0), "float"),
        (lambda q, k: tanh(q), "float"),
    ],
)
def test_the_kind_is_the_widest_that_is_needed(function, kind):
    assert traced(function).kind == kind


@given(ANY)
def test_the_kind_is_the_kind_of_the_value(node):
    arrays = {
        "ids": [[3, 1, 4]],
        "flags": [[True, False, True]] * 3,
        "slopes": [0.5],
        "table": [[n / 8 for n in range(8)]],
        "offsets": [2, 0, 1],
    }
    at = {"b": 0, "h": 0, "q": 1, "k": 2, "s": 0.25}
    value = evaluate(node, at, arrays)
    assert type(value).__name__ == node.kind
    assert math.isfinite(value)


def test_an_operand_is_read_at_its_indices():
    ids = operand("ids", axes="bk", dtype="int32")
    table = operand("table", axes=("h", 8), dtype="float32")
    same = mask(lambda b, h, q, k: ids[b, q] == ids[b, k])
    far = score(lambda s, b, h, q, k: s + table[h, (k - q) % 8])
    at = {"b": 1, "h": 0, "q": 1, "k": 2, "s": 10.0}
    arrays = {"ids": [[0, 0, 0], [5, 6, 6]], "table": [[0.0, 0.5] + [9.0] * 6]}
    assert evaluate(same.expr, at, arrays) is True
    assert evaluate(far.expr, at, arrays) == 10.5
    assert same.operands == (Operand("ids", ("b", "k"), "int32"),)


def test_numpy_scalars_are_numbers():
    np = pytest.importorskip("numpy")
    plain = traced(lambda q, k: (2 * q < 3) & (0.5 * k < 2.0))
    typed = traced(
        lambda q, k: (
            (np.int64(2) * q < np.array(3)) & (np.float64(0.5) * k < np.float32(2))
        )
    )
    assert typed == plain
    assert json.dumps(expr_data.to_data(typed)) == json.dumps(expr_data.to_data(plain))


# Constants.


@given(st.sampled_from(expr.COMPARISONS), st.sampled_from(KINDS), st.data())
def test_a_comparison_of_constants_is_its_answer(op, kind, data):
    values = {
        "bool": st.booleans(),
        "int": st.integers(-5, 5),
        "float": st.integers(-8, 8).map(lambda n: n / 4),
    }[kind]
    x, y = data.draw(values), data.draw(values)
    folded = apply(op, const(x), const(y))
    assert folded == const(evaluate(expr.Expr(op, (const(x), const(y)), "bool"), {}))


@given(st.sampled_from(sorted({*expr.ARITHMETIC, "floordiv", "mod"})), st.data())
def test_arithmetic_of_constants_is_its_number(op, data):
    values = [data.draw(st.integers(1, 9)) * s for s in (-1, 1)[: ARITY[op]]]
    assert apply(op, *map(const, values)) == const(OPERATIONS[op](*values))


def test_a_divisor_that_is_zero_by_arithmetic_is_refused():
    zero = apply("sub", const(2), const(2))
    for op in ("div", "floordiv", "mod"):
        with refused(ExpressionError):
            apply(op, var("q"), zero)


def test_a_constant_that_is_no_number_is_refused():
    with refused(ExpressionError):
        apply("sub", const(math.inf), const(math.inf))


def test_constants_are_compared_in_float32():
    assert apply("eq", const(0.1), const(0.1 + 1e-12)) == const(True)
    assert apply("lt", const(-1e300), const(1e300)) == const(True)
    assert apply("lt", const(1e300), const(math.inf)) == const(False)


def test_logic_of_constants_is_its_answer():
    for x in (False, True):
        assert apply("not", const(x)) == const(not x)
        for y in (False, True):
            assert apply("and", const(x), const(y)) == const(x and y)
            assert apply("or", const(x), const(y)) == const(x or y)


# Walking.


@given(ANY)
def test_substituting_nothing_changes_nothing(node):
    assert expr.substitute(node, lambda n: None) == node


@given(expressions("int", operands=()), st.integers(-5, 5), st.integers(-5, 5))
def test_substituting_a_variable_is_setting_it(node, q, k):
    fixed = expr.substitute(node, lambda n: const(q) if n == var("q") else None)
    assert "q" not in expr.variables(fixed)
    at = {"b": 1, "h": 2, "k": k}
    assert evaluate(fixed, at) == evaluate(node, at | {"q": q})


def test_walk_visits_parents_first_and_indices_too():
    node = apply("add", load(IDS, (var("b"), var("k"))), const(1))
    assert [n.op for n in expr.walk(node)] == ["add", "load", "var", "var", "const"]
    assert expr.variables(node) == {"b", "k"}


def test_an_expression_reads_as_a_person_would_write_it():
    node = load(
        TABLE, (var("h"), apply("mod", apply("sub", var("q"), var("k")), const(8)))
    )
    assert expr.describe(apply("add", var("s"), node)) == "s + table[h, (q - k) % 8]"
    assert repr(traced(lambda q, k: ~(q < k))) == "Expr(~(q < k))"
