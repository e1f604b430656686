"""What commands show while they work: a bar on a terminal, plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from attngen import cli_output
from attngen.cli_output import Display, progressing, wrapped

TUNING = [
    "1 of 3: dense",
    "2 of 3: running · 16 queries × 16 keys",
    "  failed: It was refused.",
    "3 of 3: running · 8 queries × 8 keys",
    "  over the budget: 1.0 MiB, certified",
    "timing 2 plans in turns",
    "round 7: 1.2 ms dense; 4% ahead",
    "after 9 rounds: 1.3 ms dense",
]


class Screen:
    """A terminal of 80 columns: what a display leaves on it, and what it shows last."""

    def __init__(self, lasting=True):
        self.file = io.StringIO()
        options = {"force_terminal": True, "width": 80, "height": 20, "_environ": {}}
        self.console = Console(file=self.file, highlight=False, **options)
        self.display = Display(self.console, "planning …", lasting)

    def say(self, *lines):
        for line in lines:
            self.display.say(line)

    @property
    def left(self):
        return _plain(self.file.getvalue())

    @property
    def shown(self):
        with self.console.capture() as captured:
            self.console.print(self.display.shown())
        return _plain(captured.get())


def _plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_bar_says_what_is_tried_and_how_many():
    screen = Screen()
    assert "planning …" in screen.shown
    screen.say(TUNING[0])
    assert "1 of 3: dense" in screen.shown
    assert "0:00:00" in screen.shown
    screen.say(*TUNING[1:4])
    assert "3 of 3: running" in screen.shown
    assert screen.display.bar.tasks[0].completed == 2
    assert "best" not in screen.shown


def test_what_is_found_stays_with_what_it_is_of():
    screen = Screen()
    screen.say(*TUNING[:5])
    assert screen.left.splitlines() == TUNING[1:5]


def test_the_best_so_far_is_below_the_bar():
    screen = Screen()
    screen.say(*TUNING[:7])
    bar, best = screen.shown.splitlines()[:2]
    assert "timing 2 plans in turns, round 7" in bar
    assert best.rstrip() == "best so far: 1.2 ms dense"
    screen.say(TUNING[7])
    assert "best so far: 1.3 ms dense" in screen.shown
    assert screen.left.splitlines()[-1] == TUNING[7]
    screen.say("round 9: 1.1 ms dense; 3% ahead", "round 10: 1.1 ms dense; 3% ahead")
    assert "in turns, round 10" in screen.shown


def test_long_lines_are_cut_to_the_screen():
    screen = Screen()
    screen.say("1 of 2: " + "a plan " * 40, "round 5: " + "1 ms of a plan " * 40)
    assert max(map(len, screen.shown.splitlines())) <= 80
    assert len(screen.shown.splitlines()) <= 3


def test_of_what_doesnt_last_nothing_stays():
    screen = Screen(lasting=False)
    screen.say("checking plain …", "round 3 of 15")
    assert "round 3 of 15" in screen.shown
    assert screen.display.bar.tasks[0].total == 15
    assert screen.left == ""


def test_elsewhere_there_are_plain_lines_on_stderr(capsys):
    with progressing("planning …") as say:
        for line in TUNING:
            say(line)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["planning …", *TUNING]


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_terminal_is_recognised(terminal, monkeypatch, capsys):
    """One that can't move its cursor has lines, too."""
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    with progressing("planning …") as say:
        say(TUNING[0])
        assert (say is cli_output.progress) == (terminal == "dumb")
    out, err = capsys.readouterr()
    assert out == ""
    assert "1 of 3: dense" in err


def test_messages_are_broken_below_what_they_go_on():
    text = (
        "It is wrong.\n  needed   "
        + "one of these, " * 10
        + "or\n  got      "
        + "x" * 200
    )
    first, one, two, got = wrapped(text)
    assert first == "It is wrong."
    assert len(one) <= 100
    assert two.startswith(" " * 11 + "of these, one")
    assert got == "  got      " + "x" * 200
