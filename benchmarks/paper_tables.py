"""The paper's inference table without a TPU: standard attention, its algorithm, attngen.

Rabe & Staats, arXiv 2112.05682, table 2: one head, d = 64, bfloat16 in, float32 out, from
2^8 to 2^20 tokens. Overhead is what the target's own compiler certifies of temporaries. A
time is its estimate of cycles at the target's clock on a TPU; measured on this machine's
processor, up to MEASURED tokens; unknown by XLA:GPU. attngen's plans are tuned for the target,
and for ever smaller budgets: the best of all, within the paper's own overhead, and within
less. The paper's figures are in data/paper_tables.json.

    python benchmarks/paper_tables.py [--targets tpu-v3,h100] [--sizes 10,14] [--seconds 60]

A cell is a target, a length and an algorithm. It is written when it is done, and compiled
again only where what it is made of is another: the model's ranking, the emitted source, the
peer's, a version. One whose tuning was stopped by --seconds goes on, by wisdom, with --more.

Writes benchmarks/results/paper_tables.json and paper_tables.png (where matplotlib is).
"""

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paper_shown import plot, show

import attngen
from attngen import (
    backends,
    building,
    descent,
    frontier,
    planner,
    presets,
    recalling,
    shortlist,
    sweeping,
    targets,
)
from attngen.backends.jax.compiler import PACKAGES
from attngen.errors import AttngenError, CompileError
from attngen.keys import canonical
from attngen.peers import references
from attngen.plans import Plan
from attngen.records import Record
from attngen.reports import Certificate
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import parse_bytes, show_bytes
from attngen.version import installed

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "paper_tables.json"
PAPER = HERE / "data" / "paper_tables.json"
TARGETS = ("tpu-v3", "tpu-v5e", "tpu-v6e", "h100", "cpu")
SIZES = tuple(range(8, 21, 2))  # of 2^size tokens
MEASURED = 2**13  # tokens up to which a processor's calls take seconds at most
SMALL = {"1MiB": 2**20, "256KiB": 2**18}  # budgets beside none and the paper's own
JAX = backends.get("jax")
PEERS = {"standard": "plain", "paper": "paper"}
WHO = (*PEERS, "attngen")


def paper() -> dict[str, Any]:
    """The paper's figures, as it has them."""
    found: dict[str, Any] = json.loads(PAPER.read_text())
    return found


def paper_bytes(
    n: int, row: str = "overhead_paper", half: str = "inference"
) -> int | None:
    """What the paper says of a length; its MB are 2^20 bytes: 4.0MB are 1024² float32."""
    said = paper()
    if n not in said["n"]:
        return None
    text = said[half][row][said["n"].index(n)]
    return None if text is None else parse_bytes(text.replace("B", "iB"))


@dataclass(frozen=True)
class Cell:
    """What is asked: who computes so many tokens where."""

    target: str
    n: int
    who: str

    @property
    def name(self) -> str:
        return f"{self.target} {self.n} {self.who}"

    @property
    def spec(self) -> AttentionSpec:
        return dataclasses.replace(
            presets.get("paper-16k"), q_len=self.n, kv_len=self.n
        )

    @property
    def device(self) -> Target:
        return targets.get(self.target)

    @property
    def timed(self) -> bool:
        """Whether something says a time."""
        kind = self.device.kind
        return kind == "tpu" or (kind == "cpu" and self.n <= MEASURED)

    @property
    def budgets(self) -> dict[str, int | None]:
        own = paper_bytes(self.n)
        return {"none": None} | ({"paper's": own} if own else {}) | SMALL

    @property
    def digest(self) -> str:
        """Of all that it is made of: another one makes it stale."""
        parts: list[Any] = [self.spec.to_json(), installed(PACKAGES[self.device.kind])]
        if self.who in PEERS:
            module = type(references.peers.get(PEERS[self.who])).__module__
            parts.append(inspect.getsource(importlib.import_module(module)))
        else:
            ranked = planner.rank(self.spec, self.device, JAX, None)
            parts += [[p.choice, p.temp_bytes, p.time_s] for p in ranked]
            parts += [attngen.emit(ranked[0]).digest, list(self.budgets.items())]
        return hashlib.sha256(canonical(parts).encode()).hexdigest()


# What a cell holds.


def of_peer(cell: Cell) -> dict[str, Any]:
    """What the compiler says of standard attention, or of the paper's algorithm."""
    found = references.compiled(
        PEERS[cell.who], cell.spec, cell.device, timed=cell.timed
    )
    made: dict[str, Any] = {"temp_bytes": found.temp_bytes, "time_s": found.time_s}
    if found.certificate is not None:
        made["estimated_cycles"] = found.certificate.estimated_cycles
        made["on_chip_bytes"] = found.certificate.on_chip_bytes
    kept = cell.spec.bytes_of("q", "k", "v", "out")
    return made | room(cell.device, kept, found.temp_bytes, found.failed)


def room(
    device: Target, kept: int, temp_bytes: int | None, failed: str | None
) -> dict[str, Any]:
    """Whether it is more than the device has, in the compiler's words.

    Args:
        kept: bytes of inputs and outputs.
    """
    has = device.memory_bytes
    words = failed or ""
    oom = "RESOURCE_EXHAUSTED" in words or "doesn't fit the device" in words
    if temp_bytes is not None and has is not None:
        need = temp_bytes + kept
        if need > has:
            oom = True
            words = f"needs {show_bytes(need)} of {show_bytes(has)}. {words}".strip()
    return {"oom": oom, "said": words or None}


