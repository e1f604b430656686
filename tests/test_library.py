"""The library's masks against definitions written without it: loops, trees, rolls."""

import math

import numpy as np
import pytest
from library import matrix, preorder, random_tree
from refusals import refused

import attngen
from attngen import AttentionSpec, masks
from attngen.errors import OperandError


def pairs(seen, q_len, kv_len):
    """The matrix of a Python function of (q, k)."""
    return np.array([[seen(q, k) for k in range(kv_len)] for q in range(q_len)])


def same(mask, seen, q_len, kv_len, operands=None, **at):
    np.testing.assert_array_equal(
        matrix(mask, q_len, kv_len, operands, **at), pairs(seen, q_len, kv_len)
    )


# Windows.


@pytest.mark.parametrize(
    ("left", "dilation", "right"), [(1, 3, 0), (4, 3, 2), (3, 1, 5)]
)
def test_a_dilated_window_is_a_list_of_keys(left, dilation, right):
    def seen(q, k):
        before = [q - i * dilation for i in range(left)]
        after = [q + i * dilation for i in range(1, right + 1)]
        return k in before + after

    same(masks.dilated_window(left, dilation, right), seen, 23, 31)
    past = masks.dilated_window(left, dilation) & masks.causal()
    same(past, lambda q, k: seen(q, k) and k <= q, 23, 31)


@pytest.mark.parametrize(("first", "window"), [(4, 5), (0, 1), (1, 40)])
def test_streaming_keeps_the_first_and_the_last_keys(first, window):
    def seen(q, k):
        cache = list(range(q + 1))
        return k in cache[:first] + cache[-window:]

    same(masks.streaming_llm(first, window), seen, 20, 25)


@pytest.mark.parametrize("stride", [1, 3, 7])
def test_strided_is_both_heads_of_the_paper(stride):
    def seen(q, k):  # arXiv 1904.10509, section 4.2
        first = range(max(0, q - stride), q + 1)
        second = [j for j in range(q + 1) if (q - j) % stride == 0]
        return k in first or k in second

    same(masks.strided(stride), seen, 25, 25)


