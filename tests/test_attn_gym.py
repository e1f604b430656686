"""The library against independent definitions: the mods of attn-gym, pair by pair.

Its masks and scores that the library doesn't have are written here, in the language.
"""

import math

import numpy as np
import pytest
import torch
from attn_gym import masks as gym
from attn_gym import mods
from attn_gym.masks.document_mask import length_to_offsets
from library import matrix, preorder, random_tree

import attngen
from attngen import masks, scores
from attngen.tracing import mask, operand, score

LENGTHS = [5, 1, 9, 3, 6]  # of documents


def seen(mod, q_len, kv_len, b=0, h=0):
    """What a mask mod says of every pair, called once for each."""
    found = [
        [bool(mod(*map(torch.tensor, (b, h, q, k)))) for k in range(kv_len)]
        for q in range(q_len)
    ]
    return np.array(found)


def scored(mod, s, h=0, b=0):
    rows, columns = s.shape
    found = [
        [
            float(mod(torch.tensor(s[q, k]), *map(torch.tensor, (b, h, q, k))))
            for k in range(columns)
        ]
        for q in range(rows)
    ]
    return np.array(found)


def same(ours, mod, q_len, kv_len, operands=None):
    found = matrix(ours, q_len, kv_len, operands)
    np.testing.assert_array_equal(found, seen(mod, q_len, kv_len))
    assert found.any()
    assert not found.all()


# Masks of the library.


def test_causal():
    same(masks.causal(), gym.causal_mask, 12, 15)


@pytest.mark.parametrize("size", [0, 3, 7])
def test_sliding_window(size):
    ours = masks.causal() & masks.sliding_window(size + 1)
    same(ours, gym.generate_sliding_window(size), 14, 14)


@pytest.mark.parametrize(("size", "dilation"), [(4, 2), (7, 3), (3, 1), (2, 5)])
def test_dilated_sliding_window(size, dilation):
    steps = size // dilation
    ours = masks.dilated_window(steps + 1, dilation, steps)
    same(ours, gym.generate_dilated_sliding_window(size, dilation), 20, 20)


@pytest.mark.parametrize("length", [1, 6, 11])
def test_prefix_lm(length):
    ours = masks.prefix(length) | masks.causal()
    same(ours, gym.generate_prefix_lm_mask(length), 15, 15)
    by_operand = masks.prefix("length") | masks.causal()
    mod = gym.generate_prefix_lm_mask(length)
    same(by_operand, mod, 15, 15, {"length": [length]})


def offsets():
    return length_to_offsets(LENGTHS, "cpu")


def test_documents_and_packed_sequences():
    count = sum(LENGTHS)
    ids = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None]
    of = {"document_ids": ids, "cu_seqlens": offsets().numpy()}
    packed = masks.packed(len(LENGTHS))
    for inner, ours in (
        (gym.causal_mask, masks.causal()),
        (gym.generate_sliding_window(2), masks.causal() & masks.sliding_window(3)),
    ):
        mod = gym.generate_doc_mask_mod(inner, offsets())
        same(masks.documents() & ours, mod, count, count, of)
        same(packed & ours, mod, count, count, of)
    mod = gym.generate_packed_causal_doc_mask_mod(offsets())
    same(packed & masks.causal(), mod, count, count, of)
    both = masks.packed_causal(len(LENGTHS), "cu_seqlens", "cu_seqlens")
    same(both, mod, count, count, of)
    # a prefix of each document: its positions start anew
    mod = gym.generate_doc_mask_mod(gym.generate_prefix_lm_mask(3), offsets())
    starts = np.concatenate([np.arange(n) for n in LENGTHS])[None]
    place = operand("place", axes="bk", dtype="int32")
    first = mask(lambda b, h, q, k: place[b, k] < 3)
    ours = masks.documents() & (masks.causal(positions="place") | first)
    same(ours, mod, count, count, of | {"place": starts})


@pytest.mark.parametrize("radius", [1, 4])
def test_global_sliding_window(radius):
    flags = np.zeros(18, bool)
    flags[[0, 7]] = True
    mod = gym.generate_global_sliding_window(radius, torch.tensor(flags))
    same(masks.longformer(radius, "flags"), mod, 18, 18, {"flags": flags[None]})
    flags[:] = np.arange(18) < 3
    mod = gym.generate_global_sliding_window(radius, torch.tensor(flags))
    same(masks.longformer(radius, 3), mod, 18, 18)


