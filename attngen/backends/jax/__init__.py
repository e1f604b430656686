"""JAX: plain `jax.numpy` and `jax.lax` loops, for whatever XLA compiles to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen import slopes
from attngen.backends.jax import candidates, context, model, shards, spaces
from attngen.backends.jax.turns import turns
from attngen.cost import Cost
from attngen.files import template_folder
from attngen.plans import Choice, Option, Plan
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles


class JaxBackend:
    """See `backends.Backend`."""

    name = "jax"
    any_size = False
    requires = ("jax >= 0.10",)
    compiler = "attngen.backends.jax.compiler"

    @property
    def templates(self) -> Path:
        return template_folder() / "jax"

    def refuse(self, spec: AttentionSpec) -> None:
        candidates.refuse(spec)

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        return spaces.space(spec, target, whole=whole)

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        return candidates.illegal(spec, choice)

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        mine = shards.local_choice(spec, choice)
        return model.cost(shards.local(spec), target, mine, tiles)

    def describe(self, choice: Choice) -> str:
        return candidates.describe(choice)

    def template(self, plan: Plan) -> tuple[str, Mapping[str, Any]]:
        return f"{plan.algorithm}.py.jinja", context.context(plan)

    def is_here(self, target: Target) -> bool:
        if target.kind == "cpu":
            return True
        from attngen.backends.jax.loader import is_here

        return is_here(target)

    def load(self, path: Path, target: Target | None = None) -> Callable[..., Any]:
        from attngen.backends.jax.loader import load

        return load(path)

    def trial(self, path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def ran(self, target: Target) -> str:
        return "" if self.is_here(target) else "on this machine's processor"

    def trial_s(self, plan: Plan) -> float:
        """On this machine's processor, where the target isn't here."""
        return model.time_s(plan.spec, plan.choice, plan.tiles)

    def facts(self, plan: Plan) -> Mapping[str, Any]:
        differentiated = {
            "gradients": slopes.gradients(plan.spec),
            "cotangents": slopes.cotangents(plan.spec),
        }
        return {"turns": turns(plan)} | differentiated | shards.mesh(plan.spec)

    def array(self, values: Any, dtype: str, target: Target | None = None) -> Any:
        import jax.numpy as jnp

        from attngen.backends.jax.loader import check_x64

        if dtype in ("float64", "int64"):
            check_x64(dtype)
        return jnp.asarray(values, dtype)

    def block(self, value: Any) -> Any:
        import jax

        return jax.block_until_ready(value)


BACKEND = JaxBackend()
