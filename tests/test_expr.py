"""The language: what each operator means, what is refused, and trees as data."""

import json
import math
import pickle

import pytest
from brute import OPERATIONS, evaluate
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from strategies import IDS, OPERANDS, TABLE, expressions

from attngen import expr, expr_data, tracing
from attngen.errors import ExpressionError, OperandError
from attngen.expr import ARITY, apply, const, load, var
from attngen.operands import OPERAND_DTYPES, Operand
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


# What is refused.

MISUSES = {
    "and": lambda s, b, h, q, k: q < k and k < 3,
    "or": lambda s, b, h, q, k: q < k or k < 3,
    "not": lambda s, b, h, q, k: not q < k,
    "if": lambda s, b, h, q, k: s if q < k else 0.0,
    "bool()": lambda s, b, h, q, k: bool(q),
    "chained": lambda s, b, h, q, k: 0 < q < k,
    "min()": lambda s, b, h, q, k: min(q, k),
    "in": lambda s, b, h, q, k: q in (1, 2),
    "int()": lambda s, b, h, q, k: int(q),
    "float()": lambda s, b, h, q, k: float(s),
    "range()": lambda s, b, h, q, k: range(q),
    "iteration": lambda s, b, h, q, k: list(q),
    "math.exp": lambda s, b, h, q, k: math.exp(s),
    "**": lambda s, b, h, q, k: s * (q - k) ** 2,
    "2 **": lambda s, b, h, q, k: s * 2**q,
    "^": lambda s, b, h, q, k: (q < k) ^ (q < 3),
    "<<": lambda s, b, h, q, k: q << 1,
    "@": lambda s, b, h, q, k: s @ s,
    "divmod": lambda s, b, h, q, k: divmod(q, 2),
    "round": lambda s, b, h, q, k: round(s),
    "float // int": lambda s, b, h, q, k: s // 2,
    "int % float": lambda s, b, h, q, k: q % 2.0,
    "& of ints": lambda s, b, h, q, k: q & 1,
    "~ of an int": lambda s, b, h, q, k: ~q,
    "where of an int": lambda s, b, h, q, k: where(q, s, 0.0),
    "/ 0": lambda s, b, h, q, k: q / 0,
    "// 0": lambda s, b, h, q, k: q // 0,
    "% 0": lambda s, b, h, q, k: q % 0,
    "NaN": lambda s, b, h, q, k: s + math.nan,
    "beyond int64": lambda s, b, h, q, k: q < 2**63,
    "None": lambda s, b, h, q, k: None,
    "a string": lambda s, b, h, q, k: s + "1",
    "a list": lambda s, b, h, q, k: [s, s],
}


@pytest.mark.parametrize("function", MISUSES.values(), ids=MISUSES)
def test_what_the_language_lacks_is_refused(function):
    with refused(ExpressionError):
        score(function)


@pytest.mark.parametrize("library", ["numpy", "jax.numpy"])
def test_where_of_an_array_library_is_refused_with_the_right_one_named(library):
    np = pytest.importorskip(library)
    with refused(ExpressionError) as caught:
        mask(lambda b, h, q, k: np.where(q < k, True, False))
    assert "attngen.where" in caught.value.hint


def test_a_captured_array_is_refused_and_operand_is_named():
    np = pytest.importorskip("numpy")
    slopes = np.ones(4)
    with refused(ExpressionError) as caught:
        score(lambda s, b, h, q, k: s + slopes)
    assert "attngen.operand" in caught.value.hint


IDS_UNINDEXED = {
    "==": lambda ids, q: ids == 3,
    "!=": lambda ids, q: ids != 3,
    "== itself": lambda ids, q: ids == ids,
    "== q": lambda ids, q: ids == q,
    "q +": lambda ids, q: q + ids < 3,
    "not": lambda ids, q: not ids,
    "in": lambda ids, q: 3 in ids,
    "sum": lambda ids, q: sum(ids) < 3,
    "alone": lambda ids, q: ids,
}


@pytest.mark.parametrize("function", IDS_UNINDEXED.values(), ids=IDS_UNINDEXED)
def test_an_operand_without_index_is_refused(function):
    ids = operand("ids", axes="bk", dtype="int32")
    with refused(ExpressionError):
        mask(lambda b, h, q, k: function(ids, q))


@pytest.mark.parametrize("axis", "bhqk")
@pytest.mark.parametrize("letter", "bhqks")
def test_an_axis_is_read_at_its_letter_and_tokens_at_either(axis, letter):
    x = Operand("x", (axis,), "int32")
    if letter == axis or {letter, axis} == {"q", "k"}:
        assert expr.variables(load(x, (var(letter),))) == {letter}
    else:
        with refused(ExpressionError):
            load(x, (var(letter),))


@pytest.mark.parametrize(
    "index",
    [
        lambda b, h, q, k: (b,),
        lambda b, h, q, k: (b, k, k),
        lambda b, h, q, k: (b, k + 1),
        lambda b, h, q, k: (h, k),
        lambda b, h, q, k: (b, h),
        lambda b, h, q, k: (b, 1.0),
        lambda b, h, q, k: (b, q < k),
        lambda b, h, q, k: (b, slice(None)),
    ],
)
def test_a_lettered_axis_is_indexed_by_its_letter_or_a_number_alone(index):
    ids = operand("ids", axes="bk", dtype="int32")
    with refused(ExpressionError):
        mask(lambda *at: ids[index(*at)] == 0)


