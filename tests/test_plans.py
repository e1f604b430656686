"""Plan: a value that prints, compares, and goes to JSON and back."""

import dataclasses
import json

import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, Plan, masks, presets, scores
from attngen.errors import FileError, InternalError

SPEC = AttentionSpec(
    batch=2,
    q_heads=4,
    kv_heads=2,
    q_len=1000,
    qk_dim=64,
    mask=masks.causal() & masks.sliding_window(300),
    score=(scores.softcap(30.0),),
    memory_budget="1MiB",
)


@pytest.mark.parametrize("fix", [None, {"q_chunk": 100, "k_chunk": 128}])
def test_a_plan_survives_json(fix):
    plan = attngen.plan(SPEC, fix=fix)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert attngen.emit(again).text == attngen.emit(plan).text


def test_the_choices_are_what_fix_takes():
    plan = attngen.plan(SPEC)
    assert attngen.plan(SPEC, fix=plan.choice).choice == plan.choice


def test_an_unknown_option_is_an_internal_fault():
    with pytest.raises(InternalError, match="report"):
        attngen.plan(SPEC).option("warps")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("spec"),
        lambda d: d.pop("q_chunk"),
        lambda d: d.update(surprise=1),
        lambda d: d.update(tiles={"full": "many"}),
        lambda d: d.update(alternatives=[3]),
        lambda d: d.update(options=3),
    ],
)
def test_a_damaged_plan_is_refused(damage):
    data = json.loads(attngen.plan(SPEC).to_json())
    damage(data)
    with pytest.raises(attngen.errors.AttngenError):
        Plan.from_dict(data)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "null"])
def test_what_is_no_plan_is_refused(text):
    with refused(FileError):
        Plan.from_json(text)


@pytest.mark.parametrize("name", presets.names())
def test_explain_fits_a_hundred_columns(name):
    spec = dataclasses.replace(
        presets.get(name), derivatives=None, memory_budget="32MiB"
    )
    text = attngen.plan(spec).explain()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "chosen" in text
    assert "modelled" in text


def test_explain_says_what_is_skipped():
    text = attngen.plan(SPEC, fix={"q_chunk": 100, "k_chunk": 100}).explain()
    assert "of 100 tiles a head" in text
    plain = dataclasses.replace(SPEC, mask=None)
    assert "nothing: every query sees every key" in attngen.plan(plain).explain()


@pytest.mark.parametrize(("backend", "target"), [("triton", "h100"), ("jax", "cpu")])
@pytest.mark.sampled(2)
def test_a_plan_is_explained_whatever_is_fixed(backend, target):
    spec = dataclasses.replace(presets.get("llama3-8b"), derivatives="vjp")
    plan = attngen.plan(spec, target, backend)
    for name, value in plan.choice.items():
        fixed = attngen.plan(spec, target, backend, {name: value})
        assert "nothing of the square" not in fixed.explain()
    assert attngen.plan(spec, target, backend, plan.choice).explain()
