"""A third backend, kept small: NumPy. One package, one template folder, nothing else.

Tests register it with `backends.register("numpy", "toy_backend")`.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attngen.cost import Cost, executed_flop
from attngen.errors import NotBuiltError
from attngen.plans import Choice, Option, Plan
from attngen.reference import numpy_dtype
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles

from . import context

NOT_BUILT = {"derivatives": None, "dropout": 0.0, "storage": "dense", "kv_dtype": None}
FLOP_PER_S = 2e9
TILE_S = 5e-5  # of Python, for each tile


class NumpyBackend:
    """See `attngen.backends.Backend`."""

    name = "numpy"
    any_size = False
    requires = ("numpy",)
    templates = Path(__file__).parent / "templates"
    compiler = "toy_backend.compiler"
    backward = None

    def refuse(self, spec: AttentionSpec) -> None:
        for field, built in NOT_BUILT.items():
            if (value := getattr(spec, field)) != built:
                raise NotBuiltError(
                    f"The toy doesn't do {field}.", got=repr(value), needed=repr(built)
                )
        for operand in spec.operands:
            if operand.name in context.NAMES:
                raise NotBuiltError(
                    "The toy uses that name.", got=operand.name, needed="another name"
                )

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        sizes = (16, 64, 256)
        return {
            "running": {
                "q_chunk": [n for n in sizes if n < spec.q_len] or [spec.q_len],
                "k_chunk": [n for n in sizes if n < spec.kv_len] or [spec.kv_len],
            }
        }

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        for name, length in (("q_chunk", spec.q_len), ("k_chunk", spec.kv_len)):
            if type(choice[name]) is not int or not 1 <= choice[name] <= length:
                return f"{name} must be an integer from 1 to {length}"
        return None

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        q, k = int(choice["q_chunk"]), int(choice["k_chunk"])
        heads = spec.batch * spec.q_heads
        tile = 6 * q * k + (q + k) * (3 * spec.qk_dim + 3 * spec.v_dim + 16)
        seconds = executed_flop(spec, tiles, q, k) / FLOP_PER_S
        return Cost(8 * tile + 2**14, seconds + heads * tiles.visited * TILE_S)

    def facts(self, plan: Plan) -> Mapping[str, Any]:
        return {}

    def describe(self, choice: Choice) -> str:
        return f"running · {choice['q_chunk']} queries × {choice['k_chunk']} keys"

    def template(self, plan: Plan) -> tuple[str, Mapping[str, Any]]:
        return "running.py.jinja", context.context(plan)

    def load(self, path: Path, target=None) -> Callable[..., Any]:
        return runpy.run_path(str(path))["attention"]

    def is_here(self, target):
        return True

    def entry(self, spec, function):
        return function

    def trial(self, path, function):
        return function

    def program(self, spec, function):
        return function

    def ran(self, target):
        return ""

    def trial_s(self, plan):
        return plan.time_s

    def array(self, values: Any, dtype: str, target=None) -> Any:
        return np.asarray(values, numpy_dtype(dtype))

    def block(self, value: Any) -> Any:
        return value


BACKEND = NumpyBackend()
