"""What commands print: JSON, tables, and what is being done."""

from __future__ import annotations

import contextlib
import re
import textwrap
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


WIDTH = 100


def wrapped(text: str) -> list[str]:
    """The lines of a message, those that are too long broken where there are spaces.

    What follows stands below what it goes on: after the label of `  got      …`.
    """
    lines = []
    for line in text.splitlines():
        found = _LABEL.match(line)
        label = found[0] if found else ""
        below = " " * (len(label) or 2)
        made = textwrap.wrap(
            line[len(label) :],
            WIDTH - len(below),
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [label + x for x in made[:1] or [""]] + [below + x for x in made[1:]]
    return lines


_LABEL = re.compile(r" +(?:got|needed|hint) +| +")


def shown(name: str) -> str:
    """A file's name as UTF-8, which it need not be."""
    return name.encode(errors="backslashreplace").decode()


def status(text: str) -> Any:
    """A spinner on stderr while something slow runs; a plain line where that's no terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_interactive:
        click.echo(text, err=True)
    return console.status(Text(text))


@contextlib.contextmanager
def progressing(
    first: str = "", *, lasting: bool = True
) -> Iterator[Callable[[str], None]]:
    """Receives what is being done: lines on stderr, `first` before them.

    On a terminal a bar shows what is tried, how many of how many, the best so far and the
    time that has passed; above it stays what is found; not `lasting`, nothing does.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_interactive:
        if first:
            progress(first)
        yield progress
        return
    from rich.live import Live

    display = Display(console, first or "starting …", lasting)
    with Live(
        console=console,
        get_renderable=display.shown,
        transient=True,
        redirect_stdout=False,
    ):
        yield display.say


_STEP = re.compile(r"(?:round )?(\d+) of (\d+)\b")
_BEST = re.compile(r"(?:round|after) \d+.*?: ([^;]+)")
_PASSING = re.compile(r"\d+ of \d+: |round \d+|timing ")  # replaced by the next


class Display:
    """The lines of bench and tuning as a bar, and the best so far below it."""

    def __init__(self, console: Any, first: str, lasting: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        what = TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
        )
        self.bar = Progress(
            TimeElapsedColumn(), BarColumn(16), what, console=console, expand=True
        )
        self.task = self.bar.add_task(first, total=None)
        self.console, self.lasting = console, lasting
        self.step = self.best = ""

    def shown(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        best = f"best so far: {self.best}" if self.best else ""
        return Group(self.bar, Text(best, no_wrap=True, overflow="ellipsis"))

    def say(self, text: str) -> None:
        from rich.text import Text

        if found := _BEST.match(text):
            self.best = found[1]
        if self.lasting and not _PASSING.match(text):
            if text.startswith(" ") and self.step:  # it is of the step: that stays too
                self.console.print(Text(self.step))
                self.step = ""
            self.console.print(Text(text))
            return
        if found and self.lasting:  # a round of what is shown already
            text = f"{self.step.split(',')[0]}, {text.split(':')[0]}"
        self.step = text
        self.bar.update(self.task, description=text)
        if step := _STEP.match(text):
            done, total = int(step[1]) - 1, int(step[2])  # it is at it
            self.bar.update(self.task, completed=done, total=total)
        elif text.startswith("timing "):
            self.bar.tasks[0].total = None  # nobody knows how many rounds it takes


def progress(text: str) -> None:
    """A line on stderr; more where it is too long for one."""
    click.echo("\n".join(wrapped(text)), err=True)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under a head, to stdout, in at most WIDTH columns."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    made = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        made.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(made)
