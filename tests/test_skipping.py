"""What is said of a plan's skipping: one share everywhere, "at most" where operands decide,
and a warning where queries see nothing."""

import dataclasses
import json

import numpy as np
import pytest
from brute import evaluate
from commands import run
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import expressions

import attngen
from attngen import AttentionSpec, masks, pictures, skipping
from attngen.expr import const
from attngen.plans import Plan
from attngen.tracing import mask, mask_of

SPEC = AttentionSpec(q_heads=2, q_len=64, qk_dim=8)
CHUNKS = {"q_chunk": 16, "k_chunk": 16}
NOTHING = "no query sees any key: the output is all zeros"

NEVER = {
    "beyond the keys": mask(lambda b, h, q, k: k > q + 64),
    "false": mask_of(const(False)),
    "and its opposite": masks.causal() & ~masks.causal(),
    "disjoint windows": masks.causal() & mask(lambda b, h, q, k: k - q >= 1),
    "behind the keys": masks.sliding_window(3) & mask(lambda b, h, q, k: k < q - 9),
    "an operand besides": masks.documents() & mask(lambda b, h, q, k: k < 0),
}


@pytest.mark.parametrize("name", NEVER)
def test_a_mask_that_is_never_true_is_a_warning(name):
    plan = attngen.plan(dataclasses.replace(SPEC, mask=NEVER[name]))
    assert plan.warnings == (NOTHING,)
    assert f"warning: {NOTHING}" in plan.explain()
    assert plan.tiles.visited == 0
    assert Plan.from_json(plan.to_json()) == plan
    assert f"warning: {NOTHING}" in attngen.emit(plan).text


def test_a_kernel_of_such_a_mask_gives_zeros_and_lse_of_minus_infinity():
    spec = dataclasses.replace(SPEC, mask=NEVER["false"], outputs=("out", "lse"))
    kernel = attngen.build(spec, fix=CHUNKS)
    assert kernel.plan.warnings == (f"{NOTHING} and lse -inf",)
    q = np.ones(spec.shape_of("q"), np.float32)
    out, lse = kernel(q, q, q)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))


def test_planning_it_takes_no_longer_where_it_is_long():
    spec = dataclasses.replace(SPEC, q_len=2**20, kv_len=2**20)
    never = mask(lambda b, h, q, k: k > q + 2**20)
    plan = attngen.plan(dataclasses.replace(spec, mask=never))
    assert plan.tiles.visited == 0


ROWS = {
    "bottom right": (
        {"q_len": 64, "kv_len": 48, "q_offset": "bottom_right", "mask": masks.causal()},
        ("the first 16 queries see no key: their output is zeros",),
    ),
    "one": (
        {"mask": mask(lambda b, h, q, k: k < q)},
        ("the first query sees no key: its output is zeros",),
    ),
    "the last": (
        {"mask": mask(lambda b, h, q, k: k > q + 9)},
        ("the last 10 queries see no key: their output is zeros",),
    ),
    "lse": (
        {"mask": mask(lambda b, h, q, k: k > q), "outputs": ("out", "lse")},
        ("the last query sees no key: its output is zeros and its lse -inf",),
    ),
    "both": (
        {"mask": mask(lambda b, h, q, k: (k > q + 9) & (q > 4))},
        (
            "the first 5 queries see no key: their output is zeros",
            "the last 10 queries see no key: their output is zeros",
        ),
    ),
    "keys that come later": ({"kv_offset": 8, "mask": masks.causal()}, 8),
    "lengths": ({"kv_lengths": True, "mask": masks.causal()}, 0),
    "an operand": ({"mask": masks.documents()}, 0),
    "all see some": ({"mask": masks.causal()}, 0),
    "another position at each call": (
        {"q_len": 1, "kv_len": 64, "q_offset": "operand", "mask": masks.causal()},
        0,
    ),
    "no mask": ({}, 0),
}


@pytest.mark.parametrize("name", ROWS)
def test_queries_that_see_no_key_are_a_warning(name):
    change, expected = ROWS[name]
    if isinstance(expected, int):
        count = f"the first {expected} queries see no key: their output is zeros"
        expected = (count,) if expected else ()
    kv_len = change.get("kv_len", SPEC.kv_len)
    spec = dataclasses.replace(SPEC, **{"kv_len": kv_len} | change)
    assert skipping.warnings(spec) == expected


