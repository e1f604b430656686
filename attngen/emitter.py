"""Plan → Source: the only module that knows jinja2."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attngen import backends, files, storage
from attngen.backends import Backend
from attngen.cost import sharding, square_flop
from attngen.errors import AttngenError, FileError, InternalError
from attngen.expr import describe
from attngen.plans import Option, Plan
from attngen.skipping import a_head, decided_by, of_mean, say_which
from attngen.slopes import gradients
from attngen.spec import AttentionSpec
from attngen.units import show_bytes, show_count
from attngen.version import __version__

if TYPE_CHECKING:
    import jinja2

WIDTH = 88


@dataclass(frozen=True)
class Source:
    """The emitted text of one plan.

    Args:
        text: a Python module that defines `attention`.
        backend: the language it is in.
        requires: what the file imports, as pip takes it.
    """

    text: str
    backend: str
    requires: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def write(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            FileError: it can't be written.
        """
        files.write(Path(path), self.text)
        return Path(path)

    def __str__(self) -> str:
        return self.text


def emit(plan: Plan, backend: Backend) -> Source:
    """Spell the plan out as text."""
    name, context = backend.template(plan)
    template = _environment(backend.templates).get_template(name)
    text = template.render(header=header(plan, backend), **context)
    try:
        compile(text, name, "exec", dont_inherit=True, flags=0)
    except SyntaxError as error:
        raise InternalError(f"{name} made a file that isn't Python: {error}") from error
    return Source(text, backend.name, backend.requires)


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    """Of a folder's templates, each compiled once: that costs more than to fill it in."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def header(plan: Plan, backend: Backend) -> str:
    """The docstring of an emitted file: what it computes, how, and from what."""
    spec = plan.spec
    sections = {
        "made by": f"attngen {__version__} for {plan.target}; `attngen emit --check` compares this file\n"
        "with what would be emitted now. It is yours: attngen claims no rights in it.",
        "computes": _computes(spec),
        "plan": _describe_plan(plan, backend),
        "cost": _cost(plan),
        "needs": ", ".join(backend.requires) + "; nothing of attngen",
        "spec": _data(spec.to_dict(defaults=False)),
        "choices": _data(
            {"backend": plan.backend, "target": plan.target, **plan.choice}
        ),
    }
    lines = [_title(plan), ""]
    for label, text in sections.items():
        first, *rest = text.splitlines()
        lines.append(f"{label:<10}{first}")
        lines += [f"{'':<10}{line}".rstrip() for line in rest]
    return "\n".join(lines)


_HOW = {
    "running": "with a running softmax",
    "split_kv": "keys in parts",
    "summaries": "each summarised",
    "scanned": "differentiable to any order",
}


def _title(plan: Plan) -> str:
    if plan.algorithm == "dense":
        return "Attention, the whole square of scores at once."
    chunks = f"{plan.q_chunk} queries and {plan.k_chunk} keys"
    how = _HOW.get(plan.algorithm, plan.algorithm)
    return f"Attention in chunks of {chunks}, {how}."


def _computes(spec: AttentionSpec) -> str:
    scale = "1/sqrt(qk_dim)" if spec.scale is None else repr(spec.scale)
    lines = [f"out = softmax(s) v over the keys, with s = q.k * {scale}"]
    for score in spec.score:
        lines += _filled(f"then    s = {describe(score.expr)}")
    if spec.mask is not None:
        lines += _filled(f"key k is there for query q where {describe(spec.mask.expr)}")
    if spec.kv_lengths:
        lines.append("and its index < kv_lengths[b]")
    if spec.q_lengths:
        lines.append("for queries of index < q_lengths[b]")
    offset = spec.q_offset if spec.q_offset is not None else 0
    if offset != 0 or spec.kv_offset:
        lines.append(f"positions: query 0 is at {offset}, key 0 at {spec.kv_offset}")
    for text in storage.described(spec):
        lines += _filled(text)
    if spec.sink:
        lines.append("with exp(sink[h]) added to each denominator (not in lse)")
    if spec.dropout:
        lines += _filled(
            f"with dropout: a weight is 0 with probability {spec.dropout!r}, else divided by "
            "1 less that, by Philox 4x32-10 of seed, b, h and positions; not in lse"
        )
    if spec.derivatives == "vjp":
        names = ", ".join(gradients(spec).values())
        lines += _filled(f"and the gradients of {names}, once, in reverse mode")
    elif spec.derivatives == "any":
        lines.append("and derivatives of any order, forward and in reverse")
    if spec.devices > 1:
        lines.append(sharding(spec))
    for name in ("q", "k", "v", *(o.name for o in spec.operands), *spec.outputs):
        shape = ", ".join(map(str, spec.shape_of(name)))
        lines.append(f"{name:<7} [{shape}]  {spec.dtype_of(name)}")
    return "\n".join(lines)


def _describe_plan(plan: Plan, backend: Backend) -> str:
    tiles, seen = plan.tiles, backends.seen(plan)
    names = decided_by(seen)
    lines = list(_filled(backend.describe(plan.choice)))
    told = f"{tiles.full} full, {tiles.edge} on an edge, {tiles.empty} empty and never visited"
    if names:
        full = f"{tiles.full} always full, " if tiles.full else ""
        told = f"{full}{tiles.empty} always empty, at most {tiles.visited} visited: "
        told += f"{say_which(names)} at run time"
    whose = a_head(seen) + of_mean(plan, seen)
    lines += _filled(f"tiles{whose}: {tiles.total}; {told}")
    for warning in plan.warnings:
        lines += _filled(f"warning: {warning}")
    return "\n".join(lines)


def _cost(plan: Plan) -> str:
    square = square_flop(backends.seen(plan).spec)
    skips = (
        f" ({show_count(square)}FLOP without skipping)" if plan.flop < square else ""
    )
    return (
        f"{show_count(plan.flop)}FLOP{skips}, "
        f"{show_bytes(plan.temp_bytes)} of temporaries (modelled)"
        + ("\non each device" if plan.spec.devices > 1 else "")
    )


def _data(value: Mapping[str, Any]) -> str:
    """JSON over several lines, broken after commas only."""
    return "\n".join(_filled(json.dumps(value)))


def _filled(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH - 10, break_long_words=False, break_on_hyphens=False
    ) or [""]


_SECTION = re.compile(
    r"^(spec|choices) {2,}(\{.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Header:
    """What an emitted file says of itself: its spec and the choices of its plan."""

    spec: AttentionSpec
    target: str
    backend: str
    choice: dict[str, Option]


def read_header(path: Path) -> Header:
    """The header of an emitted file, edited or not.

    Raises:
        FileError: it isn't a file that attngen emitted.
    """
    import ast

    import msgspec

    text = files.read(path)
    try:
        doc = ast.get_docstring(ast.parse(text), clean=False) or ""
    except (SyntaxError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path} isn't Python.", got=str(error), needed="an emitted file"
        ) from error
    found = {m[1]: " ".join(m[2].split()) for m in _SECTION.finditer(doc)}
    try:
        spec = AttentionSpec.from_dict(json.loads(found["spec"]))
        choices = msgspec.json.decode(found["choices"], type=dict[str, Option])
        target, backend = str(choices.pop("target")), str(choices.pop("backend"))
    except AttngenError as error:
        raise FileError(
            f"{path} has a header whose spec isn't one: {error.what}",
            got=error.got,
            needed=error.needed,
            hint=error.hint,
        ) from error
    except (KeyError, ValueError, RecursionError) as error:
        raise FileError(
            f"{path} isn't a file that attngen emitted.",
            got="a docstring without readable 'spec' and 'choices' sections",
            needed="the header that attngen emit writes",
        ) from error
    return Header(spec, target, backend, choices)
