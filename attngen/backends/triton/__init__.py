"""Triton: GPU kernels, with a launcher for torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen import joint, slopes, storage, targets
from attngen.backends.triton import candidates, context, model, small
from attngen.backends.triton.passes import Passes
from attngen.cost import Cost
from attngen.files import template_folder
from attngen.plans import Choice, Option, Plan
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles


class TritonBackend:
    """See `backends.Backend`."""

    name = "triton"
    any_size = True
    requires = ("torch >= 2.6", "triton >= 3.5")
    backward = Passes()
    compiler = "attngen.backends.triton.compiler"

    @property
    def templates(self) -> Path:
        return template_folder() / "triton"

    def refuse(self, spec: AttentionSpec) -> None:
        candidates.refuse(spec)

    def modelled(self, spec: AttentionSpec) -> AttentionSpec:
        return storage.typical(spec)

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        return candidates.space(spec, target, whole=whole)

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        return candidates.illegal(spec, target, choice)

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        return model.cost(spec, target, choice, tiles)

    def describe(self, choice: Choice) -> str:
        if joint.PREFIX not in choice:
            return candidates.describe(choice)
        own = candidates.describe(joint.forward_part(choice))
        return f"{own}; backward: {self.backward.describe(joint.backward_part(choice))}"

    def template(self, plan: Plan) -> tuple[str, Mapping[str, Any]]:
        return "forward.py.jinja", context.context(plan)

    def is_here(self, target: Target) -> bool:
        """Whether the GPU here is the target.

        A target that is an architecture is any GPU of it.
        """
        from attngen.backends.triton import loader

        found = loader.gpu_here()
        named = target.name == target.model  # not an architecture's representative
        return loader.runs_here(target) and (
            not named or found is None or found[1] in (None, target.model)
        )

    def load(self, path: Path, target: Target | None = None) -> Callable[..., Any]:
        from attngen.backends.triton.loader import load

        return load(path, target)

    def entry(
        self, spec: AttentionSpec, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        return function

    def trial(self, path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
        from attngen.backends.triton.trial import trial

        return trial(path, function)

    def program(
        self, spec: AttentionSpec, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        from attngen.backends.triton.trial import program

        made = slopes.gradients(spec), slopes.cotangents(spec)
        return program(function, *made) if spec.derivatives else function

    def ran(self, target: Target) -> str:
        from attngen.backends.triton.trial import ran

        return ran(target)

    def trial_s(self, plan: Plan) -> float:
        from attngen.backends.triton.loader import runs_here

        here = runs_here(targets.get(plan.target))
        return plan.time_s if here else small.interpreted_s(plan)

    def small(
        self, plan: Plan, *, rebuild: bool
    ) -> tuple[AttentionSpec, dict[str, Any]] | None:
        return small.small(plan, rebuild=rebuild)

    def facts(self, plan: Plan) -> Mapping[str, Any]:
        return {"temp_bytes": plan.temp_bytes}

    def array(self, values: Any, dtype: str, target: Target | None = None) -> Any:
        from attngen.backends.triton.loader import array

        return array(values, dtype, target)

    def block(self, value: Any) -> Any:
        from attngen.backends.triton.loader import block

        return block(value)


BACKEND = TritonBackend()
