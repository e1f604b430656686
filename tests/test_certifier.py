"""The compiler's process: whatever happens in it, the caller's goes on.

Three different ends are three different errors: it crashed, it took too long, it was
killed for memory. Nothing that it prints reaches the caller, and nothing that it started
outlives it. And what it says of a program is what a compiler in this process says.
"""

import os
import signal
import threading
import time

import jobs
import pytest
from refusals import refused

from attngen import certifier
from attngen.errors import (
    BackendError,
    CompileError,
)
from attngen.reports import Certificate


def run(job, timeout_s=60.0, **values):
    return certifier.run("jobs", job.__name__, values, timeout_s=timeout_s)


def ended(process_id, within_s=5.0):
    """Whether a process is gone, or only waits to be collected by its parent."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            with open(f"/proc/{process_id}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def ids_in(path, within_s=30.0):
    """The process ids that a job wrote down, as soon as they are there."""
    end = time.monotonic() + within_s
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return [int(i) for i in path.read_text().split()]


# The child.


def test_a_job_answers():
    assert run(jobs.answer, bytes=3) == {"temp_bytes": 3}


def test_a_job_runs_in_a_session_of_its_own():
    """So that Ctrl-C in a terminal ends it by the caller's hand alone."""
    seen = run(jobs.environment)
    assert seen["session"] == seen["group"] == seen["id"]
    assert seen["session"] != os.getsid(0)


def test_what_a_job_prints_goes_nowhere(capfd):
    assert run(jobs.noisy) == "done"
    assert capfd.readouterr() == ("", "")


def test_a_job_that_raises_is_refused():
    with refused(CompileError) as caught:
        run(jobs.raises)
    assert "refused" in caught.value.what
    assert caught.value.got == "ValueError: no such instruction"


@pytest.mark.parametrize("code", [0, 1, 3, 139])
def test_a_job_that_exits_has_crashed(code, capfd):
    with refused(CompileError) as caught:
        run(jobs.exits, code=code)
    assert "crashed" in caught.value.what
    assert caught.value.got == f"exit code {code}\nwhy it exits" or code == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_job_that_a_signal_ends_has_crashed(name):
    with refused(CompileError) as caught:
        run(jobs.crashes, signal=name)
    assert "crashed" in caught.value.what
    assert f"exit code {-getattr(signal, name)}" in caught.value.got


@pytest.mark.parametrize("job", [jobs.overflows, jobs.leaves, jobs.not_data])
def test_a_job_that_ends_without_an_answer_has_crashed(job):
    with refused(CompileError) as caught:
        run(job)
    assert "crashed" in caught.value.what


def test_a_job_that_is_killed_ran_out_of_memory():
    with refused(CompileError) as caught:
        run(jobs.crashes, signal="SIGKILL")
    assert "killed" in caught.value.what
    assert "memory" in caught.value.got
    assert "memory" in caught.value.hint


def test_a_job_that_hangs_takes_too_long(tmp_path):
    start = time.monotonic()
    with refused(CompileError) as caught:
        run(jobs.hangs, timeout_s=3.0, ids=str(tmp_path / "ids"))
    assert time.monotonic() - start < 20
    assert "too long" in caught.value.what
    assert "3.00 s" in caught.value.got
    assert all(ended(i) for i in ids_in(tmp_path / "ids"))


def test_the_three_ends_differ():
    def what(job, **how):
        with pytest.raises(CompileError) as caught:
            run(job, **how)
        return caught.value.what

    crash = what(jobs.exits, code=3)
    killed = what(jobs.crashes, signal="SIGKILL")
    late = what(jobs.answer, timeout_s=0.001, bytes=1)
    assert len({crash, killed, late}) == 3


@pytest.mark.parametrize("job", [jobs.abandons, jobs.answers_and_abandons])
def test_what_a_job_leaves_behind_is_ended(job, tmp_path):
    if job is jobs.abandons:
        with refused(CompileError):
            run(job, ids=str(tmp_path / "ids"))
    else:
        assert run(job, ids=str(tmp_path / "ids")) == "done"
    assert all(ended(i) for i in ids_in(tmp_path / "ids"))


def test_an_interrupted_caller_ends_its_job(tmp_path):
    def interrupt():
        ids_in(tmp_path / "ids")
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(jobs.hangs, ids=str(tmp_path / "ids"))
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert all(ended(i) for i in ids_in(tmp_path / "ids"))


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(jobs.answer, bytes=1)
    with refused(CompileError):
        run(jobs.exits, code=3)
    assert list(tmp_path.iterdir()) == []


def test_a_backend_without_a_compiler_says_so():
    with refused(BackendError):
        certifier.certify("", "cpu", shapes=[], source="")


def test_another_compiler_takes_one_module():
    """The protocol is what every target's compiler uses."""
    made = certifier.certify("jobs", "abacus", shapes=[], source="x = 1", digest="d")
    assert made == Certificate("abacus", "a job", temp_bytes=64, digest="d")


def many(*texts, timeout_s=60.0):
    programs = [certifier.Program([], t, digest=f"{i}") for i, t in enumerate(texts)]
    return certifier.certify_many(
        "odd_compiler", "abacus", programs, timeout_s=timeout_s
    )


def test_one_process_certifies_several():
    found = many("10", "20", "30")
    assert [c.temp_bytes for c in found] == [10, 20, 30]
    assert [c.digest for c in found] == ["0", "1", "2"]
    assert len({c.compiler for c in found}) == 1
    assert certifier.certify_many("odd_compiler", "abacus", []) == []
    with refused(BackendError):
        certifier.certify_many("", "cpu", [])


def test_a_program_that_fails_takes_no_other_along():
    found = many("10", "refuse", "20", "crash", "30", "crash")
    assert [getattr(c, "temp_bytes", None) for c in found] == [
        10, None, 20, None, 30, None,
    ]  # fmt: skip
    assert "refused" in found[1].what
    assert "crashed" in found[3].what
    assert "crashed" in found[5].what
    assert found[0].compiler == found[2].compiler != found[4].compiler


def test_a_program_that_hangs_takes_no_other_along():
    first, second, third = many("10", "hang", "30", timeout_s=3.0)
    assert (first.temp_bytes, third.temp_bytes) == (10, 30)
    assert "too long" in second.what
