"""Operands: tensors that masks and scores read, passed to a kernel by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attngen.errors import OperandError
from attngen.names import is_free

Kind = Literal["bool", "int", "float"]
Axis = str | int
LONGEST = 22  # characters of a name: emitted lines must not grow too long
LETTERS = ("b", "h", "q", "k")
OPERAND_DTYPES = ("bool", "int32", "int64", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that a mask or score reads, passed to the kernel by name.

    axes: for each dimension a letter (b, h, q, k: as long as the batch, the query heads,
    the queries, the keys) or a length of its own.
    rises_to: of integers that rise from 0 along the only axis, to that at most: offsets.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: str
    rises_to: int | None = None

    def __post_init__(self) -> None:
        check_operand_name(self.name)
        if not self.axes or not all(_is_axis(a) for a in self.axes):
            raise OperandError(
                f"Operand {self.name!r} has axes that can't be read.",
                got=repr(self.axes),
                needed="one or more of the letters b, h, q, k and positive lengths",
                hint='for example axes="bk" or axes=("h", 32)',
            )
        letters = [a for a in self.axes if isinstance(a, str)]
        if len(set(letters)) != len(letters):
            raise OperandError(
                f"Operand {self.name!r} has the same axis twice.",
                got=repr(self.axes),
                needed="each letter at most once",
            )
        if self.dtype not in OPERAND_DTYPES:
            raise OperandError(
                f"Operand {self.name!r} has a dtype that the language doesn't know.",
                got=repr(self.dtype),
                needed="one of " + ", ".join(OPERAND_DTYPES),
            )

    @property
    def kind(self) -> Kind:
        if self.dtype == "bool":
            return "bool"
        return "int" if self.dtype.startswith(("int", "uint")) else "float"

    def shape(self, lengths: Mapping[str, int]) -> tuple[int, ...]:
        """The shape, given the length of each letter's axis."""
        return tuple(a if isinstance(a, int) else lengths[a] for a in self.axes)

    def to_dict(self) -> dict[str, Any]:
        return {"axes": list(self.axes), "dtype": self.dtype}


def _is_axis(axis: object) -> bool:
    if isinstance(axis, str):
        return axis in LETTERS
    return isinstance(axis, int) and not isinstance(axis, bool) and axis > 0


def check_operand_name(name: object) -> None:
    """A name becomes a parameter of the emitted function: an identifier, and a free one."""
    if (
        not isinstance(name, str)
        or not name.isascii()
        or not name.isidentifier()
        or len(name) > LONGEST
    ):
        raise OperandError(
            "An operand's name must be an identifier.",
            got=repr(name),
            needed=f"letters, digits and underscores, at most {LONGEST}, no digit first",
        )
    if not is_free(name):
        raise OperandError(
            f"An operand can't be called {name!r}.",
            got=name,
            needed="a name that neither Python nor the emitted file uses itself "
            "(no leading underscore, no '_at_')",
            hint=f"call it {name.strip('_').replace('_at_', '_')}_values, say",
        )
