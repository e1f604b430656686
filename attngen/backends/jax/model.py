"""The model of XLA's temporaries and time, from which candidates are ranked."""

from __future__ import annotations

from attngen.cost import Cost
from attngen.plans import Choice
from attngen.regions import Tiles
from attngen.spec import AttentionSpec
from attngen.targets import Target


def cost(spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles) -> Cost:
    return Cost(1, 1.0)
