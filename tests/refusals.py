"""How attngen refuses: the exact class, what was got, and what is needed."""

import contextlib

import pytest


@contextlib.contextmanager
def refused(kind, match=None):
    """The block raises `kind` itself, with what was got and needed in its message."""
    with pytest.raises(kind, match=match) as caught:
        yield caught
    error = caught.value
    assert type(error) is kind
    assert error.got is not None
    assert error.needed is not None
    got = str(error.got).replace("\n", "\n" + " " * 11)
    assert f"\n  got      {got}" in str(error)
    assert f"\n  needed   {error.needed}" in str(error)
