"""Wisdom: found, explained, merged, shared, and never overwritten where it is damaged."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import refused
from test_records import JAX, KEY, RECORD, TARGET, record

from attngen import wisdom
from attngen.errors import WisdomError

OTHER = dataclasses.replace(RECORD, key=dataclasses.replace(KEY, cores=KEY.cores + 1))
DAMAGED = {
    "empty": b"",
    "cut off": b'{"format": 1, "records": [',
    "no wisdom": b"[1, 2]",
    "no records": b'{"format": 1}',
    "no format": b'{"records": []}',
    "another format": b'{"format": 2, "records": []}',
    "a record that isn't one": b'{"format": 1, "records": [{"key": 1}]}',
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "own"))
    monkeypatch.delenv("ATTNGEN_WISDOM_PATH", raising=False)
    return tmp_path / "own"


def test_what_is_added_is_found(folder):
    assert wisdom.find(KEY) is None
    path = wisdom.add(RECORD)
    assert path.parent == folder
    assert wisdom.find(KEY) == RECORD
    assert json.loads(path.read_text())["format"] == wisdom.FORMAT
    wisdom.add(record((1000, [3.0, 3.1, 2.9])))
    found = wisdom.find(KEY)
    assert [len(c.samples_s) for c in found.candidates] == [3, 2, 2]


def test_each_device_has_a_file(folder):
    assert wisdom.add(RECORD) != wisdom.add(OTHER)
    assert len(list(folder.glob("*.json"))) == 2
    assert wisdom.find(OTHER.key) == OTHER


def test_clear_deletes_what_tuning_wrote_and_nothing_else(folder):
    path = wisdom.add(RECORD)
    path.write_text("damaged")
    (folder / "mine.json").write_text("{}")
    assert wisdom.clear() == (path,)
    assert [p.name for p in folder.iterdir()] == ["mine.json"]
    assert wisdom.clear() == ()


def test_why_names_what_differs():
    assert wisdom.why(KEY).startswith("There is no wisdom yet")
    wisdom.add(RECORD)
    assert wisdom.why(KEY) == "There is a record of it, of effort measure."
    assert f"  cores: {KEY.cores + 1} ≠ {KEY.cores}" in wisdom.why(OTHER.key)
    newer = dataclasses.replace(KEY, versions=KEY.versions | {"jaxlib": "9.9"})
    assert "  version of jaxlib: 9.9 ≠ " in wisdom.why(newer)
    wisdom.add(dataclasses.replace(OTHER, finished=()))
    assert "interrupted" in wisdom.why(OTHER.key)


def test_other_places_are_read_and_not_written(tmp_path, monkeypatch):
    wisdom.add(RECORD)
    shipped = tmp_path / "shipped.json"
    assert wisdom.export(shipped) == 1
    text = shipped.read_bytes()
    wisdom.clear()
    assert wisdom.find(KEY) is None
    places = os.pathsep.join([str(tmp_path / "missing"), str(shipped)])
    monkeypatch.setenv("ATTNGEN_WISDOM_PATH", places)
    assert wisdom.find(KEY) == RECORD
    wisdom.add(record((1000, [3.0, 3.1, 2.9])))
    assert len(wisdom.find(KEY).candidates) == 3
    assert shipped.read_bytes() == text


def test_merge_takes_files_and_folders(tmp_path, folder):
    wisdom.add(RECORD)
    wisdom.add(OTHER)
    moved = folder.rename(tmp_path / "moved")
    written = wisdom.merge([moved])
    assert sum(written.values()) == 2
    assert wisdom.find(KEY) == RECORD
    assert wisdom.find(OTHER.key) == OTHER
    with refused(WisdomError, "can't be read"):
        wisdom.merge([tmp_path / "nothing"])


def test_nothing_is_merged_where_one_file_is_damaged(tmp_path, folder):
    wisdom.add(RECORD)
    good = tmp_path / "good.json"
    wisdom.export(good)
    wisdom.clear()
    bad = tmp_path / "bad.json"
    bad.write_bytes(b"{")
    with refused(WisdomError, "damaged"):
        wisdom.merge([good, bad])
    assert not list(folder.glob("*.json"))


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_kept(text):
    path = wisdom.add(RECORD)
    path.write_bytes(text)
    for action in (
        lambda: wisdom.find(KEY),
        lambda: wisdom.why(KEY),
        lambda: wisdom.add(RECORD),
        lambda: wisdom.check_writable(KEY),
        lambda: wisdom.export(path.with_name("export")),
    ):
        with refused(WisdomError) as caught:
            action()
        assert str(path) in caught.value.what
    assert path.read_bytes() == text


@pytest.mark.parametrize("word", ["off", "0", "None", "TRUE"])
def test_a_switch_is_no_folder(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNGEN_WISDOM", word)
    for action in (lambda: wisdom.find(KEY), lambda: wisdom.add(RECORD)):
        with refused(WisdomError, "names a folder") as caught:
            action()
        assert word in caught.value.got
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path, monkeypatch):
    wisdom.add(RECORD)
    wisdom.export(tmp_path / "all.json")
    text = (tmp_path / "all.json").read_bytes()
    for place in (tmp_path / "all.json", Path(os.devnull)):
        monkeypatch.setenv("ATTNGEN_WISDOM", str(place))
        for action in (wisdom.places, wisdom.clear, lambda: wisdom.add(RECORD)):
            with refused(WisdomError, "names a folder"):
                action()
    assert (tmp_path / "all.json").read_bytes() == text


def test_home_is_where_its_sign_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ATTNGEN_WISDOM", "~/wise")
    monkeypatch.setenv("ATTNGEN_WISDOM_PATH", "~/shipped.json")
    assert wisdom.add(RECORD).parent == tmp_path / "wise"
    assert tmp_path / "shipped.json" in wisdom.places()


def _pipe(path):
    os.mkfifo(path)


def _huge(path):
    with path.open("wb") as file:
        file.truncate(wisdom.MOST_BYTES + 1)


def _dangling(path):
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("make", [Path.mkdir, _pipe, _huge, _dangling])
def test_what_is_no_file_to_read_is_refused(make, folder):
    """At once: reading a pipe would wait for ever, and something huge fill the memory."""
    folder.mkdir()
    path = wisdom.path_of(KEY)
    make(path)
    for action in (
        lambda: wisdom.find(KEY),
        lambda: wisdom.merge([path.parent]),
        lambda: wisdom.export(folder / "export"),
    ):
        with refused(WisdomError, "can't be read"):
            action()
    assert path.is_symlink() or path.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may search anywhere")
def test_a_folder_that_cant_be_searched_is_refused(folder):
    path = wisdom.add(RECORD)
    folder.chmod(0)
    for action in (
        lambda: wisdom.find(KEY),
        lambda: wisdom.merge([path]),
        lambda: wisdom.add(RECORD),
        lambda: wisdom.check_writable(KEY),
    ):
        with refused(WisdomError):
            action()
    folder.chmod(0o700)
    assert wisdom.find(KEY) == RECORD


def test_a_folder_that_cant_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "file" / "folder"))
    for action in (lambda: wisdom.add(RECORD), lambda: wisdom.check_writable(KEY)):
        with refused(WisdomError, "can't be written"):
            action()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cant_be_written_is_refused(folder):
    folder.mkdir()
    folder.chmod(0o500)
    with refused(WisdomError, "can't be written"):
        wisdom.check_writable(KEY)
    assert wisdom.find(KEY) is None


def test_a_file_that_is_locked_for_long_is_refused(monkeypatch):
    import filelock

    monkeypatch.setattr(wisdom, "LOCK_S", 0.05)
    path = wisdom.add(RECORD)
    text = path.read_text()
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        code = (
            "import sys; sys.path[:0] = [sys.argv[1]]\n"
            "from attngen import wisdom; wisdom.LOCK_S = 0.05\n"
            "from test_records import RECORD\n"
            "try: wisdom.add(RECORD)\n"
            "except wisdom.WisdomError as error: print(error.got)\n"
        )
        tests = str(Path(__file__).parent)
        ran = subprocess.run(
            [sys.executable, "-c", code, tests], capture_output=True, text=True
        )
    assert "locked" in ran.stdout
    assert path.read_text() == text


ADDER = """
import dataclasses, sys
sys.path[:0] = [sys.argv[1]]
from test_records import KEY, RECORD
from attngen import wisdom
own = int(sys.argv[2])
for i in range(20):
    samples = tuple(1.0 + own + j / 100 for j in range(i + 1))
    first, *others = RECORD.candidates
    first = dataclasses.replace(first, samples_s=samples, yardsticks_s=samples)
    wisdom.add(dataclasses.replace(RECORD, candidates=(first, *others)))
    key = dataclasses.replace(KEY, spec=KEY.spec | {"q_len": 1000 * own + i})
    wisdom.add(dataclasses.replace(RECORD, key=key))
"""


def test_processes_that_add_at_once_lose_nothing():
    tests = str(Path(__file__).parent)
    started = [
        subprocess.Popen([sys.executable, "-c", ADDER, tests, str(i)])
        for i in (1, 2, 3)
    ]
    assert [p.wait() for p in started] == [0, 0, 0]
    assert len(wisdom.find(KEY).candidates[0].samples_s) == 60
    assert len(list(wisdom.everything())) == 61


def test_keys_are_of_this_machine():
    assert KEY.device == TARGET.model
    assert KEY.backend == JAX.name
