"""Targets: where a function is to run, and the limits that the planner needs."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

from attngen import gpus
from attngen.errors import BackendError, TargetError
from attngen.gpus import Gpu
from attngen.tpus import TPUS, Tpu


@dataclass(frozen=True)
class Target:
    """A device and its limits.

    model is what the device calls itself, "unknown" where it doesn't; memory_bytes is None
    where it can't be told; cores are those that this process may use, a GPU's
    multiprocessors, or those of a chip that JAX calls one device. gpu and tpu are None where
    the device is none. backends are those that make kernels for it, its own first.
    """

    name: str
    architecture: str
    description: str
    model: str
    memory_bytes: int | None
    cores: int
    backends: tuple[str, ...]
    gpu: Gpu | None = None
    tpu: Tpu | None = None

    @property
    def kind(self) -> str:
        """cpu, tpu, cuda or hip: what its compilers are for."""
        if self.gpu is not None:
            return self.gpu.backend
        return "cpu" if self.tpu is None else "tpu"

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
        backends=("triton", "jax") if gpu.backend == "cuda" else ("triton",),
        gpu=gpu,
    )


def _tpu(name: str) -> Target:
    tpu = TPUS[name]
    cores = "a chip" if tpu.cores == 2 or tpu.generation in ("v5e", "v6e") else "a core"
    return Target(
        name=name,
        architecture=name,
        description=f"Google TPU {tpu.generation}, {cores}",
        model=tpu.kind,
        memory_bytes=tpu.memory_bytes,
        cores=tpu.cores,
        backends=("jax",),
        tpu=tpu,
    )


BUILT: dict[str, Callable[[], Target]] = (
    {"cpu": _cpu}
    | {name: functools.partial(_tpu, name) for name in TPUS}
    | {n: functools.partial(_gpu, n) for n in (*gpus.GPUS, *gpus.REPRESENTATIVES)}
)
# of attngen's own backends; another says itself which targets it takes
OWN_BACKENDS = ("jax", "triton")


def names() -> tuple[str, ...]:
    """The targets that this version can plan for."""
    return tuple(BUILT)


def get(name: str | None = None) -> Target:
    """The target of that name; None: the machine that this runs on.

    Raises:
        TargetError: there is no such target.
    """
    name = "cpu" if name is None else name
    if name in BUILT:
        return BUILT[name]()
    if (older := _older(str(name).lower())) is not None:
        raise older
    close = difflib.get_close_matches(str(name).lower(), BUILT, n=1)
    raise TargetError(
        f"There is no target {name!r}.",
        got=name,
        needed="one of " + ", ".join(BUILT),
        hint=f"did you mean {close[0]!r}?" if close else None,
    )


def _older(name: str) -> TargetError | None:
    """The error for an NVIDIA GPU that no backend is for, by the name typed; else None."""
    named = re.fullmatch(r"(?:cuda-)?sm_?(\d+)", name)
    capability = int(named[1]) if named else gpus.OLDER.get(name, gpus.FIRST)
    if capability >= gpus.FIRST:
        return None
    return TargetError(
        f"There is no target {name!r}: it is older than what Triton is for.",
        got=f"{name}, compute capability {capability // 10}.{capability % 10}",
        needed=f"sm{gpus.FIRST} or later, say target='a100': for older ones Triton 3.9 "
        "doesn't use tensor cores",
        hint="a file that backend='jax' emits for another target runs there; its bytes and "
        "its speed are unknown here",
    )


def check(target: Target, backend: str) -> None:
    """Refuse a target for which one of attngen's backends makes no kernels.

    Raises:
        BackendError: Triton where there is no GPU; JAX on AMD's.
    """
    if backend not in OWN_BACKENDS or backend in target.backends:
        return
    raise BackendError(
        f"The {backend} backend doesn't make kernels for {target.name}.",
        got=f"target {target.name}, backend {backend}",
        needed=("" if target.gpu else "a GPU as the target, say target='h100', or ")
        + "backend="
        + " or ".join(repr(b) for b in target.backends),
        hint="the emitted JAX file runs there; its bytes and its speed are unknown here"
        if target.gpu
        else None,
    )