@pytest.mark.parametrize(("side", "kernel"), [(5, (3, 3)), (6, (3, 5)), (7, (1, 7))])
def test_natten(side, kernel):  # on a square: it takes the row's limit from the width
    mod = gym.generate_natten(side, side, *kernel)
    same(masks.neighborhood((side, side), kernel), mod, side**2, side**2)


def test_tiled_natten():
    width, height, tile = 8, 6, (4, 3)
    mod = gym.generate_tiled_natten(width, height, 5, 3, *tile)
    order = []  # the tokens, tile by tile
    for top in range(0, height, tile[1]):
        for left in range(0, width, tile[0]):
            for y in range(top, top + tile[1]):
                order += [y * width + x for x in range(left, left + tile[0])]
    found = matrix(masks.neighborhood((height, width), (3, 5)), 48, 48)
    np.testing.assert_array_equal(found[np.ix_(order, order)], seen(mod, 48, 48))


@pytest.mark.parametrize("cached", [0, 5])
def test_tree(cached):
    parents = random_tree(11, seed=2)
    enter, leave = preorder(parents)
    ancestors = gym.build_tree_ancestor_matrix(parents, device="cpu")
    mod = gym.generate_jetspec_tree_causal_mask_mod(cached, ancestors)
    before = np.zeros(cached, int)
    of = {
        "tree_enter": [np.concatenate([before, enter])],
        "tree_exit": [np.concatenate([before, leave])],
        "q_enter": [enter],
    }
    ours = masks.tree(q_enter="q_enter", prefix=cached)
    same(ours, mod, 11, 11 + cached, of)


@pytest.mark.parametrize("size", [4, 7])
def test_groups_are_windows_of_a_line(size):
    mod = gym.batchify_mask_mod(gym.causal_mask, size)
    same(masks.shifted_windows(20, size) & masks.causal(), mod, 20, 20)


# Masks that a user writes.


@pytest.mark.parametrize(("length", "block"), [(12, 3), (10, 4)])
def test_block_diffusion(length, block):
    def diffusion(b, h, q, k):
        q_noised, k_noised = q < length, k < length
        q_block, k_block = q % length // block, k % length // block
        own = (q_block == k_block) & (q_noised == k_noised)
        before = (q_block > k_block) & q_noised & ~k_noised
        return own | before | (q_block >= k_block) & ~q_noised & ~k_noised

    mod = gym.generate_block_diffusion_mask(length, block)
    same(mask(diffusion), mod, 2 * length, 2 * length)


def test_shared_prefix():
    count, documents = sum(LENGTHS), len(LENGTHS)
    shared = torch.tensor([0, 0, 2, 2, 0], dtype=torch.int32)
    mod = gym.generate_shared_prefix_mask_mod(offsets(), shared)
    cu = operand("cu", axes=(documents + 1,), dtype="int32")
    of = operand("of", axes=(documents,), dtype="int32")

    def prefix(b, h, q, k):  # -1 before the first offset, which an index can't be
        after = attngen.searchsorted(cu, q) - 1
        own = attngen.minimum(attngen.maximum(after, 0), documents - 1)
        first = attngen.minimum(attngen.maximum(of[own], 0), documents - 1)
        inside = (k >= cu[own]) & (k <= q)
        return inside | (own != first) & (k >= cu[first]) & (k < cu[first + 1])

    arrays = {"cu": offsets().numpy(), "of": shared.numpy()}
    same(mask(prefix), mod, count, count, arrays)


