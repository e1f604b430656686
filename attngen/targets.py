"""Targets: where a function is to run, and the limits that the planner needs."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

from attngen import gpus
from attngen.errors import BackendError, NotBuiltError, TargetError
from attngen.gpus import Gpu


@dataclass(frozen=True)
class Target:
    """A device and its limits.

    model is what the device calls itself, "unknown" where it doesn't; memory_bytes is None
    where it can't be told; cores are those that this process may use, or a GPU's
    multiprocessors; gpu is None where the device is none.
    """

    name: str
    architecture: str
    description: str
    model: str
    memory_bytes: int | None
    cores: int
    backends: tuple[str, ...]
    certifier: str
    gpu: Gpu | None = None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def _cpu() -> Target:
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return Target(
        name="cpu",
        architecture="cpu",
        description="this machine's processor",
        model=_processor(),
        memory_bytes=page * pages if page > 0 and pages > 0 else None,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        backends=("jax",),
        certifier="XLA:CPU",
    )


@functools.cache
def _processor() -> str:
    """The processor's model, as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == "model name" and value.strip():
                    return value.strip()
    except OSError:
        pass
    import platform

    return platform.processor() or platform.machine() or "unknown"


def _gpu(name: str) -> Target:
    model = gpus.REPRESENTATIVES.get(name, name)
    gpu = gpus.GPUS[model]
    maker = "NVIDIA" if gpu.backend == "cuda" else "AMD"
    what = f"{maker} {model.upper()}, {gpu.architecture}"
    return Target(
        name=name,
        architecture=gpu.architecture,
        description=what
        if model == name
        else f"{gpu.architecture}, as {maker} {model.upper()}",
        model=model,
        memory_bytes=gpu.memory_bytes,
        cores=gpu.multiprocessors,
        backends=("triton",),
        certifier="Triton's compiler",
        gpu=gpu,
    )


BUILT: dict[str, Callable[[], Target]] = {"cpu": _cpu} | {
    name: functools.partial(_gpu, name) for name in (*gpus.GPUS, *gpus.REPRESENTATIVES)
}
PLANNED = tuple(f"tpu-{g}" for g in ("v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x"))
# of attngen's own backends; another says itself which targets it takes
OWN_BACKENDS = ("jax", "triton")


def names() -> tuple[str, ...]:
    """The targets that this version can plan for."""
    return tuple(BUILT)


def get(name: str | None = None) -> Target:
    """The target of that name; None: the machine that this runs on.

    Raises:
        NotBuiltError: the contract has it, this version doesn't.
        TargetError: there is no such target.
    """
    name = "cpu" if name is None else name
    if name in BUILT:
        return BUILT[name]()
    if name in PLANNED:
        raise NotBuiltError(
            f"Target {name!r} isn't built yet.",
            got=name,
            needed="one of " + ", ".join(BUILT),
            hint="the emitted JAX file runs there; its bytes and its speed are unknown here",
        )
    close = difflib.get_close_matches(str(name).lower(), BUILT, n=1)
    raise TargetError(
        f"There is no target {name!r}.",
        got=name,
        needed="one of " + ", ".join(BUILT),
        hint=f"did you mean {close[0]!r}?" if close else None,
    )


def check(target: Target, backend: str) -> None:
    """Refuse a target for which one of attngen's backends isn't built.

    Raises:
        NotBuiltError: JAX on a GPU: the contract has it, this version doesn't.
        BackendError: Triton where there is no GPU.
    """
    if backend not in OWN_BACKENDS or backend in target.backends:
        return
    if target.gpu is None:
        raise BackendError(
            f"The {backend} backend doesn't make kernels for {target.name}.",
            got=f"target {target.name}, backend {backend}",
            needed="a GPU as the target, say target='h100', or backend="
            + " or ".join(repr(b) for b in target.backends),
        )
    raise NotBuiltError(
        f"The {backend} backend isn't built yet for {target.name}.",
        got=f"target {target.name}, backend {backend}",
        needed="backend=" + " or ".join(repr(b) for b in target.backends),
        hint="the emitted JAX file runs there; its bytes and its speed are unknown here",
    )
