"""What it costs to find out what is skipped: seconds and bytes, at a million tokens."""

import time
import tracemalloc

import pytest

import attngen
from attngen import AttentionSpec, masks, tilemap
from attngen.lists import skips
from attngen.regions import spans
from attngen.tiles import count_tiles

N, CHUNK = 2**20, 1024
GRID = (1024, 1024)
LIBRARY = {
    "causal": masks.causal(),
    "window": masks.causal() & masks.sliding_window(4096),
    "two sides": masks.sliding_window(512, 512),
    "dilated": masks.causal() & masks.dilated_window(512, 8),
    "prefix": masks.causal() | masks.prefix(1000),
    "prefix of each batch": masks.causal() | masks.prefix("known"),
    "streaming": masks.streaming_llm(4, 4096),
    "longformer": masks.longformer(512, 16),
    "marked": masks.longformer(512, "marked"),
    "strided": masks.strided(4096),
    "fixed": masks.fixed(4096, 32),
    "documents": masks.causal() & masks.documents(),
    "packed": masks.causal() & masks.packed(64),
    "packed causal": masks.packed_causal(64),
    "lengths": masks.lengths("key_lengths", "query_lengths"),
    "tree": masks.tree(prefix=N // 2),
    "line": masks.neighborhood(N, 129),
    "image": masks.neighborhood(GRID, 7),
    "dilated image": masks.neighborhood(GRID, 7, 2),
    "volume": masks.neighborhood((1024, 32, 32), (3, 5, 5)),
    "shifted": masks.shifted_windows(GRID, 8, 4),
    "blocks": masks.block_sparse((N // 128, N // 128), 128),
    "dense": masks.dense(),
    "positions": masks.causal(positions="places"),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_a_million_tokens_take_less_than_a_second(name):
    mask = LIBRARY[name]
    spec = AttentionSpec(q_heads=1, q_len=N, qk_dim=64, dtype="bfloat16", mask=mask)
    start = time.process_time()
    _analysed(spec)
    assert time.process_time() - start < 1
    tracemalloc.start()  # which makes it slow
    try:
        _analysed(spec)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 200e6


def _analysed(spec):
    spans(spec)
    count_tiles(spec, CHUNK, CHUNK)
    if skips(spec):
        tilemap.count_listed(spec, CHUNK, CHUNK)


def test_the_library_is_all_here():
    names = {name for m in LIBRARY.values() for name in _names(m.form)}
    assert set(masks.LIBRARY) <= names


def _names(form):
    if isinstance(form, str):
        yield form
    elif isinstance(form, list):
        for part in form:
            yield from _names(part)
    elif isinstance(form, dict):
        for name, inner in form.items():
            yield name
            if name in ("and", "or", "not"):
                yield from _names(inner)


def test_a_window_is_work_in_proportion_to_the_tokens():
    flop, tiles = [], []
    for n in (2**18, 2**19, 2**20):
        window = masks.causal() & masks.sliding_window(4096)
        spec = AttentionSpec(q_heads=1, q_len=n, qk_dim=64, mask=window)
        fix = {"algorithm": "running", "q_chunk": CHUNK, "k_chunk": CHUNK}
        plan = attngen.plan(spec, target="cpu", fix=fix)
        flop.append(plan.flop / n)
        tiles.append(plan.tiles.visited * CHUNK)
    assert flop[0] == pytest.approx(flop[1], rel=0.01)
    assert flop[0] == pytest.approx(flop[2], rel=0.01)
    assert tiles[-1] <= 5 * 2**20  # W / CHUNK + 1 for each chunk


def test_a_plan_of_a_listed_mask_is_quick():
    spec = AttentionSpec(
        q_heads=8, q_len=2**16, qk_dim=64, mask=masks.causal() & masks.strided(4096)
    )
    start = time.process_time()
    attngen.plan(spec, target="cpu")
    assert time.process_time() - start < 2
