"""Versions, apart from everything else, so that anything may import them."""

from __future__ import annotations

from collections.abc import Iterable

__version__ = "0.1.0"


def installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
