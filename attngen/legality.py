"""Candidates → legal, each refusal with its reason; and what to fix where none is legal."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from attngen.errors import PlanError
from attngen.plans import Alternative, Option
from attngen.spec import AttentionSpec
from attngen.targets import Target

Space = Mapping[str, Mapping[str, Sequence[Option]]]  # algorithm → choice → values
Fix = Mapping[str, Option]
VALUES = 4  # of a choice, that a hint names


class Chooser(Protocol):
    """What candidates are of: a backend, or its backward passes."""

    def space(
        self, spec: AttentionSpec, target: Target, *, whole: bool = False
    ) -> Space:
        """For each algorithm, the values of each choice that are worth considering."""

    def illegal(
        self, spec: AttentionSpec, target: Target, choice: Mapping[str, Option]
    ) -> str | None:
        """The reason why a candidate can't be emitted, or None."""


def split(
    spec: AttentionSpec, target: Target, backend: Chooser, fix: Mapping[str, Option]
) -> tuple[list[dict[str, Option]], list[Alternative]]:
    """The legal candidates that have the fixed choices; of the others one a reason.

    Raises:
        PlanError: a fixed choice is unknown or leaves nothing legal.
    """
    space = considered(spec, target, backend, fix)
    known = ["algorithm", *dict.fromkeys(n for axes in space.values() for n in axes)]
    for name in fix:
        if name not in known:
            raise PlanError(
                f"There is no choice {name!r} to fix.",
                got=name,
                needed="one of " + ", ".join(known),
            )
    if "algorithm" in fix and fix["algorithm"] not in space:
        raise PlanError(
            f"There is no algorithm {fix['algorithm']!r}.",
            got=f"algorithm={fix['algorithm']!r}",
            needed="one of " + ", ".join(space),
        )
    space = {n: axes for n, axes in space.items() if has(n, axes, fix)}
    if not space:
        raise PlanError(
            "No algorithm has all of the fixed choices.",
            got=", ".join(f"{n}={v!r}" for n, v in fix.items()),
            needed="; ".join(
                f"{name}: {', '.join(axes)}"
                for name, axes in backend.space(spec, target).items()
                if fix.get("algorithm", name) == name
            ),
        )
    legal: list[dict[str, Option]] = []
    refused: dict[tuple[str, str], Alternative] = {}
    for choice in _candidates(space, fix):
        reason = backend.illegal(spec, target, choice)
        if reason is None:
            legal.append(choice)
        else:
            of = str(choice["algorithm"]), reason
            refused.setdefault(of, Alternative(choice, None, None, reason))
    if not legal:
        raise _Search(spec, target, backend, fix).error()
    return legal, list(refused.values())


def considered(
    spec: AttentionSpec, target: Target, chooser: Chooser, names: Iterable[str]
) -> Space:
    """The choices that are worth considering, and of the others those that are named.

    A choice may be left out where its first value is the only one worth it.
    """
    space = chooser.space(spec, target)
    if set(names) <= {"algorithm", *(n for axes in space.values() for n in axes)}:
        return space
    whole = chooser.space(spec, target, whole=True)
    return {
        algorithm: dict(axes)
        | {
            n: v
            for n, v in whole.get(algorithm, {}).items()
            if n in names and n not in axes
        }
        for algorithm, axes in space.items()
    }


def has(algorithm: str, axes: Mapping[str, Sequence[Option]], fix: Fix) -> bool:
    """Whether an algorithm is the one that is fixed, and has the choices that are."""
    return fix.get("algorithm", algorithm) == algorithm and set(fix) <= {
        "algorithm",
        *axes,
    }


def _candidates(space: Space, fix: Fix) -> Iterator[dict[str, Option]]:
    """Each candidate with the fixed choices."""
    for algorithm, axes in space.items():
        if has(algorithm, axes, fix):
            values = [[fix[n]] if n in fix else list(v) for n, v in axes.items()]
            for combination in itertools.product(*values):
                made: dict[str, Option] = {"algorithm": algorithm}
                yield made | dict(zip(axes, combination, strict=True))