@pytest.mark.parametrize(("stride", "summary"), [(4, 1), (8, 3), (5, 5)])
def test_fixed_is_both_heads_of_the_paper(stride, summary):
    def seen(q, k):  # arXiv 1904.10509, section 4.2, with j mod l from l - c on
        first = [j for j in range(q + 1) if j // stride == q // stride]
        second = [
            j for j in range(q + 1) if j % stride in range(stride - summary, stride)
        ]
        return k in first or k in second

    same(masks.fixed(stride, summary), seen, 25, 25)


# Sequences.


def test_segments_may_differ_between_queries_and_keys():
    q_ids, k_ids = [[3, 3, 1, 9]], [[1, 3, 3, 3, 2]]
    mask = masks.documents(q_ids="q_segments", k_ids="kv_segments")
    arrays = {"q_segments": q_ids, "kv_segments": k_ids}
    same(mask, lambda q, k: q_ids[0][q] == k_ids[0][k], 4, 5, arrays)
    spec = AttentionSpec(q_heads=1, q_len=4, kv_len=5, qk_dim=8, mask=mask)
    assert spec.q_offset is None  # ids don't ask where queries stand


CU_Q, CU_K = [1, 4, 4, 9, 11], [0, 6, 7, 13, 15]


def sequence(offsets, position):
    """Which sequence a position lies in, found by walking over them; None outside."""
    for i in range(len(offsets) - 1):
        if position in range(offsets[i], offsets[i + 1]):
            return i
    return None


def test_packed_sequences_see_their_own_and_padding_nothing():
    def seen(q, k):
        return sequence(CU_Q, q) is not None and sequence(CU_Q, q) == sequence(CU_Q, k)

    same(masks.packed(4), seen, 13, 13, {"cu_seqlens": CU_Q})


def test_packed_sequences_of_queries_may_lie_elsewhere_than_their_keys():
    def seen(q, k):
        return sequence(CU_Q, q) is not None and sequence(CU_Q, q) == sequence(CU_K, k)

    mask = masks.packed(4, "cu_q", "cu_k")
    same(mask, seen, 13, 17, {"cu_q": CU_Q, "cu_k": CU_K})


def test_packed_causal_ends_each_sequence_at_its_last_key():
    expected = np.zeros((13, 17), bool)
    for i in range(4):  # as FlashAttention: a square of its own, aligned bottom right
        q_len, k_len = CU_Q[i + 1] - CU_Q[i], CU_K[i + 1] - CU_K[i]
        for q in range(q_len):
            for k in range(k_len):
                expected[CU_Q[i] + q, CU_K[i] + k] = k <= q + k_len - q_len
    arrays = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    np.testing.assert_array_equal(
        matrix(masks.packed_causal(4), 13, 17, arrays), expected
    )


def test_lengths_are_counts_of_the_first_tokens():
    arrays = {"key_lengths": [3, 9], "query_lengths": [4, 2]}
    for b in range(2):
        keys, queries = arrays["key_lengths"][b], arrays["query_lengths"][b]
        same(masks.lengths(), lambda q, k, n=keys: k < n, 5, 9, arrays, b=b)
        both = masks.lengths("key_lengths", "query_lengths")
        same(both, lambda q, k, n=keys, m=queries: k < n and q < m, 5, 9, arrays, b=b)


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_sees_ancestors_by_their_parent_pointers(seed):
    parents = random_tree(24, seed)
    enter, leave = preorder(parents)

    def ancestor(q, k):
        while q >= 0:
            if q == k:
                return True
            q = parents[q]
        return False

    arrays = {"tree_enter": [enter], "tree_exit": [leave]}
    same(masks.tree(), ancestor, 24, 24, arrays)
    cached = 6
    arrays = {
        "tree_enter": [np.concatenate([[0] * cached, enter])],
        "tree_exit": [np.concatenate([[0] * cached, leave])],
        "q_enter": [enter],
        "cached": [cached],
    }

    def seen(q, k):
        return k < cached or ancestor(q, k - cached)

    for prefix in (cached, "cached"):
        mask = masks.tree(q_enter="q_enter", prefix=prefix)
        same(mask, seen, 24, 24 + cached, arrays)
    arrays["tree_exit"][0][:cached] = 1000  # the same, told by the numbers
    same(masks.tree(q_enter="q_enter"), seen, 24, 24 + cached, arrays)


def test_positions_may_restart_and_be_those_of_an_operand():
    places = [[0, 1, 2, 0, 1, 0, 1, 2]]
    of = {"places": places}
    row = places[0]
    same(masks.causal("places"), lambda q, k: row[k] <= row[q], 8, 8, of)
    window = masks.sliding_window(2, 1, positions="places")
    same(window, lambda q, k: row[q] - 2 < row[k] <= row[q] + 1, 8, 8, of)
    two = {"at_q": [[5, 7]], "at_k": places}
    mask = masks.causal(positions=("at_q", "at_k"))
    same(mask, lambda q, k: row[k] <= two["at_q"][0][q], 2, 8, two)


# Grids.


def natten_start(index, length, window, dilation):
    """NATTEN's get_window_start, as its C++ has it (natten 0.14)."""
    half = window // 2
    if dilation <= 1:
        moved = length - index - half - 1 if index + half >= length else 0
        return max(index - half, 0) + moved
    start = index - half * dilation
    if start < 0:
        return index % dilation
    if index + half * dilation >= length:
        rest = index % dilation
        whole = (length // dilation) * dilation
        if rest < length - whole:
            return length - (length - whole) + rest - 2 * half * dilation
        return whole + rest - window * dilation
    return start


@pytest.mark.parametrize(
    ("grid", "window", "dilation"),
    [
        ((17,), (5,), (1,)),
        ((19,), (5,), (3,)),
        ((5, 7), (3, 5), (1, 1)),
        ((7, 11), (3, 5), (2, 2)),
        ((3, 4, 5), (3, 1, 3), (1, 1, 1)),
        ((6, 3, 7), (3, 3, 3), (2, 1, 2)),
        ((3, 3), (3, 3), (1, 1)),
    ],
)
def test_neighborhoods_are_nattens(grid, window, dilation):
    count = math.prod(grid)
    expected = np.zeros((count, count), bool)
    for q in np.ndindex(grid):
        axes = []
        for i, length, wide, step in zip(q, grid, window, dilation, strict=True):
            start = natten_start(i, length, wide, step)
            axes.append(range(start, start + wide * step, step))
        for k in np.ndindex(*window):
            at = tuple(axis[i] for axis, i in zip(axes, k, strict=True))
            expected[np.ravel_multi_index(q, grid), np.ravel_multi_index(at, grid)] = (
                True
            )
    assert (expected.sum(1) == math.prod(window)).all()
    found = matrix(masks.neighborhood(grid, window, dilation), count, count)
    np.testing.assert_array_equal(found, expected)


def test_numbers_stand_for_every_axis():
    one = masks.neighborhood((5, 6), (3, 3), (1, 1))
    assert one == masks.neighborhood((5, 6), 3)
    assert masks.neighborhood(9, 3) == masks.neighborhood((9,), (3,), (1,))
    assert masks.shifted_windows((4, 4), 2, 1) == masks.shifted_windows(
        (4, 4), (2, 2), (1, 1)
    )
    assert masks.block_sparse((4, 4), 8) == masks.block_sparse(4, (8, 8))


@pytest.mark.parametrize(
    "mask", [masks.neighborhood(9, 3), masks.shifted_windows(9, 4)]
)
def test_tokens_outside_of_the_grid_are_alone(mask):
    inside = matrix(mask, 9, 9)
    found = matrix(mask, 15, 14, q_offset=-3)
    np.testing.assert_array_equal(found[3:12, :9], inside)
    assert found.sum() == inside.sum()


def rolled(height, width, window, shift):
    """What Swin's layers see: roll, split into windows, mask what came around, roll back."""
    grid = np.arange(height * width).reshape(height, width)
    region = np.zeros((height, width), int)  # Swin's img_mask
    count = 0
    slices = (slice(0, -window), slice(-window, -shift or None), slice(-shift, None))
    for rows in slices if shift else (slice(None),):
        for columns in slices if shift else (slice(None),):
            region[rows, columns] = count
            count += 1
    tokens = np.roll(grid, (-shift, -shift), (0, 1))
    seen = np.zeros((height * width,) * 2, bool)
    for top in range(0, height, window):
        for left in range(0, width, window):
            part = (slice(top, top + window), slice(left, left + window))
            for q, q_region in zip(tokens[part].flat, region[part].flat, strict=True):
                for k, k_region in zip(
                    tokens[part].flat, region[part].flat, strict=True
                ):
                    seen[q, k] = q_region == k_region
    return seen


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(8, 8, 4, 2), (8, 12, 4, 1), (6, 9, 3, 0), (7, 7, 7, 3)],
)
def test_shifted_windows_are_swins_rolled_and_masked(height, width, window, shift):
    mask = masks.shifted_windows((height, width), window, shift)
    found = matrix(mask, height * width, height * width)
    np.testing.assert_array_equal(found, rolled(height, width, window, shift))


