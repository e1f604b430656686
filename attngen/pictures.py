"""The tiles of a plan as a picture: full, partial or empty; by matplotlib, or as text.

from attngen import pictures
pictures.draw(plan, "mask.png")
print(pictures.text(plan))
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from attngen import backends, drawing
from attngen.plans import Plan
from attngen.skipping import counted, decided_by, percent, say_which, share
from attngen.tilemap import EDGE, EMPTY, FULL, Cells, cells

WIDTH = 100  # columns of text
MOST_LINES, MOST_COLUMNS = 40, 80  # of the map itself
MARKS = {FULL: "█", EDGE: "▒", EMPTY: "·"}
# from dark to light, so that a grey print tells them apart, too
COLOURS = {FULL: drawing.BLUE, EDGE: "#9CCBE6", EMPTY: "#F2F2F2"}
PIXELS = 512  # cells each way, of a file
RULED = 48  # tiles each way, between which lines are drawn
ROUNDED = 0.01  # a share of work and one of tiles that differ less aren't told apart
LEAST = 16  # lines and columns of a map of few tiles, each then several characters


def check(path: Path) -> None:
    """Refuse a file that couldn't be drawn, before anything is planned.

    Raises:
        FileError, BackendError: see drawing.check.
    """
    drawing.check(path, hint="`attngen plan --picture -` draws in the terminal")


def draw(plan: Plan, path: str | Path) -> None:
    """Write the tiles of a head to a .png or .svg file: queries down, keys to the right.

    Raises:
        FileError: it can't be written.
        BackendError: matplotlib isn't installed.
    """
    path = Path(path)
    check(path)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    plan = backends.seen(plan)
    spec, found = plan.spec, cells(plan, PIXELS, PIXELS)
    square = 0.25 <= spec.q_len / spec.kv_len <= 4
    figure, axes = drawing.new_figure(size=(7.0, 8.4) if square else (8.0, 5.0))
    axes.grid(False)
    rows, columns = found.kinds.shape
    right, bottom = (
        columns * found.wide * plan.k_chunk,
        rows * found.high * plan.q_chunk,
    )
    axes.imshow(
        found.kinds,
        cmap=ListedColormap([COLOURS[kind] for kind in (FULL, EDGE, EMPTY)]),
        vmin=FULL - 0.5,
        vmax=EMPTY + 0.5,
        interpolation="nearest",
        extent=(0, right, bottom, 0),
        aspect="equal" if square else "auto",
    )
    axes.set_xlim(0, spec.kv_len)  # the last cells hold fewer
    axes.set_ylim(spec.q_len, 0)
    if max(_tiles(plan)) <= RULED:
        _rules(axes, plan)
    _ticks(axes.xaxis, spec.kv_len)
    _ticks(axes.yaxis, spec.q_len)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    lines = [x for line in (_title(plan), *_notes(plan, found)) for x in _folded(line)]
    axes.set_title("\n".join(lines), fontsize=9)
    named = [
        Patch(
            facecolor=COLOURS[kind], edgecolor=drawing.GREY, linewidth=0.4, label=said
        )
        for kind, said in _legend(plan)
    ]
    figure.legend(
        handles=named,
        loc="outside lower center",
        fontsize=drawing.LABEL,
        frameon=False,
    )
    drawing.save(figure, path)


def text(plan: Plan) -> str:
    """The tiles of a head in characters, at most 100 columns and about 50 lines."""
    plan = backends.seen(plan)
    spec, found = plan.spec, cells(plan, MOST_LINES, MOST_COLUMNS)
    rows, columns = found.kinds.shape
    high = max(1, min(2, LEAST // rows))
    # characters are about twice as high as they are wide
    square = 2 * high * (spec.kv_len / columns) / (spec.q_len / rows)
    least = -(-LEAST // columns)
    wide = max(1, min(max(round(square), least), MOST_COLUMNS // columns))
    label = max(len("queries"), len(str(spec.q_len)))
    ends = f"0{spec.kv_len:>{columns * wide - 1}}"
    lines = [*textwrap.wrap(_title(plan), WIDTH), ""]
    lines += [f"{'':{label}}  keys", f"{'queries':>{label}}  {ends}"]
    said = max(1, rows // 8)  # from each row that is labelled to the next
    for row in range(rows):
        drawn = "".join(MARKS[int(kind)] * wide for kind in found.kinds[row])
        at = str(row * found.high * plan.q_chunk) if row % said == 0 else ""
        lines.append(f"{at:>{label}}  {drawn}")
        lines += [f"{'':{label}}  {drawn}"] * (high - 1)
    lines += [f"{spec.q_len:>{label}}", ""]
    lines += [f"{MARKS[kind]} {said}" for kind, said in _legend(plan)]
    for note in _notes(plan, found):
        lines += textwrap.wrap(note, WIDTH)
    return "\n".join(lines)


def _tiles(plan: Plan) -> tuple[int, int]:
    """Chunks of queries, and of keys."""
    return -(-plan.spec.q_len // plan.q_chunk), -(-plan.spec.kv_len // plan.k_chunk)


def _title(plan: Plan) -> str:
    spec, part = plan.spec, share(plan)
    more = " or more" if decided_by(plan) else ""
    skipped = (
        f"{percent(part)}{more} of the square is skipped"
        if part
        else "nothing is skipped"
    )
    return (
        f"{spec.q_len} queries × {spec.kv_len} keys in tiles of {plan.q_chunk} × "
        f"{plan.k_chunk}: {skipped}"
    )


def _legend(plan: Plan) -> list[tuple[int, str]]:
    """Each kind, and how many tiles of a head are of it."""
    tiles, names = plan.tiles, decided_by(plan)
    said = {
        FULL: ("full", tiles.full),
        EDGE: ("partial", tiles.edge),
        EMPTY: ("empty, never visited", tiles.empty),
    }
    if names:
        said[FULL] = ("always full", tiles.full)
        own = f"partial, full or empty: {say_which(names)} at run time"
        said[EDGE] = (own, tiles.edge)
        said[EMPTY] = ("always empty, never visited", tiles.empty)
    return [
        (
            kind,
            f"{name}: {count} tile{'s' * (count != 1)}, {percent(count / tiles.total)}",
        )
        for kind, (name, count) in said.items()
    ]


def _notes(plan: Plan, found: Cells) -> list[str]:
    """What a reader of the map has to know besides."""
    spec, names, notes = plan.spec, decided_by(plan), list(plan.warnings)
    if (found.high, found.wide) != (1, 1):
        notes.append(
            f"each cell is {found.high} × {found.wide} tiles, partial where they differ"
        )
    apart = share(plan) - plan.tiles.empty / plan.tiles.total
    if apart >= ROUNDED:
        notes.append("of partial tiles a part is skipped, too")
    elif apart <= -ROUNDED:
        notes.append("the last tiles, with fewer queries or keys, are computed whole")
    if names:
        notes.append(
            f"{' and '.join(names)} can make more tiles empty: drawn and counted is the most "
            "that is visited"
        )
    if counted(plan):
        notes.append(f"drawn and counted for {', '.join(counted(plan))}")
    if spec.kv_lengths or spec.static_q_offset is None:
        notes.append("what comes at run time, lengths and offsets, at its largest")
    return notes


def _folded(line: str) -> list[str]:
    return textwrap.wrap(line, 88)


def _ticks(axis: Any, length: int) -> None:
    """Positions at quarters, in whole tokens."""
    at = sorted({length * i // 4 for i in range(5)})
    axis.set_ticks(at, labels=[str(x) for x in at])


def _rules(axes: Any, plan: Plan) -> None:
    """Thin lines between tiles."""
    for lines, chunk, length in (
        (axes.axhline, plan.q_chunk, plan.spec.q_len),
        (axes.axvline, plan.k_chunk, plan.spec.kv_len),
    ):
        for at in range(chunk, length, chunk):
            lines(at, color="white", linewidth=0.6)
