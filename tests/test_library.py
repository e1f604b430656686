"""The library's masks and scores against definitions written without it: loops, trees, rolls."""

import math

import numpy as np
import pytest
from brute import evaluate
from library import matrix, preorder, random_tree
from refusals import refused

import attngen
from attngen import AttentionSpec, masks, scores, spec_files
from attngen.errors import ExpressionError, OperandError, SpecError


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


# Scores.


@pytest.mark.parametrize("heads", [1, 2, 3, 8, 12, 20, 32, 71])
def test_alibi_slopes_are_the_papers(heads):
    def slopes(
        n,
    ):  # get_slopes of the authors' repository, ofirpress/attention_with_linear_biases
        def power_of_2(n):
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]

        if math.log2(n).is_integer():
            return power_of_2(n)
        closest = 2 ** math.floor(math.log2(n))
        return power_of_2(closest) + slopes(2 * closest)[0::2][: n - closest]

    score = scores.alibi(heads=heads)
    for h, slope in enumerate(slopes(heads)):
        at = {"b": 0, "h": h, "q": 11, "k": 4, "s": 0.5}
        assert evaluate(score.expr, at) == pytest.approx(0.5 - 7 * slope, rel=1e-12)


def test_decay_multiplies_weights_by_its_rate_for_each_token_away():
    gamma = np.array([0.9, 0.5])
    arrays = {"decay": np.log(gamma)}
    away = np.abs(np.arange(6)[:, None] - np.arange(8))
    for h in range(2):
        found = matrix(scores.decay(), 6, 8, arrays, h=h, s=0.0)
        np.testing.assert_allclose(np.exp(found), gamma[h] ** away)
    places = np.array(list(np.ndindex(3, 4)))
    blocks = np.abs(places[:, None] - places).sum(-1)  # RMT's, of an image
    found = matrix(scores.decay(grid=(3, 4)), 12, 12, arrays, s=0.0)
    np.testing.assert_allclose(np.exp(found), gamma[0] ** blocks)


@pytest.mark.parametrize("grid", [(6,), (3, 4), (2, 3, 2)])
def test_a_relative_table_is_swins(grid):
    count = math.prod(grid)
    # Swin: coordinates of all tokens, their differences, moved and raveled
    coordinates = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij")).reshape(
        len(grid), -1
    )
    relative = coordinates[:, :, None] - coordinates[:, None, :]
    shape = [2 * n - 1 for n in grid]
    for axis, n in enumerate(grid):
        relative[axis] += n - 1
    index = np.ravel_multi_index(tuple(relative), shape)
    table = np.random.default_rng(0).standard_normal((2, math.prod(shape)))
    score = scores.relative_table(grid)
    (operand,) = score.operands
    assert operand.axes == ("h", math.prod(shape))
    found = matrix(score, count, count, {"relative_table": table}, h=1, s=0.0)
    np.testing.assert_array_equal(found, table[1][index])


def test_a_table_of_a_window_has_no_entry_for_farther_pairs():
    table = np.arange(25.0)[None]
    score = scores.relative_table((6, 6), 3)
    found = matrix(score, 36, 36, {"relative_table": table}, s=0.0)
    places = np.array(list(np.ndindex(6, 6)))
    away = np.abs(places[:, None] - places).max(-1)
    np.testing.assert_array_equal(np.isnan(found), away > 2)
    near = masks.shifted_windows((6, 6), 3, 1)
    assert not np.isnan(found[matrix(near, 36, 36)]).any()


def test_temperatures_divide_and_caps_may_differ_between_heads():
    tau = {"temperature": [2.0, 4.0]}
    assert evaluate(scores.temperature().expr, {"h": 1, "s": 8.0}, tau) == 2.0
    cap = {"caps": [1.0, 3.0]}
    found = evaluate(scores.softcap("caps").expr, {"h": 1, "s": 8.0}, cap)
    assert found == 3.0 * math.tanh(8 / 3)


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


OFFSETS = attngen.operand("offsets", axes=(4,), dtype="int32")
SEARCHES = {
    "of both": lambda b, h, q, k: attngen.searchsorted(OFFSETS, q - k) == 1,
    "of a float": lambda b, h, q, k: attngen.searchsorted(OFFSETS, q / 2) == 1,
    "of no operand": lambda b, h, q, k: attngen.searchsorted([1, 2], q) == 1,
    "of a read": lambda b, h, q, k: attngen.searchsorted(OFFSETS[1], q) == 1,
    "of an array": lambda b, h, q, k: attngen.searchsorted(OFFSETS, np.arange(3)) == 1,
    "of floats": lambda b, h, q, k: (
        attngen.searchsorted(attngen.operand("x", axes=(4,), dtype="float32"), q) == 1
    ),
    "of lettered axes": lambda b, h, q, k: (
        attngen.searchsorted(attngen.operand("x", axes="k", dtype="int32"), q) == 1
    ),
    "of two axes": lambda b, h, q, k: (
        attngen.searchsorted(attngen.operand("x", axes=("b", 3), dtype="int32"), q) == 1
    ),
}


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_searches_that_can_not_be_are_refused(search):
    with refused(ExpressionError):
        attngen.mask(search)


# Files.


def example_forms():
    from library import EXAMPLES

    return EXAMPLES.items()


