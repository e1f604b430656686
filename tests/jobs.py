"""Jobs for the certifier's child process: compilers that behave in every way there is."""

import os
import signal
import subprocess
import sys
import time


def answer(job):
    return {"temp_bytes": job["bytes"]}


def certify(job):
    """As a backend's compiler: the figures that the job asks for."""
    return {"compiler": "a job", "temp_bytes": 64} if "source" in job else {}


def environment(job):
    return {"id": os.getpid(), "group": os.getpgid(0), "session": os.getsid(0)}


def noisy(job):
    """Prints in every way that a compiler can."""
    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.write(1, b"to file descriptor 1\n")
    os.write(2, b"to file descriptor 2 \xff\n")
    subprocess.run(["echo", "from a process"], check=True)
    return "done"


def raises(job):
    raise ValueError("no such instruction")


def too_much(job):
    raise MemoryError


def not_data(job):
    return object()


def exits(job):
    print("why it exits")
    os._exit(job["code"])


def leaves(job):
    sys.exit(0)


def crashes(job):
    os.kill(os.getpid(), getattr(signal, job["signal"]))


def overflows(job):
    """A segmentation fault of its own making."""
    import ctypes

    ctypes.string_at(0)


def hangs(job):
    """Ignores polite requests, and has a process of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _sleeper(job)
    time.sleep(600)


def abandons(job):
    """Ends, and leaves a process of its own behind."""
    _sleeper(job)
    os._exit(3)


def answers_and_abandons(job):
    _sleeper(job)
    return "done"


def _sleeper(job):
    """Start a long process, and say who runs: this one's id and that one's."""
    code = "import time; time.sleep(600)"
    started = subprocess.Popen([sys.executable, "-c", code])
    with open(job["ids"] + ".new", "w") as file:
        file.write(f"{os.getpid()} {started.pid}")
    os.rename(job["ids"] + ".new", job["ids"])
