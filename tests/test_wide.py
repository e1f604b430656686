"""64-bit numbers: float64 specs, positions beyond int32, and 32-bit specs beside them."""

import dataclasses

import jax
import pytest
from judge import judge, kernel
from refusals import refused

import attngen
from attngen import AttentionSpec, backends, masks, scores
from attngen.errors import BackendError

backends.register("numpy", "toy_backend")

BASE = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=11,
    kv_len=14,
    qk_dim=8,
    q_offset=1,
    outputs=("out", "lse"),
)
DOUBLE = dataclasses.replace(BASE, dtype="float64")
CHUNKS = {"algorithm": "running", "q_chunk": 4, "k_chunk": 5}
LINE = attngen.operand("line", axes=("k",), dtype="float64")
FAR = attngen.operand("far", axes="bk", dtype="int64")


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


SPECS = {
    "double": DOUBLE,
    "double, masked": dataclasses.replace(DOUBLE, mask=masks.causal(), sink=True),
    "double, rounded": dataclasses.replace(DOUBLE, out_dtype="float32"),
    "double, scored": dataclasses.replace(
        DOUBLE, score=(scores.softcap(2.0), scores.alibi())
    ),
    "double, of lengths": dataclasses.replace(DOUBLE, kv_lengths=True, q_lengths=True),
    # 3 * 0.1 < 0.3 in float32, and not in float64: scores compare in their own dtype
    "double, compared": dataclasses.replace(
        DOUBLE,
        score=(attngen.score(lambda s, b, h, q, k: s + (q * 0.1 <= 0.3 * (k > 0))),),
    ),
    "single to double": dataclasses.replace(BASE, out_dtype="float64"),
    "a double operand": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: LINE[k] < 0.1 * q)
    ),
    "a long operand": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: FAR[b, k] < 2)
    ),
    "far positions": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: k * 10**9 <= q * 10**9)
    ),
    "far bounds": dataclasses.replace(
        BASE, mask=attngen.mask(lambda b, h, q, k: q - 2 * 10**9 < k + 2 * 10**9)
    ),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(2)
def test_jax_computes_it(name, x64):
    judge(SPECS[name], **CHUNKS)


@pytest.mark.parametrize("name", SPECS)
def test_the_toy_backend_computes_it(name):
    judge(SPECS[name], "numpy", q_chunk=4, k_chunk=5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_jax_computes_it_at_once(name, x64):
    judge(SPECS[name], algorithm="dense")


@pytest.mark.parametrize("name", ["double", "single to double", "far bounds"])
def test_it_is_refused_where_jax_has_no_64_bits(name):
    with refused(BackendError):
        kernel(SPECS[name], **CHUNKS)


NARROW = {
    "lengths": {"kv_lengths": True, "q_lengths": True},
    "an offset": {"q_offset": "operand", "mask": masks.causal()},
    "an offset of lengths": {
        "q_offset": "bottom_right",
        "kv_lengths": True,
        "mask": masks.sliding_window(4),
        "dtype": "bfloat16",
    },
    "a score of constants": {"score": (attngen.score(lambda s, b, h, q, k: 1.0),)},
    "documents": {"q_len": 14, "mask": masks.causal() & masks.documents()},
}


@pytest.mark.parametrize("name", NARROW)
def test_32_bits_compute_beside_64(name, x64):
    spec = dataclasses.replace(BASE, **NARROW[name])
    judge(spec, **CHUNKS, guard=True)
    judge(spec, algorithm="dense")
