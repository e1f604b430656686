"""One suite for every backend: what is emitted computes its spec, by the reference."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge, kernel

import attngen
from attngen import AttentionSpec, backends, inputs, masks, scores

backends.register("numpy", "toy_backend")

BASE = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=50,
    kv_len=70,
    qk_dim=16,
    q_offset="bottom_right",
    outputs=("out", "lse"),
)
SAME = dataclasses.replace(BASE, kv_len=50, q_offset=None)
CHUNKS = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}

SPECS = {
    "no mask": BASE,
    "causal": dataclasses.replace(BASE, mask=masks.causal()),
    "top left": dataclasses.replace(BASE, mask=masks.causal(), q_offset=0),
    "offset": dataclasses.replace(BASE, mask=masks.causal(), q_offset=7),
    "before every key": dataclasses.replace(BASE, mask=masks.causal(), q_offset=-30),
    "offset at run time": dataclasses.replace(
        BASE, mask=masks.causal(), q_offset="operand"
    ),
    "offset of lengths": dataclasses.replace(
        BASE, mask=masks.causal(), kv_lengths=True
    ),
    "keys elsewhere": dataclasses.replace(BASE, mask=masks.causal(), kv_offset=13),
    "window": dataclasses.replace(BASE, mask=masks.sliding_window(9, 4)),
    "causal window": dataclasses.replace(
        BASE, mask=masks.causal() & masks.sliding_window(20)
    ),
    "prefix": dataclasses.replace(BASE, mask=masks.causal() | masks.prefix(30)),
    "prefix of a batch": dataclasses.replace(
        BASE, mask=masks.causal() | masks.prefix("prefix_lengths")
    ),
    "not causal": dataclasses.replace(BASE, mask=~masks.causal()),
    "documents": dataclasses.replace(SAME, mask=masks.documents()),
    "causal documents": dataclasses.replace(
        SAME, mask=masks.causal() & masks.documents()
    ),
    "dense mask": dataclasses.replace(BASE, mask=masks.dense()),
    "dense mask of heads": dataclasses.replace(BASE, mask=masks.dense(axes="hk")),
    "transposed mask": dataclasses.replace(BASE, mask=masks.dense(axes="kqb")),
    "softcap": dataclasses.replace(BASE, score=(scores.softcap(3.0),)),
    "alibi": dataclasses.replace(BASE, mask=masks.causal(), score=(scores.alibi(),)),
    "bias": dataclasses.replace(BASE, score=(scores.bias(axes="hqk"),)),
    "transposed bias": dataclasses.replace(BASE, score=(scores.bias(axes="kh"),)),
    "buckets": dataclasses.replace(BASE, score=(scores.relative_buckets(),)),
    "one-sided buckets": dataclasses.replace(
        BASE, mask=masks.causal(), score=(scores.relative_buckets(bidirectional=False),)
    ),
    "several scores": dataclasses.replace(
        BASE,
        mask=masks.causal(),
        score=(scores.softcap(2.0), scores.alibi(), scores.bias(axes="k")),
    ),
    "sink": dataclasses.replace(BASE, mask=masks.causal(), sink=True),
    "lengths": dataclasses.replace(BASE, kv_lengths=True, q_offset=None),
    "lengths of both": dataclasses.replace(
        BASE, kv_lengths=True, q_lengths=True, mask=masks.causal(), q_offset=0
    ),
    "query lengths": dataclasses.replace(BASE, q_lengths=True, outputs=("lse", "out")),
    "nothing seen": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: k < -5)
    ),
    "some rows see nothing": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: (k > q) & (q % 3 == 0))
    ),
    "of heads and batches": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: (k + h) % 3 <= b)
    ),
    "a query alone": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: q >= 40)
    ),
    "every other key": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: 2 * k <= q)
    ),
    "dilated": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: ((q - k) % 4 == 0) & (k <= q))
    ),
    "bools as numbers": dataclasses.replace(
        BASE,
        score=(attngen.score(lambda s, b, h, q, k: s * ((k > q) + 1) - (q % 2)),),
    ),
    "a score that drops": dataclasses.replace(
        BASE,
        score=(
            attngen.score(
                lambda s, b, h, q, k: attngen.where(k % 5 == 0, -math.inf, s)
            ),
        ),
    ),
    "heads first": dataclasses.replace(BASE, layout="bhtd", mask=masks.causal()),
    "one query": dataclasses.replace(BASE, q_len=1, mask=masks.causal()),
    "one key": dataclasses.replace(BASE, kv_len=1, q_offset=None),
    "one of all": AttentionSpec(q_heads=1, q_len=1, qk_dim=1, outputs=("lse",)),
    "many heads, one kv head": dataclasses.replace(BASE, q_heads=6, kv_heads=1),
    "odd dims": dataclasses.replace(BASE, qk_dim=40, v_dim=72, mask=masks.causal()),
    "dim 1": dataclasses.replace(BASE, qk_dim=1, v_dim=3),
    "a scale": dataclasses.replace(BASE, scale=-0.3, precision="highest"),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(3)
def test_jax_computes_it_in_chunks(name):
    spec = SPECS[name]
    q, k = min(16, spec.q_len), min(24, spec.kv_len)
    judge(spec, algorithm="running", q_chunk=q, k_chunk=k)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(3, 1)
def test_jax_computes_it_at_once(name):
    judge(SPECS[name], algorithm="dense")


@pytest.mark.parametrize("name", SPECS)
def test_the_toy_backend_computes_it(name):
    spec = SPECS[name]
    q, k = min(16, spec.q_len), min(24, spec.kv_len)
    judge(spec, "numpy", q_chunk=q, k_chunk=k)


LOW = [
    {},
    {"product_dtype": None},
    {"guard": False},
    {"algorithm": "dense", "q_chunk": 50, "k_chunk": 70},
    {"algorithm": "dense", "q_chunk": 50, "k_chunk": 70, "product_dtype": None},
]


@pytest.mark.parametrize(
    ("change", "dtype"),
    [(change, dtype) for change in LOW for dtype in ("bfloat16", "float16")],
)
@pytest.mark.sampled(3)
def test_low_precision(dtype, change):
    spec = dataclasses.replace(
        BASE, dtype=dtype, mask=masks.causal(), out_dtype="float32"
    )
    fix = CHUNKS | change
    if "product_dtype" in fix:
        fix["product_dtype"] = dtype
    judge(spec, **fix)
    if not change:
        judge(dataclasses.replace(spec, out_dtype=None), **fix)


LOOPS = [
    {"loop": loop, "q_chunk": q, "k_chunk": k, "head_chunk": g, "batch_chunk": b}
    for loop, q, k, g, b in [
        ("fori", 50, 70, 2, 2),
        ("fori", 1, 1, 1, 1),
        ("fori", 7, 70, 2, 1),
        ("fori", 50, 9, 1, 2),
        ("fori", 50, 9, 1, 1),
        ("scan", 13, 35, 2, 2),
        ("scan", 50, 20, 1, 1),
        ("unrolled", 13, 35, 1, 2),
        ("unrolled", 25, 24, 2, 1),
        ("unrolled", 50, 70, 2, 2),
    ]
]


@pytest.mark.parametrize("fix", LOOPS)
@pytest.mark.sampled(2)
def test_every_loop(fix):
    dense = dataclasses.replace(BASE, mask=masks.dense(axes="bqk"))
    for spec in (BASE, dense):
        judge(spec, algorithm="running", **fix)


@pytest.mark.parametrize(
    ("name", "q_chunk", "k_chunk"),
    [
        (name, *sizes)
        for name in ("causal window", "lengths of both", "sink")
        for sizes in [(1, 7), (7, 1), (50, 70), (32, 70), (5, 64)]
    ],
)
@pytest.mark.sampled(4)
def test_every_chunk(name, q_chunk, k_chunk):
    judge(SPECS[name], algorithm="running", q_chunk=q_chunk, k_chunk=k_chunk)


@functools.lru_cache(maxsize=4)
def function_of(spec, **fix):
    return kernel(spec, **fix)[0]


def run(spec, arrays, **fix):
    function = function_of(spec, **fix)
    made = {n: jnp.asarray(x, spec.dtype_of(n)) for n, x in arrays.items()}
    out = function(**made)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("fix", [CHUNKS, {"algorithm": "dense"}])
def test_what_nobody_sees_does_not_matter(fix):
    spec = dataclasses.replace(BASE, mask=masks.causal(), q_offset=3, layout="bhtd")
    arrays = inputs.arrays(spec)
    clean = run(spec, arrays, **fix)
    for value in (np.nan, np.inf, -np.inf, 1e30):
        for name in ("k", "v"):
            arrays[name] = arrays[name].copy()
            arrays[name][:, :, 53:] = value  # the last query stands at 52
        for a, b in zip(clean, run(spec, arrays, **fix), strict=True):
            np.testing.assert_array_equal(a, b)


def test_finite_values_in_masked_keys_do_not_matter():
    spec = dataclasses.replace(BASE, mask=attngen.mask(lambda b, h, q, k: k % 2 == 0))
    arrays = inputs.arrays(spec)
    clean = run(spec, arrays, **CHUNKS)
    arrays["v"] = arrays["v"].copy()
    arrays["v"][:, 1::2] = 1e30
    for a, b in zip(clean, run(spec, arrays, **CHUNKS), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("fix", [CHUNKS, {"algorithm": "dense"}])
def test_values_that_a_score_leaves_out_do_not_matter(fix):
    spec = dataclasses.replace(BASE, score=(scores.bias(axes="bk"),))
    arrays = inputs.arrays(spec)
    arrays["bias"][:, 30:] = -np.inf
    clean = run(spec, arrays, **fix)
    arrays["v"] = arrays["v"].copy()
    arrays["v"][:, 30:] = np.nan
    for a, b in zip(clean, run(spec, arrays, **fix), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_length_beyond_the_keys_is_all_of_them():
    spec = dataclasses.replace(BASE, kv_lengths=True, q_offset=0)
    arrays = inputs.arrays(spec, nan=False)
    arrays["kv_lengths"][:] = spec.kv_len
    whole = run(spec, arrays, **CHUNKS)
    arrays["kv_lengths"][:] = 10 * spec.kv_len
    for a, b in zip(whole, run(spec, arrays, **CHUNKS), strict=True):
        np.testing.assert_array_equal(a, b)


def test_it_is_linear_in_the_values_and_the_weights_sum_to_one():
    spec = dataclasses.replace(BASE, mask=masks.causal(), outputs=("out",))
    arrays = inputs.arrays(spec)
    (one,) = run(spec, arrays, **CHUNKS)
    (twice,) = run(spec, arrays | {"v": 2 * arrays["v"]}, **CHUNKS)
    np.testing.assert_array_equal(twice, 2 * np.asarray(one))
    (ones,) = run(spec, arrays | {"v": np.ones_like(arrays["v"])}, **CHUNKS)
    np.testing.assert_allclose(ones, 1.0, rtol=1e-6)


def test_it_does_not_depend_on_the_chunks():
    spec = dataclasses.replace(BASE, mask=masks.causal())
    arrays = inputs.arrays(spec)
    one = run(spec, arrays, **CHUNKS)
    for q_chunk, k_chunk in ((50, 70), (3, 11), (50, 8)):
        fix = {"algorithm": "running", "q_chunk": q_chunk, "k_chunk": k_chunk}
        for a, b in zip(one, run(spec, arrays, **fix), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_grouped_heads_are_repeated_heads():
    arrays = inputs.arrays(BASE)
    grouped = run(BASE, arrays, **CHUNKS)
    repeated = arrays | {n: np.repeat(arrays[n], 2, axis=2) for n in ("k", "v")}
    single = dataclasses.replace(BASE, kv_heads=4)
    for a, b in zip(grouped, run(single, repeated, **CHUNKS), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_two_halves_merge_by_their_lse():
    spec = dataclasses.replace(BASE, mask=masks.causal(), q_offset=20, q_lengths=False)
    arrays = inputs.arrays(spec)
    out, lse = run(spec, arrays, **CHUNKS)
    parts = []
    for start, stop in ((0, 30), (30, 70)):
        half = dataclasses.replace(spec, kv_len=stop - start, kv_offset=start)
        cut = arrays | {n: arrays[n][:, start:stop] for n in ("k", "v")}
        parts.append(run(half, cut, **CHUNKS))
    weights = [np.exp(np.asarray(part[1]) - np.asarray(lse)) for part in parts]
    np.testing.assert_allclose(sum(weights), 1.0, rtol=1e-5)
    merged = sum(
        w.swapaxes(1, 2)[..., None] * np.asarray(part[0])
        for w, part in zip(weights, parts, strict=True)
    )
    np.testing.assert_allclose(merged, out, rtol=2e-5, atol=2e-6)
