"""The least budget: an error names it, and a build with exactly that succeeds."""

import dataclasses
import re

import pytest

import attngen
from attngen import AttentionSpec, api, masks, planner, scores
from attngen.errors import BudgetError

PLAIN = AttentionSpec(q_heads=4, kv_heads=2, q_len=60, kv_len=75, qk_dim=8)
SPECS = {
    "plain": PLAIN,
    "causal": dataclasses.replace(
        PLAIN, mask=masks.causal(), q_offset=0, outputs=("out", "lse")
    ),
    "bfloat16": dataclasses.replace(
        PLAIN, batch=2, dtype="bfloat16", sink=True, score=(scores.bias(),)
    ),
}


def least(call, spec):
    """The bytes that the error names."""
    with pytest.raises(BudgetError) as caught:
        call(dataclasses.replace(spec, memory_budget=1))
    need = int(re.search(r"\((\d+) bytes", caught.value.needed)[1])
    assert caught.value.hint == f"raise memory_budget to {need}"
    return need


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.slow
def test_the_least_budget_is_enough_and_a_byte_less_is_not(name):
    spec = SPECS[name]
    need = least(attngen.build, spec)
    kernel = attngen.build(dataclasses.replace(spec, memory_budget=need))
    assert kernel.certificate.temp_bytes <= need
    assert kernel.report.passed
    with pytest.raises(BudgetError):
        attngen.build(dataclasses.replace(spec, memory_budget=need - 1))


@pytest.mark.slow
def test_the_modelled_least_is_enough_too():
    need = least(attngen.plan, PLAIN)
    assert least(attngen.build, PLAIN) <= need
    plan = attngen.plan(dataclasses.replace(PLAIN, memory_budget=need))
    assert attngen.certify(plan).temp_bytes <= need


@pytest.mark.slow
def test_a_file_under_a_budget_that_only_the_compiler_grants_can_be_judged(tmp_path):
    spec = dataclasses.replace(PLAIN, memory_budget=least(attngen.build, PLAIN))
    kernel = attngen.build(spec)
    assert kernel.plan.temp_bytes > spec.budget_bytes
    path = tmp_path / "kernel.py"
    kernel.source.write(path)
    assert attngen.validate(path).passed
    assert api.emit(api.plan_of(path)).text == path.read_text()


def test_the_smallest_come_first():
    device, by = attngen.targets.get("cpu"), attngen.backends.get("jax")
    spec = dataclasses.replace(PLAIN, memory_budget=1)
    sizes = [p.temp_bytes for p in planner.rank(spec, device, by, smallest=5)]
    assert len(sizes) == 5
    assert sizes == sorted(sizes)
