"""`attngen wisdom`: what is known of this device from tuning, where, and why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attngen.cli_output import print_json, shown, table
from attngen.cli_spec import json_option, place_options, read_spec

if TYPE_CHECKING:
    from attngen.keys import Key, Only

device_option = click.option(
    "--device", metavar="TEXT", help="The device's model, or a part of it."
)


def _key(given: dict[str, Any], target: str | None, backend: str | None) -> Key:
    from attngen import building, recalling

    spec = read_spec(given)
    return recalling.key_of(spec, *building.where(target, backend))


def _only(
    given: dict[str, Any], target: str | None, backend: str | None, device: str | None
) -> Only:
    """The records that a command line names: what it doesn't say may be anything."""
    from attngen.keys import Only

    named = any(value is not None for value in given.values())
    spec = _key(given, None, None).spec if named else None
    return Only(spec=spec, target=target, backend=backend, device=device)


def _records(count: int) -> str:
    return f"{count} record{'' if count == 1 else 's'}"


@click.group()
def wisdom() -> None:
    """Records of tuning: where they are, what they say, to share and to delete."""


@wisdom.command("dir")
@json_option
def where(as_json: bool) -> None:
    """Print the folder that is written, and each place that is read."""
    from attngen import wisdom as known

    places = [(str(p), len(known.files_of(p))) for p in known.places()]
    if as_json:
        print_json(
            {
                "folder": str(known.folder()),
                "places": [{"path": p, "files": n} for p, n in places],
            }
        )
        return
    for index, (path, count) in enumerate(places):
        use = "read and written" if index == 0 else "read"
        click.echo(f"{shown(path)}  ({use}, {count} files)")


@wisdom.command()
@device_option
@place_options
def show(
    target: str | None,
    backend: str | None,
    device: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """List the records; with a spec, show all that was timed of it here.

    Without a spec, or with --device, those of a --target, a --backend, a --device.
    """
    from attngen import wisdom as known

    if device is None and any(value is not None for value in given.values()):
        key = _key(given, target, backend)
        record = known.find(key)
        if as_json:
            print_json(None if record is None else record.to_dict())
        else:
            click.echo(known.why(key) if record is None else str(record))
        return
    only = _only(given, target, backend, device)
    found = list(known.everything(only))
    if not found and only != known.ALL:
        raise known.nothing(only)
    if as_json:
        print_json([{"file": str(p), **r.to_dict()} for p, r in found])
        return
    if not found:
        click.echo(f"There is no wisdom yet: {', '.join(map(str, known.places()))}")
        return
    rows = []
    for _, record in found:
        best = record.best()
        seconds = "" if best is None else best.least
        size = record.size.replace("queries × ", "× ")
        rows.append((size, record.key.device, record.effort, seconds))
    table(("spec", "device", "effort", "least"), rows)


@wisdom.command()
@place_options
def why(target: str | None, backend: str | None, as_json: bool, **given: Any) -> None:
    """Say whether `build` uses a record of a spec, or what differs from the nearest."""
    from attngen import building, recalling

    asked = read_spec(given), *building.where(target, backend)
    said = recalling.why(*asked)
    if as_json:
        used = recalling.recall(*asked, "estimate", {}) is not None
        print_json({"used": used, "why": said})
    else:
        click.echo(said)


@wisdom.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def merge(paths: tuple[Path, ...], as_json: bool) -> None:
    """Take over the records of files, or of folders of them."""
    from attngen import wisdom as known

    written = known.merge(paths)
    if as_json:
        print_json({"written": {str(p): n for p, n in written.items()}})
        return
    for path, count in written.items():
        click.echo(f"{_records(count)} into {shown(str(path))}")


@wisdom.command()
@click.argument("path", type=click.Path(path_type=Path))
@device_option
@place_options
def export(
    path: Path,
    target: str | None,
    backend: str | None,
    device: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Write records to one file, to ship with a project or an image.

    All of them, or those of a spec (of any device and version), a --target, a --backend,
    a --device. A file that is there is replaced where it is wisdom.
    """
    from attngen import wisdom as known

    count = known.export(path, _only(given, target, backend, device))
    if as_json:
        print_json({"path": str(path), "records": count})
    else:
        click.echo(f"{_records(count)} into {shown(str(path))}")


@wisdom.command()
@click.option("--yes", is_flag=True, help="Do delete.")
@json_option
def clear(yes: bool, as_json: bool) -> None:
    """Delete this user's records."""
    from attngen import wisdom as known
    from attngen.errors import WisdomError

    if not yes:
        raise WisdomError(
            "Clearing deletes records that took time to make.",
            got="no --yes",
            needed="--yes",
            hint=f"they are in {known.folder()}",
        )
    deleted = [str(p) for p in known.clear()]
    if as_json:
        print_json({"deleted": deleted})
        return
    click.echo("\n".join(f"deleted {shown(p)}" for p in deleted) or "nothing to delete")
