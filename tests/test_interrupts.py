"""Interrupts wait for what must be done whole, and are heard afterwards."""

import signal
import threading

import pytest

from attngen import wisdom
from attngen.interrupts import undisturbed


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
