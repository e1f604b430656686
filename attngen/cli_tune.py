"""`attngen tune`: plans timed on this device, or compiled for one that isn't here."""

from __future__ import annotations

import sys
from typing import Any

import click

from attngen.cli_output import print_json, progress, progressing, shown
from attngen.cli_spec import plan_options, read_fix, read_spec
from attngen.records import Record

INTERRUPTED = 1


@click.command()
@click.option(
    "--effort",
    default="measure",
    show_default=True,
    help="measure: the model's best 8 plans. patient: its best 48, and on from the fastest. "
    "estimate: times nothing.",
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

    For a GPU that isn't here, compile them, and rank them by the bound of their loops.

    Ctrl-C ends it, and loses nothing that was timed: tuning again goes on from there.
    """
    from attngen import api, building, recalling
    from attngen import wisdom as known

    spec, fixed = read_spec(given), read_fix(fix)
    interrupted = False
    try:
        with progressing("planning …") as say:
            record = api.tune(
                spec,
                target,
                backend,
                effort,
                seconds=seconds,
                fix=fixed,
                on_progress=say,
            )
    except KeyboardInterrupt:
        interrupted = True
    device, by = building.where(target, backend)
    if interrupted:
        key = recalling.key_of(spec, device, by)
        record = known.find(key) or Record(key=key)
        count = sum(len(c.samples_s) for c in record.candidates)
        what = f"{count} samples"
        if not by.is_here(device):
            what = f"{len(record.candidates)} compiled plans"
        kept = f"{what} kept in {shown(str(known.path_of(key)))}"
        progress(f"interrupted; {kept}; tune again to go on")
    found = recalling.recall(spec, device, by, "estimate", fixed)
    if as_json:
        chosen = None if found is None else found[0].to_dict()
        print_json(record.to_dict() | {"chosen": chosen})
    elif record.candidates:
        click.echo(str(record))
        if found is not None:
            click.echo(f"\n{found[0].explain()}")
    if interrupted:
        sys.exit(INTERRUPTED)
