"""A spec from the command line: a file or a preset, then options over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from attngen import files
from attngen.errors import FileError, PlanError, SpecError
from attngen.plans import Option
from attngen.spec import AttentionSpec

# option → field; integers, texts, and those that read a mask or scores
_INTEGERS = (
    "batch",
    "q_heads",
    "kv_heads",
    "q_len",
    "kv_len",
    "qk_dim",
    "v_dim",
    "kv_offset",
    "page_size",
    "num_pages",
    "batch_shards",
    "head_shards",
)
_TEXTS = (
    "dtype",
    "out_dtype",
    "kv_dtype",
    "kv_scale",
    "layout",
    "storage",
    "q_offset",
    "derivatives",
    "precision",
)
_FLAGS = ("sink", "kv_lengths", "q_lengths")
# a preset whose queries are its keys stays so when one of the two is changed
_PAIRS = {"q_len": "kv_len", "q_heads": "kv_heads", "qk_dim": "v_dim"}


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """SPEC, --preset, and an option for each field of a spec."""
    options = [
        click.argument("spec", required=False, metavar="[SPEC.toml]"),
        click.option("--preset", help="A named workload: see `attngen presets`."),
        click.option("--budget", metavar="BYTES", help="memory_budget, e.g. 64MiB."),
        *(click.option(_name(f), f, type=int, metavar="N", help=f) for f in _INTEGERS),
        *(click.option(_name(f), f, metavar="TEXT", help=f) for f in _TEXTS),
        click.option("--scale", type=float, help="scale of q·k"),
        click.option("--dropout", type=float, help="probability, of each weight"),
        *(
            click.option(f"{_name(f)}/--no-{_name(f)[2:]}", f, default=None)
            for f in _FLAGS
        ),
        click.option("--outputs", metavar="out,lse", help="outputs, in order"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The spec, where it runs, and what the user decides."""
    fix = click.option(
        "--fix",
        multiple=True,
        metavar="NAME=VALUE",
        help="A choice that you make, e.g. q_chunk=512. Repeatable.",
    )
    return place_options(command, fix)


def place_options(
    command: Callable[..., Any], *more: Callable[..., Any]
) -> Callable[..., Any]:
    """The spec, where it runs, and more options before --json."""
    for option in reversed(
        [
            click.option(
                "--target", help="Where: see `attngen targets`. Default: cpu."
            ),
            click.option("--backend", help="In what language. Default: jax."),
            *more,
            json_option,
        ]
    ):
        command = option(command)
    return spec_options(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _name(field: str) -> str:
    return "--" + field.replace("_", "-")


def read_spec(given: dict[str, Any]) -> AttentionSpec:
    """The spec that a command line describes.

    Raises:
        SpecError, FileError, PresetError: as their names say.
    """
    from attngen import presets

    path, preset = given.pop("spec"), given.pop("preset")
    changes = {n: v for n, v in given.items() if v is not None and n != "budget"}
    if given.get("budget") is not None:
        changes["memory_budget"] = _number(given["budget"])
    if "outputs" in changes:
        changes["outputs"] = tuple(changes["outputs"].replace(" ", "").split(","))
    for field in ("q_offset", "out_dtype", "kv_dtype", "kv_scale", "derivatives"):
        if field in changes:
            changes[field] = _number(changes[field])
            if changes[field] == "none":
                changes[field] = None
    if path is not None and preset is not None:
        raise SpecError(
            "A spec comes from a file or from a preset.",
            got=f"{path} and --preset {preset}",
            needed="one of the two",
        )
    if preset is not None:
        base = presets.get(preset)
    elif path is not None:
        base = read_file(Path(path))
    elif changes:
        return AttentionSpec.from_dict(changes)
    else:
        raise SpecError(
            "Which attention?",
            got="neither a file nor a preset",
            needed="SPEC.toml, --preset NAME, or at least --q-heads, --q-len and --qk-dim",
        )
    for one, other in _PAIRS.items():
        if one in changes and getattr(base, one) == getattr(base, other):
            changes.setdefault(other, changes[one])
    return dataclasses.replace(base, **changes)


def read_file(path: Path) -> AttentionSpec:
    """A spec from TOML, JSON, or the header of an emitted file."""
    if path.suffix == ".py":
        from attngen.emitter import read_header

        return read_header(path).spec
    text = files.read(path)
    if path.suffix == ".json":
        return AttentionSpec.from_json(text)
    if path.suffix == ".toml":
        return AttentionSpec.from_toml(text)
    raise FileError(
        f"{path} is no kind of spec.",
        got=path.suffix or "no suffix",
        needed=".toml or .json",
    )


def _number(text: str) -> int | str:
    """An integer where the text is one (of no more digits than any limit has)."""
    digits = text.removeprefix("-")
    whole = digits.isascii() and digits.isdigit() and len(digits) < 40
    return int(text) if whole else text


def read_fix(items: tuple[str, ...]) -> dict[str, Option]:
    """NAME=VALUE pairs as the choices that `fix` takes.

    Raises:
        PlanError: one isn't NAME=VALUE, or is given twice.
    """
    fix: dict[str, Option] = {}
    for item in (part for i in items for part in i.split(",")):
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name or name in fix:
            raise PlanError(
                "A fixed choice can't be read.",
                got=repr(item),
                needed="NAME=VALUE, each name once",
                hint="--fix q_chunk=512 --fix k_chunk=1024",
            )
        text = value.strip()
        fix[name] = {"true": True, "false": False}.get(text.lower(), _number(text))
    return fix
