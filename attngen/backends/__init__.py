"""Backends: a package each (candidates, model, printer, loader, compiler), found by name.

A backend is a module-level object `BACKEND` of its package that has the members of
`Backend`. Those that attngen ships live here; another registers its package by name.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from attngen.cost import Cost
from attngen.errors import BackendError
from attngen.plans import Choice, Option, Plan
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Tiles


class Backward(Protocol):
    """The backward passes of a backend, as choices of their own.

    Under the names of a forward plan's choices: algorithm, q_chunk, k_chunk and others.
    """

    spills: bool  # whether compiled ones may turn out not to fit: then all are ranked

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        """As `Backend.space`."""

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        """As `Backend.illegal`."""

    def kept_bytes(self, spec: AttentionSpec, target: Target) -> int:
        """What the forward pass keeps for this one beside outputs, as it lies."""

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        """As `Backend.cost`; what the forward pass kept is among the bytes."""

    def flop(self, spec: AttentionSpec, choice: Choice, tiles: Tiles) -> int:
        """Of the products of all tiles that are visited."""

    def describe(self, choice: Choice) -> str:
        """A candidate in a few words."""


class Backend(Protocol):
    """What a backend gives. Only `load` and `compiler` may import its array library."""

    name: str
    requires: tuple[str, ...]  # what an emitted file imports, as pip takes it
    templates: Path  # the folder of its templates
    any_size: bool  # whether an emitted file takes any batch and lengths
    backward: Backward | None  # None: derivatives "vjp" aren't built
    compiler: str  # the module that certifies in a child process; "" where none does

    def refuse(self, spec: AttentionSpec) -> None:
        """Raise NotBuiltError for what this backend doesn't do."""

    def modelled(self, spec: AttentionSpec) -> AttentionSpec:
        """The dense spec whose tiles are counted for a packed or paged one."""

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Mapping[str, Mapping[str, Sequence[Option]]]:
        """For each algorithm, the values of each choice that are worth considering.

        Args:
            whole: all that can be emitted: for a search from neighbour to neighbour.
        """

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Choice
    ) -> str | None:
        """The reason why a candidate can't be emitted, or None."""

    def cost(
        self, spec: AttentionSpec, target: Target, choice: Choice, tiles: Tiles
    ) -> Cost:
        """Modelled bytes and time of a legal candidate."""

    def describe(self, choice: Choice) -> str:
        """A candidate in a few words, for tables."""

    def template(self, plan: Plan) -> tuple[str, Mapping[str, Any]]:
        """The template's file name and what it receives."""

    def is_here(self, target: Target) -> bool:
        """Whether the device here is the target: what is timed here are its times."""

    def load(self, path: Path, target: Target | None = None) -> Callable[..., Any]:
        """The function of an emitted file, ready to be called with arrays.

        Args:
            target: what it was emitted for; where that can't run here, the function says
                so when it is called. None: the device here.
        """

    def entry(
        self, spec: AttentionSpec, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """The function of a kernel as its user calls it: what is differentiated otherwise
        than the spec says is an error."""

    def trial(self, path: Path, function: Callable[..., Any]) -> Callable[..., Any]:
        """What validation calls: the function as it was loaded, or the file interpreted
        where it can't be called here."""

    def program(
        self, spec: AttentionSpec, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """What `trial` made as validation calls it: with derivatives it takes cotangents
        too, by the names of `slopes.cotangents`, and returns the gradients of
        `slopes.gradients` behind the outputs. Without them, the function itself."""

    def ran(self, target: Target) -> str:
        """Where that runs, for the report; "" where it goes without saying."""

    def trial_s(self, plan: Plan) -> float:
        """About how long that takes at the plan's own size, in seconds."""

    def facts(self, plan: Plan) -> Mapping[str, Any]:
        """What its compiler is told beside the source, in plain values."""

    def small(
        self, plan: Plan, *, rebuild: bool
    ) -> tuple[AttentionSpec, dict[str, Any]] | None:
        """A smaller spec to judge the plan's file by; asked if `any_size`.

        Args:
            rebuild: whether it may have another mask, for which a file is emitted anew.
        """

    def array(self, values: Any, dtype: str, target: Target | None = None) -> Any:
        """A NumPy array as what `trial` takes of it, in one of the language's dtypes.

        Args:
            target: of the kernel; None: the device here.
        """

    def block(self, value: Any) -> Any:
        """What a function returned, when all of it has been computed."""


_PACKAGES = {"jax": "attngen.backends.jax", "triton": "attngen.backends.triton"}


def register(name: str, package: str) -> None:
    """Make a backend known: `package` is imported when it is first asked for."""
    _PACKAGES[name] = package


def names() -> tuple[str, ...]:
    return tuple(_PACKAGES)


def modelled(spec: AttentionSpec, backend: Backend) -> AttentionSpec:
    """The dense spec whose tiles are counted: of one that is stored otherwise its backend's."""
    return spec if spec.storage == "dense" else backend.modelled(spec)


def seen(plan: Plan) -> Plan:
    """A plan as its tiles are counted: of the dense spec that stands for a stored one."""
    spec = modelled(plan.spec, get(plan.backend))
    return plan if spec is plan.spec else dataclasses.replace(plan, spec=spec)


def get(name: str | None = None) -> Backend:
    """The backend of that name; None: jax.

    Raises:
        BackendError: there is none.
    """
    name = "jax" if name is None else name
    if name not in _PACKAGES:
        raise BackendError(
            f"There is no backend {name!r}.",
            got=name,
            needed="one of " + ", ".join(_PACKAGES),
        )
    backend: Backend = importlib.import_module(_PACKAGES[name]).BACKEND
    return backend
