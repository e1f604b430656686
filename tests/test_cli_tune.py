"""`attngen tune` and `attngen wisdom`: what they print, how they end, what they keep."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
from commands import FAILED, SMALL, WRONG, process, refused, run
from machine import Machine, candidate

import attngen
from attngen import backends, planner, recalling, targets, timing, tuner, tuning, wisdom
from attngen.records import Finished, Record

TARGET, JAX = targets.get(), backends.get()
SPEC = attngen.AttentionSpec(q_heads=2, q_len=40, qk_dim=8)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Wisdom of a test's own; and a machine that may be busy with other tests."""
    monkeypatch.setattr(timing, "USELESS", float("inf"))
    monkeypatch.setattr(tuner, "STAGE_S", 0.0)
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "own"))
    return tmp_path / "own"


@pytest.fixture
def record():
    """Two plans of SPEC that were timed, as tuning writes them."""
    made = []
    for turn, ranked in enumerate(planner.rank(SPEC, TARGET, JAX)[:2]):
        plan = recalling.neutral(SPEC, TARGET, JAX, ranked.choice)
        digest = attngen.emit(plan).digest
        times = {"samples_s": (0.1 + turn, 0.1 + turn), "yardsticks_s": (0.01, 0.02)}
        made.append(candidate(plan, digest=digest, **times))
    done = Finished(effort="measure", fix={}, budget=None, noise=0.0)
    key = recalling.key_of(SPEC, TARGET, JAX)
    record = Record(key=key, finished=(done,), candidates=tuple(made))
    wisdom.add(record)
    return record


def test_tune_prints_what_was_tried_and_what_is_chosen(sizes, monkeypatch):
    monkeypatch.setitem(tuner.MOST, "measure", 2)
    out, err = run("tune", *SMALL, "--seconds", "20")
    assert max(map(len, out.splitlines())) <= 100
    table, chosen = out.split("\n40 queries × 40 keys", 1)
    assert "1.00×" in table
    assert "timed here: " in chosen
    assert re.search(r"^certified [\d.]+ \w+ of temporaries$", chosen, re.MULTILINE)
    assert "1 of 2: " in err
    data = json.loads(run("tune", *SMALL, "--seconds", "0.01", "--json")[0])
    assert data["effort"] == "measure"
    assert data.pop("chosen")["backend"] == "jax"
    assert json.loads(run("wisdom", "show", *SMALL, "--json")[0]) == data


def test_an_estimate_is_not_timed(sizes):
    out, _ = run("tune", *SMALL, "--effort", "estimate")
    assert "effort: estimate" in out
    assert "not timed" in out


def test_show_lists_the_records_or_one_of_them(record):
    assert "measure" in run("wisdom", "show")[0]
    (listed,) = json.loads(run("wisdom", "show", "--json")[0])
    assert Path(listed.pop("file")).exists()
    assert listed == json.loads(record.to_json())
    assert run("wisdom", "show", *SMALL)[0] == f"{record}\n"
    other = ("wisdom", "show", *SMALL, "--batch", "2")
    assert "batch: 2 ≠ 1" in run(*other)[0]
    assert json.loads(run(*other, "--json")[0]) is None


def test_why_says_what_differs(record):
    said = json.loads(run("wisdom", "why", *SMALL, "--json")[0])
    assert said["used"] is True
    assert said["why"] == run("wisdom", "why", *SMALL)[0].rstrip("\n")
    other = ("wisdom", "why", *SMALL, "--batch", "2")
    assert "batch: 2 ≠ 1" in run(*other)[0]
    assert json.loads(run(*other, "--json")[0])["used"] is False


