"""Targets: where a function is to run, and the limits that the planner needs."""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass

from attngen.errors import NotBuiltError, TargetError


@dataclass(frozen=True)
class Target:
    """A device and its limits.

    model is what the device calls itself, "unknown" where it doesn't; memory_bytes is None
    where it can't be told; cores are those that this process may use.
    """

    name: str
    architecture: str
    description: str
    model: str
    memory_bytes: int | None
    cores: int
    backends: tuple[str, ...]
    certifier: str

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


BUILT = {"cpu": _cpu}
PLANNED = (
    *(f"tpu-{g}" for g in ("v2", "v3", "v4", "v5e", "v5p", "v6e", "v7x")),
    *("a100", "rtx3090", "rtx4090", "l4", "h100", "h200", "b200", "rtx5090"),
    *("mi300x", "mi355x"),
    *(f"cuda-sm{n}" for n in (80, 86, 89, 90, 100, 120)),
)


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
            needed=" or ".join(BUILT),
            hint="the emitted JAX file runs there; its bytes and its speed are unknown here",
        )
    raise TargetError(
        f"There is no target {name!r}.", got=name, needed="one of " + ", ".join(BUILT)
    )
