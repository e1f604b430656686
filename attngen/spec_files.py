"""A spec as plain values, JSON and TOML, and back.

Masks and scores are data: a library function's name (`"causal"`), a call of one
(`{sliding_window = {left = 4096}}`), a combination (`{and = [...]}`, `{or = [...]}`,
`{not = ...}`), or a traced expression (`{expr = [...], operands = {...}}`, see expr.py).
A list of masks means all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec

from attngen import expr, expr_data, masks, scores
from attngen.errors import ExpressionError, FileError, SpecError
from attngen.operands import Operand
from attngen.spec import FIELDS, AttentionSpec
from attngen.tracing import Mask, Score, mask_of, score_of


def to_dict(spec: AttentionSpec, *, defaults: bool = True) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if not defaults and value == field.default:
            continue
        if isinstance(value, Mask):
            value = _short(value.form)
        elif field.name == "score":
            value = [_short(s.form) for s in value]
        elif isinstance(value, tuple):
            value = list(value)
        data[field.name] = value
    return data


def _short(form: Any) -> Any:
    """A call without arguments by its name alone."""
    if isinstance(form, dict) and len(form) == 1:
        (name, argument), *_ = form.items()
        if argument == {}:
            return name
        if name in ("and", "or"):
            return {name: [_short(a) for a in argument]}
        if name == "not":
            return {name: _short(argument)}
    return form


def from_dict(data: Any) -> AttentionSpec:
    if not isinstance(data, dict):
        raise SpecError(
            "A spec is a table of fields.",
            got=type(data).__name__,
            needed="a table of q_heads, q_len, qk_dim and more",
        )
    unknown = sorted(set(data) - set(FIELDS))
    if unknown:
        raise SpecError(
            f"A spec has no field {unknown[0]!r}.",
            got=", ".join(map(str, unknown)),
            needed="some of " + ", ".join(FIELDS),
        )
    missing = [n for n in ("q_heads", "q_len", "qk_dim") if n not in data]
    if missing:
        raise SpecError(
            f"A spec lacks the field {missing[0]!r}.",
            got=", ".join(data) or "no fields",
            needed="at least q_heads, q_len and qk_dim",
        )
    fields = dict(data)
    try:
        if fields.get("mask") is not None:
            fields["mask"] = read_mask(fields["mask"])
        if "score" in fields:
            given = fields["score"]
            listed = given if isinstance(given, list) else [given]
            fields["score"] = tuple(read_score(s) for s in listed)
    except RecursionError:
        raise ExpressionError(
            "A mask or score in a file is nested too deeply.",
            got="more tables or lists inside each other than can be read",
            needed=f"at most {expr.DEEPEST}",
        ) from None
    return AttentionSpec(**fields)


def read_mask(form: Any) -> Mask:
    """The mask that a file describes.

    Raises:
        ExpressionError: it isn't one of the forms above.
    """
    if isinstance(form, list) and form:
        joined = read_mask(form[0])
        for other in form[1:]:
            joined = joined & read_mask(other)
        return joined
    if isinstance(form, dict) and len(form) == 1:
        (name, argument), *_ = form.items()
        if name in ("and", "or") and isinstance(argument, list) and argument:
            joined = read_mask(argument[0])
            for other in argument[1:]:
                joined = (
                    joined & read_mask(other)
                    if name == "and"
                    else joined | read_mask(other)
                )
            return joined
        if name == "not":
            return ~read_mask(argument)
    made = _read(form, masks.LIBRARY, "mask", mask_of)
    assert isinstance(made, Mask)
    return made


def read_score(form: Any) -> Score:
    """The score that a file describes; raises as `read_mask`."""
    made = _read(form, scores.LIBRARY, "score", score_of)
    assert isinstance(made, Score)
    return made


def _read(form: Any, library: dict[str, Any], what: str, of: Callable[..., Any]) -> Any:
    if isinstance(form, str):
        form = {form: {}}
    if isinstance(form, dict) and "expr" in form and set(form) <= {"expr", "operands"}:
        return of(
            expr_data.from_data(form["expr"], _declared(form.get("operands", {})))
        )
    if isinstance(form, dict) and len(form) == 1:
        (name, arguments), *_ = form.items()
        if name in library and isinstance(arguments, dict):
            given = {
                key: tuple(v) if isinstance(v, list) else v
                for key, v in arguments.items()
            }
            try:
                return library[name](**given)
            except ExpressionError:  # a TypeError that says what is wrong
                raise
            except TypeError as error:
                raise ExpressionError(
                    f"The {what} {name!r} doesn't take these arguments.",
                    got=f"{given}",
                    needed=str(error),
                ) from error
    raise ExpressionError(
        f"A {what} in a file can't be read.",
        got=repr(form)[:200],
        needed=f"one of {', '.join(library)}, a table with one of them and its arguments, "
        "a combination, or an expr",
        hint='mask = ["causal", {sliding_window = {left = 4096}}]',
    )


def _declared(operands: Any) -> dict[str, Operand]:
    if not isinstance(operands, dict) or not all(
        isinstance(o, dict)
        and set(o) == {"axes", "dtype"}
        and isinstance(o["axes"], list)
        for o in operands.values()
    ):
        raise ExpressionError(
            "The operands of an expression in a file can't be read.",
            got=repr(operands)[:200],
            needed='a table such as {ids = {axes = ["b", "k"], dtype = "int32"}}',
        )
    return {
        name: Operand(name, tuple(o["axes"]), o["dtype"])
        for name, o in operands.items()
    }


def to_json(spec: AttentionSpec, *, indent: int = 2) -> str:
    return msgspec.json.format(
        msgspec.json.encode(to_dict(spec)), indent=indent
    ).decode()


def from_json(text: str | bytes) -> AttentionSpec:
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise FileError(
            "This isn't JSON.", got=str(error), needed="what spec.to_json() writes"
        ) from error
    return from_dict(data)


def to_toml(spec: AttentionSpec) -> str:
    """TOML without the fields at their default (TOML has no null)."""
    import tomli_w

    return tomli_w.dumps(to_dict(spec, defaults=False))


def from_toml(text: str) -> AttentionSpec:
    import tomllib

    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FileError(
            "This isn't TOML.", got=str(error), needed="a table of spec fields"
        ) from error
    return from_dict(data)
