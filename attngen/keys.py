"""Key and Only: what a time holds for, and which records are meant.

Values only: nothing here runs, reads or writes anything.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Any

import msgspec


def canonical(value: Any) -> str:
    """Plain values as JSON that is the same for equal values."""
    return msgspec.json.encode(value, order="sorted").decode()


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a time holds for: nothing of it may differ.

    Args:
        spec: all its fields as plain values, but its memory_budget.
        device: the model, as the device calls itself.
        cores: that the process may use.
        versions: of attngen and of what computes.
    """

    spec: dict[str, Any]
    target: str
    device: str
    cores: int
    backend: str
    versions: dict[str, str]

    @functools.cached_property
    def text(self) -> str:
        """Equal for equal keys."""
        return canonical(asdict(self))

    def fields(self) -> dict[str, Any]:
        """Each thing that can differ, by a name for people."""
        rest = {"target": self.target, "device": self.device, "cores": self.cores}
        versions = {f"version of {n}": v for n, v in self.versions.items()}
        return self.spec | rest | {"backend": self.backend} | versions

    def differences(self, other: Key) -> list[str]:
        """What this key has, and the other hasn't, in words."""
        own, others = self.fields(), other.fields()
        names = [n for n in {**own, **others} if own.get(n) != others.get(n)]
        return [f"{n}: {_short(own.get(n))} ≠ {_short(others.get(n))}" for n in names]


@dataclass(frozen=True, kw_only=True)
class Only:
    """Which records are meant: None, of any.

    Args:
        spec: as a key has it.
        device: the model, or a part of it in letters of any case.
    """

    spec: dict[str, Any] | None = None
    target: str | None = None
    backend: str | None = None
    device: str | None = None

    def takes(self, key: Key) -> bool:
        """Whether a record of that key is meant."""
        same = all(
            asked in (None, own)
            for asked, own in [
                (self.spec, key.spec),
                (self.target, key.target),
                (self.backend, key.backend),
            ]
        )
        return same and (self.device or "").lower() in key.device.lower()

    def __str__(self) -> str:
        named = {"target": self.target, "backend": self.backend, "device": self.device}
        words = [f"{n} {v!r}" for n, v in named.items() if v is not None]
        return ", ".join(["this spec"] * (self.spec is not None) + words)


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else canonical(value)
    return text if len(text) <= 60 else text[:57] + "…"
