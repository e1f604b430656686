"""The paper's table as text in 100 columns, and as a picture, from the cells of results."""

import importlib.util
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attngen import drawing
from attngen.targets import Target
from attngen.units import show_bytes, show_count, show_time

LABEL, COLUMN, WIDTH = 33, 9, 100
SAYS = "    as the paper says"
NONE, UNKNOWN = "", "–"  # not done; nothing says it
BUDGETS = {
    "none": "attngen",
    "paper's": "attngen within the paper's",
    "1MiB": "attngen within 1 MiB",
    "256KiB": "attngen within 256 KiB",
}
WHO = {"standard": "standard attention", "paper": "the paper's algorithm"}
SKY = "#56B4E9"  # Okabe and Ito's too
STYLES = {
    "standard": (drawing.ORANGE, "s"),
    "paper": (drawing.GREEN, "D"),
    "none": (drawing.BLUE, "o"),
    "1MiB": (SKY, "^"),
}


@dataclass(frozen=True)
class Column:
    """One length on one target: what each algorithm takes."""

    target: str
    n: int
    cells: dict[str, Any]

    def entry(self, who: str) -> dict[str, Any] | None:
        """Of standard attention, of the paper's algorithm, or of attngen in a budget."""
        if who in WHO:
            return self.cells.get(f"{self.target} {self.n} {who}")
        whole = self.cells.get(f"{self.target} {self.n} attngen")
        if whole is None or "budgets" not in whole:
            return whole
        return whole["budgets"].get(who) or {"unfit": True}

    def value(self, who: str, name: str) -> Any:
        found = self.entry(who)
        if found is None or found.get("oom"):
            return None
        return found.get(name)

    def overhead(self, who: str) -> str:
        found = self.entry(who)
        if found is None:
            return NONE
        if found.get("oom"):
            return "OOM"
        if found.get("unfit"):
            return "none"
        need = found.get("temp_bytes")
        return "refused" if need is None else _bytes(need)

    def time(self, who: str) -> str:
        seconds = self.value(who, "time_s")
        return NONE if self.entry(who) is None else _or(seconds, show_time)

    def speed(self, who: str) -> str:
        """Against standard attention: more is faster, as in the paper."""
        return _or(self.ratio(who, "standard"), lambda x: f"{x - 1:+.0%}")

    def ratio(self, who: str, other: str) -> float | None:
        """How many times as fast as another."""
        own, others = self.value(who, "time_s"), self.value(other, "time_s")
        return others / own if own and others else None


def _bytes(count: int) -> str:
    """In at most eight characters: 810 KiB, and not 810.0 KiB."""
    number, unit = show_bytes(count).split()
    return f"{number.split('.')[0] if len(number) > 4 else number} {unit}"


def _or(value: Any, words: Callable[[Any], str]) -> str:
    return UNKNOWN if value is None else words(value)


def columns(target: Target, cells: dict[str, Any]) -> list[Column]:
    found = {int(n) for t, n, _ in map(str.split, cells) if t == target.name}
    return [Column(target.name, n, cells) for n in sorted(found)]


def show(
    target: Target,
    cells: dict[str, Any],
    paper: dict[str, Any],
    half: str = "inference",
    budgets: dict[str, str] = BUDGETS,
) -> str:
    """The table of a target.

    Args:
        half: of the paper's figures.
        budgets: attngen's rows, with their names.
    """
    made = columns(target, cells)
    if not made:
        return f"{target.name}: nothing yet\n"
    own = target.name == "tpu-v3"
    if target.tpu is not None:
        clock = show_count(target.tpu.clock_hz)
        times = f"time (XLA:TPU's cycles at {clock}Hz)"
    else:
        times = "time" + (" (measured)" if target.kind == "cpu" else " (not known)")
    said, rows = _Said(paper, half, made), WHO | budgets
    lines = [
        _row(f"{target.name}, {target.description}"[:LABEL], map(_power, made)),
        "",
        "overhead (certified)",
    ]
    for who, name in rows.items():
        lines.append(_row(f"  {name}", [c.overhead(who) for c in made]))
        if who in WHO:
            lines.append(_row(SAYS, said.overhead(who)))
    known = [w for w in rows if any(c.value(w, "time_s") for c in made)]
    lines += ["", times]
    for who in known:
        lines.append(_row(f"  {rows[who]}", [c.time(who) for c in made]))
        if own and who == "paper":
            lines.append(_row(SAYS, said.time()))
    lines += ["", "speed against standard attention"] if known else []
    for who in (w for w in known if w != "standard"):
        lines.append(_row(f"  {rows[who]}", [c.speed(who) for c in made]))
        if own and who == "paper":
            lines.append(_row(SAYS, said.speed()))
    lines += _notes(made)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _notes(made: list[Column]) -> list[str]:
    """What compilers said of what doesn't fit."""
    notes = []
    for who, name in WHO.items():
        ends = [c for c in made if (c.entry(who) or {}).get("oom")]
        if ends:
            words = " ".join(str((ends[0].entry(who) or {}).get("said")).split())
            words = words.rsplit("RESOURCE_EXHAUSTED: ", 1)[-1]
            said = f"OOM, {name} at {_power(ends[0])}: {words}"
            notes += textwrap.wrap(said, WIDTH, subsequent_indent="  ")
    return ["", *notes] if notes else []


