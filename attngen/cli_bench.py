"""`attngen bench`: attngen beside its peers, on this machine."""

from __future__ import annotations

from typing import Any

import click

from attngen.cli_output import print_json, progressing
from attngen.cli_spec import plan_options, read_fix, read_spec


@click.command()
@click.option(
    "--rounds",
    type=int,
    default=15,
    show_default=True,
    help="How often each contender takes its turn.",
)
@click.option(
    "--peers",
    metavar="A,B",
    help="Some of plain, jax.nn, paper, sdpa, flex. Default: all.",
)
@click.option(
    "--effort", default="estimate", show_default=True, help="Of attngen's own kernel."
)
@plan_options
def bench(
    rounds: int,
    peers: str | None,
    effort: str,
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Time attngen beside its peers, in turns, each checked first.

    plain jnp and jax.nn compute all scores; paper is Rabe & Staats' algorithm; sdpa and
    flex are torch's, where that is installed. What can't say the spec, or computes
    something else, is listed with the reason.

    attngen computes in the spec's layout. Each peer gets its arrays contiguous in its own
    (torch bhtd, jax.nn and paper bthd, plain either), moved there before it is timed.
    """
    from attngen import bench as worker

    spec = read_spec(given)
    names = None if peers is None else [n.strip() for n in peers.split(",")]
    with progressing(lasting=False) as say:
        comparison = worker.compare(
            spec,
            target=target,
            backend=backend,
            peers=names,
            rounds=rounds,
            effort=effort,
            fix=read_fix(fix),
            on_progress=say,
        )
    print_json(comparison.to_dict()) if as_json else click.echo(str(comparison))
