"""attngen beside the peers that are installed: checked, then timed in turns.

    comparison = bench.compare(spec, peers=("jax.nn", "sdpa"))
    print(comparison)

All contenders get the same numbers in one process, and take turns: attngen in the spec's
layout, each peer contiguous in the one that it is at home in, moved there before anything
is timed. Each is first judged by the reference, in the spec's layout: one that computes
something else is timed as well, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from attngen import api, backends, inputs, reference, targets, timing, tuning, validator
from attngen import peers as known
from attngen.comparison import (
    EXACT,
    FAILED,
    NOT_INSTALLED,
    OTHER,
    OWN,
    REFUSED,
    ROUNDS_MORE,
    TOO_LARGE,
    Comparison,
    Entry,
)
from attngen.errors import CALL_FAULTS, BackendError, PlanError, TargetError
from attngen.kernel import Kernel
from attngen.peers import Peer, Ready
from attngen.peers.matrices import available_bytes
from attngen.plans import Option
from attngen.reference import Array, numpy_dtype
from attngen.spec import AttentionSpec
from attngen.units import show_bytes
from attngen.version import installed

ROUNDS = 15
SETTLE_S = (
    0.02  # after each sample: torch's threads look for more work for about half that
)
# Beyond this many times what is allowed, an error is no rounding.
FAR = 8
Say = Callable[[str], None]


def compare(
    spec: AttentionSpec,
    *,
    target: str | None = None,
    backend: str | None = None,
    peers: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    effort: str = "estimate",
    fix: Mapping[str, Option] | None = None,
    on_progress: Say | None = None,
) -> Comparison:
    """Time attngen's kernel and its peers side by side on this machine.

    Args:
        spec: what to compute; forward.
        target: None, or the target that this machine is.
        backend: "jax" (None).
        peers: some of `peers.names()`; None: all.
        rounds: how many; each contender is called once a round (a short one several times).
        effort, fix: of attngen's own kernel, as for `build`.
        on_progress: receives what is being done, a line each.

    Raises:
        TargetError: the target isn't this machine.
        BackendError: the backend has no compiled functions to time.
        PeerError: there is no such peer.
        PlanError: there are no rounds.
        TimingError: the clock stands, the machine is too noisy to tell anything, or its
            memory too small for the inputs.
        As `build`, of attngen's own kernel.
    """
    device = _here(target)
    if backends.get(backend).name != "jax":
        raise BackendError("bench times what JAX runs.", got=backend, needed="jax")
    chosen = [
        known.get(name)
        for name in dict.fromkeys(known.names() if peers is None else peers)
    ]
    if rounds < 1:
        raise PlanError(
            "There is nothing to time in no rounds.",
            got=f"rounds={rounds}",
            needed="at least 1; 15 make a steady median",
        )
    tuning.check_room(spec, device)
    say = on_progress or (lambda line: None)
    say("building attngen's own …")
    kernel = api.build(spec, target, "jax", effort, fix, on_progress=on_progress)
    arrays = inputs.arrays(spec, nan=False)
    say("computing the reference …")
    judge = Judge.of(spec, arrays, kernel.plan.q_chunk)
    found: list[Contender] = [_own(kernel, arrays, judge)]
    for peer in chosen:
        say(f"checking {peer.name} …")
        found.append(prepared(peer, spec, arrays, judge))
    calls = {entry.name: ready.call for entry, ready in found if ready is not None}
    timed = _timed(calls, rounds, say)
    return Comparison(
        spec=spec,
        plan=kernel.plan,
        entries=tuple(
            replace(entry, samples_s=tuple(timed.samples_s.get(entry.name, ())))
            for entry, _ in found
        ),
        rows=len(judge.rows),
        yardsticks_s=tuple(timed.yardsticks_s),
        device=device.to_dict(),
        versions=versions(),
    )


def _here(target: str | None) -> targets.Target:
    """The target that this machine is, which alone can be timed."""
    here = targets.get()
    if targets.get(target).name != here.name:
        raise TargetError(
            "bench times on the device, and this machine is another.",
            got=f"target {target!r}",
            needed=here.name,
            hint="run bench there; without it, certify says a plan's bytes, and build "
            "judges its numbers",
        )
    return here


# Contenders: prepared, checked, and never a reason to stop.

Contender = tuple[Entry, Ready | None]


def _own(kernel: Kernel, arrays: Mapping[str, Array], judge: Judge) -> Contender:
    """attngen's own kernel, compiled as its peers in JAX are."""
    from attngen.peers.jax_common import jax_arrays, ready

    note = backends.get(kernel.plan.backend).describe(kernel.plan.choice)
    made = ready(kernel.function, jax_arrays(kernel.spec, arrays), note)
    made = replace(made, prepared_s={})  # `build` has compiled it before
    return _judged(OWN, made, judge), made


