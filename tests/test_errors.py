"""Errors: what each says, what it is, and that every one in attngen says it."""

import ast
import pickle
from pathlib import Path

import pytest

import attngen.errors
from attngen.errors import AttngenError, InternalError, SpecError

KINDS = [
    kind
    for kind in vars(attngen.errors).values()
    if isinstance(kind, type) and issubclass(kind, AttngenError)
]
PACKAGE = Path(attngen.errors.__file__).parent


def test_an_error_says_what_was_got_and_needed_and_what_to_do():
    error = SpecError("No.", got="this", needed="that", hint="do")
    assert str(error) == "No.\n  got      this\n  needed   that\n  hint     do"


def test_lines_stand_below_each_other():
    error = SpecError("No.", got="this\nand that", needed="that")
    assert str(error).splitlines()[1:3] == ["  got      this", " " * 11 + "and that"]
    assert error.to_dict()["got"] == "this\nand that"


def test_what_is_not_known_is_not_said():
    assert str(SpecError("No.", needed="that")) == "No.\n  needed   that"
    assert str(SpecError("No.")) == "No."
    assert str(SpecError("No.", got=0)) == "No.\n  got      0"


def test_what_has_no_characters_is_seen():
    error = SpecError("It can't be that.", got="")
    assert str(error).endswith("got      ''")
    assert error.to_dict()["got"] == "''"


def test_an_error_is_plain_values():
    error = SpecError("No.", got=(1, 2), needed="that")
    assert error.to_dict() == {
        "error": "SpecError",
        "what": "No.",
        "got": "(1, 2)",
        "needed": "that",
        "hint": None,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_built_in_error_too(kind):
    if kind is AttngenError:
        return
    error = kind("No.", got="this", needed="that")
    assert isinstance(error, AttngenError)
    others = [base for base in kind.__mro__ if base.__module__ == "builtins"]
    assert others[0] not in (Exception, BaseException, object)
    assert kind.__doc__
    assert str(error) == "No.\n  got      this\n  needed   that"


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_processes_whole(kind):
    error = kind("No.", got="this", needed="that", hint="do")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert again.to_dict() == error.to_dict()
    assert str(again) == str(error)


def test_an_internal_error_is_not_the_users_and_asks_for_a_report():
    error = InternalError("The plan has no chunk.")
    assert not isinstance(error, AttngenError)
    assert str(error).startswith("The plan has no chunk.\n")
    assert "report" in str(error)


def refusals(path):
    """The calls in a module that make one of the errors, as (line, keywords)."""
    names = {kind.__name__ for kind in KINDS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", None))
            if name in names:
                yield node.lineno, {k.arg for k in node.keywords}


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_error_says_got_and_needed(path):
    silent = [
        line
        for line, keywords in refusals(path)
        if None not in keywords and not {"got", "needed"} <= keywords
    ]
    assert not silent, f"{path.name}: lines {silent}"


def test_errors_are_found_where_they_are():
    assert len(list(refusals(PACKAGE / "spec_checks.py"))) >= 5
