"""What commands print: JSON, tables, and what is being done."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click


def print_json(value: Any, *, err: bool = False) -> None:
    """A value as JSON, to stdout or stderr."""
    import json

    import msgspec

    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:  # a file's name that isn't UTF-8: escaped
        text = json.dumps(value, indent=2)
    click.echo(text, err=err)


def shown(name: str) -> str:
    """A file's name as UTF-8, which it need not be."""
    return name.encode(errors="backslashreplace").decode()


def status(text: str) -> Any:
    """A spinner on stderr while something slow runs; a plain line where that's no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        click.echo(text, err=True)
    return console.status(Text(text))


@contextlib.contextmanager
def progressing(
    first: str = "", *, lasting: bool = True
) -> Iterator[Callable[[str], None]]:
    """Receives what is being done: lines on stderr, `first` before them.

    On a terminal a spinner shows which of several things is tried ("3 of 8: …"), and only
    what is found stays; not `lasting`, nothing does.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        if first:
            progress(first)
        yield progress
        return
    with console.status(Text(first or "starting …")) as line:

        def say(text: str) -> None:
            if not lasting or re.match(r"\d+ of \d+: ", text):
                line.update(Text(text))
            else:
                console.print(Text(text))

        yield say


def progress(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under a head, to stdout, in at most 100 columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        made.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 100
    console.print(made)
