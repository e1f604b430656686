"""What every backend's loader asks of an emitted file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from attngen.errors import FAULTS, FileError


@contextlib.contextmanager
def running(path: Path) -> Iterator[None]:
    """Around the code that runs a file.

    Raises:
        FileError: the file can't be run.
    """
    try:
        yield
    except FAULTS as error:
        raise FileError(
            f"{path} can't be imported.",
            got=f"{type(error).__name__}: {error}",
            needed="a module that runs",
        ) from error


def attention_of(module: ModuleType, path: Path) -> Callable[..., Any]:
    """The function that a file defines.

    Raises:
        FileError: it defines no `attention`.
    """
    function: Callable[..., Any] | None = getattr(module, "attention", None)
    if not callable(function):
        raise FileError(
            f"{path} defines no function attention.",
            got=repr(function),
            needed="def attention(q, k, v, …)",
        )
    return function
