"""`attngen tune`: plans timed on this device, until interrupted or done."""

from __future__ import annotations

import sys
from typing import Any

import click

from attngen.cli_output import print_json, progress
from attngen.cli_spec import plan_options, read_fix, read_spec

INTERRUPTED = 1


@click.command()
@click.option(
    "--effort",
    default="measure",
    show_default=True,
    help="measure: the model's best 8 plans. patient: its best 48.",
)
@click.option(
    "--seconds",
    type=float,
    help="About how long it may take. Default: 60, patient: 900.",
)
@plan_options
def tune(
    effort: str,
    seconds: float | None,
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Time plans on this device; keep what is found for `build`.

    Ctrl-C ends it, and loses nothing that was timed: tuning again goes on from there.
    """
    from attngen import api

    spec = read_spec(given)
    try:
        record = api.tune(
            spec,
            target,
            backend,
            effort,
            seconds=seconds,
            fix=read_fix(fix),
            on_progress=progress,
        )
    except KeyboardInterrupt:
        progress("interrupted: what was timed is kept; tune again to go on")
        sys.exit(INTERRUPTED)
    print_json(record.to_dict()) if as_json else click.echo(str(record))
