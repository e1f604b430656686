"""Interrupts that wait while something is done that must be done whole, or reach threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")
_STOP: contextvars.ContextVar[threading.Event | None] = contextvars.ContextVar(
    "stop", default=None
)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C (SIGINT) waits until this is done.

    Without it a KeyboardInterrupt may come between taking a lock and the `try` that gives
    it back. Only the main thread hears interrupts, and only it can make them wait.
    """
    own = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not (main and callable(own)):
        yield
        return
    waiting: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *said: waiting.append(said))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, own)
        if waiting:
            own(*waiting[0])


def stopped() -> bool:
    """Whether what this thread is at is to be left: the main one was interrupted."""
    stop = _STOP.get()
    return stop is not None and stop.is_set()


def in_threads(
    function: Callable[[Given], Made], given: Sequence[Given]
) -> tuple[list[Made], bool]:
    """A function of each of some values, a thread each; whether Ctrl-C came.

    Then `stopped` is true in the threads, and what they return is what they have by then.
    """
    stop = threading.Event()

    def one(value: Given) -> Made:
        _STOP.set(stop)  # of this thread alone
        return function(value)

    with concurrent.futures.ThreadPoolExecutor(max(1, len(given))) as pool:
        futures: list[concurrent.futures.Future[Made]] = []
        try:
            futures += (pool.submit(one, value) for value in given)
            concurrent.futures.wait(futures)
        except KeyboardInterrupt:
            stop.set()
        return [f.result() for f in futures], stop.is_set()
