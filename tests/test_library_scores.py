"""The library's scores against their papers' formulas; T5's buckets are in test_scores.py."""

import math

import numpy as np
import pytest
from brute import evaluate
from library import matrix

from attngen import masks, scores


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