@given(
    expressions("bool", operands=()),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(-8, 8),
)
@settings(max_examples=100, deadline=None)
def test_no_warning_is_wrong(node, q_len, kv_len, offset):
    spec = AttentionSpec(
        q_heads=2,
        q_len=q_len,
        kv_len=kv_len,
        qk_dim=8,
        q_offset=offset,
        mask=mask_of(node),
    )
    for warning in skipping.warnings(spec):
        _, end, number, *_ = warning.split()
        count = int(number) if number.isdigit() else 1
        blind = {"first": range(count), "last": range(q_len - count, q_len)}
        for i in blind.get(end, range(q_len)):  # or "no query"
            for k in range(kv_len):
                for h in (0, 1):
                    at = {"b": 0, "h": h, "q": i + offset, "k": k}
                    assert not evaluate(node, at)


def test_the_command_line_warns_where_only_source_is_printed(tmp_path):
    path = tmp_path / "never.json"
    path.write_text(dataclasses.replace(SPEC, mask=NEVER["false"]).to_json())
    out, err = run("plan", path)
    assert f"warning: {NOTHING}" in out
    assert err == ""
    assert json.loads(run("plan", path, "--json")[0])["warnings"] == [NOTHING]
    out, err = run("emit", path)
    assert err == f"attngen: warning: {NOTHING}\n"


def test_what_operands_decide_is_said_to_be_at_most():
    spec = dataclasses.replace(SPEC, mask=masks.causal() & masks.documents())
    plan = attngen.plan(spec, fix=CHUNKS | {"skip": "list"})
    assert skipping.decided_by(plan) == ("document_ids",)
    told = " ".join(plan.explain().split())
    assert (
        "38% of the square or more: of 16 tiles a head 6 are always empty, at most 10 are "
        "visited, 0 of them known to be full: document_ids says which at run time"
        in told
    )
    head = " ".join(attngen.emit(plan).text.split('"""')[1].split())
    assert (
        "tiles of a head: 16; 6 always empty, at most 10 visited: document_ids says which"
        in head
    )


def test_without_a_list_nothing_is_decided_at_run_time():
    for condition in (masks.causal(), masks.documents(), None):
        spec = dataclasses.replace(SPEC, mask=condition)
        bounds = {"skip": "bounds"} if condition == masks.documents() else {}
        plan = attngen.plan(spec, fix=CHUNKS | bounds)
        assert skipping.decided_by(plan) == ()
        assert "at most" not in plan.explain()


def test_whose_tiles_are_counted_is_said_where_they_differ():
    wider = mask(lambda b, h, q, k: (k <= q) & (q - k < 16 * (h + 1)))
    spec = dataclasses.replace(SPEC, mask=wider)
    plan = attngen.plan(spec, fix=CHUNKS | {"skip": "list"})
    assert skipping.counted(plan) == ("head 0",)
    assert "tiles (head 0)" in plan.explain()
    assert "tiles of head 0" in attngen.emit(plan).text
    assert "head 0" in pictures.text(plan)


@pytest.mark.parametrize(
    "condition", [None, masks.causal(), masks.causal() & masks.documents()]
)
def test_the_picture_and_the_explanation_say_the_same_share(condition):
    spec = dataclasses.replace(SPEC, mask=condition)
    plan = attngen.plan(spec)
    share = skipping.share(plan)
    if share:
        assert f"{skipping.percent(share)} " in plan.explain()
        assert f"{skipping.percent(share)} " in pictures.text(plan)
    else:
        assert "nothing" in plan.explain()
        assert "nothing is skipped" in pictures.text(plan)


def test_a_share_is_rounded_to_neither_nothing_nor_all():
    assert skipping.percent(0) == "0%"
    assert skipping.percent(0.001) == "under 1%"
    assert skipping.percent(0.5) == "50%"
    assert skipping.percent(0.999) == "over 99%"
    assert skipping.percent(1) == "100%"
