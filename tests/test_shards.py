"""Batch and heads sharded over devices: nothing is gathered, and the budget is a device's.

Under automatic partitioning, on 8 host devices in a process of their own; and as XLA:TPU
compiles it for a slice of 4 x 4 that isn't here.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import sharded
from commands import run
from library import slowly
from refusals import refused

import attngen
from attngen import AttentionSpec, compilers, masks, targets
from attngen.backends.jax import devices, shards
from attngen.errors import NotBuiltError, PlanError, SpecError
from attngen.reports import Certificate

CAUSAL = masks.causal()
FIX = {"algorithm": "running", "q_chunk": 128, "k_chunk": 128}


EXCHANGED = ("lengths", "gradients by keys", "gradients, two passes")


TOGETHER = 4  # cases that a process judges, one after the other
CASES = slowly(sharded.CASES, [*sharded.CASES][:TOGETHER])


@pytest.fixture
def judged(case, shared):
    """What sharded.py says of a case, on every mesh: asked once in a run."""
    cases = list(sharded.CASES)
    first = cases.index(case) // TOGETHER * TOGETHER
    path = shared / f"sharded_{first}.json"
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            ended = subprocess.run(
                [sys.executable, Path(sharded.__file__), *cases[first : first + TOGETHER]],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            path.write_text(ended.stdout.splitlines()[-1])
    at = len(sharded.MESHES) * (cases.index(case) - first)
    return json.loads(path.read_text())[at : at + len(sharded.MESHES)]


@pytest.mark.parametrize("case", CASES)
def test_each_device_computes_its_own(case, judged):
    for found in judged:
        assert found["passed"], found["report"]
        assert "all rows" in found["report"]
        assert all(found["as asked"])


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_gathered(case, judged):
    for (batches, _), found in zip(sharded.MESHES, judged, strict=True):
        # the longest and the shortest of all lengths: a number each, of a chunk of queries;
        # gradients of slopes and sinks, which all batches add to
        exchanged = case in EXCHANGED and batches > 1
        assert set(found["collectives"]) == ({"all-reduce"} if exchanged else set())


@pytest.mark.parametrize("case", CASES)
def test_a_device_takes_what_it_would_alone(case, judged):
    for found in judged:
        # of transposed keys and values XLA makes one more copy
        more = found["keys"] if case.startswith(("transposed", "gradients")) else 0
        assert found["device"] <= found["alone"] + more + 1024


@pytest.mark.parametrize("case", CASES)
def test_texts_are_as_wide_as_others(case):
    for batches, heads in (*sharded.MESHES, (2, 2), (1, 2)):
        text = attngen.emit(sharded.plan_of(case, batches, heads)).text
        assert all(len(line) <= 88 for line in text.splitlines())
        compile(text, case, "exec")


# Certificates.


def certificate(target="cpu", **fields):
    spec = AttentionSpec(
        **{"batch": 16, "q_heads": 16, "q_len": 512, "qk_dim": 64} | fields
    )
    plan = attngen.plan(spec, target, "jax", FIX)
    return plan, attngen.certify(plan)


def needs(target):
    missing = compilers.all_of(targets.get(target))[-1].missing
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} here")


PLACES = [
    "cpu",
    pytest.param("tpu-v5e", marks=needs("tpu-v5e")),
    pytest.param("h100", marks=needs("h100")),
]


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.parametrize(
    ("batches", "heads", "kv_heads"), [(8, 1, 16), (1, 8, 8), (2, 8, 8), (4, 2, 2)]
)
@pytest.mark.sampled(5)
def test_a_certificate_is_of_one_device(target, batches, heads, kv_heads):
    plan, found = certificate(
        target, kv_heads=kv_heads, mask=CAUSAL, batch_shards=batches, head_shards=heads,
        dtype="float32" if target == "cpu" else "bfloat16",
    )  # fmt: skip
    spec = plan.spec
    assert found.devices == batches * heads
    assert found.collectives == {}
    assert "which exchange nothing" in str(found)
    assert found.argument_bytes == spec.bytes_of(*"qkv") // spec.devices
    assert found.output_bytes == spec.bytes_of("out") // spec.devices
    alone = attngen.certify(
        attngen.plan(
            shards.local(spec), target, "jax", shards.local_choice(spec, plan.choice)
        )
    )
    # XLA:GPU copies the keys, or the values, of a device that has one head of them
    more = spec.bytes_of("k") // spec.devices if target == "h100" else 0
    assert found.temp_bytes <= 1.05 * alone.temp_bytes + more + 2**14
    assert Certificate.from_json(found.to_json()) == found
    if found.estimated_cycles is not None:
        assert found.estimated_cycles <= 1.1 * alone.estimated_cycles


@pytest.mark.parametrize("target", PLACES)
@pytest.mark.sampled(3)
def test_dropout_compiles_for_several_devices(target):
    _, found = certificate(target, dropout=0.1, batch_shards=2, head_shards=2)
    assert (found.devices, found.collectives) == (4, {})


def test_without_shards_nothing_is_said_of_them():
    _, found = certificate(q_heads=2, batch=1)
    assert (found.devices, found.collectives) == (1, None)
    assert "exchange" not in str(found)


def test_what_an_unsharded_plan_would_gather():
    """The program that these shards are for: it is what the count of collectives sees."""
    plan, _ = certificate(batch_shards=2, head_shards=2, batch=4, q_heads=4)
    from attngen import certifier

    spec = plan.spec
    whole = AttentionSpec(batch=4, q_heads=4, q_len=512, qk_dim=64)
    source = attngen.emit(
        attngen.plan(whole, fix=FIX | {"head_chunk": 1, "batch_chunk": 1})
    )
    found = certifier.certify(
        "attngen.backends.jax.compiler", "cpu", source=source.text,
        shapes=[(n, spec.shape_of(n), "float32") for n in "qkv"], facts=shards.mesh(spec),
    )  # fmt: skip
    assert found.collectives["all-gather"] >= 3
    assert "exchange" in str(found)


def test_a_build_fits_and_is_right():
    spec = AttentionSpec(
        batch=4, q_heads=8, kv_heads=4, q_len=300, qk_dim=16, mask=CAUSAL,
        batch_shards=2, head_shards=4, memory_budget="1MiB",
    )  # fmt: skip
    kernel = attngen.build(spec)
    assert kernel.report.passed
    assert kernel.certificate.devices == 8
    assert kernel.certificate.temp_bytes <= 2**20
    assert "over 8 devices: batch in 2 shards, heads in 4 shards" in kernel.source.text
    assert "on each device" in kernel.plan.explain()
    assert AttentionSpec.from_json(spec.to_json()) == spec


def test_a_device_models_its_own():
    whole = AttentionSpec(batch=8, q_heads=8, q_len=256, qk_dim=16)
    fields = {"batch_shards": 4, "head_shards": 2}
    spec = AttentionSpec(batch=8, q_heads=8, q_len=256, qk_dim=16, **fields)
    fix = {"algorithm": "dense"}
    assert (
        attngen.plan(spec, fix=fix).temp_bytes
        < attngen.plan(whole, fix=fix).temp_bytes / 4
    )
    assert attngen.plan(spec).choice["batch_chunk"] % 4 == 0
    assert attngen.plan(spec).choice["head_chunk"] % 2 == 0


# What can't be.


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"q_heads": 8, "kv_heads": 2, "head_shards": 4}, "head_shards=4"),
        ({"batch": 3, "batch_shards": 2}, "batch_shards=2"),
        ({"batch_shards": 0}, "batch_shards=0"),
        ({"head_shards": True}, "head_shards=True"),
        ({"head_shards": "2"}, "head_shards='2'"),
    ],
)
def test_shards_that_do_not_divide_are_refused(fields, named):
    with refused(SpecError) as caught:
        AttentionSpec(**{"q_heads": 8, "q_len": 16, "qk_dim": 8} | fields)
    assert named in caught.value.got


SPEC = AttentionSpec(
    batch=4, q_heads=8, q_len=64, qk_dim=8, batch_shards=2, head_shards=2
)


@pytest.mark.parametrize(
    "fix", [{"head_chunk": 1}, {"batch_chunk": 1}, {"head_chunk": 6}]
)
def test_chunks_that_are_no_part_of_each_shard_are_not_legal(fix):
    with refused(PlanError):
        attngen.plan(SPEC, fix=fix)


def test_a_plan_says_what_lengths_exchange_and_fits_the_width():
    spec = dataclasses.replace(SPEC, kv_lengths=True)
    said = "devices exchange two numbers a chunk of queries"
    assert said in attngen.plan(spec).explain()
    assert said not in attngen.plan(SPEC).explain()
    assert all(len(line) <= 100 for line in attngen.plan(spec).explain().splitlines())


def test_more_devices_than_a_slice_has_are_refused():
    tpu = targets.get("tpu-v5e").tpu
    assert devices._slice(tpu, 256) == "16x16"
    with pytest.raises(ValueError, match="257 devices are more than the 16 x 16"):
        devices._slice(tpu, 257)


def test_what_is_not_built():
    first = attngen.operand("weights", axes="h", dtype="float32")
    fixed = attngen.score(lambda s, b, h, q, k: s + first[7])
    spec = dataclasses.replace(SPEC, score=(fixed,))
    with refused(NotBuiltError):
        attngen.plan(spec)
    with refused(NotBuiltError, "Triton"):
        attngen.plan(SPEC, "h100", "triton")
    with refused(NotBuiltError):
        attngen.tune(SPEC)
    with refused(NotBuiltError):
        attngen.build(SPEC, effort="measure")


def test_options_of_the_command_line():
    out, _ = run(
        "plan", "--q-heads", 8, "--q-len", 64, "--qk-dim", 8, "--batch", 4,
        "--batch-shards", 2, "--head-shards", 4, "--json",
    )  # fmt: skip
    spec = json.loads(out)["spec"]
    assert (spec["batch_shards"], spec["head_shards"]) == (2, 4)
