"""Emitted file → its function: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from attngen.backends.emitted import attention_of, running
from attngen.errors import BackendError
from attngen.gpus import GPUS
from attngen.interrupts import undisturbed
from attngen.machine import GPU_DRIVERS, may_have
from attngen.targets import Target

DRIVERS = GPU_DRIVERS  # of GPUs, on Linux


def import_file(path: Path) -> ModuleType:
    """The module of an emitted file. Triton reads a kernel's source from the file itself.

    Raises:
        BackendError: torch or Triton isn't installed.
        FileError: the file can't be run, or defines no `attention`.
    """
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            raise BackendError(
                f"{name} isn't installed.",
                got="a kernel in Triton",
                needed="torch and triton",
                hint="pip install 'attngen[triton]'",
            )
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    name = f"attngen_emitted_{digest[:16]}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    with running(path):
        specification.loader.exec_module(module)
    attention_of(module, path)
    return module


def has_gpu() -> bool:
    """Whether torch sees a GPU here."""
    if importlib.util.find_spec("torch") is None:
        return False
    if not may_have(DRIVERS):
        return False  # and torch's import takes seconds
    with undisturbed():  # an import that is cut short isn't repaired
        import torch

    return bool(torch.cuda.is_available())


def gpu_here() -> tuple[str, str | None] | None:
    """The GPU that torch sees: its architecture and its model, as gpus.py names them.

    The model is None where gpus.py doesn't know it; there is no GPU: None.
    """
    if not has_gpu():
        return None
    import torch

    if torch.version.hip:
        properties = torch.cuda.get_device_properties(0)
        architecture = str(properties.gcnArchName).split(":")[0]
    else:
        architecture = "sm{}{}".format(*torch.cuda.get_device_capability())
    words = re.split(r"[\s-]+", torch.cuda.get_device_name().lower())
    names = {*words, *(a + b for a, b in itertools.pairwise(words))}  # "rtx 4090"
    return architecture, next((known for known in GPUS if known in names), None)


def target_here() -> str | None:
    """The target that the GPU here is, or one of its architecture; None: there is none."""
    found = gpu_here()
    if found is None:
        return None
    architecture, model = found
    of_it = (n for n, gpu in GPUS.items() if gpu.architecture == architecture)
    return model or next(of_it, None)


def runs_here(target: Target | None) -> bool:
    """Whether a kernel for the target runs on the GPU here: it has its architecture.

    None: whatever GPU is here.
    """
    found = gpu_here()
    return found is not None and (target is None or found[0] == target.architecture)


@dataclass(frozen=True)
class Absent:
    """The function of a kernel that can't run here: it says so when it is called."""

    path: Path
    target: Target | None = None

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        found = gpu_here()
        wanted = "" if self.target is None else f" of {self.target.architecture}"
        raise BackendError(
            "This kernel can't be called here.",
            got="no GPU that torch sees" if found is None else f"a GPU of {found[0]}",
            needed=f"a GPU{wanted}, and a build of torch for it",
            hint="kernel.source.write(path) keeps the file; attngen.validate(kernel) runs "
            "it in Triton's interpreter",
        )


def load(path: Path, target: Target | None = None) -> Callable[..., Any]:
    """The function of an emitted file; where the target can't run, one that says so."""
    if not runs_here(target):
        return Absent(path, target)
    return attention_of(import_file(path), path)


def array(values: Any, dtype: str, target: Target | None = None) -> Any:
    """A NumPy array as a tensor on the GPU; as it is where the target can't run."""
    if not runs_here(target):
        return values
    return tensor(values, dtype).cuda()


def tensor(values: Any, dtype: str) -> Any:
    """A NumPy array as a tensor; what NumPy has no name for goes through its bits."""
    import numpy as np
    import torch

    if dtype == "bfloat16" or dtype.startswith("float8"):
        of = np.int16 if dtype == "bfloat16" else np.int8
        bits = torch.from_numpy(np.ascontiguousarray(values).view(of).copy())
        return bits.view(torch.bfloat16 if of is np.int16 else torch.float8_e4m3fn)
    return torch.from_numpy(np.array(values))


def numbers(x: Any) -> Any:
    """A tensor as a NumPy array."""
    import ml_dtypes
    import torch

    x = x.detach().cpu()
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


def differentiated(
    function: Callable[..., Any],
    gradients: Mapping[str, str],
    cotangents: Mapping[str, str],
    **given: Any,
) -> tuple[Any, ...]:
    """An emitted function's outputs, then its gradients by torch.

    Args:
        gradients: the names of arguments by those of their gradients, in order; none: the
            outputs alone.
        cotangents: the names of outputs by those of the arguments that hold their gradients.
        given: tensors by name, the function's own and cotangents.
    """
    import torch

    pulled = [given.pop(name) for name in cotangents]
    for name in gradients.values():
        given[name] = given[name].detach().requires_grad_()
    returned = function(**given)
    outputs = returned if isinstance(returned, tuple) else (returned,)
    if not gradients:
        return outputs
    of = [given[name] for name in gradients.values()]
    made = torch.autograd.grad(outputs, of, pulled)
    return (*(x.detach() for x in outputs), *made)


def block(value: Any) -> Any:
    """What was returned, when the GPU has computed all of it."""
    if has_gpu():
        import torch

        torch.cuda.synchronize()
    return value
