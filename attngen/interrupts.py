"""Interrupts that wait while something is done that must be done whole."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


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
