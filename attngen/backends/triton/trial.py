"""The function that validation calls: on the GPU, or in Triton's interpreter.

A process either interprets or compiles, and a kernel that crashes must not take the caller
along, so interpreted calls have a process of their own.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attngen import certifier
from attngen.backends.triton import loader
from attngen.errors import CompileError, ValidationError
from attngen.targets import Target

TIMEOUT_S = 900.0


def trial(path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    """An emitted file's function, from arrays (see `Backend.array`) to NumPy arrays."""
    if isinstance(function, loader.Absent):
        return Interpreted(path)
    return Called(function)


def program(
    function: Callable[..., Any],
    gradients: Mapping[str, str],
    cotangents: Mapping[str, str],
) -> Callable[..., Any]:
    """What `trial` made as a function that returns gradients behind its outputs, too.

    Args:
        function: of `trial`; or an emitted file's own, which then takes tensors as they are.
        gradients, cotangents: as `slopes` names them.
    """
    if isinstance(function, Interpreted | Called):
        return replace(function, gradients=gradients, cotangents=cotangents)
    return functools.partial(loader.differentiated, function, gradients, cotangents)


@dataclass(frozen=True)
class Called:
    """An emitted function on the GPU here, from tensors to NumPy arrays."""

    function: Callable[..., Any]
    gradients: Mapping[str, str] = field(default_factory=dict)
    cotangents: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, **given: Any) -> tuple[Any, ...]:
        outputs = loader.differentiated(
            self.function, self.gradients, self.cotangents, **given
        )
        return tuple(loader.numbers(x) for x in outputs)


def ran(target: Target) -> str:
    """Where the trial of a kernel for the target runs."""
    if not loader.runs_here(target):
        return "in Triton's interpreter"
    import torch

    return f"on {torch.cuda.get_device_name()}"


@dataclass(frozen=True)
class Interpreted:
    """An emitted function in Triton's interpreter, on NumPy arrays.

    Raises:
        ValidationError: it raised, or didn't end in time.
    """

    path: Path
    gradients: Mapping[str, str] = field(default_factory=dict)
    cotangents: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, **given: Any) -> tuple[Any, ...]:
        from attngen.backends.triton import interpreter

        with tempfile.TemporaryDirectory(prefix="attngen-") as name:
            folder = Path(name)
            job = {
                "source": str(self.path.resolve()),
                "folder": name,
                "dtypes": interpreter.save(folder, given),
                "gradients": dict(self.gradients),
                "cotangents": dict(self.cotangents),
            }
            try:
                dtypes = certifier.run(
                    "attngen.backends.triton.interpreter",
                    "call",
                    job,
                    timeout_s=TIMEOUT_S,
                    environment={"TRITON_INTERPRET": "1"},
                )
            except CompileError as error:
                raise ValidationError(
                    "The kernel failed in Triton's interpreter.",
                    got=error.got,
                    needed="its outputs",
                ) from error
            return interpreter.outputs(folder, dtypes)
