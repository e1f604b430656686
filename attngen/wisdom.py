"""Wisdom: records kept in files, one a device, and found again by their key.

Data only: reading wisdom runs nothing. What is written is written whole, under a lock that
processes share; a file that can't be read as wisdom is never overwritten.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from attngen import files
from attngen.errors import FileError, WisdomError
from attngen.interrupts import undisturbed
from attngen.keys import Key, Only
from attngen.records import Record
from attngen.units import show_bytes

FORMAT = 1
ENDING = "-cores.json"  # of the files that are written
LOCK_S = 60.0  # that another process may hold a file
MOST_BYTES = 2**30  # of a file: more than hundreds of devices' worth
SWITCHES = ("0", "1", "off", "on", "no", "yes", "none", "false", "true", "disabled")
WAIT_S = 0.2  # of that at a time: between two, an interrupt is heard


ALL = Only()


def folder() -> Path:
    """Where this user's wisdom is; ATTNGEN_WISDOM names another folder.

    Raises:
        WisdomError: it names a file, or looks like a switch, which it isn't.
    """
    named = os.environ.get("ATTNGEN_WISDOM")
    if named:
        path = Path(os.path.expanduser(named))
        switch = named.lower() in SWITCHES
        if switch or (_there(path) and not path.is_dir()):
            raise WisdomError(
                "ATTNGEN_WISDOM names a folder.",
                got=f"ATTNGEN_WISDOM={named}" + ("" if switch else ", a file"),
                needed="a folder, which is made where it isn't there; or leave it unset",
                hint=f"./{named} is a folder of that name" if switch else None,
            )
        return path
    import platformdirs

    return Path(platformdirs.user_data_dir("attngen")) / "wisdom"


def places() -> tuple[Path, ...]:
    """All folders and files that are read: the user's own, ATTNGEN_WISDOM_PATH's, packaged."""
    listed = os.environ.get("ATTNGEN_WISDOM_PATH", "").split(os.pathsep)
    others = (Path(os.path.expanduser(p)) for p in listed if p)
    return (folder(), *others, files.package() / "wisdom_data")


def path_of(key: Key) -> Path:
    """The user's file for a key's device."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{key.device}".lower()).strip("-")[:80]
    return folder() / f"{key.target}-{words or 'unknown'}-{key.cores}{ENDING}"


def files_of(place: Path) -> list[Path]:
    """The wisdom files of a folder, or a file itself.

    Raises:
        WisdomError: the folder can't be read.
    """
    try:
        if not place.is_dir():
            return [place] if place.exists() else []
        return sorted(p for p in place.iterdir() if p.suffix == ".json")
    except OSError as error:
        raise _unreadable(place, error.strerror) from error


def read(path: Path) -> tuple[Record, ...]:
    """The records of a file.

    Raises:
        WisdomError: it can't be read, is damaged, or is of another format.
    """
    if _there(path) and not path.is_file():  # reading a pipe may never end
        raise _unreadable(path, "no regular file")
    if _there(path) and (size := path.stat().st_size) > MOST_BYTES:
        raise _unreadable(path, f"a file of {show_bytes(size)}")
    try:
        data = msgspec.json.decode(files.read(path))
    except FileError as error:
        raise _unreadable(path, error.got) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(data, dict) or "format" not in data:
        raise _damaged(path, "no format number")
    if data["format"] != FORMAT or isinstance(data["format"], bool):
        raise WisdomError(
            f"{path} is wisdom of another format.",
            got=f"format {data['format']!r:.40}",
            needed=f"format {FORMAT}, which this version of attngen reads",
            hint="move it away, and tune again; or use the attngen that wrote it",
        )
    if not isinstance(records := data.get("records"), list):
        raise _damaged(path, "no list of records")
    try:
        return tuple(Record.from_dict(r) for r in records)
    except FileError as error:
        raise _damaged(path, str(error.got)) from error


def everything(only: Only = ALL) -> Iterator[tuple[Path, Record]]:
    """Each record of each place, with its file.

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    for place in places():
        for path in files_of(place):
            for record in read(path):
                if only.takes(record.key):
                    yield path, record


def find(key: Key) -> Record | None:
    """What is known of a key, from all places together.

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    found = [r for _, r in everything() if r.key.text == key.text]
    return functools.reduce(Record.merged, found) if found else None


def why(key: Key) -> str:
    """Whether there is a record of a key; if not, what differs from the nearest.

    Raises:
        WisdomError: a file can't be read as wisdom.
    """
    known = {r.key.text: r.key for _, r in everything()}
    if key.text in known:
        record = find(key)
        assert record is not None
        if record.effort == "unfinished":
            why = "had too little time" if record.finished else "was interrupted"
            return f"There is a record of it, of a search that {why}."
        if not record.finished:
            return "There is a record of it, an estimate: nothing was timed."
        return f"There is a record of it, of effort {record.effort}."
    if not known:
        return "There is no wisdom yet: " + ", ".join(map(str, places()))
    nearest = min(known.values(), key=lambda k: len(key.differences(k)))
    return "\n".join(
        ["No record. The nearest differs in (asked ≠ recorded)"]
        + [f"  {line}" for line in key.differences(nearest)]
    )


def add(record: Record) -> Path:
    """Keep a record: merged with what the user's file of its device has. Returns the file.

    Raises:
        WisdomError: the file can't be read as wisdom, or can't be written.
    """
    path = path_of(record.key)
    _add(path, [record])
    return path