@pytest.mark.parametrize("make", [mask, score])
def test_the_function_has_the_right_arguments(make):
    with refused(ExpressionError):
        make(lambda q, k: q < k)
    with refused(ExpressionError):
        make(3)


def test_a_mask_is_a_condition_and_a_score_is_a_number():
    with refused(ExpressionError):
        mask(lambda b, h, q, k: q - k)
    with refused(ExpressionError):
        score(lambda s, b, h, q, k: q < k)
    with refused(ExpressionError):
        tracing.mask_of(apply("lt", var("s"), const(0.0)))
    assert score(lambda s, b, h, q, k: 0).expr == const(0.0)


def test_a_mask_is_not_true_or_false():
    causal = mask(lambda b, h, q, k: k <= q)
    with refused(ExpressionError):
        bool(causal)
    with refused(ExpressionError):
        causal and causal  # noqa: B018


# Operands.

BAD_NAMES = ["for", "None", "q", "k", "v", "attention", "jnp"]
BAD_NAMES += ["", "2x", "a-b", "a b", "x" * 33, "größe", "_x", "a_at_b", None, 3]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_operand_has_a_free_identifier_for_a_name(name):
    with refused(OperandError):
        operand(name, axes="b", dtype="int32")


@pytest.mark.parametrize("name", ["for", "_x", "a_at_b"])
def test_the_name_that_the_refusal_proposes_is_free(name):
    with refused(OperandError) as caught:
        operand(name, axes="b", dtype="int32")
    proposed = next(w.strip(",") for w in caught.value.hint.split() if "_values" in w)
    assert operand(proposed, axes="b", dtype="int32").operand.name == proposed


@pytest.mark.parametrize(
    "axes",
    ["", "x", "s", "bb", "bkb", ("h", 0), ("h", -1), ("h", True), ("h", 2.0), None],
)
def test_an_axis_is_a_letter_or_a_length(axes):
    with refused(OperandError):
        operand("ids", axes=axes, dtype="int32")


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float", "", None, ["int32"]])
def test_an_operand_has_a_dtype_of_the_language(dtype):
    with refused(OperandError):
        operand("ids", axes="b", dtype=dtype)


@pytest.mark.parametrize("dtype", OPERAND_DTYPES)
def test_the_kind_of_an_operand_is_its_dtypes(dtype):
    kind = {"b": "bool", "i": "int", "f": "float"}
    kind = "float" if dtype == "bfloat16" else kind[dtype[0]]
    assert Operand("x", ("b",), dtype).kind == kind


def test_the_shape_of_an_operand_follows_the_lengths():
    lengths = {"b": 2, "h": 3, "q": 5, "k": 7}
    assert Operand("x", ("h", 32, "q"), "float32").shape(lengths) == (3, 32, 5)


def test_two_operands_of_one_name_are_refused():
    one = load(Operand("x", ("b",), "int32"), (var("b"),))
    other = load(Operand("x", ("h",), "int32"), (var("h"),))
    assert expr.operands(one, one) == (one.value,)
    with refused(OperandError):
        expr.operands(one, other)


# Trees as data.


@given(ANY)
def test_data_is_read_as_it_was_written(node):
    data = json.loads(json.dumps(expr_data.to_data(node)))
    assert expr_data.from_data(data, DECLARED) == node


@given(ANY)
def test_an_expression_is_a_value(node):
    again = pickle.loads(pickle.dumps(node))
    assert again == node
    assert hash(again) == hash(node)
    assert {o.name for o in expr.operands(node)} <= set(DECLARED)
    assert expr.variables(node) <= set(expr.VARIABLES)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 2.0, 0.1, 1e300, 5e-324])
def test_a_float_constant_survives(value):
    data = json.loads(json.dumps(expr_data.to_data(const(value)), allow_nan=False))
    assert expr_data.from_data(data, {}) == const(value)


MALFORMED = [
    None, 1.5, "x", "", "__import__('os')", [], {}, {"add": ["q", "k"]}, ["q"], [1, 2],
    ["add", "q"], ["add", "q", "k", "b"], ["pow", "q", 2], ["where", True, "q"],
    ["const"], ["const", "nan"], ["const", math.nan], ["const", True], ["const", "1"],
    ["const", None], ["const", 1.0, 2.0], ["const", 10**400], 2**63, [["add"], "q", 1],
    ["and", "q", "k"], ["not", "q"], ["floordiv", "q", 0], ["div", "q", 0],
    ["mod", "q", ["const", 2.0]], ["int", ["const", 1.0]], ["add", "q", None],
    ["load"], ["load", ["ids"]], ["load", "ids"], ["load", "ids", "b", ["add", "k", 1]],
    ["load", "ids", "b", "h"],
]  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED, ids=repr)
def test_malformed_data_is_refused(data):
    with refused(ExpressionError):
        expr_data.from_data(data, DECLARED)


def test_an_undeclared_operand_is_refused():
    with refused(OperandError):
        expr_data.from_data(["load", "other", "b"], DECLARED)
    with refused(OperandError):
        expr_data.from_data(["load", "other", "b"], {})


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
