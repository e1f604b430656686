"""Real processes that tune: at once, interrupted and killed; nothing finished is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from commands import SMALL

import attngen
from attngen import backends, recalling, targets, wisdom
from attngen.records import Record

SPEC = attngen.AttentionSpec(q_heads=2, q_len=40, qk_dim=8)
LONGER = ("--q-heads", "2", "--q-len", "41", "--qk-dim", "8")
KEY = recalling.key_of(SPEC, targets.get(), backends.get())
PATIENCE_S = 300.0  # a machine that does much else; nothing is expected to take long

# What a busy machine measures is refused by `attngen tune`; here it is no matter.
TUNE = """
import sys
from attngen import timing, tuner
timing.USELESS = float("inf")
tuner.MOST["measure"] = 2
from attngen.cli import main
main(["tune", *sys.argv[1:]])
"""
# One plan, timed until a signal comes: a slow kernel would do, and takes longer.
ENDLESS = TUNE.replace(
    "from attngen.cli",
    "tuner.MOST['measure'] = 1; tuner.STAGES, tuner.MOST_ROUNDS = (10**9,), 10**9\n"
    "from attngen.cli",
)


@pytest.fixture
def start(tmp_path, monkeypatch, process_environment):
    """Starts processes that share a folder of wisdom; ends those that are left."""
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "own"))
    shared = process_environment | {"ATTNGEN_WISDOM": str(tmp_path / "own")}
    started = []

    def start(code, *arguments):
        count = len(started)
        with (tmp_path / f"{count}.out").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                env=shared,
                stdout=out,
                stderr=out if code == ENDLESS else subprocess.DEVNULL,
            )
        process.said = tmp_path / f"{count}.out"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def samples(record):
    """Every sample of a record, with what it is of."""
    return {
        (c.identity, *pair)
        for c in record.candidates
        for pair in zip(c.yardsticks_s, c.samples_s, strict=True)
    }


def until_timed(process, least=5):
    """Wait until a process has kept some samples: what it does from then on is time."""
    end = time.monotonic() + PATIENCE_S
    while (found := len(samples(kept()))) < least:
        assert process.poll() is None, process.said.read_text()
        assert time.monotonic() < end, process.said.read_text()
        time.sleep(0.02)
    return found


def kept(key=KEY):
    return wisdom.find(key) or Record(key=key)


@pytest.mark.slow
@pytest.mark.parametrize("other", [SMALL, LONGER], ids=["the same", "two specs"])
def test_two_that_tune_at_once_lose_nothing(other, start):
    asked = (SMALL, other)
    running = [start(TUNE, *spec, "--seconds", "120", "--json") for spec in asked]
    assert [p.wait(PATIENCE_S) for p in running] == [0, 0]
    for process in running:
        own = Record.from_json(drop(process.said.read_text()))
        assert own.effort == "measure"
        assert len(own.ranked()) == 2
        known = kept(own.key)
        assert samples(own) <= samples(known)
        assert {f.effort for f in known.finished} == {"measure"}
    records = list(wisdom.everything())
    assert len(records) == len(set(asked))
    assert len({path for path, _ in records}) == 1


def drop(text):
    """The record of what `tune --json` prints."""
    data = json.loads(text)
    del data["chosen"], data["effort"]
    return json.dumps(data)


@pytest.mark.slow
def test_one_that_is_killed_beside_another_leaves_what_it_finished(start):
    killed, other = start(ENDLESS, *SMALL), start(TUNE, *LONGER, "--seconds", "120")
    found = until_timed(killed)
    assert other.poll() is None
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(PATIENCE_S) == -signal.SIGKILL
    assert len(samples(kept())) >= found
    assert kept().effort == "unfinished"
    assert other.wait(PATIENCE_S) == 0
    assert len(samples(kept())) >= found
    assert {r.effort for _, r in wisdom.everything()} == {"measure", "unfinished"}
    again = start(TUNE, *SMALL, "--seconds", "1e-3")
    assert again.wait(PATIENCE_S) == 0
    assert len(samples(kept())) > found


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_tuning_keeps_its_samples(sent, start):
    process = start(ENDLESS, *SMALL)
    found = until_timed(process)
    os.kill(process.pid, sent)
    code = process.wait(PATIENCE_S)
    assert len(samples(kept())) >= found
    assert kept().effort == "unfinished"
    said = process.said.read_text()
    assert "Traceback" not in said
    if sent == signal.SIGINT:
        assert code == 1
        assert "interrupted; " in said
    else:
        assert code == -signal.SIGKILL
