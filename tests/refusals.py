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
    assert f"\n  got      {error.got}" in str(error)
    assert f"\n  needed   {error.needed}" in str(error)
