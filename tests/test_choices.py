"""Each choice of a plan, and each algorithm: what is emitted computes its spec."""

import dataclasses

import jax
import pytest
from judge import judge, kernel
from test_conformance import SPECS

import attngen
from attngen import AttentionSpec, api, backends, masks, scores, targets
from attngen.diagonals import rises
from attngen.errors import PlanError

PLAIN = AttentionSpec(
    batch=2, q_heads=4, kv_heads=2, q_len=64, qk_dim=16, outputs=("out", "lse")
)
CAUSAL = dataclasses.replace(PLAIN, mask=masks.causal())
CHUNKS = {"q_chunk": 16, "k_chunk": 24}
UNUSUAL = {
    "ones": {"denominator": "ones"},
    "twice": {"qk": "twice"},
    "scaled scores": {"scale": "scores"},
    "keys last": {"slices": "dn"},
    "all": {"denominator": "ones", "qk": "twice", "scale": "scores", "slices": "dn"},
    "split": {"algorithm": "split_kv", "parts": 2},
    "split, all": {
        "algorithm": "split_kv", "parts": 2, "denominator": "ones", "qk": "twice",
        "slices": "dn",
    },
    "summaries": {"algorithm": "summaries"},
    "summaries, all": {"algorithm": "summaries", "denominator": "ones", "slices": "dn"},
}  # fmt: skip


def adapted(spec, fix):
    """Choices for a spec, however short it is."""
    chunks = {"q_chunk": min(16, spec.q_len), "k_chunk": min(24, spec.kv_len)}
    return {"algorithm": "running"} | chunks | fix


