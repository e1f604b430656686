"""Pictures, by matplotlib: the frontier of memory and time, and what all pictures share.

matplotlib is asked for when something is drawn, and not before.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attngen.errors import BackendError, FileError
from attngen.frontier import Frontier, Point
from attngen.units import show_bytes, show_time

ENDINGS = (".png", ".svg")
TICKS = 4  # from each tick of bytes to the next
LEAST_FLOOR = TICKS**5  # no floor below that: programs of a few bytes stand on it
# Okabe and Ito's colours, which the colour-blind tell apart; each has a marker of its own
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
MARKS = ((ORANGE, "s"), (GREEN, "D"))  # of programs that aren't attngen's
HEADROOM = (
    3.0  # of time above the line and what is beside it: slower plans aren't shown
)
SIZE = (8.0, 5.0)  # inches
LABEL = 8.5  # points
LINE = "the best within so many bytes; queries × keys of a chunk"
# where a label may stand beside its point: points to the right, upwards; then how it is set
PLACES = (
    (5, 5, "left", "bottom"),
    (-5, -5, "right", "top"),
    (5, -5, "left", "top"),
    (-5, 5, "right", "bottom"),
    (0, 9, "center", "bottom"),
    (0, -9, "center", "top"),
    (9, 0, "left", "center"),
    (-9, 0, "right", "center"),
    (12, 12, "left", "bottom"),
    (-12, -12, "right", "top"),
)


def check(
    path: Path, hint: str = "`attngen tune --json` lists all candidates as numbers"
) -> None:
    """Refuse what couldn't be drawn in the end, before time is spent.

    Args:
        hint: what shows the same without matplotlib.

    Raises:
        FileError: the file is of no kind that is drawn, or its folder isn't there, or can't
            be written.
        BackendError: matplotlib isn't installed.
    """
    if path.suffix.lower() not in ENDINGS:
        raise FileError(
            "A picture is one of a few kinds of file.",
            got=path.name or str(path),
            needed="a name that ends in " + " or ".join(ENDINGS),
        )
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise FileError(
            f"{path} can't be written.",
            got="a folder" if path.is_dir() else f"no folder {path.parent}",
            needed="a file's name in a folder that is there",
        )
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise FileError(
            f"{path} can't be written.",
            got=error.strerror,
            needed="a folder that can be written",
        ) from error
    if importlib.util.find_spec("matplotlib") is None:
        raise BackendError(
            "matplotlib draws, and isn't installed.",
            got="no matplotlib",
            needed="pip install 'attngen[plot]'",
            hint=hint,
        )


def draw(found: Frontier, path: Path) -> None:
    """Write a frontier's picture to a .png or .svg file.

    Raises:
        FileError: it has no points, or can't be written.
        BackendError: matplotlib isn't installed.
    """
    check(path)
    if not found.points:
        raise FileError(
            "There is nothing to draw.",
            got=f"no certified plan of {found.what} has a time on {found.target}",
            needed="plans that were timed, or whose compiler says a time",
        )
    figure, axes = new_figure()
    drawn = [p for p in (*found.points, *found.others) if p.drawn]
    floor = floor_of(p.temp_bytes for p in drawn)
    top = HEADROOM * max(_time(p) for p in (*found.line, *found.others) if p.drawn)
    shown = [p for p in found.points if _time(p) <= top]
    at = [(max(p.temp_bytes or 0, floor), p.time_s) for p in shown]
    cut = len(found.points) - len(shown)
    also = f", {cut} more are slower than shown" if cut else ""
    axes.scatter(*zip(*at, strict=True), s=14, color=GREY, alpha=0.6, linewidths=0,
                 label=f"certified plans ({len(shown)}{also})", zorder=2)  # fmt: skip
    _line(axes, found, floor, right=max(p.temp_bytes or 0 for p in drawn))
    for p, (colour, marker) in zip(found.others, MARKS, strict=False):
        where = [max(p.temp_bytes or 0, floor)], [p.time_s]
        axes.scatter(*where if p.drawn else ([], []), s=64, color=colour,
                     marker=marker, label=_said(p), zorder=4)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=0.08, y=0.15)
    bytes_axis(axes.xaxis, floor, any(p.temp_bytes == 0 for p in drawn))
    time_axis(axes.yaxis)
    zero = "; 0 B at the left edge" if any(p.temp_bytes == 0 for p in drawn) else ""
    axes.set_xlabel(f"temporaries beyond inputs and outputs, certified{zero}")
    axes.set_ylabel(found.time)
    axes.set_title(f"{found.what}\non {found.target}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, fontsize=LABEL, frameon=False)
    _labels(figure, axes, found, floor)
    save(figure, path)


def _time(point: Point) -> float:
    assert point.time_s is not None
    return point.time_s


def _line(axes: Any, found: Frontier, floor: float, right: float) -> None:
    """The best time that each number of bytes can have: steps down, labelled elsewhere."""
    xs = [max(p.temp_bytes or 0, floor) for p in found.line]
    ys = [p.time_s for p in found.line]
    axes.plot([*xs, max(right, xs[-1])], [*ys, ys[-1]], drawstyle="steps-post",
              color=BLUE, linewidth=1.4, zorder=3, label=LINE)  # fmt: skip
    axes.scatter(xs, ys, s=22, color=BLUE, zorder=3, linewidths=0)


def _said(p: Point) -> str:
    if p.temp_bytes is None:
        return f"{p.name}: doesn't compile for it"
    if p.time_s is None:
        return f"{p.name}: {show_bytes(p.temp_bytes)}, its time isn't known"
    return f"{p.name}: {show_bytes(p.temp_bytes)}, {show_time(p.time_s)}"


def _labels(figure: Any, axes: Any, found: Frontier, floor: float) -> None:
    """Chunk sizes where the line bends, each where it covers nothing; else left out."""
    figure.canvas.draw()
    seen = figure.canvas.get_renderer()
    taken: list[Any] = []
    frame = axes.get_window_extent(seen)
    spots = [p for p in (*found.points, *found.others) if p.drawn]
    dots = [
        axes.transData.transform((max(p.temp_bytes or 0, floor), p.time_s))
        for p in spots
    ]
    line = _pixels(axes, found, floor)
    first, *rest = found.bends
    for point in [first, *rest[-1:], *rest[:-1]]:  # the ends have the first choice
        _label(axes, seen, point, floor, frame, taken, [*dots, *line])


def _label(
    axes: Any,
    seen: Any,
    point: Point,
    floor: float,
    frame: Any,
    taken: list[Any],
    dots: Sequence[Any],
) -> None:
    where = (max(point.temp_bytes or 0, floor), point.time_s)
    for right, up, across, upright in PLACES:
        text = axes.annotate(
            point.name, where, (right, up), textcoords="offset points",
            fontsize=LABEL, color=BLUE, ha=across, va=upright, zorder=5,
        )  # fmt: skip
        box = text.get_window_extent(seen)
        inside = frame.containsx(box.x0) and frame.containsx(box.x1)
        inside = inside and frame.containsy(box.y0) and frame.containsy(box.y1)
        padded = box.padded(1.5)
        clear = not any(padded.overlaps(other) for other in taken)
        if inside and clear and not any(padded.contains(*d) for d in dots):
            taken.append(padded)
            return
        text.remove()


def _pixels(axes: Any, found: Frontier, floor: float) -> list[Any]:
    """Points along the line, close enough that no label gets between them."""
    corners: list[Any] = []
    for p in found.line:
        here = axes.transData.transform((max(p.temp_bytes or 0, floor), p.time_s))
        if corners:
            corners.append((here[0], corners[-1][1]))
        corners.append(tuple(here))
    dense = []
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        count = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0)) / 4))
        for i in range(count + 1):
            dense.append((x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count))
    return dense


# What the pictures of benchmarks share.


def new_figure(
    size: tuple[float, float] = SIZE, columns: int = 1, rows: int = 1
) -> tuple[Any, Any]:
    """A figure that no window shows, and its axes: one, or rows of columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    return figure, axes if axes.size > 1 else axes[0][0]


