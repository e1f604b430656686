"""Printed text computes what its tree says, and is as a formatter leaves it."""

import math
import subprocess
import sys

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strategies
from brute import evaluate
from hypothesis import given, settings
from test_intervals import CORNERS

from attngen.expr import apply, const, var
from attngen.printer import ArrayPrinter

NAMES = {n: n for n in "bhqks"}


def printer(namespace, bits=32):
    dtypes = {"float_dtype": f"float{bits}", "int_dtype": f"int{bits}"}
    return ArrayPrinter(namespace, NAMES, lambda node: node.value.name, **dtypes)


def run(lines, namespace, at):
    scope = {namespace: {"np": np, "jnp": jnp}[namespace]}
    scope |= {n: v if n == "s" else scope[namespace].int32(v) for n, v in at.items()}
    exec("\n".join(lines), scope)
    return scope["seen"]


def agrees(node, namespace, corners):
    lines = printer(namespace).lines("seen", node, width=76)
    for at in corners:
        assert bool(run(lines, namespace, at)) == evaluate(node, at, {})


BOOLS = strategies.expressions("bool", operands=(), compare_floats=False)


@settings(max_examples=120, deadline=None)
@given(BOOLS)
def test_numpy_text_computes_its_tree(node):
    agrees(node, "np", CORNERS)


@settings(max_examples=25, deadline=None)
@given(BOOLS)
def test_jax_text_computes_its_tree(node):
    agrees(node, "jnp", CORNERS[::17])


FLOATS = strategies.expressions("float", score=True, operands=())


def agree(node, namespace, corners, width):
    """In float64, as Python's own floats: equal but for the last places of exp and log."""
    lines = printer(namespace, 64).lines("seen", node, width=width)
    for at in corners:
        got = run(lines, namespace, at | {"s": np.float64(-1.25)})
        want = evaluate(node, at | {"s": -1.25})
        assert np.isclose(float(got), want, rtol=1e-9, atol=1e-9)


@settings(max_examples=150, deadline=None)
@given(FLOATS, st.sampled_from([40, 76]))
def test_numpy_text_computes_floats(node, width):
    agree(node, "np", CORNERS[::5], width)


@settings(max_examples=25, deadline=None)
@given(FLOATS)
def test_jax_text_computes_floats(node):
    with jax.enable_x64(True):
        agree(node, "jnp", CORNERS[::29], 76)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-3.4028235e38, "-3.4028235e+38"),  # rounds to float32's least
        (-3.5e38, "-np.inf"),
        (math.inf, "np.inf"),
        (0.1, "0.1"),
        (-7, "-7"),
        (2**40, "1099511627776"),
    ],
)
def test_numbers_are_what_the_dtype_holds_of_them(value, text):
    assert printer("np").text(const(value)) == text


@settings(max_examples=200, deadline=None)
@given(strategies.expressions("bool", operands=()))
def test_no_line_is_too_long_unless_it_cannot_be_split(node):
    for line in printer("np").lines("seen", node, width=60):
        assert len(line) <= 60


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (apply("sub", var("q"), apply("sub", var("k"), const(1))), "q - (k - 1)"),
        (apply("sub", apply("sub", var("q"), var("k")), const(1)), "q - k - 1"),
        (apply("mod", apply("neg", var("q")), const(3)), "-q % 3"),
        (apply("neg", apply("mod", var("q"), const(3))), "-(q % 3)"),
        (apply("mul", var("q"), const(-3)), "q * -3"),
        (apply("floordiv", apply("add", var("q"), const(1)), const(2)), "(q + 1) // 2"),
        (
            apply(
                "and", apply("le", var("k"), var("q")), apply("lt", var("q"), const(9))
            ),
            "(k <= q) & (q < 9)",
        ),
        (apply("not", apply("eq", var("q"), var("k"))), "~(q == k)"),
    ],
)
def test_parentheses_stand_where_python_needs_them(node, text):
    assert printer("np").text(node) == text


def test_a_formatter_has_nothing_to_do(tmp_path):
    path = tmp_path / "lines.py"
    texts = []

    @settings(max_examples=150, deadline=None, database=None)
    @given(strategies.expressions("bool", operands=()))
    def collect(node):
        texts.extend(printer("np").lines("seen", node, width=88))

    collect()
    path.write_text("\n".join(texts) + "\n")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "format",
        "--isolated",
        "--diff",
        str(path),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[:2000]
