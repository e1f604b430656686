"""Plan: how an attention is computed, and why so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from attngen.errors import FileError, InternalError, PlanError
from attngen.spec import AttentionSpec
from attngen.tiles import Tiles

Option = int | str | bool
Choice = Mapping[str, Option]


def check_fix(fix: Mapping[Any, Any] | None) -> dict[str, Option]:
    """The choices that a user makes, as a dictionary of plain values.

    Raises:
        PlanError: a name isn't text, or a value is no integer, text or truth value.
    """
    for name, value in (fix or {}).items():
        if not isinstance(name, str) or not isinstance(value, int | str):
            raise PlanError(
                "A fixed choice can't be that.",
                got=f"{name}={value!r:.80}",
                needed="a name, and an integer, text, True or False",
            )
    return dict(fix or {})


def grouped(spec: AttentionSpec, choice: Choice) -> int:
    """How many query heads share a tile."""
    return spec.repeats if choice.get("pack_gqa") else 1


# field → its type in JSON, of those that JSON has as they are
_PLAIN: dict[str, Any] = {
    **dict.fromkeys(("target", "backend", "algorithm"), str),
    **dict.fromkeys(("q_chunk", "k_chunk", "temp_bytes", "flop", "moved_bytes"), int),
    "options": dict[str, Option],
    "index_dtype": Literal["int32", "int64"],
    "drops_keys": bool,
    "time_s": float,
    "fixed": tuple[str, ...],
    "warnings": tuple[str, ...],
}


@dataclass(frozen=True)
class Alternative:
    """A candidate that wasn't chosen: its choices, its modelled figures, and the reason."""

    choice: dict[str, Option]
    temp_bytes: int | None
    time_s: float | None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every decision that the emitter spells out.

    Args:
        spec: what is computed.
        target, backend: where, and in what language.
        algorithm: "running" or "dense".
        q_chunk, k_chunk: queries and keys of a tile.
        options: the backend's own choices, as (name, value) pairs.
        tiles: of one head: full, on an edge, empty.
        index_dtype: of positions, int64 where a mask or score can leave int32.
        drops_keys: whether a score can be −inf, which leaves its key out.
        temp_bytes, time_s: modelled, not measured.
        flop: of the two products of what is visited, each counted once.
        moved_bytes: of q, k, v and the outputs, read and written as slices.
        fixed: the choices that the user made.
        warnings: what is legal, and hardly meant: queries that see no key.
        alternatives: what else was considered, each with the reason against it.
    """

    spec: AttentionSpec
    target: str
    backend: str
    algorithm: str
    q_chunk: int
    k_chunk: int
    options: tuple[tuple[str, Option], ...]
    tiles: Tiles
    index_dtype: str
    drops_keys: bool
    temp_bytes: int
    time_s: float
    flop: int
    moved_bytes: int
    fixed: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    alternatives: tuple[Alternative, ...] = ()

    def option(self, name: str) -> Option:
        """A choice of the backend's own."""
        for known, value in self.options:
            if known == name:
                return value
        raise InternalError(f"The plan has no choice {name!r}.")

    @property
    def choice(self) -> dict[str, Option]:
        """All choices by name, as `fix` takes them."""
        common: dict[str, Option] = {
            "algorithm": self.algorithm,
            "q_chunk": self.q_chunk,
            "k_chunk": self.k_chunk,
        }
        return common | dict(self.options)

    def explain(self) -> str:
        """The plan for people: what was chosen, what is skipped, what else there was."""
        from attngen.explain import explain

        return explain(self)

    def __str__(self) -> str:
        return self.explain()

    def to_dict(self) -> dict[str, Any]:
        data = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("spec", "options", "tiles", "alternatives")
        }
        return data | {
            "spec": self.spec.to_dict(),
            "options": dict(self.options),
            "tiles": asdict(self.tiles),
            "fixed": list(self.fixed),
            "warnings": list(self.warnings),
            "alternatives": [asdict(a) for a in self.alternatives],
        }

    def to_json(self, *, indent: int = 2) -> str:
        return msgspec.json.format(
            msgspec.json.encode(self.to_dict()), indent=indent
        ).decode()

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            FileError: a field is missing, unknown, or of the wrong type.
        """
        if not isinstance(data, dict):
            raise FileError(
                "A plan is a table of fields.",
                got=type(data).__name__,
                needed="what plan.to_json() writes",
            )
        try:
            fields = dict(data)
            for name, kind in _PLAIN.items():
                if name in fields:
                    fields[name] = msgspec.convert(fields[name], kind)
            fields["spec"] = AttentionSpec.from_dict(fields.get("spec"))  # type: ignore[arg-type]
            fields["options"] = tuple(fields.get("options", {}).items())
            fields["tiles"] = msgspec.convert(fields.get("tiles"), Tiles)
            listed = msgspec.convert(fields.get("alternatives", []), list[Alternative])
            return cls(**fields | {"alternatives": tuple(listed)})
        except (TypeError, ValueError, msgspec.ValidationError) as error:
            if isinstance(error, FileError) or hasattr(error, "what"):
                raise
            raise FileError(
                "This isn't a plan.",
                got=str(error),
                needed="what plan.to_json() writes",
            ) from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        try:
            data = msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise FileError(
                "This isn't JSON.", got=str(error), needed="what plan.to_json() writes"
            ) from error
        return cls.from_dict(data)