def prepared(
    peer: Peer, spec: AttentionSpec, arrays: Mapping[str, Array], judge: Judge
) -> Contender:
    """A peer's entry, and what is to be timed where it can be.

    Args:
        arrays: `inputs.arrays` of the spec.
        judge: of the same arrays.
    """
    if not known.installed(peer):
        return Entry(peer.name, NOT_INSTALLED, f"needs {peer.package}"), None
    if (reason := known.refuse(peer, spec)) is not None:
        return Entry(peer.name, REFUSED, reason), None
    if (reason := _no_room(peer.matrix_bytes(spec))) is not None:
        return Entry(peer.name, TOO_LARGE, reason), None
    return _checked(peer, spec, arrays, judge)


def _no_room(need: int | None) -> str | None:
    """Why something isn't even tried: it would take more memory than there is."""
    free = available_bytes()
    if need is None or free is None or need <= free:
        return None
    return f"needs about {show_bytes(need)}, {show_bytes(free)} are free"


def _checked(
    peer: Peer, spec: AttentionSpec, arrays: Mapping[str, Array], judge: Judge
) -> Contender:
    """A peer made, called once, and judged; what it raises becomes its entry."""
    try:
        ready = known.make(peer, spec, arrays)
        if (reason := _no_room(ready.temp_bytes)) is not None:
            return Entry(peer.name, TOO_LARGE, reason), None
        return _judged(peer.name, ready, judge), ready
    except CALL_FAULTS as raised:
        return Entry(peer.name, FAILED, _first_line(raised)), None


def _judged(name: str, ready: Ready, judge: Judge) -> Entry:
    found = judge.verdict(ready.outputs(ready.call()))
    return Entry(
        name,
        found.status,
        ready.said,
        temp_bytes=ready.temp_bytes,
        error=found.error,
        allowed=found.allowed,
        fault=found.fault,
        prepared_s=ready.prepared_s,
    )


def _first_line(error: BaseException) -> str:
    """What an exception says, short enough for a note."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= 300 else text[:297] + "…"


class Verdict(NamedTuple):
    """An output against the reference; see `Entry`."""

    status: str
    error: float | None
    allowed: float
    fault: str = ""


@dataclass(frozen=True)
class Judge:
    """The reference's outputs for some rows, and how far one may be from them."""

    spec: AttentionSpec
    rows: Array
    want: Mapping[str, Array]
    allowed: Mapping[str, tuple[float, float]]  # in the output's dtype; in the inputs'

    @classmethod
    def of(
        cls, spec: AttentionSpec, arrays: Mapping[str, Array], q_chunk: int
    ) -> Judge:
        rows = validator.sample_rows(spec, q_chunk)
        operands = {n: x for n, x in arrays.items() if n not in ("q", "k", "v")}
        given = (spec, arrays["q"], arrays["k"], arrays["v"], operands)
        want = reference.attention(*given, rows=rows)
        how = reference.plain(spec)
        plain = reference.attention(*given, rows=rows, rounding=how)

        def allowed(name: str, dtype: str) -> float:
            kind = numpy_dtype(dtype)
            base = validator.largest_error(plain[name].astype(kind), want[name])
            return 2 * (base or 0.0) + 2 * validator.ulp(kind, want[name])

        both = {n: (allowed(n, spec.dtype_of(n)), allowed(n, spec.dtype)) for n in want}
        return cls(spec, rows, want, both)

    def verdict(self, outputs: Sequence[Array]) -> Verdict:
        """Of the output that is worst.

        What rounds its outputs as its inputs are rounds more than a spec of a wider
        out_dtype allows; only far beyond that it computes something else.
        """
        pairs = zip(self.spec.outputs, outputs, strict=True)
        found = [self._verdict(name, output) for name, output in pairs]
        ranks = (EXACT, ROUNDS_MORE, OTHER)
        return max(found, key=lambda v: ranks.index(v.status))

    def _verdict(self, name: str, output: Array) -> Verdict:
        got = reference.pick(self.spec, name, output, self.rows)
        error = validator.largest_error(got, self.want[name])
        allowed, coarse = self.allowed[name]
        if error is None:
            return Verdict(
                OTHER, None, allowed, f"{name} has NaNs or infinities astray"
            )
        empty = np.isneginf(self.want["lse"])
        if name == "out" and (got[empty] != 0).any():
            return Verdict(OTHER, error, allowed, "rows that see no key aren't 0")
        if error <= allowed:
            return Verdict(EXACT, error, allowed)
        status = OTHER if error > FAR * max(allowed, coarse) else ROUNDS_MORE
        return Verdict(status, error, allowed, f"{name} may be {allowed:.1e} off")


def _timed(
    calls: Mapping[str, Callable[[], Any]], rounds: int, say: Say
) -> timing.Rounds:
    def on_round(found: timing.Rounds) -> bool:
        say(f"round {found.count} of {rounds}")
        return False

    found = timing.interleaved(
        calls, rounds, on_round=on_round, warm_up=False, settle_s=SETTLE_S
    )
    timing.check_noise(found.yardsticks_s)
    return found


def versions() -> dict[str, str]:
    """Of attngen and of what contenders compute with, as far as they are installed."""
    return installed(("attngen", "jax", "jaxlib", "numpy", "torch"))
