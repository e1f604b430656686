"""JAX: plain `jax.numpy` and `jax.lax` loops, for whatever XLA compiles to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen import joint, slopes, storage, targets
from attngen.backends.jax import candidates, context, model, packed, shards, spaces
from attngen.backends.jax.passes import Passes
from attngen.backends.jax.turns import turns
from attngen.cost import Cost
from attngen.dtypes import ARRAYS
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
    backward = Passes()
    compiler = "attngen.backends.jax.compiler"

    @property
    def templates(self) -> Path:
        return template_folder() / "jax"

    def refuse(self, spec: AttentionSpec) -> None:
        candidates.refuse(spec)

    def modelled(self, spec: AttentionSpec) -> AttentionSpec:
        return storage.typical(packed.lowered(spec))

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        return spaces.space(packed.lowered(spec), target, whole=whole)

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        return candidates.illegal(packed.lowered(spec), choice)

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        spec = packed.lowered(spec)
        mine = shards.local_choice(spec, choice)
        return model.cost(shards.local(spec), target, mine, tiles)

    def describe(self, choice: Choice) -> str:
        if joint.PREFIX not in choice:
            return candidates.describe(choice)
        own = candidates.describe(joint.forward_part(choice))
        backward = self.backward.describe(joint.backward_part(choice))
        return f"{own}; backward: {backward}"

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

    def entry(
        self, spec: AttentionSpec, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        from attngen.backends.jax.entry import entry

        return entry(spec, function)

    def trial(self, path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def program(
        self, spec: AttentionSpec, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        from attngen.backends.jax.program import program

        if spec.derivatives is None:
            return function
        import jax

        made = program(function, slopes.gradients(spec), slopes.cotangents(spec))
        return jax.jit(made)  # type: ignore[no-any-return]

    def ran(self, target: Target) -> str:
        return "" if self.is_here(target) else "on this machine's processor"

    def trial_s(self, plan: Plan) -> float:
        """On this machine's processor, where the target isn't here."""
        spec = packed.lowered(joint.forward_spec(plan.spec))
        seconds = model.time_s(spec, plan.choice, plan.tiles)
        if joint.PREFIX in plan.choice:
            own, here = joint.backward_part(plan.choice), targets.get("cpu")
            seconds += self.backward.cost(plan.spec, here, own, plan.tiles).time_s
        return seconds

    def facts(self, plan: Plan) -> Mapping[str, Any]:
        spec = plan.spec
        program = {}
        if spec.derivatives is not None:
            program["gradients"] = slopes.gradients(spec)
            program["cotangents"] = slopes.cotangents(spec)
        return {"turns": turns(packed.lowered_plan(plan))} | program | shards.mesh(spec)

    def array(self, values: Any, dtype: str, target: Target | None = None) -> Any:
        import jax.numpy as jnp

        from attngen.backends.jax.loader import check_x64

        if dtype in ("float64", "int64"):
            check_x64(dtype)
        return jnp.asarray(values, ARRAYS.get(dtype, dtype))

    def block(self, value: Any) -> Any:
        import jax

        return jax.block_until_ready(value)


BACKEND = JaxBackend()
