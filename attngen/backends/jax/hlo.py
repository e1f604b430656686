"""The text of a compiled module, as far as attngen reads it: what calls what, and where from.

An optimised module names each computation and lists its instructions; each instruction may
say which frame of the Python program it came from, and TPU's compiler how many cycles it
expects. XLA promises nothing about this text: whatever isn't found is None, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_TYPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")
_ENTRY = re.compile(r'^(\d+) (?:\{(.*)\}|"(.*)")$')
_TABLES = ("FunctionNames", "FileLocations", "StackFrames")
_BITS = re.compile(r"[a-z]+(\d+)?\w*")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Args:
        shape: its type, as text.
        inside: what stands in its parentheses.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    shape: str
    inside: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return _NAME.findall(self.inside)

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names: body, condition, calls, to_apply."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def number(self, attribute: str) -> int | None:
        found = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(found[1]) if found else None

    @property
    def cycles(self) -> int | None:
        """What the compiler expects that it takes."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def frame(self) -> int | None:
        found = _FRAME.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def bytes(self) -> int:
        """Of all arrays of its type, without padding."""
        return sum(array_bytes(d, n) for d, n, _ in _TYPE.findall(self.shape))


def array_bytes(dtype: str, dims: str) -> int:
    """Of an array as XLA spells its type: "bf16", "4,128"."""
    bits = _BITS.fullmatch(dtype)
    size = max(1, int(bits[1]) // 8) if bits and bits[1] else 1
    for n in dims.split(","):
        size *= int(n) if n else 1
    return size


@dataclass(frozen=True)
class Frame:
    """Where an instruction came from: a function, the line in it, and who called it."""

    function: str
    line: int
    parent: int | None


@dataclass
class Module:
    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""
    frames: dict[int, Frame] = field(default_factory=dict)

    def root(self, computation: str) -> Instruction | None:
        found = self.computations.get(computation, [])
        return next((i for i in found if i.root), None)

    def find(self, computation: str, name: str) -> Instruction | None:
        found = self.computations.get(computation, [])
        return next((i for i in found if i.name == name), None)

    def calls(self, frame: int | None) -> list[Frame]:
        """The frames of an instruction, the outermost call first."""
        chain: list[Frame] = []
        while frame in self.frames and len(chain) < 100:
            chain.append(self.frames[frame])
            frame = chain[-1].parent
        return chain[::-1]


def parse(text: str) -> Module:
    """A module's text, taken apart."""
    module = Module()
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] | None = None
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = module.computations[head[2]] = []
            module.entry = head[2] if head[1] else module.entry
            table = None
        elif current is not None and (found := instruction(line)):
            current.append(found)
        elif line.strip() in _TABLES:
            table = tables.setdefault(line.strip(), {})
        elif table is not None and (entry := _ENTRY.match(line.strip())):
            table[int(entry[1])] = entry[2] if entry[2] is not None else entry[3]
    module.frames = dict(_frames(tables))
    return module


def instruction(line: str) -> Instruction | None:
    """A line of a computation; None where it is none."""
    start = _START.match(line)
    if not start:
        return None
    rest = line[start.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    if end <= 0 or opening < 0:
        return None
    closing = _closing(rest, opening)
    return Instruction(
        name=start[2],
        opcode=rest[:opening],
        shape=shape,
        inside=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :],
        root=bool(start[1]),
    )


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis closes that opens there; the end where none does."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _frames(tables: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[int, Frame]]:
    """Each frame with its function's name. A parent is counted from 1, 1 being none."""
    names = tables.get("FunctionNames", {})
    places = {n: _fields(t) for n, t in tables.get("FileLocations", {}).items()}
    for number, text in tables.get("StackFrames", {}).items():
        own = _fields(text)
        place = places.get(own.get("file_location_id", 0), {})
        function = names.get(place.get("function_name_id", 0))
        if function is not None:
            parent = own.get("parent_frame_id", 1) - 1
            yield number, Frame(function, place.get("line", 0), parent or None)


def _fields(text: str) -> dict[str, int]:
    pairs = (p.split("=", 1) for p in text.split() if "=" in p)
    return {n: int(v) for n, v in pairs if v.isdigit()}