def test_windows_of_a_volume_are_those_of_each_axis():
    grid, window, shift = (3, 4, 5), (2, 2, 3), (1, 0, 2)
    places = list(np.ndindex(grid))

    def block(at):
        edges = [[s, *range(s + w, n, w)] if s else [*range(w, n, w)]
                 for n, w, s in zip(grid, window, shift, strict=True)]  # fmt: skip
        return [sum(i >= e for e in cuts) for i, cuts in zip(at, edges, strict=True)]

    mask = masks.shifted_windows(grid, window, shift)
    same(mask, lambda q, k: block(places[q]) == block(places[k]), 60, 60)


# Arrays.


@pytest.mark.parametrize("axes", ["", "b", "h", "hb"])
def test_a_block_mask_is_its_blocks_repeated(axes):
    shape = [{"b": 2, "h": 3}[a] for a in axes]
    blocks = np.random.default_rng(0).random((*shape, 3, 4)) < 0.5
    mask = masks.block_sparse((3, 4), (5, 2), axes=axes)
    at = {"b": 1, "h": 2}
    own = blocks[tuple(at[a] for a in axes)]
    expected = own.repeat(5, 0).repeat(2, 1)[:13, :7]
    found = matrix(mask, 13, 7, {"block_mask": blocks}, **at)
    np.testing.assert_array_equal(found, expected)


def test_a_block_mask_that_could_be_left_is_refused():
    mask = masks.block_sparse((4, 4), 16)
    spec = {"q_heads": 1, "q_len": 64, "qk_dim": 8, "mask": mask}
    attngen.plan(AttentionSpec(**spec), target="cpu", backend="jax")
    for change in (
        {"q_len": 65, "q_offset": 0},
        {"q_offset": 1},
        {"q_offset": "operand"},
    ):
        with refused(OperandError, "outside its axis"):
            attngen.plan(
                AttentionSpec(**(spec | {"kv_len": 64} | change)), target="cpu"
            )


# searchsorted.


@pytest.mark.parametrize("entries", [[0, 3, 3, 8], [5, 1, 9, 1], [7, 7, 7, 7]])
def test_searchsorted_counts_the_entries_up_to_a_position(entries):
    of = attngen.operand("entries", axes=(4,), dtype="int32")
    for wanted in range(5):
        mask = attngen.mask(
            lambda b, h, q, k, n=wanted: attngen.searchsorted(of, q - 1) == n
        )
        expected = [sum(e <= q - 1 for e in entries) == wanted for q in range(12)]
        found = matrix(mask, 12, 1, {"entries": entries})
        np.testing.assert_array_equal(found[:, 0], expected)
        if entries == sorted(entries):
            side = np.searchsorted(entries, np.arange(12) - 1, side="right")
            np.testing.assert_array_equal(found[:, 0], side == wanted)
