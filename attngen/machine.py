"""Which accelerators are here, by their drivers: no library is asked, which would warn."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

TPU_DRIVERS = ("/dev/accel0", "/dev/vfio/0")
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def may_have(drivers: tuple[str, ...]) -> bool:
    """Whether one of these drivers is here; where that can't be told, it may be."""
    return sys.platform != "linux" or any(Path(x).exists() for x in drivers)


def quiet_jax() -> None:
    """Where no accelerator is, keep jax from looking for one, and from warning of it.

    libtpu and the CUDA plug-in, which certify, would otherwise be asked for devices by
    whatever imports jax.
    """
    if not may_have(TPU_DRIVERS + GPU_DRIVERS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def cuda_plugin() -> str:
    """Which of jax's CUDA plug-ins is installed, as its packages spell it; none: "cuda12"."""
    newer = importlib.util.find_spec("jax_cuda13_plugin") is not None
    return "cuda13" if newer else "cuda12"


def start_jax() -> None:
    """Let jax load its plug-ins while nothing that they print is seen.

    The CUDA plug-in says on standard error that it finds no driver, whatever it is told.
    """
    needed = ("jax", f"jax_{cuda_plugin()}_plugin")
    there = all(importlib.util.find_spec(name) is not None for name in needed)
    if not there or may_have(GPU_DRIVERS) or "jax" in sys.modules:
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        import jax

        jax.devices()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
