"""Where nothing is legal: the reason that stands in the way, and what would be."""

import pytest
from refusals import refused

import attngen
from attngen import AttentionSpec, masks
from attngen.errors import PlanError

PLAIN = AttentionSpec(q_heads=8, kv_heads=2, q_len=4096, qk_dim=64, dtype="bfloat16")
CAUSAL = AttentionSpec(q_heads=8, q_len=4096, qk_dim=64, mask=masks.causal())


@pytest.mark.parametrize("target", ["cpu", "tpu-v5e"])
@pytest.mark.parametrize(
    ("spec", "fix", "reason", "hints"),
    [
        (CAUSAL, {"diagonal": 3}, "diagonal must be 0 or divide", ["diagonal = 0"]),
        (PLAIN, {"head_chunk": 3}, "from 1 to kv_heads = 2", ["head_chunk = 1, 2"]),
        (PLAIN, {"unroll": 8, "k_chunk": 2048}, "exceed the key", ["unroll = 1, 2"]),
        (
            PLAIN,
            {"algorithm": "dense", "exp": "exp2"},
            "dense has exp = exp",
            ["algorithm = running, split_kv, summaries", "exp = exp"],
        ),
        (
            CAUSAL,
            {"blank": "limits", "diagonal": 64, "loop": "scan"},
            "only fori skips",
            ["diagonal = 0"],
        ),
        (PLAIN, {"loop": "scan", "unroll": 4}, "only fori loops", ["loop = fori"]),
    ],
)
def test_the_reason_is_of_what_is_fixed_and_the_hint_is_legal(
    spec, fix, reason, hints, target
):
    with refused(PlanError, "No legal plan") as caught:
        attngen.plan(spec, target=target, fix=fix)
    assert reason in caught.value.needed
    offered = caught.value.hint.removeprefix("legal with ").split(", or with ")
    assert all(any(o.startswith(h) for o in offered) for h in hints)
    for offer in offered:
        name, _, values = offer.partition(" = ")
        for text in values.removesuffix(", …").split(", "):
            value = int(text) if text.isdigit() else text
            attngen.plan(spec, target=target, fix={**fix, name: value})


def test_a_choice_that_is_free_and_has_one_value_here_is_offered_with_others():
    with refused(PlanError, "No legal plan") as caught:
        attngen.plan(CAUSAL, target="tpu-v5e", fix={"diagonal": 128})
    assert caught.value.needed.startswith("mask = distance needs")
    assert "mask = positions" in caught.value.hint
    fix = {"diagonal": 128, "mask": "positions"}
    assert attngen.plan(CAUSAL, target="tpu-v5e", fix=fix).fixed == tuple(fix)


def test_where_two_choices_stand_in_the_way_one_of_them_is_named():
    with refused(PlanError, "No legal plan") as caught:
        attngen.plan(CAUSAL, target="cpu", fix={"unroll": 64, "diagonal": 7})
    assert caught.value.needed.startswith(("unroll must", "diagonal must"))
