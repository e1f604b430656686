"""The frontier of memory and time: which plans are on it, and its picture."""

import itertools
import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from commands import SMALL, refused, run
from hypothesis import given
from hypothesis import strategies as st
from machine import candidate
from refusals import refused as raises

import attngen
from attngen import AttentionSpec, backends, drawing, frontier, recalling, targets
from attngen.errors import BackendError, FileError
from attngen.frontier import Frontier, Point
from attngen.peers import references
from attngen.peers.references import Reference
from attngen.records import Record
from attngen.reports import Certificate

V3 = targets.get("tpu-v3")
SPEC = AttentionSpec(q_heads=1, q_len=4096, qk_dim=64, dtype="bfloat16")
PNG = b"\x89PNG\r\n"


def point(temp_bytes, time_s, name="8×8"):
    return Point(name=name, choice={}, temp_bytes=temp_bytes, time_s=time_s)


sizes = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=30
)


@given(sizes)
def test_each_point_is_beaten_by_one_of_the_line_which_none_beats(pairs):
    points = [point(b, float(t)) for b, t in pairs]
    line = frontier.pareto(points)
    assert all(
        any(x.temp_bytes <= p.temp_bytes and x.time_s <= p.time_s for x in line)
        for p in points
    )
    for before, after in itertools.pairwise(line):
        assert before.temp_bytes < after.temp_bytes
        assert before.time_s > after.time_s


@given(sizes)
def test_bends_are_of_the_line_and_save_time(pairs):
    found = picture([point(b, float(t)) for b, t in pairs])
    bends = found.bends
    assert bends[-1] == found.line[-1]
    assert all(any(b is p for p in found.line) for b in bends)
    for before, after in itertools.pairwise(bends[:-1]):
        assert after.time_s < (1 - frontier.BEND) * before.time_s


def test_what_has_no_bytes_or_no_time_is_on_no_line():
    known = point(10, 1.0)
    assert frontier.pareto([point(None, 0.5), point(5, None), known]) == (known,)


@pytest.mark.parametrize(
    ("budget", "fastest"), [(None, 1.0), (99, 2.0), (10, 3.0), (9, None)]
)
def test_the_fastest_within_a_budget(budget, fastest):
    points = [point(100, 1.0), point(50, 2.0), point(10, 3.0), point(0, None)]
    found = frontier.within(points, budget)
    assert (found and found.time_s) == fastest


def picture(points, others=()):
    return Frontier(
        what="4 queries", target="abacus", time="time", points=tuple(points),
        others=tuple(others),
    )  # fmt: skip


def plans(*chunks):
    return [
        attngen.plan(SPEC, target="tpu-v3", fix={"q_chunk": q, "k_chunk": k})
        for q, k in chunks
    ]


def record(target, *candidates):
    key = recalling.key_of(SPEC, target, backends.get("jax"))
    return Record(key=key, candidates=candidates)


def test_a_record_of_estimates_becomes_points_and_says_the_clock():
    small, large = plans((128, 128), (1024, 4096))
    made = frontier.of(
        record(
            V3,
            candidate(small, temp_bytes=0, estimated_s=0.04),
            candidate(large, temp_bytes=2**20, estimated_s=0.01),
            candidate(large, digest="other", temp_bytes=5, failed="refused"),
            candidate(large, digest="unknown", temp_bytes=5),
        ),
        V3,
        [Reference(name="standard attention", failed="doesn't fit")],
    )
    assert [(p.name, p.temp_bytes, p.time_s) for p in made.points] == [
        ("128×128", 0, 0.04),
        ("1024×4096", 2**20, 0.01),
    ]
    assert "938 MHz" in made.time
    assert "TPU v3" in made.target
    assert made.others[0].missing == "doesn't fit"
    assert json.loads(json.dumps(made.to_dict()))["line"][0]["choice"] == small.choice


def test_measured_times_are_those_of_the_same_rounds():
    """The slower one was timed while the machine was twice as slow."""
    fast, slow = plans((128, 128), (1024, 4096))
    made = frontier.of(
        record(
            targets.get("cpu"),
            candidate(fast, samples_s=(1.0,) * 3, yardsticks_s=(0.1, 0.11, 0.12)),
            candidate(slow, samples_s=(6.0,) * 3, yardsticks_s=(0.2, 0.22, 0.24)),
        ),
        targets.get("cpu"),
        [],
    )
    assert [p.time_s for p in made.points] == pytest.approx([1.0, 3.0])
    assert made.time.endswith("measured")