def test_records_are_exported_cleared_and_merged(record, tmp_path):
    exported = tmp_path / "all.json"
    assert "1 record into" in run("wisdom", "export", exported)[0]
    refused("WisdomError", "wisdom", "clear")
    assert wisdom.find(record.key) == record
    assert "deleted" in run("wisdom", "clear", "--yes")[0]
    assert wisdom.find(record.key) is None
    assert json.loads(run("wisdom", "clear", "--yes", "--json")[0])["deleted"] == []
    refused("WisdomError", "wisdom", "export", tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
    merged = json.loads(run("wisdom", "merge", exported, "--json")[0])
    assert list(merged["written"].values()) == [1]
    assert wisdom.find(record.key) == record


@pytest.fixture
def three(record):
    """Records of two specs here, and of one on another device."""
    other = recalling.key_of(dataclasses.replace(SPEC, q_len=41), TARGET, JAX)
    wisdom.add(dataclasses.replace(record, key=other))
    abacus = {"target": "abacus", "device": "Abacus 3000", "backend": "beads"}
    wisdom.add(
        dataclasses.replace(record, key=dataclasses.replace(record.key, **abacus))
    )
    return record


CHOSEN = {
    "all": ((), 3),
    "a spec": (SMALL, 2),
    "a spec with a budget": ((*SMALL, "--budget", "1MiB"), 2),
    "a target": (("--target", "cpu"), 2),
    "a backend": (("--backend", "beads"), 1),
    "a device": (("--device", "abacus"), 1),
    "a spec of a target": ((*SMALL, "--target", "abacus"), 1),
    "a spec of a device": ((*SMALL, "--device", "3000"), 1),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_records_to_export_are_chosen(name, three, tmp_path):
    arguments, count = CHOSEN[name]
    path = tmp_path / "some.json"
    said = json.loads(run("wisdom", "export", path, *arguments, "--json")[0])
    assert said == {"path": str(path), "records": count}
    assert len(wisdom.read(path)) == count
    if not set(SMALL) & set(arguments) or "--device" in arguments:
        listed = json.loads(run("wisdom", "show", *arguments, "--json")[0])
        assert len(listed) == count


def test_a_spec_to_export_may_be_a_file_or_a_preset(three, tmp_path):
    path, spec = tmp_path / "some.json", tmp_path / "spec.toml"
    spec.write_text(SPEC.to_toml())
    assert run("wisdom", "export", path, spec)[0].startswith("2 records into ")
    error = refused("WisdomError", "wisdom", "export", path, "--preset", "llama3-8b")
    assert error["got"] == "this spec"
    assert len(wisdom.read(path)) == 2


def test_what_no_record_is_of_is_named(three, tmp_path):
    path = tmp_path / "some.json"
    for command in (("export", path), ("show",)):
        error = refused("WisdomError", "wisdom", *command, "--target", "nonsense")
        assert error["got"] == "target 'nonsense'"
        assert error["needed"] == "of what there is: target: abacus, cpu"
        error = refused("WisdomError", "wisdom", *command, "--device", "no", *SMALL)
        assert TARGET.model in error["needed"]
    assert not path.exists()


def test_an_export_replaces_wisdom_and_nothing_else(record, tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text("q_len = 3")
    assert "damaged" in refused("WisdomError", "wisdom", "export", path)["what"]
    assert path.read_text() == "q_len = 3"
    refused("WisdomError", "wisdom", "export", tmp_path)
    wisdom.export(tmp_path / "all.json")
    assert run("wisdom", "export", tmp_path / "all.json")[0].startswith("1 record ")


def test_dir_names_each_place(record, folder):
    places = json.loads(run("wisdom", "dir", "--json")[0])
    assert places["places"][0] == {"path": str(folder), "files": 1}
    assert places["folder"] == str(folder)
    assert str(folder) in run("wisdom", "dir")[0]


def test_build_takes_what_was_timed(record, sizes):
    data = json.loads(run("build", *SMALL, "--effort", "measure", "--json")[0])
    best = record.best().choice
    assert {n: data["plan"][n] for n in ("algorithm", "q_chunk", "k_chunk")} == {
        n: best[n] for n in ("algorithm", "q_chunk", "k_chunk")
    }


@pytest.mark.parametrize(
    "seconds", ["0", "-3", "nan", "inf", "-inf", "1e999", "1e-400"]
)
def test_the_command_refuses_no_time(seconds):
    refused("PlanError", "tune", *SMALL, "--seconds", seconds)


def test_next_to_no_time_is_enough_for_one_plan(sizes):
    assert "time for 1 of " in run("tune", *SMALL, "--seconds", "1e-9")[1]


@pytest.mark.parametrize("noise", [(1.0, 40.0), (1.0,)], ids=["noisy", "standing"])
def test_useless_samples_end_it_with_words(noise, sizes, monkeypatch):
    """Nothing that was kept before is lost."""
    monkeypatch.setattr(timing, "USELESS", 2.0)
    monkeypatch.setattr(timing, "STANDS_S", 0.01)
    monkeypatch.setitem(tuner.MOST, "measure", 2)
    machine = Machine(monkeypatch, noise)
    if noise == (1.0,):
        monkeypatch.setattr(timing, "clock", lambda: 5.0)
    else:  # each round is forty times as slow as the one before, or as fast
        interleaved, turns = timing.interleaved, itertools.count()
        slow = lambda: machine.work(0.02 * (1, 40)[next(turns) % 2])()  # noqa: E731
        monkeypatch.setattr(
            timing,
            "interleaved",
            lambda *a, **k: interleaved(*a, **k | {"yardstick": slow}),
        )
    for as_json in ((), ("--json",)):
        out, err = run("tune", *SMALL, *as_json, code=FAILED)
        assert out == ""
        assert "clock" in err or "too noisy" in err
        assert "Traceback" not in err
    assert all(r.effort != "measure" for _, r in wisdom.everything())


@pytest.mark.parametrize("named", ["off", "file"])
def test_commands_say_that_wisdom_needs_a_folder(named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("[]")
    monkeypatch.setenv("ATTNGEN_WISDOM", named)
    for command in (("show",), ("why", *SMALL), ("dir",), ("export", "all.json")):
        assert "names a folder" in refused("WisdomError", "wisdom", *command)["what"]
    refused("WisdomError", "tune", *SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_that_there_is_no_wisdom_yet_is_said(folder):
    assert run("wisdom", "show")[0].startswith(f"There is no wisdom yet: {folder}")
    assert json.loads(run("wisdom", "show", "--json")[0]) == []


def test_the_commands_name_a_damaged_file(folder):
    folder.mkdir()
    (folder / "x.json").write_text("[")
    for command in (("why", *SMALL), ("show",), ("show", *SMALL)):
        error = refused("WisdomError", "wisdom", *command)
        assert "x.json" in error["what"]
    (folder / "x.json").write_text('{"format": 99, "records": []}')
    assert "99" in refused("WisdomError", "wisdom", "show")["got"]
    refused("WisdomError", "wisdom", "merge", folder / "missing.json")


@pytest.mark.filterwarnings("default")
def test_a_damaged_file_is_a_plain_warning_where_wisdom_is_not_asked_for(
    folder, certified
):
    folder.mkdir()
    (folder / "x.json").write_text("[")
    err = run("build", *SMALL)[1]
    assert (
        f"attngen: warning: Wisdom isn't used: {folder / 'x.json'} is damaged."
        in " ".join(err.split())
    )
    assert "Warning:" not in err
    assert "warnings.warn" not in err


def test_an_interrupt_says_what_is_kept_and_prints_it(monkeypatch, record):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", interrupted)
    out, err = run("tune", *SMALL, code=FAILED)
    assert out.startswith(str(record))
    path = wisdom.path_of(record.key)
    assert f"interrupted; 4 samples kept in {path}" in " ".join(err.split())
    wisdom.clear()
    out, err = run("tune", *SMALL, code=FAILED)
    assert out == ""
    assert "interrupted; 0 samples" in err


def test_the_exit_code_of_a_refused_process(process_environment, tmp_path):
    ran = process(
        "tune", *SMALL, "--seconds", "0", cwd=tmp_path, environment=process_environment
    )
    assert ran.returncode == WRONG
    assert "Traceback" not in ran.stderr