def _name(who: str) -> str:
    return (WHO | BUDGETS)[who]


def _power(column: Column) -> str:
    return f"2^{column.n.bit_length() - 1}"


def _row(label: str, values: Any) -> str:
    return f"{label:<{LABEL}}" + "".join(f"{v:>{COLUMN}}" for v in values)


class _Said:
    """The paper's own figures, for the columns of a table."""

    def __init__(self, paper: dict[str, Any], half: str, made: list[Column]) -> None:
        self.rows = paper[half]
        known = {n: i for i, n in enumerate(paper["n"])}
        self.at = [known.get(c.n) for c in made]

    def _row(self, name: str) -> list[Any]:
        return [NONE if i is None else self.rows[name][i] for i in self.at]

    def overhead(self, who: str) -> list[str]:
        return [x or "OOM" for x in self._row(f"overhead_{who}")]

    def time(self) -> list[str]:
        return [_or(x, show_time) for x in self._row("time_paper_s")]

    def speed(self) -> list[str]:
        found = self._row("speed_relative_to_standard_percent")
        return [
            f"±{x[1]}%" if isinstance(x, list) else _or(x, lambda p: f"{p:+d}%")
            for x in found
        ]


# The picture.


def plot(
    named: list[Target], cells: dict[str, Any], paper: dict[str, Any], path: Path
) -> None:
    """Overhead, and speed beside the paper's algorithm, a row a target."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: pip install 'attngen[plot]'", file=sys.stderr)
        return
    if not named:
        return
    figure, axes = drawing.new_figure((10.0, 1.0 + 3.0 * len(named)), 2, len(named))
    for (left, right), target in zip(axes, named, strict=True):
        made = columns(target, cells)
        _overhead(left, target, made, paper)
        _speed(right, target, made)
    for one in axes[-1]:
        one.set_xlabel("tokens")
    shown: dict[str, Any] = {}
    for one in axes[:, 0]:
        shown |= dict(zip(*one.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        shown.values(), shown, loc="outside lower center", ncols=3, frameon=False
    )
    drawing.save(figure, path)


def _lengths(axes: Any, made: list[Column]) -> None:
    axes.set_xscale("log", base=2)
    powers = [f"$2^{{{c.n.bit_length() - 1}}}$" for c in made]
    axes.set_xticks([c.n for c in made], powers)
    axes.set_xlim(made[0].n / 1.5, made[-1].n * 1.5)
    axes.minorticks_off()


def _overhead(
    axes: Any, target: Target, made: list[Column], paper: dict[str, Any]
) -> None:
    from paper_tables import paper_bytes

    known = {w: [(c.n, c.value(w, "temp_bytes")) for c in made] for w in STYLES}
    numbers = [b for points in known.values() for _, b in points if b is not None]
    floor = drawing.floor_of(numbers)
    for who, points in known.items():
        colour, marker = STYLES[who]
        there = [(n, max(b, floor)) for n, b in points if b is not None]
        axes.plot(*zip(*there, strict=True) if there else ([], []), color=colour,
                  marker=marker, markersize=5, label=_name(who))  # fmt: skip
    for who in WHO if target.name == "tpu-v3" else ():
        said = [(c.n, paper_bytes(c.n, f"overhead_{who}")) for c in made]
        there = [(n, b) for n, b in said if b is not None]
        axes.plot(*zip(*there, strict=True) if there else ([], []), linestyle="none",
                  marker=STYLES[who][1], markersize=10, markerfacecolor="none",
                  color=STYLES[who][0], label=f"{_name(who)}, the paper says")  # fmt: skip
    axes.set_yscale("log", base=2)
    drawing.bytes_axis(axes.yaxis, floor, 0 in numbers)
    _lengths(axes, made)
    axes.set_title(f"{target.name}: temporaries, certified", fontsize=10)


def _speed(axes: Any, target: Target, made: list[Column]) -> None:
    timed = False
    for who, (colour, marker) in STYLES.items():
        ratios = [(c.n, c.ratio(who, "paper")) for c in made]
        there = [(n, r) for n, r in ratios if r is not None]
        timed = timed or bool(there)
        if there:
            axes.plot(*zip(*there, strict=True), color=colour, marker=marker,
                      markersize=5)  # fmt: skip
    how = "measured" if target.kind == "cpu" else "by estimated cycles"
    axes.set_title(f"{target.name}: times as fast as the paper's, {how}", fontsize=10)
    if not timed:
        axes.set_title(f"{target.name}: nothing says a time", fontsize=10)
        axes.set_axis_off()
        return
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}×"))
    _lengths(axes, made)
