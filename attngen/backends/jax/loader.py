"""Emitted file → the jitted function of it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attngen.errors import FileError


def load(path: Path) -> Callable[..., Any]:
    """Import an emitted file and jit its `attention`.

    Raises:
        FileError: it can't be imported, or defines no `attention`.
    """
    import jax

    return jax.jit(load_function(path))  # type: ignore[no-any-return]


def load_function(path: Path) -> Callable[..., Any]:
    """The plain function of an emitted file."""
    name = "attngen_emitted_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileError(
            f"{path} can't be imported.",
            got=path.name,
            needed="a file that ends in .py",
        )
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (OSError, SyntaxError, NameError, ImportError, AttributeError) as error:
        raise FileError(
            f"{path} can't be imported.", got=str(error), needed="a module that runs"
        ) from error
    function = getattr(module, "attention", None)
    if not callable(function):
        raise FileError(
            f"{path} defines no function attention.",
            got=repr(function),
            needed="def attention(q, k, v, …)",
        )
    return function  # type: ignore[no-any-return]