@pytest.mark.parametrize("fix", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize(
    "name", ["causal window", "several scores", "documents", "sink"]
)
@pytest.mark.sampled(7)
def test_a_choice_computes_the_spec(name, fix):
    judge(SPECS[name], **adapted(SPECS[name], fix))


@pytest.mark.slow
@pytest.mark.parametrize("fix", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize("name", SPECS)
def test_a_choice_computes_every_spec(name, fix):
    spec = SPECS[name]
    if spec.kv_len < 48 and "parts" in fix:
        pytest.skip("one chunk can't be split")
    judge(spec, **adapted(spec, fix))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fix", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.sampled(7)
def test_a_choice_computes_low_precision(dtype, fix):
    spec = dataclasses.replace(CAUSAL, dtype=dtype, outputs=("out",))
    low = {"product_dtype": dtype, "scale": "scores"}
    for product in ({}, low):
        judge(spec, **adapted(spec, fix | product))


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("head_chunk", [1, 2])
@pytest.mark.parametrize("algorithm", ["running", "split_kv", "summaries"])
@pytest.mark.sampled(5)
def test_steps_that_are_stacked_come_out_in_order(layout, head_chunk, algorithm):
    spec = dataclasses.replace(CAUSAL, layout=layout)
    for batch_chunk in (1, 2):
        sizes = {"head_chunk": head_chunk, "batch_chunk": batch_chunk}
        judge(spec, algorithm=algorithm, steps="map", q_chunk=16, k_chunk=24, **sizes)


def test_summaries_by_map():
    spec = dataclasses.replace(PLAIN, mask=masks.documents(), q_heads=2)
    for one in (PLAIN, spec, dataclasses.replace(PLAIN, sink=True)):
        judge(one, algorithm="summaries", loop="map", q_chunk=16, k_chunk=16)


WINDOW = dataclasses.replace(CAUSAL, mask=masks.sliding_window(30, 20))


@pytest.mark.parametrize("unroll", [2, 4, 8])
@pytest.mark.parametrize("spec", [CAUSAL, WINDOW], ids=["causal", "window"])
@pytest.mark.sampled(4)
def test_tiles_without_a_mask_go_several_to_a_step(spec, unroll):
    """Their number isn't known: some are left over, or all."""
    judge(spec, q_chunk=8, k_chunk=4, unroll=unroll)
    judge(spec, q_chunk=5, k_chunk=3, unroll=unroll)


DIAGONAL = {
    "causal": CAUSAL,
    "heads first": dataclasses.replace(CAUSAL, layout="bhtd"),
    "bottom right": dataclasses.replace(CAUSAL, kv_len=96, q_offset="bottom_right"),
    "more keys": dataclasses.replace(CAUSAL, kv_len=91, q_offset=0),
    "an offset": dataclasses.replace(CAUSAL, kv_len=96, q_offset=16),
    "keys elsewhere": dataclasses.replace(CAUSAL, q_offset=32, kv_offset=32),
    "a shifted edge": dataclasses.replace(
        CAUSAL, kv_len=96, mask=attngen.mask(lambda b, h, q, k: k < q + 17), q_offset=0
    ),
    "scores": dataclasses.replace(
        CAUSAL,
        score=(scores.softcap(2.0), scores.alibi(), scores.bias(axes="hqk")),
        sink=True,
    ),
    "biases of queries": dataclasses.replace(CAUSAL, score=(scores.bias(axes="qh"),)),
    "buckets": dataclasses.replace(
        CAUSAL, score=(scores.relative_buckets(bidirectional=False),)
    ),
    "a score that drops": dataclasses.replace(
        CAUSAL,
        score=(
            attngen.score(
                lambda s, b, h, q, k: attngen.where((k + q) % 3 == 0, -float("inf"), s)
            ),
        ),
    ),
    "low": dataclasses.replace(CAUSAL, dtype="bfloat16", outputs=("out",)),
    "odd dims": dataclasses.replace(CAUSAL, qk_dim=40, v_dim=24),
}


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.sampled(7)
def test_a_diagonal_computes_the_spec(name):
    spec = DIAGONAL[name]
    judge(spec, q_chunk=16, k_chunk=8, diagonal=4)
    judge(spec, q_chunk=32, k_chunk=16, diagonal=16, head_chunk=1, unroll=2)
    judge(spec, q_chunk=16, k_chunk=16, diagonal=2, batch_chunk=2, denominator="ones")


@pytest.mark.slow
def test_a_diagonal_of_all_queries():
    for q_chunk, k_chunk in ((64, 64), (64, 8)):
        judge(CAUSAL, q_chunk=q_chunk, k_chunk=k_chunk, diagonal=8, slices="dn")


def test_a_diagonal_leaves_out_half_of_its_square():
    """What it computes is counted, by the compiler, to be less."""
    flop = []
    for diagonal in (0, 8):
        function, _ = kernel(
            CAUSAL, q_chunk=64, k_chunk=64, diagonal=diagonal, head_chunk=2
        )
        structs = {
            n: jax.ShapeDtypeStruct(CAUSAL.shape_of(n), "float32") for n in "qkv"
        }
        analysis = jax.jit(function).lower(**structs).compile().cost_analysis()
        flop.append(analysis["flops"])
    assert flop[1] < 0.75 * flop[0]


NO_DIAGONAL = {
    "no mask": (PLAIN, {}),
    "a window": (WINDOW, {}),
    "a prefix": (dataclasses.replace(PLAIN, mask=masks.causal() | masks.prefix(9)), {}),
    "documents": (
        dataclasses.replace(PLAIN, mask=masks.causal() & masks.documents()),
        {},
    ),
    "steeper": (
        dataclasses.replace(PLAIN, mask=attngen.mask(lambda b, h, q, k: k <= 2 * q)),
        {},
    ),
    "lengths": (dataclasses.replace(CAUSAL, kv_lengths=True), {}),
    "lengths of queries": (dataclasses.replace(CAUSAL, q_lengths=True), {}),
    "an offset at run time": (dataclasses.replace(CAUSAL, q_offset="operand"), {}),
    "an edge within a chunk": (dataclasses.replace(CAUSAL, kv_len=96, q_offset=3), {}),
    "before the keys": (dataclasses.replace(CAUSAL, q_offset=-16), {}),
    "beyond the keys": (dataclasses.replace(CAUSAL, q_offset=16), {}),
    "ragged queries": (dataclasses.replace(CAUSAL, q_len=60, kv_len=60), {}),
    "longer keys": (CAUSAL, {"k_chunk": 32}),
    "one key": (CAUSAL, {"k_chunk": 1}),
    "no divisor": (CAUSAL, {"diagonal": 5}),
    "too many steps": (CAUSAL, {"q_chunk": 64, "diagonal": 2}),
    "below zero": (CAUSAL, {"diagonal": -4}),
    "a truth value": (CAUSAL, {"diagonal": True}),
    "twice": (CAUSAL, {"qk": "twice"}),
    "scan": (CAUSAL, {"loop": "scan"}),
}


@pytest.mark.parametrize("name", NO_DIAGONAL)
def test_where_there_is_no_diagonal_it_is_refused(name):
    spec, fix = NO_DIAGONAL[name]
    with pytest.raises(PlanError):
        attngen.plan(
            spec, fix={"q_chunk": 16, "k_chunk": 8, "diagonal": 4} | fix, target="cpu"
        )


def test_a_diagonal_begins_where_its_first_query_sees_one_key_of_a_chunk():
    assert rises(CAUSAL, 16, 8)
    for name in ("a window", "a prefix", "steeper", "an edge within a chunk"):
        assert not rises(NO_DIAGONAL[name][0], 16, 8)


REFUSED = {
    "parts of one": ({"algorithm": "split_kv", "parts": 1}, "parts must be"),
    "more parts than chunks": ({"algorithm": "split_kv", "parts": 4}, "parts must be"),
    "parts of a truth value": (
        {"algorithm": "split_kv", "parts": True},
        "parts must be",
    ),
    "parts as text": ({"algorithm": "split_kv", "parts": "two"}, "parts must be"),
    "split by scan": ({"algorithm": "split_kv", "loop": "scan"}, "no loop scan"),
    "twice": ({"algorithm": "summaries", "qk": "twice"}, "running maximum"),
    "a ragged map": ({"algorithm": "summaries", "loop": "map"}, "whole key chunks"),
    "running by map": ({"loop": "map"}, "loop must be"),
    "ragged steps": ({"steps": "map", "q_chunk": 15}, "whole"),
    "no steps": (
        {"steps": "map", "q_chunk": 64, "head_chunk": 2, "batch_chunk": 2},
        "more than one step",
    ),
    "an unknown denominator": ({"denominator": "mean"}, "denominator must be"),
    "an unknown order": ({"slices": "nk"}, "slices must be"),
    "qk three times": ({"qk": 3}, "qk must be"),
    "scaled keys": ({"scale": "keys"}, "scale must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_emitted_is_refused(name):
    fix, words = REFUSED[name]
    with pytest.raises(PlanError, match=words):
        attngen.plan(PLAIN, fix={"algorithm": "running"} | CHUNKS | fix, target="cpu")


def test_queries_are_scaled_only_where_products_are_wide():
    spec = dataclasses.replace(PLAIN, dtype="bfloat16")
    low = {"product_dtype": "bfloat16", "scale": "queries"}
    with pytest.raises(PlanError, match="take queries that are scaled"):
        attngen.plan(spec, fix=CHUNKS | low, target="cpu")


@pytest.mark.parametrize(
    ("spec", "fix"),
    [
        (CAUSAL, {"q_chunk": 1024, "k_chunk": 512, "diagonal": 256}),
        (CAUSAL, {"q_chunk": 2048, "k_chunk": 256, "diagonal": 128, "unroll": 8}),
        (PLAIN, {"algorithm": "split_kv", "q_chunk": 512, "k_chunk": 512, "parts": 8}),
        (PLAIN, {"algorithm": "summaries", "q_chunk": 512, "k_chunk": 1024}),
        (PLAIN, {"q_chunk": 512, "k_chunk": 512, "unroll": 8, "steps": "map"}),
    ],
    ids=["diagonal", "long diagonal", "split", "summaries", "unrolled"],
)
@pytest.mark.sampled(2)
def test_a_large_call_is_judged_at_a_smaller_size_too(spec, fix):
    """The smaller plan has the same choices, and is legal."""
    from attngen.validator import shrink

    large = dataclasses.replace(spec, q_len=4096, kv_len=4096)
    plan = attngen.plan(large, fix={"algorithm": "running"} | fix, target="cpu")
    small, choice = shrink(large, plan)
    assert small.q_len <= 480
    by = backends.get("jax")
    assert by.illegal(small, targets.get("cpu"), choice) is None
    assert choice.keys() == plan.choice.keys()
    for name in ("diagonal", "parts", "unroll", "steps"):
        assert bool(choice.get(name)) == bool(plan.choice.get(name))
    report = judge(small, **choice)
    assert report.passed


def test_the_text_of_an_unusual_plan_is_emitted_again_from_its_header(tmp_path):
    """Every choice is in the header."""
    fix = {"algorithm": "split_kv", "parts": 2, "denominator": "ones", "slices": "dn"}
    plan = attngen.plan(PLAIN, fix=CHUNKS | fix, target="cpu")
    path = attngen.emit(plan).write(tmp_path / "kernel.py")
    report = attngen.validate(path)
    assert report.passed
    assert api.emit(attngen.plan(PLAIN, fix=plan.choice, target="cpu")).text.count(
        "_combine"
    )


BEFORE_THE_KEYS = {
    "more queries": (
        AttentionSpec(
            q_heads=1, q_len=64, kv_len=32, qk_dim=4, mask=masks.causal(),
            q_offset="bottom_right", outputs=("out", "lse"),
        ),
        {"q_chunk": 4, "k_chunk": 4},
    ),
    "keys that begin later": (
        AttentionSpec(
            q_heads=1, q_len=5, kv_len=65, qk_dim=4, mask=masks.causal(),
            q_offset=0, kv_offset=4, outputs=("out", "lse"),
        ),
        {"q_chunk": 2, "k_chunk": 1},
    ),
    "an edge alone": (
        AttentionSpec(
            q_heads=1, q_len=8, kv_len=32, qk_dim=4, q_offset=-7,
            mask=attngen.mask(lambda b, h, q, k: (k <= q) & ((q + k) % 2 == 0)),
        ),
        {"q_chunk": 1, "k_chunk": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE_THE_KEYS)
@pytest.mark.parametrize(
    "fix",
    [
        {"algorithm": "running", "unroll": 4},
        {"algorithm": "running", "unroll": 8},
        {"algorithm": "split_kv", "parts": 2},
        {"algorithm": "split_kv", "parts": 8},
        {"algorithm": "summaries"},
    ],
    ids=str,
)
@pytest.mark.sampled(4)
def test_queries_before_every_key_see_none(name, fix):
    """A limit before the first key: the number of chunks to visit is below zero."""
    spec, chunks = BEFORE_THE_KEYS[name]
    if fix.get("unroll") and name == "an edge alone":
        pytest.skip("there is no tile without a mask")
    judge(spec, **chunks, **fix)


def test_lengths_of_zero_and_offsets_below_it_see_none():
    spec = AttentionSpec(
        q_heads=1, q_len=4, kv_len=64, qk_dim=4, mask=masks.causal(), kv_lengths=True,
        q_offset="operand",
    )  # fmt: skip
    arrays = attngen.inputs.arrays(spec, nan=False)
    arrays["kv_lengths"][:] = 64
    for fix in ({"algorithm": "split_kv", "parts": 8}, {"unroll": 4}):
        function, _ = kernel(spec, q_chunk=1, k_chunk=2, **fix)
        for offset in (-9, -63, -5):
            given = arrays | {"q_offset": arrays["q_offset"] * 0 + offset}
            made = {n: jax.numpy.asarray(x, spec.dtype_of(n)) for n, x in given.items()}
            assert (abs(function(**made)) == 0).all()