def test_vision_cross_attention():
    intervals = torch.tensor([[0, 4], [2, 9], [5, 12]])
    mod = gym.generate_vision_cross_attention_mask_mod(intervals, 3)
    of = operand("intervals", axes=(3, 2), dtype="int32")
    ours = mask(lambda b, h, q, k: (q >= of[k // 3, 0]) & (q < of[k // 3, 1]))
    same(ours, mod, 12, 9, {"intervals": intervals.numpy()})


def test_sliding_tiles():
    mod = gym.generate_sta_mask_mod_2d((6, 8), (6, 6), (2, 2), text_seq_len=5)

    def tiles(b, h, q, k):  # neighborhoods of tiles of 4 tokens, and text that all see

        def of(at):
            return (at // 4 // 4, at // 4 % 4)

        near = (q < 48) & (k < 48)
        for i, j, n in zip(of(q), of(k), (3, 4), strict=True):
            first = attngen.minimum(attngen.maximum(i - 1, 0), n - 3)
            near = near & (j >= first) & (j < first + 3)
        return near | (k >= 48) | (q >= 48)

    same(mask(tiles), mod, 53, 53)


def test_sparse_video():
    spatial = gym.generate_spatial_head_mask_mod(4, 3, 6, 1, True, 2)
    ours = mask(lambda b, h, q, k: (k < 10) | (q < 4) | (abs(q - k) < 6))
    same(ours, spatial, 22, 22)
    temporal = gym.generate_temporal_head_mask_mod(4, 3, 6, 1)
    away = mask(lambda b, h, q, k: abs((q - 4) % 6 - (k - 4) % 6) < 2)
    same(masks.prefix(4) | mask(lambda b, h, q, k: q < 4) | away, temporal, 22, 22)


def test_speculative_training():
    mod = gym.generate_jetspec_training_mask_mod(5, 4)

    def blocks(b, h, q, k):
        at = k - 5
        return (k < 5) | (q // 4 == at // 4) & (at % 4 <= q % 4)

    same(mask(blocks), mod, 12, 17)


# Scores.

S = np.random.default_rng(0).standard_normal((9, 11)).astype(np.float32) * 20


@pytest.mark.parametrize("heads", [1, 2, 8, 16])
def test_alibi(heads):
    mod = mods.generate_alibi_bias(heads)
    slopes = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    for h in range(heads):
        expected = scored(mod, S, h)
        for ours in (scores.alibi(heads=heads), scores.alibi()):
            found = matrix(ours, 9, 11, {"slopes": slopes}, h=h, s=S)
            np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("cap", [1, 15, 30])
def test_softcap(cap):
    expected = scored(mods.generate_tanh_softcap(cap), S)
    for ours in (scores.softcap(cap), scores.softcap("caps")):
        found = matrix(ours, 9, 11, {"caps": [float(cap)]}, s=S)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sandwich_is_a_relative_table():
    heads, length = 2, 12
    mod = mods.generate_sandwich_bias(heads, length)
    frequencies = 1 / 10000 ** (2 * np.arange(64) / 128)
    bias = np.cos(np.arange(1 - length, length)[:, None] * frequencies).sum(-1)
    table = bias * (heads / (8 * np.arange(1, heads + 1)[:, None]))
    ours = scores.relative_table(length)
    for h in range(heads):
        found = matrix(ours, 9, 11, {"relative_table": table}, h=h, s=S)
        np.testing.assert_allclose(found, scored(mod, S, h), rtol=1e-4, atol=1e-4)


def test_graphormer():
    adjacency = torch.rand((1, 9, 9), generator=torch.Generator().manual_seed(0)) < 0.2
    away = mods.shortest_path_distances(adjacency | adjacency.mT, 3)
    table = torch.arange(10.0).reshape(2, 5) / 4
    mod = mods.generate_graphormer_spatial_bias(table, away)
    of = operand("of", axes=("h", 5), dtype="float32")
    path = operand("path", axes="bqk", dtype="int32")
    ours = score(lambda s, b, h, q, k: s + of[h, path[b, q, k]])
    arrays = {"of": table.numpy(), "path": away.numpy()}
    found = matrix(ours, 9, 9, arrays, h=1, s=S[:, :9])
    np.testing.assert_allclose(found, scored(mod, S[:, :9], 1), rtol=1e-6)


def test_an_activation():
    mod = mods.generate_activation_score_mod(torch.sigmoid, 0.5)
    ours = score(lambda s, b, h, q, k: attngen.log(1 / (1 + attngen.exp(-s)) + 0.5))
    np.testing.assert_allclose(matrix(ours, 9, 11, s=S), scored(mod, S), rtol=1e-5)


def test_rotary_scores_are_a_bias():
    generator = torch.Generator().manual_seed(0)
    q_rope, k_rope = (torch.randn((1, 1, n, 4), generator=generator) for n in (9, 11))
    mod = mods.generate_mla_rope_score_mod(q_rope, k_rope, 128, 0.5)
    bias = 0.5 * (q_rope @ k_rope.mT)[0, 0].numpy()
    found = matrix(scores.bias("rope", "qk"), 9, 11, {"rope": bias}, s=S)
    np.testing.assert_allclose(found, scored(mod, S), rtol=1e-5, atol=1e-6)
    assert math.isfinite(found.sum())
