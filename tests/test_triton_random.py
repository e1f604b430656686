"""Random specs through the Triton backend, in the interpreter, by the reference."""

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, assume, given, settings

pytest.importorskip("triton", reason="needs attngen[triton]")

import interpreted
from test_random import check_near, specs

from attngen.errors import AttngenError


@st.composite
def longer(draw):
    """Specs of the other backends' test with more tokens, in several blocks of 16."""
    spec, more = draw(specs()), draw(st.sampled_from([0, 16, 29]))
    try:
        return dataclasses.replace(
            spec, q_len=spec.q_len + more, kv_len=spec.kv_len + more
        )
    except AttngenError:
        assume(False)


def judged(spec, q_chunk, k_chunk, order):
    """By the rule in float32; else few elements may flatter the plain baseline."""
    fix = {"q_chunk": q_chunk, "k_chunk": k_chunk, "order": order}
    if spec.dtype == "float32":
        interpreted.judge(spec, **fix)
    else:
        check_near(interpreted.report_of(spec, **fix)[0])


SIZES = (
    st.sampled_from([16, 32]),
    st.just(16),
    st.sampled_from(["forward", "reverse"]),
)
QUIET = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
}


@settings(max_examples=15, **QUIET)
@given(longer(), *SIZES)
def test_random_specs(spec, q_chunk, k_chunk, order):
    judged(spec, q_chunk, k_chunk, order)


@pytest.mark.slow
@settings(max_examples=150, **QUIET)
@given(longer(), *SIZES)
def test_many_random_specs(spec, q_chunk, k_chunk, order):
    judged(spec, q_chunk, k_chunk, order)
