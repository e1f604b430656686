"""Interrupts wait for what must be done whole, and are heard afterwards."""

import os
import signal
import threading
import time

import pytest

from attngen import certifier, wisdom
from attngen.interrupts import in_threads, stopped, undisturbed


@pytest.fixture
def heard():
    """The interrupts that were heard, by a handler of a test's own."""
    found = []
    before = signal.signal(signal.SIGINT, lambda *said: found.append(said[0]))
    yield found
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_waits(heard):
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert heard == []
    assert heard == [signal.SIGINT]
    signal.raise_signal(signal.SIGINT)
    assert heard == [signal.SIGINT] * 2


def test_it_is_heard_after_an_error(heard):
    @undisturbed()
    def work():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        work()
    assert heard == [signal.SIGINT]


def test_an_interrupt_of_python_is_raised_when_it_is_done():
    done = []

    @undisturbed()
    def work():
        signal.raise_signal(signal.SIGINT)
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_and_ignored_interrupts_are_left_alone(heard):
    handler = signal.getsignal(signal.SIGINT)
    seen = []

    def work():
        with undisturbed():
            seen.append(signal.getsignal(signal.SIGINT) is handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with undisturbed():
        signal.raise_signal(signal.SIGINT)
    assert heard == []


def test_wisdom_is_written_and_its_lock_given_back(tmp_path, monkeypatch):
    path = tmp_path / "file.json"

    def write(text):
        with wisdom._locked(path):
            signal.raise_signal(signal.SIGINT)
            path.write_text(text)

    for text in ("one", "two"):
        with pytest.raises(KeyboardInterrupt):
            write(text)
        assert path.read_text() == text
    monkeypatch.setattr(wisdom, "LOCK_S", 0.1)
    with wisdom._locked(path):
        pass


@pytest.fixture
def interruptible():
    """Ctrl-C is Python's own, whatever started the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_threads_hear_an_interrupt_of_the_main_one(interruptible):
    assert not stopped()
    assert in_threads(lambda x: (x, stopped()), [1, 2]) == (
        [(1, False), (2, False)],
        False,
    )

    def work(x):
        if x == 1:
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        while not stopped():
            time.sleep(0.01)
        return x

    assert in_threads(work, [1, 2]) == ([1, 2], True)
    assert not stopped()
    with pytest.raises(ValueError, match="odd"):
        in_threads(lambda x: int("odd"), [1])


def test_an_interrupt_ends_compilers_in_threads_and_keeps_what_they_said(interruptible):
    def work(texts):
        programs = [certifier.Program([], text) for text in texts]
        return certifier.certify_many("odd_compiler", "abacus", programs)

    timer = threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    found, interrupted = in_threads(work, [["10", "hang", "20"], ["hang"]])
    assert interrupted
    assert [[c.temp_bytes for c in part] for part in found] == [[10], []]
    assert time.monotonic() - begin < 60
