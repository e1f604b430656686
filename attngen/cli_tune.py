"""`attngen tune`: plans timed on this device, or compiled for one that isn't here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attngen.cli_output import print_json, progress, progressing, shown
from attngen.cli_spec import plan_options, read_fix, read_spec
from attngen.errors import BackendError
from attngen.records import Record
from attngen.units import show_bytes

if TYPE_CHECKING:
    from attngen.plans import Plan
    from attngen.spec import AttentionSpec
    from attngen.targets import Target

INTERRUPTED = NOTHING = 1


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
    help="About how long it may take. Default: 60, patient: 900; with --frontier, five "
    "times that.",
)
@click.option(
    "--frontier",
    "picture",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Tune for ever smaller budgets too, and draw memory against time: .png or .svg.",
)
@plan_options
def tune(
    effort: str,
    seconds: float | None,
    picture: Path | None,
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Time plans on this device; keep what is found for `build`.

    For a device that isn't here, compile them: a TPU's are ranked by its compiler's estimate
    of cycles, a GPU's by the bound of their loops.

    Ctrl-C ends it, and loses nothing that was timed or compiled: tuning again goes on from
    there. Exit code 1 where that happens, or where no plan can be used.
    """
    from attngen import api, building, recalling
    from attngen import wisdom as known

    spec, fixed = read_spec(given), read_fix(fix)
    if picture is not None:
        _check_picture(picture, target, backend)
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
                sweep=picture is not None,
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
    more = {}
    if picture is not None and not interrupted:
        more["frontier"] = _draw(picture, record, spec, device)
    if as_json:
        chosen = None if found is None else found[0].to_dict()
        print_json(record.to_dict() | {"chosen": chosen} | more)
    elif record.candidates:
        click.echo(str(record))
        if found is not None:
            click.echo(f"\n{found[0].explain()}\n{_certified(record, found[0])}")
    if interrupted:
        sys.exit(INTERRUPTED)
    if not by.is_here(device) and record.best(spec.budget_bytes, fixed) is None:
        progress(f"none of {len(record.candidates)} plans can be used{_within(spec)}")
        sys.exit(NOTHING)


def _certified(record: Record, plan: Plan) -> str:
    """What is recorded of the bytes of a plan, whose own are modelled."""
    ranked = record.ranked(plan.spec.budget_bytes)
    best = next((c for c in ranked if c.choice == plan.choice), None)
    if best is None or best.temp_bytes is None:
        return ""
    text = f"\ncertified {show_bytes(best.temp_bytes)} of temporaries"
    if best.on_chip_bytes:
        text += f", {show_bytes(best.on_chip_bytes)} on the chip"
    return text


def _within(spec: AttentionSpec) -> str:
    budget = spec.budget_bytes
    return "" if budget is None else f" within {show_bytes(budget)}"


def _check_picture(path: Path, target: str | None, backend: str | None) -> None:
    """Refuse a picture that couldn't be drawn, before time is spent.

    Raises:
        FileError, BackendError: see drawing.check; or the target's kernels have no frontier.
    """
    from attngen import building, drawing

    drawing.check(path)
    device, by = building.where(target, backend)
    if by.name != "jax" or device.kind == "cuda":
        raise BackendError(
            f"There is no frontier of memory and time on {device.name} by {by.name}.",
            got="kernels that need no temporaries"
            if by.name == "triton"
            else "a compiler that says nothing of time",
            needed="a processor or a TPU as the target, by JAX",
        )


def _draw(
    path: Path, record: Record, spec: AttentionSpec, device: Target
) -> dict[str, Any]:
    """Compile what stands beside the plans, draw all, and say it in plain values."""
    from attngen import drawing, frontier
    from attngen.peers import references

    progress("compiling standard attention and the paper's algorithm")
    others = [references.compiled(peer, spec, device) for peer in references.NAMES]
    found = frontier.of(record, device, others)
    drawing.draw(found, path)
    progress(f"wrote {shown(str(path))}")
    return {"path": str(path)} | found.to_dict()
