"""What masks and scores read: operands in every way, and scores of every shape."""

import dataclasses
import math

import pytest
from judge import judge

import attngen
from attngen import AttentionSpec, backends, masks, maximum, minimum, scores, where

backends.register("numpy", "toy_backend")

BASE = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=13,
    qk_dim=8,
    outputs=("out", "lse"),
)
CHUNKS = {"algorithm": "running", "q_chunk": 4, "k_chunk": 5}
ODD = {"algorithm": "running", "q_chunk": 13, "k_chunk": 4, "head_chunk": 2}


def read(name, axes, dtype="float32"):
    return attngen.operand(name, axes=axes, dtype=dtype)


IDS = read("ids", "bk", "int32")
FLAGS = read("flags", "qk", "bool")
LINE = read("line", (25,))
LARGE = read("large", (12, 14))
TABLE = read("table", ("h", 7))
HALF = read("half", ("h", 7), "bfloat16")
GRID = read("grid", ("h", 3, 4))
MIXED = read("mixed", (3, "k", "b"))
PAIR = read("pair", "qk", "float16")
PICK = read("pick", (6, "b"), "int32")
SWITCH = read("switch", ("q", 4), "bool")

SCORES = {
    "slices": lambda s, b, h, q, k: s + PAIR[q, k] * IDS[b, k],
    "a key's, at the query": lambda s, b, h, q, k: s + IDS[b, q] - IDS[b, k],
    "the diagonal": lambda s, b, h, q, k: s + PAIR[q, q] - PAIR[k, k],
    "numbers for letters": lambda s, b, h, q, k: s * TABLE[1, 3] + PAIR[q, 0],
    "numbers of two digits": lambda s, b, h, q, k: s + LARGE[1, 12] - 2 * LARGE[11, 2],
    "a number and a letter": lambda s, b, h, q, k: s + MIXED[2, k, 0],
    "a gather that is proven": lambda s, b, h, q, k: s + LINE[q - k + 12],
    "a gather modulo": lambda s, b, h, q, k: s + HALF[h, (q - k) % 7],
    "a gather that is clamped": lambda s, b, h, q, k: (
        s + TABLE[h, minimum(maximum(k - q, -3), 3) + 3]
    ),
    "a gather below its axis": lambda s, b, h, q, k: s + where(k <= q, LINE[k - q], 0),
    "a gather beyond its axis": lambda s, b, h, q, k: (
        s + where(k < q, TABLE[h, k + 2], 0)
    ),
    "two gathers in one": lambda s, b, h, q, k: s + GRID[h, (q - k) % 3, (q + k) % 4],
    "a gather of a gather": lambda s, b, h, q, k: s + LINE[PICK[(q - k) % 6, b] * 2],
    "a gather at the query": lambda s, b, h, q, k: s * LINE[q],
    "a gather by the score": lambda s, b, h, q, k: s + TABLE[h, (s > 0) + 2 * (s > 1)],
    "no score at all": lambda s, b, h, q, k: 0.1 * q,
    "of the head alone": lambda s, b, h, q, k: TABLE[h, 2],
    "a constant": lambda s, b, h, q, k: 1.5,
    "a condition": lambda s, b, h, q, k: where(q < 5, 1.0, 2.0),
    "no finite number": lambda s, b, h, q, k: where((k > 3) | (q == 2), s, -math.inf),
    "beyond float32": lambda s, b, h, q, k: where(k % 3 == 0, s, -1e300),
    "floor of negatives": lambda s, b, h, q, k: s + (k - q) // 3 - (q - k) % -4,
    "logarithms": lambda s, b, h, q, k: s - attngen.log(abs(q - k) + 1.0),
}
MASKS = {
    "a gather of bools": lambda b, h, q, k: SWITCH[q, (k + h) % 4],
    "not a bool": lambda b, h, q, k: ~SWITCH[q, 0] & (k >= q),
    "the diagonal of bools": lambda b, h, q, k: FLAGS[q, q] == ~FLAGS[0, k],
    "numbers of bools": lambda b, h, q, k: (k <= q) + FLAGS[q, k] + (k % 3 == 0) > 1,
    "a float": lambda b, h, q, k: LINE[(q + k) % 25] < 0.25,
    "a gather in a bound": lambda b, h, q, k: (k <= q) & (PICK[k // 3, b] < 3),
    "a bound or what isn't one": lambda b, h, q, k: (k <= q) | (IDS[b, k] == 1),
    "the heads": lambda b, h, q, k: where(h % 2 == 0, k <= q, k >= q),
    "slopes": lambda b, h, q, k: (3 * q - 2 * k >= -4) & (q + k > 3),
    "a float's bound": lambda b, h, q, k: k <= 0.5 * q,
}
TWICE = attngen.score(SCORES["a gather by the score"])
SPECS = {
    **{n: {"score": (attngen.score(f),)} for n, f in SCORES.items()},
    **{n: {"mask": attngen.mask(f)} for n, f in MASKS.items()},
    "the same gather twice": {"score": (TWICE, TWICE)},
    "the same gather masked": {
        "score": (attngen.score(SCORES["a gather modulo"]),),
        "mask": attngen.mask(lambda b, h, q, k: HALF[h, (q - k) % 7] < 0.5),
    },
    "a gather, the offset at run time": {
        "score": (attngen.score(SCORES["a gather at the query"]),),
        "q_offset": "operand",
    },
    "elsewhere": {
        "score": (attngen.score(SCORES["slices"]), scores.alibi("slopes")),
        "mask": masks.causal() | masks.documents("ids"),
        "q_offset": -3,
        "kv_offset": 4,
    },
}


def spec_of(name):
    return dataclasses.replace(BASE, **SPECS[name])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(5)
def test_jax_reads_it(name):
    judge(spec_of(name), **CHUNKS)


@pytest.mark.parametrize("name", SPECS)
def test_the_toy_backend_reads_it(name):
    judge(spec_of(name), "numpy", q_chunk=4, k_chunk=5)


@pytest.mark.slow
@pytest.mark.parametrize("fix", [{"algorithm": "dense"}, ODD])
@pytest.mark.parametrize("name", SPECS)
def test_jax_reads_it_in_other_plans(name, fix):
    judge(spec_of(name), **fix)


@pytest.mark.parametrize(
    "name", ["the diagonal", "a number and a letter", "a constant"]
)
def test_jax_reads_it_at_once(name):
    judge(spec_of(name), algorithm="dense")


AXES = ["q", "k", "h", "b", "qk", "kq", "hb", "bk", "qh", "kqh", "bhqk", "qbkh"]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.sampled(3)
def test_axes_in_any_order(axes):
    spec = dataclasses.replace(
        BASE, mask=masks.dense(axes=axes), score=(scores.bias(axes=axes[::-1]),)
    )
    judge(spec, **CHUNKS | {"head_chunk": 2, "batch_chunk": 2})
    judge(spec, "numpy", q_chunk=4, k_chunk=5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_a_bias_of_another_dtype(dtype):
    spec = dataclasses.replace(BASE, score=(scores.bias(axes="qk", dtype=dtype),))
    judge(spec, "numpy", q_chunk=4, k_chunk=5)
    if dtype != "float64":
        judge(spec, **CHUNKS)
