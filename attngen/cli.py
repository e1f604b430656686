"""The command line: arguments in, text or JSON out.

Results go to stdout, everything else to stderr. Exit code 0: done; 1: the check failed;
2: the request was wrong.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from attngen import machine
from attngen.cli_bench import bench
from attngen.cli_certify import certify
from attngen.cli_output import print_json, progressing, shown, status, table, wrapped
from attngen.cli_spec import plan_options, read_fix, read_spec
from attngen.cli_tune import tune
from attngen.cli_wisdom import wisdom
from attngen.errors import (
    AttngenError,
    FileError,
    TimingError,
    ValidationError,
)
from attngen.version import __version__

if TYPE_CHECKING:
    from attngen.plans import Plan

CHECK_FAILED, WRONG_REQUEST = 1, 2
TERMINAL = "-"  # instead of a picture's file
RUNS_JAX = ("build", "validate", "tune", "bench")  # other commands start without jax


class Group(click.Group):
    """Turns a user's mistake into its message and exit code, never into a traceback."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["attngen.json"] = "--json" in args
        machine.quiet_jax()
        if args[:1] and args[0] in RUNS_JAX and "--help" not in args:
            machine.start_jax()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return super().invoke(ctx)
        except AttngenError as error:
            _fail(error, as_json=ctx.meta["attngen.json"])


def _fail(error: AttngenError, *, as_json: bool) -> NoReturn:
    if as_json:
        print_json(error.to_dict(), err=True)
    else:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        name = type(error).__name__
        first, *others = wrapped(f"{name}: {error}")
        console.print(f"[bold red]{name}[/]", end="")
        console.print("\n".join([first[len(name) :], *others]), markup=False)
    failed = isinstance(error, ValidationError | TimingError)
    sys.exit(CHECK_FAILED if failed else WRONG_REQUEST)