def check_writable(key: Key) -> None:
    """Refuse before time is spent: the file of a key's device is sound, and can be written.

    Raises:
        WisdomError: it isn't, or can't.
    """
    path = path_of(key)
    with _locked(path):
        if _there(path):
            read(path)
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writable-")
            os.close(handle)
            os.unlink(temporary)
        except OSError as error:
            raise _unwritable(path, error.strerror) from error


def merge(paths: Iterable[Path]) -> dict[Path, int]:
    """Take the records of files, and of folders, over: by file, how many were written.

    Everything is read before anything is written.

    Raises:
        WisdomError: one isn't there, isn't wisdom, or the user's can't be written.
    """
    by_file: dict[Path, list[Record]] = {}
    for place in paths:
        found = files_of(place)
        if not found:
            raise _unreadable(place, "no wisdom file there")
        for path in found:
            for record in read(path):
                by_file.setdefault(path_of(record.key), []).append(record)
    for path in by_file:
        if _there(path):
            read(path)
    for path, records in by_file.items():
        _add(path, records)
    return {path: len(records) for path, records in by_file.items()}


def export(path: Path, only: Only = ALL) -> int:
    """Write records of all places to one file, to ship; returns how many.

    A file that is there is replaced where it is wisdom, and only there.

    Raises:
        WisdomError: there are none, a file can't be read as wisdom, or path can't be written.
    """
    records = _merged(r for _, r in everything(only))
    if not records:
        raise nothing(only)
    if _there(path):
        read(path)
    _write(path, records)
    return len(records)


def nothing(only: Only = ALL) -> WisdomError:
    """What to say where there is no record of what is asked for."""
    known = {r.key.text: r.key for _, r in everything()}.values()
    if not known:
        return WisdomError(
            "There is no wisdom yet.",
            got=", ".join(map(str, places())),
            needed="a record; `attngen tune` makes them",
        )
    found = {
        "spec": () if only.spec is None else [f"{len(known)} records, of other specs"],
        "target": {k.target for k in known if only.target},
        "backend": {k.backend for k in known if only.backend},
        "device": {k.device for k in known if only.device},
    }
    words = [f"{n}: {', '.join(sorted(v))}" for n, v in found.items() if v]
    return WisdomError(
        "There is no record of what is asked for.",
        got=str(only),
        needed="of what there is: " + "; ".join(words),
        hint="`attngen wisdom show` lists all",
    )


def clear() -> tuple[Path, ...]:
    """Delete the user's own wisdom files, damaged ones too; returns those deleted.

    What else is in the folder stays.

    Raises:
        WisdomError: one can't be deleted.
    """
    own = folder()
    listed = files_of(own) if own.is_dir() else []
    deleted = [p for p in listed if p.name.endswith(ENDING)]
    for path in deleted:
        try:
            with _locked(path):
                path.unlink(missing_ok=True)
            _lock_of(path).unlink(missing_ok=True)
        except OSError as error:
            if isinstance(error, WisdomError):
                raise
            raise _unwritable(path, error.strerror) from error
    return tuple(deleted)


def _add(path: Path, records: list[Record]) -> None:
    with _locked(path):
        known = read(path) if _there(path) else ()
        _write(path, _merged([*known, *records]))


def _merged(records: Iterable[Record]) -> list[Record]:
    by_key: dict[str, Record] = {}
    for record in records:
        known = by_key.get(record.key.text)
        by_key[record.key.text] = record if known is None else known.merged(record)
    return list(by_key.values())


def _write(path: Path, records: list[Record]) -> None:
    data = {"format": FORMAT, "records": records}
    text = msgspec.json.format(msgspec.json.encode(data), indent=1).decode()
    try:
        files.write(path, text + "\n")
    except FileError as error:
        raise _unwritable(path, error.got) from error


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process writes the file meanwhile; its folder is made.

    An interrupt waits meanwhile, but not while another process has the lock.

    Raises:
        WisdomError: the folder can't be made or written, or the lock isn't let go.
    """
    import filelock

    for _ in range(math.ceil(LOCK_S / WAIT_S)):
        with undisturbed():
            lock = filelock.FileLock(_lock_of(path), timeout=min(WAIT_S, LOCK_S))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire()
            except filelock.Timeout:
                continue
            except (OSError, NotImplementedError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                raise _unwritable(path, reason) from error
            try:
                yield
            finally:
                lock.release()
                del lock  # its finaliser would swallow an interrupt
            return
    raise _unwritable(path, f"locked for more than {LOCK_S:.0f} s")


def _there(path: Path) -> bool:
    """Whether a file or a folder is there.

    Raises:
        WisdomError: what it is in can't be searched.
    """
    try:
        return path.exists()
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


def _unreadable(path: Path, got: object) -> WisdomError:
    return WisdomError(
        f"{path} can't be read as wisdom.",
        got=got or "an error of the file system",
        needed="a readable file that attngen wrote",
    )


def _damaged(path: Path, got: str) -> WisdomError:
    return WisdomError(
        f"{path} is damaged.",
        got=got,
        needed="wisdom as attngen wrote it",
        hint="nothing was overwritten: repair it, or move it away",
    )


def _unwritable(path: Path, got: object) -> WisdomError:
    return WisdomError(
        f"{path} can't be written.",
        got=got or "an error of the file system",
        needed="a folder that can be written",
        hint="name another in ATTNGEN_WISDOM",
    )