class _Search:
    """For what stands in the way, where no candidate with the fixed choices is legal."""

    def __init__(
        self, spec: AttentionSpec, target: Target, backend: Chooser, fix: Fix
    ) -> None:
        self.spec, self.target, self.backend, self.fix = spec, target, backend, fix
        self.space = considered(spec, target, backend, fix)

    def error(self) -> PlanError:
        spec, target, fix = self.spec, self.target, self.fix
        if not fix:
            dims = f"head dims {spec.qk_dim} and {spec.v_dim}, {spec.dtype}"
            first = next(iter(self._all_reasons()))  # of the smallest tiles
            return PlanError(
                f"No plan is legal on {target.name}.",
                got=f"{dims}: {first}",
                needed=f"tiles that {target.name} has room for",
                hint="smaller head dims, a smaller dtype, or a larger target",
            )
        reason, hints = self._reason()
        if self._is_free(subject := _subject(reason)):
            more = self._widened(subject)
            hints = [*more, *hints]
            reason = reason if more else self._reason()[0]
        return PlanError(
            "No legal plan has the fixed choices.",
            got=", ".join(f"{n}={v!r}" for n, v in fix.items()),
            needed=reason,
            hint="legal with " + ", or with ".join(hints) if hints else None,
        )

    def _all_reasons(self) -> Counter[str]:
        made = _candidates(self.space, self.fix)
        return Counter(r for c in made if (r := self._illegal(c)) is not None)

    def _reason(self) -> tuple[str, list[str]]:
        reasons, hints = self._with_one_free()
        return self._main(reasons or self._all_reasons()), hints

    def _main(self, reasons: Counter[str]) -> str:
        """The reason of most candidates; one that begins with a free choice comes last.

        Also the next, of half as many at least.
        """

        def place(reason: str) -> tuple[bool, int]:
            return self._is_free(_subject(reason)), -reasons[reason]

        first, *others = sorted(reasons, key=place) or ["other choices"]
        more = [
            r
            for r in others[:1]
            if not place(r)[0] and 2 * reasons[r] >= reasons[first]
        ]
        return "; ".join([first, *more])

    def _is_free(self, name: str) -> bool:
        known = any(name in axes for axes in self.space.values())
        return known and name not in self.fix

    def _widened(self, name: str) -> list[str]:
        """Consider all values of a free choice; those that are legal with what is fixed."""
        whole = self.backend.space(self.spec, self.target, whole=True)
        self.space = {
            algorithm: dict(axes) | {n: whole[algorithm][n] for n in axes if n == name}
            for algorithm, axes in self.space.items()
        }
        made = _candidates(self.space, self.fix)
        legal = dict.fromkeys(c[name] for c in made if self._illegal(c) is None)
        return [f"{name} = {_listed(legal)}"] if legal else []

    def _illegal(self, choice: dict[str, Option]) -> str | None:
        return self.backend.illegal(self.spec, self.target, choice)

    def _with_one_free(self) -> tuple[Counter[str], list[str]]:
        """Why what is legal with one choice less isn't with it; what it could be instead.

        Choices that are free have better values there: their reasons aren't of the matter.
        """
        reasons: Counter[str] = Counter()
        hints = []
        for name in self.fix:
            others = {n: v for n, v in self.fix.items() if n != name}
            values: dict[Option, None] = {}
            for choice in _candidates(self.space, others):
                if set(self.fix) <= set(choice) and self._illegal(choice) is None:
                    values[choice[name]] = None
                    for back in self._with(choice):
                        reasons[self._illegal(back) or ""] += 1
            if values:
                hints.append(f"{name} = {_listed(values)}")
        del reasons[""]
        return reasons, hints

    def _with(self, choice: Mapping[str, Option]) -> Iterator[dict[str, Option]]:
        """A candidate with all that is fixed; where that is the algorithm, of its choices."""
        algorithm = str(self.fix.get("algorithm", choice["algorithm"]))
        axes = self.space[algorithm]
        if has(algorithm, axes, self.fix):
            kept = {n: _near(choice.get(n), values) for n, values in axes.items()}
            yield {"algorithm": algorithm} | kept | dict(self.fix)


def _near(value: Option | None, values: Sequence[Option]) -> Option:
    return values[0] if value is None or value not in values else value


def _subject(reason: str) -> str:
    """What a reason is about, where it begins with a choice's name."""
    return reason.partition(" ")[0]


def _listed(values: Mapping[Option, None]) -> str:
    shown = ", ".join(map(str, list(values)[:VALUES]))
    return f"{shown}, …" if len(values) > VALUES else shown