def of_attngen(cell: Cell, seconds: float) -> dict[str, Any]:
    """The best certified plan within each budget, each choice with its source's digest."""
    if not cell.timed:
        return {"budgets": _certified(cell), "stopped": False}
    record = attngen.tune(
        cell.spec,
        cell.target,
        "jax",
        seconds=seconds,
        sweep=True,
        on_progress=_quietly,
    )
    found = {n: _tuned(cell, b, record) for n, b in cell.budgets.items()}
    return {"budgets": found, "stopped": _stopped(record)}


def _stopped(record: Record) -> bool:
    """Whether a search, or the sweep over budgets, had less time than it takes."""
    done = {f.budget for f in record.finished if not f.stopped}
    budget = None
    while budget in done:
        budget = next(iter(sweeping.below(record, budget, {})), -1)
    return budget != -1


def _within(cell: Cell, budget: int | None) -> AttentionSpec:
    return dataclasses.replace(cell.spec, memory_budget=budget)


def _tuned(cell: Cell, budget: int | None, record: Record) -> dict[str, Any] | None:
    """The fastest of a record that is still emitted as it was; None: none fits."""
    spec = _within(cell, budget)
    known = recalling.recall(spec, cell.device, JAX, "estimate", {})
    if known is None:
        return None
    choice = known[0].choice
    neutral = recalling.neutral(spec, cell.device, JAX, choice)
    digest = attngen.emit(neutral).digest
    made = record.find(choice, digest)
    points = frontier.of(record, cell.device, []).points
    same = (p for p in points if p.choice == choice and p.temp_bytes == made.temp_bytes)
    return {
        "choice": choice,
        "digest": digest,
        "temp_bytes": made.temp_bytes,
        "time_s": next(same).time_s,
    }


def _certified(cell: Cell) -> dict[str, dict[str, Any] | None]:
    """Of the model's best within each budget, certified: that which it likes best, fits.

    Times aren't known. The model's bytes are an upper bound: what it likes without a budget
    may fit a small one.
    """
    plans: list[Plan] = []
    for budget in cell.budgets.values():
        spec = _within(cell, budget)
        ranked = planner.rank(spec, cell.device, JAX, None, smallest=descent.TRIES)
        for plan in shortlist.different(ranked, descent.TRIES):
            neutral = recalling.neutral(cell.spec, cell.device, JAX, plan.choice)
            plans += (
                [neutral] if neutral.choice not in [p.choice for p in plans] else []
            )
    made = [(p, attngen.emit(p)) for p in sorted(plans, key=lambda p: p.time_s)]
    answers = building.certify_many(made, JAX, cell.target)
    entries = [
        {
            "choice": plan.choice,
            "digest": source.digest,
            "temp_bytes": answer.temp_bytes,
            "time_s": None,
        }
        for (plan, source), answer in zip(made, answers, strict=True)
        if isinstance(answer, Certificate) and answer.temp_bytes is not None
    ]
    return {
        name: next(
            (e for e in entries if budget is None or e["temp_bytes"] <= budget), None
        )
        for name, budget in cell.budgets.items()
    }


# All cells, and those that are missing.


def run(
    cells: list[Cell], known: dict[str, Any], seconds: float, more: bool
) -> Iterator[dict[str, Any]]:
    """All cells of the inference table; see `done`."""

    def of(cell: Cell) -> dict[str, Any]:
        return of_peer(cell) if cell.who in PEERS else of_attngen(cell, seconds)

    return done(cells, known, of, more)


def done(
    cells: list[Cell],
    known: dict[str, Any],
    of: Callable[[Cell], dict[str, Any]],
    more: bool = False,
) -> Iterator[dict[str, Any]]:
    """All cells, each time one is done; what is known and not stale isn't compiled."""
    for cell in cells:
        digest = cell.digest
        have = known.get(cell.name)
        if have and have["digest"] == digest and not (more and have.get("stopped")):
            continue
        say(f"{cell.name} …")
        try:
            made = of(cell)
        except CompileError as error:
            made = {"failed": f"{error.what} {error.got}"[:400]}
        known = known | {cell.name: {"digest": digest} | made}
        yield known


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quietly(text: str) -> None:
    if not text.startswith("≈"):
        say(f"  {text}")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["cells"] if path.exists() else {}


def write(path: Path, name: str, cells: dict[str, Any]) -> None:
    whole = {
        "benchmark": name,
        "versions": installed(("attngen", *PACKAGES["tpu"], *PACKAGES["cuda"])),
        "processor": targets.get().to_dict(),
        "clock_hz": {n: t.clock_hz for n in TARGETS if (t := targets.get(n).tpu)},
        "cells": dict(sorted(cells.items())),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--seconds", type=float, default=60.0, help="of tuning a cell")
    parser.add_argument("--more", action="store_true", help="tune what was stopped")
    parser.add_argument("--show", action="store_true", help="compile nothing")
    given = parser.parse_args()
    names = given.targets.split(",")
    sizes = [2 ** int(x) for x in given.sizes.split(",")]
    cells = [Cell(t, n, who) for t in names for n in sizes for who in WHO]
    known = read(RESULTS)
    try:
        for found in [] if given.show else run(cells, known, given.seconds, given.more):
            known = found
            write(RESULTS, "the paper's inference table", known)
    except AttngenError as error:
        sys.exit(str(error))
    for name in names:
        print(show(targets.get(name), known, paper()))
    drawn = [n for n in TARGETS if any(key.startswith(f"{n} ") for key in known)]
    plot([targets.get(n) for n in drawn], known, paper(), RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
