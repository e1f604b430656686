"""Emitted file → the jitted function of it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attngen import files
from attngen.backends.emitted import attention_of, running
from attngen.errors import BackendError
from attngen.machine import GPU_DRIVERS, TPU_DRIVERS, may_have
from attngen.targets import Target


def load(path: Path) -> Callable[..., Any]:
    """Run an emitted file and jit its `attention`.

    Raises:
        FileError: it can't be run, or defines no `attention`.
        BackendError: jax isn't installed, or the file computes with 64-bit numbers, which
            JAX has turned off.
    """
    if importlib.util.find_spec("jax") is None:
        raise BackendError(
            "What attngen emits for JAX is run by JAX, which isn't installed.",
            got="no jax",
            needed="pip install 'attngen[jax]'",
            hint="without it, plan and emit work",
        )
    import jax

    function = jax.jit(load_function(path))
    if "jax_enable_x64" in files.read(path):
        check_x64("a file that computes with 64-bit numbers")
    return function  # type: ignore[no-any-return]


def load_function(path: Path) -> Callable[..., Any]:
    """The plain function of an emitted file, from its text as it is now: no .pyc."""
    text = files.read(path)
    name = "attngen_emitted_" + hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    shown = str(path).encode(errors="backslashreplace").decode()  # XLA takes no other
    with running(path):
        exec(compile(text, shown, "exec", dont_inherit=True), module.__dict__)
    return attention_of(module, path)


def is_here(target: Target) -> bool:
    """Whether JAX's own device is the target: a TPU of its generation, a GPU of its model.

    Where no driver is, jax isn't asked: it would look for devices, and warn.
    """
    if not may_have(TPU_DRIVERS if target.tpu else GPU_DRIVERS):
        return False
    import jax

    kind = str(jax.devices()[0].device_kind)
    if target.tpu is not None:
        return kind == target.model
    words = re.split(r"[\s-]+", kind.lower())
    return jax.default_backend() in ("gpu", "cuda") and target.model in words


def check_x64(what: str) -> None:
    """Raise BackendError where JAX has 64-bit numbers turned off."""
    import jax

    if not jax.config.jax_enable_x64:
        raise BackendError(
            "JAX has 64-bit numbers turned off.",
            got=what,
            needed="jax_enable_x64",
            hint='jax.config.update("jax_enable_x64", True), or JAX_ENABLE_X64=1 in the '
            "environment",
        )