def _warn(message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning without the line of code that it comes from."""
    for line in wrapped(f"attngen: warning: {message}"):
        click.echo(line, err=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="attngen")
def main() -> None:
    """attngen: a compiler for attention.

    Say what attention you want (a preset, a TOML or JSON spec), on which target, within
    how many bytes; get readable source that is proven to compute it and proven to fit.
    """


@main.command()
@click.option(
    "--picture",
    metavar="FILE",
    help="Draw the tiles of a head, full, partial or empty: .png or .svg; - draws in the "
    "terminal.",
)
@plan_options
def plan(
    picture: str | None,
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Choose algorithm, chunks and loops by the model, and say why."""
    from attngen import api

    path = None if picture in (None, TERMINAL) else Path(str(picture))
    if path is not None:
        from attngen import pictures

        pictures.check(path)
    made = api.plan(read_spec(given), target, backend, read_fix(fix))
    drawn = {} if picture is None else {"picture": _picture(made, path)}
    if as_json:
        print_json(made.to_dict() | drawn)
        return
    click.echo(made.explain())
    if picture == TERMINAL:
        click.echo(f"\n{drawn['picture']['text']}")


def _picture(made: Plan, path: Path | None) -> dict[str, Any]:
    """Draw the tiles to a file, or as text; say it in plain values."""
    from attngen import pictures, skipping

    said = {"path": path and str(path), "skipped": skipping.share(made)}
    if path is None:
        return said | {"text": pictures.text(made)}
    pictures.draw(made, path)
    click.echo(f"wrote {shown(str(path))}", err=True)
    return said


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.")
@click.option(
    "--check",
    is_flag=True,
    help="SPEC is emitted files or folders of them: are they what would be emitted now?",
)
@click.argument("more", nargs=-1, type=click.Path(path_type=Path))
@plan_options
def emit(
    output: Path | None,
    check: bool,
    more: tuple[Path, ...],
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Print or write the source of the best plan; --check compares emitted files."""
    from attngen import api
    from attngen import targets as known

    if check:
        named = [Path(given["spec"])] if given["spec"] else []
        _check_emitted([*more, *named], as_json)
        return
    if more:
        raise FileError(
            "emit takes one spec.",
            got=", ".join(map(str, more)),
            needed="one SPEC.toml",
        )
    plan = api.plan(read_spec(given), target, backend, read_fix(fix))
    source = api.emit(plan)
    for warning in plan.warnings:
        _warn(warning)
    if known.get(plan.target).gpu and not as_json:
        said = (
            f"not certified: whether it compiles for {plan.target} without spilling "
            "registers, `attngen certify` says, and `attngen build` sees to"
        )
        click.echo("\n".join(wrapped(said)), err=True)
    if output is not None:
        source.write(output)
        click.echo(f"wrote {output}", err=True)
    if as_json:
        print_json(
            {
                "text": source.text,
                "digest": source.digest,
                "path": output and str(output),
            }
        )
    elif output is None:
        click.echo(source.text, nl=False)


def _check_emitted(paths: list[Path], as_json: bool) -> None:
    from attngen import api, files

    found = [f for p in paths for f in (sorted(p.glob("*.py")) if p.is_dir() else [p])]
    if not found:
        raise FileError(
            "--check needs emitted files.",
            got=", ".join(map(str, paths)) or "no path",
            needed="FILE.py or a folder of them",
        )
    results = {}
    for path in found:
        results[str(path)] = api.emit(api.plan_of(path)).text == files.read(path)
    if as_json:
        print_json({"same": all(results.values()), "files": results})
    else:
        for name, same in results.items():
            click.echo(f"{'same' if same else 'DIFFERS':<8} {shown(name)}")
    if not all(results.values()):
        sys.exit(CHECK_FAILED)


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.")
@click.option(
    "--effort", default="estimate", show_default=True, help="How hard to search."
)
@plan_options
def build(
    output: Path | None,
    effort: str,
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Plan, emit, certify and validate; with -o, write the file and its certificate."""
    from attngen import api, files

    spec = read_spec(given)
    with progressing("certifying and validating …") as say:
        kernel = api.build(
            spec, target, backend, effort, read_fix(fix), on_progress=say
        )
    assert kernel.report is not None
    assert kernel.certificate is not None
    if output is not None:
        kernel.source.write(output)
        beside = output.with_suffix(".certificate.json")
        files.write(beside, kernel.certificate.to_json() + "\n")
        click.echo(f"wrote {output} and {beside}", err=True)
    if as_json:
        print_json(
            {
                "plan": kernel.plan.to_dict(),
                "report": kernel.report.to_dict(),
                "certificate": kernel.certificate.to_dict(),
                "digest": kernel.source.digest,
                "path": output and str(output),
            }
        )
        return
    click.echo(kernel.plan.explain())
    click.echo(f"\ncertified {kernel.certificate}")
    click.echo("\n".join(wrapped(f"validated {kernel.report}")))


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Of the random inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def validate(files: tuple[Path, ...], seed: int, as_json: bool) -> None:
    """Judge emitted files, edited or not, against the specs in their headers."""
    from attngen import api

    reports = {}
    for path in files:
        with status(f"validating {path} …"):
            reports[str(path)] = api.validate(path, seed=seed)
    if as_json:
        print_json({name: report.to_dict() for name, report in reports.items()})
    else:
        for name, report in reports.items():
            click.echo(f"{shown(name)}: {report}")
    if not all(r.passed for r in reports.values()):
        sys.exit(CHECK_FAILED)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def targets(as_json: bool) -> None:
    """List the targets, what is known of them, and who certifies for them."""
    from attngen import compilers
    from attngen import targets as known

    listed = [known.get(name) for name in known.names()]
    if as_json:
        print_json(
            [
                t.to_dict() | {"certifiers": [c.to_dict() for c in compilers.all_of(t)]}
                for t in listed
            ]
        )
        return
    from attngen.units import show_bytes

    rows = [
        (
            t.name,
            t.description,
            str(t.cores),
            "?" if t.memory_bytes is None else show_bytes(t.memory_bytes),
            ", ".join(t.backends),
            ", ".join(c.name for c in compilers.all_of(t)),
        )
        for t in listed
    ]
    table(("target", "what", "cores", "memory", "backends", "certified by"), rows)
    for c in dict.fromkeys(c for t in listed for c in compilers.all_of(t)):
        there = "is installed" if not c.missing else "isn't installed"
        click.echo(f"{c.name:<18} {there}: {c.install}")


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def presets(name: str | None, as_json: bool) -> None:
    """List the presets and their sources; with NAME, print its spec as TOML or JSON."""
    from attngen import presets as known

    if name is not None:
        spec = known.get(name)
        click.echo(spec.to_json() if as_json else spec.to_toml(), nl=as_json)
        return
    if as_json:
        print_json(
            {
                n: {"spec": known.get(n).to_dict(), "source": known.source(n)}
                for n in known.names()
            }
        )
        return
    table(("preset", "source"), [(n, known.source(n)) for n in known.names()])


main.add_command(bench)
main.add_command(certify)
main.add_command(tune)
main.add_command(wisdom)
