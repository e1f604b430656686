"""No operand can take a name that an emitted file uses itself."""

import ast

import pytest
from test_emitter import texts

from attngen.emitter import read_header
from attngen.names import is_free


def names_in_attention(tree):
    """Every name that the body of `attention` binds or reads."""
    (function,) = (
        n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "attention"
    )
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.FunctionDef):
            yield node.name


def test_every_name_that_is_used_is_taken(tmp_path):
    for name, text in texts().items():
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        operands = {o.name for o in read_header(path).spec.operands}
        used = set(names_in_attention(ast.parse(text))) - operands
        assert not {n for n in used if is_free(n)}, name


@pytest.mark.parametrize(
    "name",
    ["if", "lambda", "match", "len", "jnp", "q", "sink", "_x", "x_at_b", "part_1"],
)
def test_what_python_or_the_file_uses_is_taken(name):
    assert not is_free(name)


@pytest.mark.parametrize("name", ["ids", "slopes", "bias", "table", "x", "mask"])
def test_ordinary_names_are_free(name):
    assert is_free(name)
