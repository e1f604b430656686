"""The tile map: what each cell stands for, how it is drawn and written, how long it takes."""

import dataclasses
import json
import time
import tracemalloc

import numpy as np
import pytest
from commands import CHUNKS, SMALL, run

import attngen
from attngen import AttentionSpec, masks, pictures, presets, skipping
from attngen.lists import worth_listing
from attngen.tilemap import EDGE, EMPTY, FULL, cells, kinds, listed_kinds
from attngen.tracing import mask

SPEC = AttentionSpec(q_heads=2, q_len=64, qk_dim=8)
LONG = AttentionSpec(q_heads=1, q_len=2**20, qk_dim=64)
WINDOW = masks.causal() & masks.sliding_window(20)
GLOBAL = masks.causal() & (masks.sliding_window(20) | masks.prefix(9))
EVERY_OTHER = mask(lambda b, h, q, k: (k <= q) & (k // 16 % 2 == 0))
MASKS = {
    "no mask": None,
    "causal": masks.causal(),
    "window": WINDOW,
    "window and global": GLOBAL,
    "documents": masks.causal() & masks.documents(),
    "every other": EVERY_OTHER,
    "nothing": mask(lambda b, h, q, k: k > q + 64),
}


def plan_of(condition, q_chunk=8, k_chunk=8, **change):
    spec = dataclasses.replace(SPEC, mask=condition, **change)
    several = spec.kv_len > k_chunk
    listed = {"skip": "list"} if several and worth_listing(spec) else {}
    return attngen.plan(spec, fix={"q_chunk": q_chunk, "k_chunk": k_chunk} | listed)


def merged(tiles, high, wide):
    """Tiles as cells, each of several: what all are, else an edge."""
    made = []
    for i in range(0, tiles.shape[0], high):
        parts = (
            set(tiles[i : i + high, j : j + wide].flat)
            for j in range(0, tiles.shape[1], wide)
        )
        made.append([p.pop() if len(p) == 1 else EDGE for p in parts])
    return np.array(made)


@pytest.mark.parametrize("sizes", [(8, 8), (7, 10), (64, 16), (3, 64)])
@pytest.mark.parametrize("name", MASKS)
def test_each_tile_has_its_own_cell_and_few_cells_are_merged(name, sizes):
    plan = plan_of(MASKS[name], *sizes)
    tiles = kinds(plan)
    assert np.array_equal(cells(plan, 100, 100).kinds, tiles)
    for rows, columns in ((1, 1), (3, 2), (2, 5), (5, 100)):
        found, high, wide = cells(plan, rows, columns)
        assert found.shape[0] <= rows
        assert found.shape[1] <= columns
        assert np.array_equal(found, merged(tiles, high, wide))


@pytest.mark.parametrize("name", MASKS)
def test_the_map_holds_as_many_tiles_of_each_kind_as_the_plan_counts(name):
    plan = plan_of(MASKS[name])
    tiles = cells(plan, 100, 100).kinds
    found = [int((tiles == kind).sum()) for kind in (FULL, EDGE, EMPTY)]
    assert found == [plan.tiles.full, plan.tiles.edge, plan.tiles.empty]


def test_of_many_listed_tiles_blocks_are_judged_and_nothing_narrow_is_lost():
    band = mask(lambda b, h, q, k: (k <= q) & (q - k < 16) & (k // 2**18 % 2 == 0))
    plan = attngen.plan(
        dataclasses.replace(LONG, mask=band),
        fix={"q_chunk": 8, "k_chunk": 8, "skip": "list"},
    )
    found, high, wide = cells(plan, 64, 64)
    assert high == wide == 2**20 // 8 // 64
    half = np.arange(64) // 16 % 2 == 0
    assert np.array_equal(np.diag(found) != EMPTY, half)
    assert np.all(np.triu(found, 1)[np.triu_indices(64, 1)] == EMPTY)


@pytest.mark.parametrize("q_chunk", [8, 1024])
@pytest.mark.parametrize("name", ["window", "documents", "every other"])
def test_a_million_tokens_take_under_a_second_and_few_bytes(name, q_chunk):
    spec = dataclasses.replace(LONG, mask=MASKS[name])
    small = dataclasses.replace(LONG, q_len=4096, kv_len=4096, mask=MASKS[name])
    listed = {"skip": "list"} if worth_listing(small) else {}
    plan = attngen.plan(small, fix={"q_chunk": q_chunk, "k_chunk": 1024} | listed)
    plan = dataclasses.replace(plan, spec=spec)  # planning is timed elsewhere
    cells(attngen.plan(small), 40, 80)  # verdicts and spans are derived once
    start = time.process_time()
    cells(plan, 512, 512)
    assert time.process_time() - start < 1
    tracemalloc.start()
    try:
        cells(plan, 512, 512)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_a_ragged_plan_has_whole_cells():
    plan = plan_of(WINDOW, 24, 40, q_len=50, kv_len=70, q_offset=3)
    assert cells(plan, 9, 9).kinds.shape == (3, 2)
    assert listed_kinds(plan.spec, 24, 40, np.arange(3)).shape == (3, 2)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(64, 64), (1, 4096), (4096, 1), (3000, 70)])
def test_text_fits_a_terminal(name, size):
    q_len, kv_len = size
    change = {"q_len": q_len, "kv_len": kv_len, "q_offset": max(0, kv_len - q_len)}
    if name == "documents" and q_len > kv_len:
        pytest.skip("queries and keys are the same tokens")
    chunks = {"q_chunk": min(8, q_len), "k_chunk": min(8, kv_len)}
    lines = pictures.text(plan_of(MASKS[name], **chunks, **change)).splitlines()
    assert len(lines) <= 56
    assert all(len(line) <= 100 for line in lines)


def test_text_of_a_small_map():
    text = pictures.text(plan_of(WINDOW, 16, 16))
    assert text.splitlines() == [
        "64 queries × 64 keys in tiles of 16 × 16: 44% of the square is skipped",
        "",
        "         keys",
        "queries  0             64",
        "      0  ▒▒▒▒············",
        "         ▒▒▒▒············",
        "     16  ▒▒▒▒▒▒▒▒········",
        "         ▒▒▒▒▒▒▒▒········",
        "     32  ▒▒▒▒▒▒▒▒▒▒▒▒····",
        "         ▒▒▒▒▒▒▒▒▒▒▒▒····",
        "     48  ····▒▒▒▒▒▒▒▒▒▒▒▒",
        "         ····▒▒▒▒▒▒▒▒▒▒▒▒",
        "     64",
        "",
        "█ full: 0 tiles, 0%",
        "▒ partial: 9 tiles, 56%",
        "· empty, never visited: 7 tiles, 44%",
    ]


def test_what_comes_at_run_time_is_said():
    text = pictures.text(plan_of(MASKS["documents"]))
    assert "document_ids says which at run time" in text
    assert "the most that is visited" in text
    text = pictures.text(plan_of(masks.causal(), kv_lengths=True))
    assert "at its largest" in text


def test_where_the_share_of_work_is_not_that_of_tiles_it_says_why():
    causal = dataclasses.replace(SPEC, q_len=1024, kv_len=1024, mask=masks.causal())
    choice = {"q_chunk": 512, "k_chunk": 512, "diagonal": 128}
    text = pictures.text(attngen.plan(causal, fix=choice))
    assert "44% of the square is skipped" in text
    assert "of partial tiles a part is skipped, too" in text
    text = pictures.text(plan_of(masks.causal(), 24, 24))
    assert "the last tiles, with fewer queries or keys, are computed whole" in text
    assert "too" not in pictures.text(plan_of(masks.causal()))


def test_plan_prints_the_map_after_the_plan():
    plan = attngen.plan(presets.get("mistral-7b"))
    out, err = run("plan", "--preset", "mistral-7b", "--picture", "-")
    assert out == f"{plan.explain()}\n\n{pictures.text(plan)}\n"
    assert err == ""
    out, err = run("plan", "--preset", "mistral-7b", "--picture", "-", "--json")
    said = json.loads(out)["picture"]
    assert said == {
        "path": None,
        "skipped": skipping.share(plan),
        "text": pictures.text(plan),
    }


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_plan_draws_a_file(ending, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"mask.{ending}"
    made = run("plan", *SMALL, *CHUNKS)[0]
    out, err = run("plan", *SMALL, *CHUNKS, "--picture", path)
    assert (out, err) == (made, f"wrote {path}\n")
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    out, err = run("plan", *SMALL, *CHUNKS, "--picture", path, "--json")
    assert json.loads(out)["picture"] == {"path": str(path), "skipped": 0.0}
    assert err == f"wrote {path}\n"


def test_a_drawing_says_what_the_text_says(tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib

    plan = plan_of(MASKS["documents"])
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        pictures.draw(plan, tmp_path / "mask.svg")
    drawn = " ".join((tmp_path / "mask.svg").read_text().split())
    for part in ("in tiles of 8 × 8", "always empty, never visited: 28 tiles, 44%"):
        assert part in drawn
    assert "document_ids says which at run time" in drawn
    for word in ("queries", "keys"):
        assert f">{word}<" in drawn


def test_a_drawing_of_a_long_or_narrow_square(tmp_path):
    pytest.importorskip("matplotlib")
    for q_len, kv_len in ((1, 300), (300, 2)):
        plan = plan_of(None, 1, 1, q_len=q_len, kv_len=kv_len)
        pictures.draw(plan, tmp_path / "mask.png")
        assert (tmp_path / "mask.png").stat().st_size > 1000
