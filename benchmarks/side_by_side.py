"""What the committed benchmarks share: contenders in turns, ratios, results that merge.

Contenders are compiled and judged by the reference before they are timed; a peer that
isn't here, or has no room, is named with the reason and left out.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import attngen
from attngen import AttentionSpec, inputs, peers, targets, timing
from attngen.bench import SETTLE_S, Judge, prepared, versions
from attngen.peers import Ready
from attngen.peers.jax_common import jax_arrays, ready
from attngen.units import show_bytes, show_time

RESULTS = Path(__file__).parent / "results"
NATIVE = {"jax.nn": "bthd", "sdpa": "bhtd"}  # how each library wants its arrays


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Contest:
    """Contenders by name, and what became of each."""

    ready: dict[str, Ready] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: timing.Rounds | None = None

    def own(
        self,
        name: str,
        kernel: attngen.Kernel,
        arrays: Mapping[str, Any] | None = None,
    ) -> None:
        """attngen's own kernel, compiled as its peers in JAX are.

        Args:
            arrays: its inputs and operands; None: random ones.
        """
        assert kernel.certificate is not None
        assert kernel.report is not None
        if arrays is None:
            arrays = inputs.arrays(kernel.spec, nan=False)
        self.ready[name] = ready(kernel.function, jax_arrays(kernel.spec, arrays), "")
        self.facts[name] = {
            "choice": kernel.plan.choice,
            "certified_bytes": kernel.certificate.temp_bytes,
            "max_error": kernel.report.max_error,
        }
        say(f"{name}: {kernel.certificate}, {kernel.plan.choice}")

    def peer(self, name: str, peer: str, spec: AttentionSpec) -> None:
        """A peer on arrays in its own layout, judged; left out where it can't be had."""
        spec = dataclasses.replace(spec, layout=NATIVE[peer], memory_budget=None)
        arrays = inputs.arrays(spec, nan=False)
        judge = Judge.of(spec, arrays, spec.q_len)
        entry, made = prepared(peers.get(peer), spec, arrays, judge)
        if made is None:
            self.facts[name] = {"left_out": entry.note}
            say(f"{name}: left out: {entry.note}")
            return
        self.ready[name] = made
        self.facts[name] = {
            "said": entry.note,
            "temp_bytes": entry.temp_bytes,
            "status": entry.status,
            "error": entry.error,
        }
        say(f"{name}: {entry.note}, {entry.status}")

    def call(self, name: str, call: Callable[[], Any]) -> None:
        """Anything else that computes the same, judged elsewhere."""
        self.ready[name] = Ready(call, lambda out: (out,), "")
        self.facts[name] = {}

    def run(self, rounds: int) -> None:
        """All that is ready, in turns."""

        def on_round(found: timing.Rounds) -> bool:
            say(f"round {found.count} of {rounds}")
            return False

        calls = {n: r.call for n, r in self.ready.items()}
        self.rounds = timing.interleaved(
            calls, rounds, on_round=on_round, settle_s=SETTLE_S
        )
        if self.rounds.noise >= timing.NOISY:
            say(f"noise {self.rounds.noise:.0%}: more rounds, or a quieter machine")

    def ratio(self, slow: str, fast: str) -> timing.Spread | None:
        """How many times as fast the second is; None where one was left out."""
        if self.rounds is None or not {slow, fast} <= set(self.ready):
            return None
        return self.rounds.ratio(slow, fast)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, all samples included."""
        assert self.rounds is not None
        samples = self.rounds.samples_s
        return {
            "rounds": self.rounds.count,
            "noise": self.rounds.noise,
            "yardsticks_s": self.rounds.yardsticks_s,
            "contenders": {
                n: fact | {"samples_s": samples.get(n, [])}
                for n, fact in self.facts.items()
            },
        }

    def times(self) -> list[str]:
        """A line a contender: its median."""
        assert self.rounds is not None
        return [
            f"    {n:<34}{show_time(timing.spread(s).median):>10}"
            for n, s in self.rounds.samples_s.items()
        ]


@dataclass(frozen=True)
class Goal:
    """Something wanted, and what was seen of it.

    Args:
        wanted: at least this ratio, or at most these bytes; None: shown only.
        seen: a ratio's median and quartiles, bytes, or None where it couldn't be had.
    """

    what: str
    wanted: float | None
    seen: timing.Spread | int | None

    @property
    def met(self) -> bool | None:
        if self.wanted is None or self.seen is None:
            return None
        if isinstance(self.seen, timing.Spread):
            return self.seen.median >= self.wanted
        return self.seen <= self.wanted

    def __str__(self) -> str:
        ratio = isinstance(self.seen, timing.Spread)
        verdict = {True: "yes", False: "NO", None: ""}[self.met]
        if self.wanted is None:
            wanted = ""
        elif ratio or self.wanted < 100:
            wanted = f"≥ {self.wanted:.2f}×"
        else:
            wanted = f"≤ {show_bytes(int(self.wanted))}"
        if self.seen is None:
            seen = "—"
        elif isinstance(self.seen, timing.Spread):
            s = self.seen
            seen = f"{s.median:.2f}× [{s.low:.2f} {s.high:.2f}]"
        else:
            seen = show_bytes(self.seen)
        return f"{self.what:<52}{wanted:>11}  {seen:<22}{verdict}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        seen = asdict(self.seen) if isinstance(self.seen, timing.Spread) else self.seen
        return {
            "what": self.what,
            "wanted": self.wanted,
            "seen": seen,
            "met": self.met,
        }


def circumstances() -> dict[str, Any]:
    """The machine, and versions of all that computes."""
    return {"device": targets.get().to_dict(), "versions": versions()}


def merge(file: str, parts: Mapping[str, Any]) -> Path:
    """Replace some parts of a results file; the others stay as they were seen."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / file
    known = json.loads(path.read_text()) if path.exists() else {}
    known = dict(sorted((known | dict(parts)).items()))
    path.write_text(json.dumps(known, indent=1) + "\n")
    return path
