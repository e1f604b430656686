"""Triton: GPU kernels, with a launcher for torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attngen.backends.triton import candidates, context, model, small
from attngen.cost import Cost
from attngen.files import template_folder
from attngen.plans import Choice, Option, Plan
from attngen.regions import Tiles
from attngen.spec import AttentionSpec
from attngen.targets import Target


class TritonBackend:
    """See `backends.Backend`."""

    name = "triton"
    any_size = True
    requires = ("torch >= 2.6", "triton >= 3.5")
    compiler = "attngen.backends.triton.compiler"

    @property
    def templates(self) -> Path:
        return template_folder() / "triton"

    def refuse(self, spec: AttentionSpec) -> None:
        candidates.refuse(spec)

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
        return candidates.describe(choice)

    def template(self, plan: Plan) -> tuple[str, Mapping[str, Any]]:
        return "forward.py.jinja", context.context(plan)

    def is_here(self, target: Target) -> bool:
        """Whether the GPU here is the target.

        A target that is an architecture is any GPU of it.
        """
        from attngen.backends.triton.loader import gpu_here

        found = gpu_here()
        if found is None:
            return False
        architecture, model = found
        named = target.name == target.model  # not an architecture's representative
        return architecture == target.architecture and (
            not named or model in (None, target.model)
        )

    def load(self, path: Path) -> Callable[..., Any]:
        from attngen.backends.triton.loader import load

        return load(path)

    def trial(self, path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
        from attngen.backends.triton.trial import trial

        return trial(path, function)

    def trial_s(self, plan: Plan) -> float:
        from attngen.backends.triton.loader import has_gpu

        return plan.time_s if has_gpu() else small.interpreted_s(plan.spec)

    def small(
        self, plan: Plan, *, rebuild: bool
    ) -> tuple[AttentionSpec, dict[str, Any]] | None:
        return small.small(plan, rebuild=rebuild)

    def facts(self, plan: Plan) -> Mapping[str, Any]:
        return {}

    def array(self, values: Any, dtype: str) -> Any:
        from attngen.backends.triton.loader import array

        return array(values, dtype)

    def block(self, value: Any) -> Any:
        from attngen.backends.triton.loader import block

        return block(value)


BACKEND = TritonBackend()
