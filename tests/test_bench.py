"""attngen beside its peers: what is timed, what isn't, and what the comparison says."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from refusals import refused
from small import FIX, spec_of

from attngen import bench, masks, peers, reference
from attngen.comparison import WIDTH
from attngen.errors import BackendError, PeerError, PlanError, TargetError
from attngen.peers import Ready

SPEC = spec_of(q_heads=4, kv_heads=2)
FREE = 2**40


class Fake:
    """A peer that returns the reference's output, or something else, without a library."""

    package, layout = "numpy", None

    def __init__(self, name, change=lambda out: out, **members):
        self.name, self.change = name, change
        self.__dict__ |= members

    def refuse(self, spec):
        return None

    def matrix_bytes(self, spec):
        return 0

    def make(self, spec, arrays):
        given = dict(arrays)
        q, k, v = (given.pop(n) for n in "qkv")
        out = reference.attention(spec, q, k, v, given)["out"].swapaxes(1, 2)
        made = self.change(out.astype(np.float32))
        return Ready(lambda: made, lambda found: (found,), "as it is")


def rows_of_mean(out):
    """The first query, which sees no key, gets the mean of what others get."""
    out = out.copy()
    out[:, 0] = out.mean(1)
    return out


def raises(spec, arrays):
    raise RuntimeError("\n the kernel\nisn't there")


FAKES = {
    "exact": Fake("exact"),
    "rounding": Fake("rounding", lambda out: out + np.float32(4e-6)),
    "other": Fake("other", lambda out: out[:, ::-1]),
    "astray": Fake("astray", lambda out: np.where(out == 0, np.nan, out)),
    "mean": Fake("mean", rows_of_mean),
    "absent": Fake("absent", package="no_such_package"),
    "mute": Fake("mute", refuse=lambda spec: "has no words"),
    "huge": Fake("huge", matrix_bytes=lambda spec: FREE + 1),
    "broken": Fake("broken", make=raises),
    "full": Fake("full", make=lambda *_: (_ for _ in ()).throw(MemoryError())),
}
EMPTY = {"kv_len": 47, "q_offset": "bottom_right", "mask": masks.causal()}


@pytest.fixture
def fakes(monkeypatch, certified):
    monkeypatch.setattr(peers, "names", lambda: tuple(FAKES))
    monkeypatch.setattr(peers, "get", lambda name: FAKES[name])
    monkeypatch.setattr(bench, "available_bytes", lambda: FREE)
    monkeypatch.setattr(bench, "SETTLE_S", 0)


def compare(*names, spec=SPEC, rounds=2, **options):
    return bench.compare(spec, peers=names or None, rounds=rounds, fix=FIX, **options)


def test_every_contender_has_its_entry(fakes):
    found = compare(spec=spec_of(**EMPTY))
    assert {e.name: e.status for e in found.entries} == {
        "attngen": "right",
        "exact": "right",
        "rounding": "computes something else",  # also in the row that sees no key
        "other": "computes something else",
        "astray": "computes something else",
        "mean": "computes something else",
        "absent": "not installed",
        "mute": "can't say it",
        "huge": "too large",
        "broken": "failed",
        "full": "failed",
    }
    for entry in found.entries:
        assert len(entry.samples_s) == (2 if entry.checked else 0)
    assert found.entry("astray").error is None
    assert found.entry("mean").error > 0
    assert "no key" in found.entry("mean").fault
    assert found.entry("absent").note == "needs no_such_package"
    assert found.entry("mute").note == "has no words"
    assert "1.0 TiB" in found.entry("huge").note or "GiB" in found.entry("huge").note
    assert found.entry("broken").note == "RuntimeError: the kernel"
    assert found.entry("full").note == "MemoryError: no message"


def test_rounding_is_told_from_something_else(fakes):
    found = compare("rounding", "other")
    assert found.entry("rounding").status == "rounds more"
    assert found.entry("rounding").error == pytest.approx(4e-6, rel=0.3)
    assert "off" in found.entry("rounding").fault
    assert found.entry("other").status == "computes something else"


def test_half_precision_outputs_of_a_wider_spec_are_rounding(fakes):
    spec = spec_of(dtype="bfloat16", out_dtype="float32")
    FAKES["coarse"] = Fake("coarse", lambda out: out + np.float32(0.03))
    try:
        assert compare("coarse", spec=spec).entry("coarse").status == "rounds more"
    finally:
        del FAKES["coarse"]