def save(figure: Any, path: Path) -> None:
    """Write a figure.

    Raises:
        FileError: it can't be written.
    """
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise FileError(
            f"{path} can't be written.",
            got=error.strerror,
            needed="a folder that can be written",
        ) from error


def floor_of(counts: Any) -> float:
    """Where programs without temporaries stand on an axis of powers."""
    least = min((c for c in counts if c), default=TICKS * LEAST_FLOOR)
    return max(LEAST_FLOOR, float(TICKS) ** (math.floor(math.log(least, TICKS)) - 1))


def bytes_axis(axis: Any, floor: float, zero: bool) -> None:
    """Ticks of binary units on a logarithmic axis; `zero`: 0 B at the floor."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    def name(count: float, _: object = None) -> str:
        if zero and count < 1.01 * floor:
            return "0 B" if count > 0.99 * floor else ""
        return show_bytes(count).replace(".0", "")

    axis.set_major_locator(LogLocator(base=TICKS, numticks=16))
    axis.set_major_formatter(FuncFormatter(name))
    axis.set_minor_locator(LogLocator(base=2, numticks=40))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def time_axis(axis: Any) -> None:
    """Ticks of seconds at 1, 2 and 5 on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axis.set_major_formatter(
        FuncFormatter(
            lambda s, _: show_time(s).replace(".0 ", " ").replace(".00 ", " ")
        )
    )
    axis.set_minor_locator(LogLocator(base=10, subs="all", numticks=20))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
