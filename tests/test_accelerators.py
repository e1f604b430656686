"""What plans for TPUs and GPUs are made of, judged on this machine's processor."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from judge import judge
from library import slowly
from test_conformance import BASE, SPECS

import attngen
from attngen import AttentionSpec, backends, inputs, masks, planner, targets
from attngen.backends.jax.candidates import distant, limited
from attngen.backends.jax.distance import by_distance, has_distance
from attngen.backends.jax.loader import load_function
from attngen.building import stored

JAX = backends.get("jax")
WINDOW = masks.causal() & masks.sliding_window(9)
UNUSUAL = {"algorithm": "running", "q_chunk": 16, "k_chunk": 24}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "target",
    slowly(["tpu-v6e", "tpu-v3", "h100"], ["tpu-v6e"]),
)
@pytest.mark.sampled(2)
def test_first_plans_compute_it(name, target):
    spec = SPECS[name]
    first = planner.rank(spec, targets.get(target), JAX, most=1)[0]
    judge(spec, **first.choice)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(4)
def test_masks_by_distance_and_values_by_limits(name):
    spec = SPECS[name]
    q, k = min(16, spec.q_len), min(24, spec.kv_len)
    fix = UNUSUAL | {"q_chunk": q, "k_chunk": k}
    fix |= {"mask": "distance"} if distant(spec) else {}
    fix |= {"blank": "limits"} if limited(spec, False) else {}
    judge(spec, **fix)


@pytest.mark.parametrize(
    ("q_chunk", "k_chunk"), [(1, 7), (7, 1), (50, 70), (32, 70), (5, 64)]
)
@pytest.mark.parametrize("offset", [0, 20, -3])
@pytest.mark.parametrize("kv_offset", [0, 4])
@pytest.mark.sampled(4)
def test_distances_at_every_chunk(q_chunk, k_chunk, offset, kv_offset):
    spec = dataclasses.replace(BASE, mask=WINDOW, q_offset=offset, kv_offset=kv_offset)
    fix = {"mask": "distance", "blank": "limits"}
    judge(spec, algorithm="running", q_chunk=q_chunk, k_chunk=k_chunk, **fix)


def test_values_that_nobody_sees_do_not_matter_by_limits():
    spec = dataclasses.replace(BASE, mask=WINDOW, q_offset=3, layout="bhtd")
    plan = attngen.plan(spec, fix=UNUSUAL | {"blank": "limits", "mask": "distance"})
    function = load_function(stored(attngen.emit(plan)))
    arrays = {n: jnp.asarray(x) for n, x in inputs.arrays(spec).items()}
    clean = function(**arrays)
    for value in (np.nan, np.inf, 1e30):
        # the last query stands at 52
        dirty = arrays | {n: arrays[n].at[:, :, 53:].set(value) for n in "kv"}
        for a, b in zip(clean, function(**dirty), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("mask", "offset"),
    [(masks.causal(), -16), (WINDOW, 40), (masks.causal() & masks.prefix(0), 0)],
    ids=["before all keys", "after all keys", "no key"],
)
def test_the_only_tile_is_blanked_where_no_query_sees_any_key(mask, offset):
    spec = AttentionSpec(q_heads=1, q_len=16, qk_dim=4, mask=mask, q_offset=offset)
    fix = {"algorithm": "running", "q_chunk": 16, "k_chunk": 16, "blank": "limits"}
    function = load_function(stored(attngen.emit(attngen.plan(spec, fix=fix))))
    nan = jnp.full((1, 16, 1, 4), jnp.nan)
    assert (function(jnp.ones_like(nan), nan, nan) == 0).all()


def test_distances_that_leave_32_bits_are_not_legal():
    far = attngen.mask(lambda b, h, q, k: (k <= q - 2**30 + 8) | (k >= q + 2**30 + 10))
    spec = dataclasses.replace(BASE, mask=far, q_offset=0, kv_offset=-(2**30) + 1)
    assert not distant(spec)
    assert distant(dataclasses.replace(spec, kv_offset=0))


def test_comparisons_by_distance():
    def of(function):
        return str(by_distance(attngen.mask(function).expr))

    assert of(lambda b, h, q, k: k <= q) == str(by_distance(masks.causal().expr))
    mask = masks.causal().expr
    assert has_distance(mask)
    assert not has_distance(attngen.mask(lambda b, h, q, k: 2 * k <= q).expr)
    assert not has_distance(attngen.mask(lambda b, h, q, k: k <= 5).expr)
    for text in (
        of(lambda b, h, q, k: q >= k),
        of(lambda b, h, q, k: q - k > 3),
        of(lambda b, h, q, k: (k + 2 < q + 7) | (q < 3)),
    ):
        assert "away" in text
        assert "shift" in text


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(q_heads=1, q_len=8, qk_dim=4),
        AttentionSpec(q_heads=1, q_len=8, qk_dim=4, mask=masks.documents()),
        AttentionSpec(
            q_heads=1, q_len=8, qk_dim=4, mask=masks.causal(), q_offset="operand"
        ),
    ],
    ids=["no mask", "documents", "an offset at run time"],
)
def test_distances_that_are_not_known_are_not_legal(spec):
    assert not distant(spec)
    with pytest.raises(attngen.errors.PlanError, match="fixed choices"):
        attngen.plan(spec, fix={"mask": "distance"})


@pytest.mark.parametrize(
    ("dim", "exp", "legal"),
    [(64, "exp", True), (64, "exp2", False), (80, "exp", False), (256, "exp", True)],
)
def test_narrow_queries_are_scaled_where_that_is_exact(dim, exp, legal):
    spec = AttentionSpec(q_heads=1, q_len=64, qk_dim=dim, dtype="bfloat16")
    fix = {"product_dtype": "bfloat16", "scale": "queries", "exp": exp}
    choice = JAX.illegal(
        spec,
        targets.get("tpu-v3"),
        planner.rank(spec, targets.get("cpu"), JAX, most=1)[0].choice | fix,
    )
    assert (choice is None) == legal
    if legal:
        judge(spec, algorithm="running", q_chunk=16, k_chunk=16, **fix)