# The picture.


@pytest.fixture
def several():
    others = [
        Point(name="standard", choice=None, temp_bytes=2**30, time_s=0.02),
        Point(name="paper", choice=None, temp_bytes=None, time_s=None, missing="no"),
    ]
    line = [point(2**i, 2.0**-i, f"{2**i}×7") for i in range(12, 24, 2)]
    return picture([point(0, 9.0, "1×1"), *line, point(2**20, 1e6)], others)


def test_a_picture_names_what_it_shows(several, tmp_path):
    pytest.importorskip("matplotlib")
    drawing.draw(several, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawing.draw(several, tmp_path / "a.svg")
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    texts = [" ".join("".join(t.itertext()).split()) for t in root.iter() if _text(t)]
    assert {"1×1", "4194304×7", "0 B", "1 GiB"} <= set(texts)
    assert any("0 B at the left edge" in t for t in texts)
    assert any(t.startswith("standard: 1.0 GiB, 20.0 ms") for t in texts)
    assert any(t.startswith("paper: ") and "compile" in t for t in texts)
    assert any("1 more are slower than shown" in t for t in texts)


def _text(element):
    return element.tag.endswith("}text")


def test_no_labels_overlap(several):
    pytest.importorskip("matplotlib")
    figure, axes = drawing.new_figure()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.plot([2**10, 2**24], [1e-8, 10.0], alpha=0)
    drawing._labels(figure, axes, several, 2**10)
    boxes = [t.get_window_extent() for t in axes.texts]
    assert len(boxes) > 3
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_picture_of_nothing_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with raises(FileError, "no certified plan"):
        drawing.draw(picture([]), tmp_path / "a.png")


def test_matplotlib_is_named_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    with raises(BackendError, "matplotlib") as caught:
        drawing.check(tmp_path / "a.png")
    assert "pip install 'attngen[plot]'" in caught.value.needed


# The command.


@pytest.fixture(autouse=True)
def own_wisdom(monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNGEN_WISDOM", str(tmp_path / "wisdom"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_can_not_be_written_is_refused_before_anything_is_timed():
    error = refused("FileError", "tune", *SMALL, "--frontier", "/proc/a.png")
    assert "can't be written" in error["what"]


@pytest.mark.parametrize("name", ["a.jpeg", "a", "nowhere/a.png"])
def test_a_file_that_can_not_be_drawn_is_refused_before_anything_is_timed(
    name, tmp_path
):
    refused("FileError", "tune", *SMALL, "--frontier", tmp_path / name)


@pytest.mark.parametrize(
    "where", [("--target", "h100"), ("--target", "h100", "--backend", "jax")]
)
def test_targets_without_bytes_or_times_have_no_frontier(where, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    refused("BackendError", "tune", *SMALL, *where, "--frontier", path)
    assert not path.exists()


def test_the_command_draws_all_that_was_compiled(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")

    def certify_many(made, by, target):
        """As if a tile were all: larger ones take more bytes, and less time."""
        return [
            Certificate(
                target,
                "XLA:TPU",
                temp_bytes=4 * p.q_chunk * p.k_chunk,
                estimated_cycles=10**8 + 10**14 // (p.q_chunk * p.k_chunk),
            )
            for p, _ in made
        ]

    def compiled(peer, spec, target):
        whole = Certificate(target.name, "XLA:TPU", temp_bytes=2**30)
        return Reference(name=peer, certificate=whole, time_s=0.5)

    monkeypatch.setattr("attngen.building.certify_many", certify_many)
    monkeypatch.setattr(references, "compiled", compiled)
    path = tmp_path / "a.png"
    command = ("tune", "--preset", "paper-16k", "--target", "tpu-v3")
    out, err = run(*command, "--frontier", path, "--seconds", "60", "--json")
    assert path.read_bytes().startswith(PNG)
    found = json.loads(out)["frontier"]
    assert found["path"] == str(path)
    assert [o["name"] for o in found["others"]] == ["plain", "paper"]
    least = min(p["temp_bytes"] for p in found["line"])
    assert least <= 2**17  # every budget was searched
    assert "within 128.0 KiB" in err