@pytest.mark.parametrize(("name", "example"), example_forms())
def test_it_is_known_by_its_name_in_files(name, example):
    spec = example.spec()
    text = spec.to_json()
    assert '"expr"' not in text  # the library's names, not their trees
    assert spec_files.from_json(text) == spec
    toml = spec_files.to_toml(spec)
    assert spec_files.from_toml(toml) == spec
    assert spec_files.to_toml(spec_files.from_toml(toml)) == toml


def test_every_name_of_the_library_has_an_example():
    from library import MASKS, SCORES

    said = {name.split()[0] for name in MASKS}
    assert said == set(masks.LIBRARY) == set(masks.__all__) - {"LIBRARY"}
    assert {name.split()[0] for name in SCORES} == set(scores.LIBRARY)


def test_a_traced_search_goes_through_files():
    mask = attngen.mask(lambda b, h, q, k: attngen.searchsorted(OFFSETS, q + 1) > k)
    spec = AttentionSpec(q_heads=1, q_len=8, qk_dim=8, mask=mask)
    assert spec_files.from_json(spec.to_json()) == spec
    assert spec_files.from_toml(spec_files.to_toml(spec)) == spec
    form = mask.form | {"expr": ["gt", ["searchsorted", "offsets", "q", "k"], 1]}
    with refused(ExpressionError, "can't be read"):
        spec_files.read_mask(form)


# Refusals.

REFUSED = {
    "dilation of 0": lambda: masks.dilated_window(3, 0),
    "dilated window of 0": lambda: masks.dilated_window(0, 2),
    "dilated right of a float": lambda: masks.dilated_window(3, 2, 1.0),
    "streaming window of 0": lambda: masks.streaming_llm(4, 0),
    "streaming first of -1": lambda: masks.streaming_llm(-1, 4),
    "longformer radius of -1": lambda: masks.longformer(-1, 4),
    "longformer tokens of a float": lambda: masks.longformer(2, 1.5),
    "stride of 0": lambda: masks.strided(0),
    "stride of a string": lambda: masks.strided("8"),
    "summary beyond the stride": lambda: masks.fixed(4, 5),
    "summary of 0": lambda: masks.fixed(4, 0),
    "ids of the queries alone": lambda: masks.documents(q_ids="q_ids"),
    "ids of all and of both": lambda: masks.documents("ids", q_ids="x", k_ids="y"),
    "no sequences": lambda: masks.packed(0),
    "sequences of a name": lambda: masks.packed("cu_seqlens"),
    "no causal sequences": lambda: masks.packed_causal(0),
    "lengths of neither": lambda: masks.lengths(None),
    "tree's prefix of a float": lambda: masks.tree(prefix=1.5),
    "positions of three": lambda: masks.causal(positions=("x", "y", "z")),
    "positions of a number": lambda: masks.causal(positions=3),
    "even window": lambda: masks.neighborhood(9, 4),
    "window longer than the grid": lambda: masks.neighborhood((9, 3), 5),
    "dilated window longer than the grid": lambda: masks.neighborhood(8, 3, 3),
    "grid of a string": lambda: masks.neighborhood("9", 3),
    "grid of 0": lambda: masks.neighborhood((0, 4), 1),
    "grid of four axes": lambda: masks.neighborhood((2, 2, 2, 2), 1),
    "window of another grid": lambda: masks.neighborhood((5, 5), (3, 3, 3)),
    "shift as long as the window": lambda: masks.shifted_windows((8, 8), 4, 4),
    "negative shift": lambda: masks.shifted_windows((8, 8), 4, -1),
    "windows of 0": lambda: masks.shifted_windows((8, 8), 0),
    "blocks of 0": lambda: masks.block_sparse((0, 4)),
    "three blocks": lambda: masks.block_sparse((4, 4, 4)),
    "block of 0": lambda: masks.block_sparse((4, 4), 0),
    "blocks with other axes": lambda: masks.block_sparse((4, 4), axes="q"),
    "heads of 0": lambda: scores.alibi(heads=0),
    "heads and slopes": lambda: scores.alibi("slopes", heads=4),
    "decay of a grid and of positions": lambda: scores.decay(grid=4, positions="x"),
    "decay of grid 0": lambda: scores.decay(grid=0),
    "table of a larger window": lambda: scores.relative_table((4, 4), 5),
    "table of another grid": lambda: scores.relative_table((4, 4), (2,)),
    "temperature of a length": lambda: scores.temperature(axes=("h", 4)),
    "cap of None": lambda: scores.softcap(None),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_arguments_that_can_not_be_are_refused(make):
    with refused(ExpressionError):
        make()


def test_names_that_collide_are_refused():
    with refused(OperandError, "Two different operands"):
        AttentionSpec(
            q_heads=1, q_len=8, qk_dim=8,
            mask=masks.prefix("lengths_of") & masks.documents("lengths_of"),
        )  # fmt: skip
    with refused(OperandError, "of the spec itself|can't be called"):
        AttentionSpec(
            q_heads=1, q_len=8, qk_dim=8, kv_lengths=True, mask=masks.lengths("kv_lengths")
        )  # fmt: skip


def test_masks_of_positions_ask_where_queries_stand():
    for mask in (masks.strided(4), masks.neighborhood(9, 3), masks.packed(2)):
        with refused(SpecError, "where do the queries stand"):
            AttentionSpec(q_heads=1, q_len=8, kv_len=9, qk_dim=8, mask=mask)
