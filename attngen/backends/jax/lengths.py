"""Run-time lengths and offsets of a tile's batches, as text."""

from __future__ import annotations

from attngen.backends.jax import shards
from attngen.backends.jax.tile import Starts, Tile
from attngen.plans import Plan


class Lengths:
    """Run-time lengths and offsets of a tile's batches, as scalars for the bounds."""

    def __init__(self, plan: Plan, at: Tile, starts: Starts) -> None:
        self.many = "b" in at.letters
        self.start = starts.b
        self.begins = ", ".join(shards.begins(plan, "b", {"b": starts.b}))
        self.sizes = ", ".join(shards.sizes(plan, "b", at.sizes))

    def part(self, operand: str) -> str:
        """As JAX's own integers, which loops count in: 64 bits where those are on."""
        text = operand
        if not self.many:
            text = f"{operand}[{self.start}]"
        elif self.start != "0":
            comma = "" if "," in self.begins else ","
            at = f"({self.begins}{comma}), ({self.sizes}{comma})"
            text = f"lax.dynamic_slice({operand}, {at})"
        return f"{text}.astype(int)"

    def extreme(self, name: str, which: str) -> str:
        return f"{name}.{which}()" if self.many else name
