"""The reference against attention written as loops over Python's own numbers."""

import math

import numpy as np
import pytest
from brute import evaluate

import attngen
from attngen import AttentionSpec, inputs, masks, reference, scores


def by_hand(spec, q, k, v, operands):
    """out and lse, one number at a time, from DESIGN's definition."""
    if spec.layout == "bthd":
        q, k, v = (np.swapaxes(x, 1, 2) for x in (q, k, v))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((spec.batch, spec.q_heads, spec.q_len, spec.v_dim))
    lse = np.full(out.shape[:-1], -math.inf)
    lists = {n: np.asarray(x).tolist() for n, x in operands.items()}
    for b in range(spec.batch):
        offset = spec.static_q_offset
        if spec.q_offset == "operand":
            offset = lists["q_offset"][b]
        elif offset is None:
            offset = lists["kv_lengths"][b] - spec.q_len
        for h in range(spec.q_heads):
            g = h // (spec.q_heads // spec.kv_heads)
            for i in range(spec.q_len):
                weights = {}
                for j in range(spec.kv_len):
                    at = {"b": b, "h": h, "q": i + offset, "k": j + spec.kv_offset}
                    index = at | {"q": i, "k": j}
                    s = spec.scale_value * float(q[b, h, i] @ k[b, g, j])
                    for score in spec.score:
                        s = evaluate(score.expr, at | {"s": s}, lists, index)
                    there = s > -math.inf
                    if spec.mask is not None:
                        there &= evaluate(spec.mask.expr, at, lists, index)
                    if spec.kv_lengths:
                        there &= j < lists["kv_lengths"][b]
                    if spec.q_lengths:
                        there &= i < lists["q_lengths"][b]
                    if there:
                        weights[j] = s
                if not weights:
                    continue
                total = sum(math.exp(s) for s in weights.values())
                lse[b, h, i] = math.log(total)
                if spec.sink:
                    total += math.exp(lists["sink"][h])
                for j, s in weights.items():
                    out[b, h, i] += math.exp(s) / total * v[b, g, j]
    return {"out": out, "lse": lse}


BASE = {"batch": 2, "q_heads": 4, "kv_heads": 2, "qk_dim": 3, "v_dim": 2}
SPECS = [
    AttentionSpec(**BASE, q_len=4, kv_len=6),
    AttentionSpec(**BASE, q_len=4, kv_len=6, layout="bhtd", scale=-2.0),
    AttentionSpec(**BASE, q_len=4, kv_len=6, mask=masks.causal(), q_offset=-2),
    AttentionSpec(
        **BASE, q_len=4, kv_len=6, mask=masks.causal(), q_offset="bottom_right"
    ),
    AttentionSpec(
        **BASE,
        q_len=4,
        kv_len=6,
        mask=masks.causal(),
        q_offset="bottom_right",
        kv_lengths=True,
        sink=True,
    ),
    AttentionSpec(
        **BASE,
        q_len=4,
        kv_len=6,
        mask=masks.sliding_window(2),
        q_offset="operand",
        kv_offset=3,
        q_lengths=True,
    ),
    AttentionSpec(
        **BASE,
        q_len=5,
        mask=masks.documents() | masks.dense(axes="kq"),
        score=(scores.softcap(2.0), scores.alibi(), scores.relative_buckets()),
    ),
    AttentionSpec(
        **BASE,
        q_len=5,
        score=(
            attngen.score(
                lambda s, b, h, q, k: attngen.where((q + k) % 3 == h, -math.inf, s * b)
            ),
        ),
        sink=True,
    ),
]


@pytest.mark.parametrize("spec", SPECS)
def test_it_is_the_definition(spec):
    arrays = inputs.arrays(spec)
    q, k, v = (arrays.pop(n) for n in "qkv")
    want = by_hand(spec, q, np.nan_to_num(k), np.nan_to_num(v), arrays)
    got = reference.attention(spec, q, k, v, arrays)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-12, atol=1e-12)


def test_rows_are_rows_of_the_whole():
    spec = SPECS[3]
    arrays = inputs.arrays(spec)
    q, k, v = (arrays.pop(n) for n in "qkv")
    whole = reference.attention(spec, q, k, v, arrays)
    some = reference.attention(spec, q, k, v, arrays, rows=np.array([3, 1]))
    for name in whole:
        np.testing.assert_array_equal(some[name], whole[name][:, :, [3, 1]])


def test_a_nan_that_is_seen_is_the_users_and_one_that_is_not_is_nothing():
    spec = AttentionSpec(q_heads=1, q_len=4, qk_dim=3, mask=masks.causal())
    arrays = inputs.arrays(spec)
    q, k, v = (arrays.pop(n) for n in "qkv")
    clean = reference.attention(spec, q, k, v, {})["out"]
    v = v.copy()
    v[:, 2] = np.nan
    out = reference.attention(spec, q, k, v, {})["out"]
    np.testing.assert_array_equal(out[:, :, :2], clean[:, :, :2])
    assert np.isnan(out[:, :, 2:]).all()


@pytest.mark.parametrize("sink", [-np.inf, -200.0, 0.0, 200.0])
def test_a_sink_of_any_size(sink):
    spec = AttentionSpec(q_heads=1, q_len=4, qk_dim=3, sink=True)
    arrays = inputs.arrays(spec)
    q, k, v = (arrays.pop(n) for n in "qkv")
    got = reference.attention(spec, q, k, v, {"sink": np.array([sink])})
    plain = reference.attention(
        AttentionSpec(q_heads=1, q_len=4, qk_dim=3), q, k, v, {}
    )
    np.testing.assert_array_equal(got["lse"], plain["lse"])
    share = 1 / (1 + np.exp(sink - plain["lse"]))
    np.testing.assert_allclose(got["out"], plain["out"] * share[..., None], rtol=1e-12)