def test_ratios_are_those_of_each_round(fakes):
    found = compare("exact", rounds=3)
    own, other = (found.entry(n).samples_s for n in ("attngen", "exact"))
    each = sorted(b / a for a, b in zip(own, other, strict=True))
    assert found.ratio("exact").median == pytest.approx(each[1])
    assert found.ratio("attngen").median == 1
    assert found.noise == 0  # of too few rounds to tell
    with pytest.raises(KeyError):
        found.entry("nobody")


def test_contenders_are_slower_where_they_wait(fakes):
    def make(spec, arrays):
        ready = FAKES["exact"].make(spec, arrays)
        return replace(ready, call=lambda: (time.sleep(0.03), ready.call())[1])

    FAKES["slow"] = Fake("slow", make=make)
    try:
        found = compare("slow")
    finally:
        del FAKES["slow"]
    assert found.ratio("slow").low > 1
    assert min(found.entry("slow").samples_s) >= 0.03


def test_the_text_fits(fakes):
    long = "a reason, and what it is made of, at some length, " * 8
    FAKES["mute"].refuse = lambda spec: long
    text = str(compare())
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "2 rounds side by side" in text
    assert "× [" in text
    assert text.count("computes something else") == 2
    for name in FAKES:
        assert f"\n{name}" in text
    wide = compare("exact")
    entry = replace(wide.entry("exact"), samples_s=(9e3, 9e3))
    text = str(replace(wide, entries=(wide.entries[0], entry)))
    assert max(map(len, text.splitlines())) <= WIDTH


def test_plain_values_hold_every_sample(fakes):
    found = compare("exact", "absent")
    data = json.loads(json.dumps(found.to_dict()))
    own, exact, absent = data["entries"]
    assert (own["name"], own["ratio"]["median"]) == ("attngen", 1)
    assert exact["samples_s"] == list(found.entry("exact").samples_s)
    assert exact["time_s"]["low"] <= exact["time_s"]["median"]
    assert (absent["status"], absent["samples_s"]) == ("not installed", [])
    assert absent["ratio"] is None
    assert data["rounds"] == len(data["yardsticks_s"]) == 2
    assert data["device"]["name"] == "cpu"
    assert {"attngen", "jax", "numpy"} <= set(data["versions"])
    assert data["spec"] == SPEC.to_dict()
    assert data["plan"] == found.plan.to_dict()
    assert data["rows"] == SPEC.q_len


def test_progress_is_told(fakes):
    said = []
    compare("exact", on_progress=said.append)
    assert "checking exact …" in said
    assert said[-1] == "round 2 of 2"


def test_the_real_peers_take_their_turns(certified):
    found = compare("plain", "jax.nn", "paper")
    assert [e.status for e in found.entries] == ["right"] * 4
    for entry in found.entries:
        assert entry.temp_bytes > 0
    assert found.entry("jax.nn").note == "is_causal=True"
    assert "16 queries" in found.entry("attngen").note


def test_what_xla_will_need_is_looked_at_before_it_runs(monkeypatch, certified):
    monkeypatch.setattr(bench, "available_bytes", lambda: 2 * 4 * 2 * 48 * 48)
    found = compare("plain")  # allowed by the estimate, not by the compiler's figure
    assert found.entry("plain jnp").status == "too large"
    assert "are free" in found.entry("plain jnp").note


def test_outputs_are_judged_in_the_specs_layout(certified):
    found = compare("jax.nn", "paper", spec=replace(SPEC, layout="bhtd"))
    assert [e.status for e in found.entries] == ["right"] * 3
    assert found.entry("jax.nn").note == "is_causal=True, arrays in bthd"
    assert "arrays in" not in found.entry("attngen").note


@pytest.mark.parametrize("target", ["h100", "tpu-v5e"])
def test_bench_times_on_this_machine_alone(target, no_compiler):
    with refused(TargetError, "this machine") as caught:
        compare(target=target)
    assert "certify" in caught.value.hint


def test_wrong_requests_are_refused(no_compiler):
    with refused(TargetError, "abacus"):
        compare(target="abacus")
    with refused(PeerError, "'flash'"):
        compare("plain", "flash")
    with refused(PlanError, "no rounds"):
        compare(rounds=0)
    with refused(BackendError):
        compare(backend="abacus")
