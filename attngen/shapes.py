"""Arguments as text: `f32[8,128]`, `mask=pred[8]`, JSON trees of such; read, never run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attngen.errors import ShapeError

# as XLA's text has them, and as jax prints them → NumPy's names
_SHORT = {"pred": "bool", "bf16": "bfloat16", "c64": "complex64", "c128": "complex128"}
_SHORT |= {f"f{n}": f"float{n}" for n in (16, 32, 64)}
_SHORT |= {f"{s}{n}": f"int{n}" for s in "si" for n in (8, 16, 32, 64)}
_SHORT |= {f"u{n}": f"uint{n}" for n in (8, 16, 32, 64)}
_SHORT |= {"f8e4m3fn": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}
DTYPES = tuple(dict.fromkeys(_SHORT.values()))

_SHAPE = re.compile(r"([A-Za-z][A-Za-z0-9_]*) *\[([0-9, ]*)\]")
_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_]*) *= *")
_LARGEST = 2**63 - 1  # bytes and elements are counted in 64 bits
NEEDED = "DTYPE[SIZE,…], as bfloat16[1,4096,8,64], f32[8,128], f32[]; or JSON of such"


@dataclass(frozen=True)
class Shape:
    """An array that isn't there: its dtype, by NumPy's name, and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.sizes))}]"


def read(texts: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in their order, and those by name: trees whose leaves are Shapes.

    Args:
        texts: each has arguments with commas between them; an argument is a shape or a
            JSON value with shapes as strings, after `name=` where it goes by name.

    Raises:
        ShapeError: one can't be read, or a name is given twice.
    """
    given: list[Any] = []
    named: dict[str, Any] = {}
    for text in texts:
        for name, value in _Reader(text).arguments():
            if name is None:
                given.append(value)
            elif name in named:
                raise _unreadable(text, f"{name}= twice", "each name once")
            else:
                named[name] = value
    return given, named


class _Reader:
    """Goes through a text from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def arguments(self) -> list[tuple[str | None, Any]]:
        found = [self._argument()]
        while self._skip() < len(self.text):
            if self.text[self.at] != ",":
                raise self._stuck()
            self.at += 1
            found.append(self._argument())
        return found

    def _skip(self) -> int:
        """Past spaces."""
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.at

    def _argument(self) -> tuple[str | None, Any]:
        name = _NAME.match(self.text, self._skip())
        if name:
            self.at = name.end()
        if self.text[self.at : self.at + 1] in ("{", "[", '"'):
            return name and name[1], self._json()
        found = _SHAPE.match(self.text, self.at)
        if not found:
            raise self._stuck()
        self.at = found.end()
        return name and name[1], _shape(found, self.text)

    def _json(self) -> Any:
        decoder = json.JSONDecoder(object_pairs_hook=_once(self.text))
        try:
            value, self.at = decoder.raw_decode(self.text, self.at)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _unreadable(self.text, f"JSON that ends too soon: {error}") from None
        return _leaves(value, self.text)

    def _stuck(self) -> ShapeError:
        rest = self.text[self.at :][:40]
        return _unreadable(self.text, repr(rest) if rest else "nothing")


def _once(text: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise _unreadable(text, "a key twice in one object", "each key once")
        return made

    return table


def _leaves(value: Any, text: str) -> Any:
    """A JSON value with its strings as shapes; null stays None, which has no leaf."""
    if isinstance(value, dict):
        return {name: _leaves(x, text) for name, x in value.items()}
    if isinstance(value, list):
        return [_leaves(x, text) for x in value]
    if value is None:
        return None
    found = isinstance(value, str) and _SHAPE.fullmatch(value.strip())
    if not found:
        raise _unreadable(text, f"{json.dumps(value)} in JSON")
    return _shape(found, text)


def _shape(found: re.Match[str], text: str) -> Shape:
    dtype = _SHORT.get(found[1], found[1])
    if dtype not in DTYPES:
        known = ", ".join((*DTYPES, *_SHORT))
        raise _unreadable(text, f"the dtype {found[1]}", f"one of {known}")
    sizes = [x.strip() for x in found[2].split(",")] if found[2].strip() else []
    if not all(x.isdigit() for x in sizes):
        raise _unreadable(text, found[0])
    count = 1
    for size in sizes:
        count *= int(size[:20])
    if count > _LARGEST // 16 or any(len(x) > 19 for x in sizes):
        raise _unreadable(text, found[0], "sizes that 64 bits can count")
    return Shape(dtype, tuple(map(int, sizes)))


def _unreadable(text: str, got: str, needed: str = NEEDED) -> ShapeError:
    where = f" in {text[:80]!r}" if got not in text or got != text else ""
    return ShapeError("A shape can't be read.", got=f"{got}{where}", needed=needed)
