"""Compiled programs fill a process's memory map, which has an end: XLA then crashes."""

import sys
from pathlib import Path

MOST = 20_000  # of the 65,530 mappings that Linux lets a process have
MAPS = Path("/proc/self/maps")


def forget() -> None:
    """Let JAX drop its compiled programs when there are very many."""
    if "jax" not in sys.modules or not MAPS.exists():
        return
    with MAPS.open("rb") as lines:
        many = sum(1 for _ in lines) > MOST
    if many:
        import jax

        jax.clear_caches()
