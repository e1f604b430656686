"""A machine whose clock moves only when work is done, by as much as a test says."""

import itertools

from attngen import timing
from attngen.records import Candidate
from attngen.tuner import Prepared


class Machine:
    """Replaces attngen's clock and yardstick; `noise` multiplies what work takes."""

    def __init__(self, patch, noise=(1.0,)):
        self.now = 0.0
        self.noise = itertools.cycle(noise)
        patch.setattr(timing, "clock", lambda: self.now)
        patch.setattr(timing, "yardstick", self.yardstick)

    def yardstick(self):
        """No two samples are quite the same, as on a real machine: they tell rounds apart."""
        longer = itertools.count()
        return lambda: self.work(0.02 * (1 + 1e-9 * next(longer)))()

    def work(self, seconds):
        def call():
            self.now += seconds * next(self.noise)

        return call


def candidate(plan, **changes):
    """What is recorded of a plan that was certified and not timed."""
    fields = {
        "choice": plan.choice,
        "digest": "d" * 64,
        "temp_bytes": plan.temp_bytes,
        "modelled_bytes": plan.temp_bytes,
        "modelled_s": plan.time_s,
    }
    return Candidate(**fields | changes)


def prepared(plan, call, **changes):
    return Prepared(candidate(plan, **changes), call)
