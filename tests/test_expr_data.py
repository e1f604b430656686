"""Expressions as data: written and read again."""

import json
import math
import pickle

import pytest
from hypothesis import given
from refusals import refused
from test_expr import ANY, DECLARED

from attngen import expr, expr_data
from attngen.errors import ExpressionError, OperandError
from attngen.expr import const


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
