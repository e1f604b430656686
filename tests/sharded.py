"""Run by test_shards.py on 8 host devices: kernels under automatic partitioning.

`python sharded.py CASE` prints JSON: for each mesh whether numbers are right, what devices exchange, and the
bytes of one of them beside those of the program that one alone would run.
"""

import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import attngen
from attngen import AttentionSpec, backends, building, masks, scores, slopes, validator
from attngen.backends.jax import compiler, shards
from attngen.backends.jax import program as programs
from attngen.backends.jax.loader import load_function
from attngen.backends.jax.scratch import scratch_bytes

CAUSAL = masks.causal()
BASE = {"batch": 8, "q_heads": 8, "kv_heads": 4, "q_len": 96, "qk_dim": 16}
TABLE = attngen.operand("table", axes=("h", 7), dtype="float32")
KEYS = attngen.score(lambda s, b, h, q, k: s * TABLE[h, k % 7] + TABLE[h, q % 5])
BOARD = attngen.mask(lambda b, h, q, k: ((q + k + h + b) % 2 == 0) | (q == k))
MESHES = ((2, 4), (8, 1), (1, 4))
# case → (fields, choices, as many batches and heads of each shard in a tile)
CASES = {
    # of the default run
    "operands": ({"mask": CAUSAL & masks.documents(), "score": (scores.alibi(),)}, {}, 1),
    "lengths": ({"kv_lengths": True, "q_lengths": True}, {}, 1),
    "dropout": ({"mask": CAUSAL, "dropout": 0.2}, {}, 1),
    "gradients by keys": ({"layout": "bhtd", "sink": True, "derivatives": "vjp", "outputs": ("out", "lse")}, {"backward": "by_keys"}, 1),
    # of the slow one
    "a table": ({"score": (scores.relative_buckets(),)}, {}, 1),
    "heads of their own": ({"kv_heads": 8}, {}, 1),
    "grouped heads, causal": ({"mask": CAUSAL, "outputs": ("out", "lse")}, {}, 1),
    "bfloat16, heads first": ({"dtype": "bfloat16", "layout": "bhtd", "mask": CAUSAL}, {}, 1),
    "two of each": ({"q_heads": 16, "kv_heads": 8, "v_dim": 24}, {}, 2),
    "ragged, all heads": ({"q_len": 100, "mask": CAUSAL}, {}, 8),
    "a table, all heads": ({"score": (scores.relative_buckets(),), "mask": CAUSAL}, {}, 8),
    "a table of keys": ({"score": (KEYS,), "layout": "bhtd"}, {}, 2),
    "a bias": ({"score": (scores.bias(axes="khb"),)}, {}, 1),
    "numbers of heads": ({"mask": BOARD}, {}, 1),
    "a sink": ({"sink": True, "outputs": ("lse", "out")}, {}, 1),
    "stacked": ({"mask": CAUSAL, "outputs": ("out", "lse")}, {"steps": "map"}, 1),
    "transposed": ({"kv_heads": 8}, {"slices": "dn", "denominator": "ones"}, 1),
    "twice": ({"mask": CAUSAL}, {"qk": "twice"}, 1),
    "parts": ({}, {"algorithm": "split_kv", "parts": 2}, 1),
    "summaries": ({}, {"algorithm": "summaries"}, 1),
    "dense": ({"mask": CAUSAL}, {"algorithm": "dense"}, 8),
    "dropout, dense": ({"dropout": 0.2}, {"algorithm": "dense"}, 8),
    "gradients with dropout": ({"dropout": 0.2, "derivatives": "vjp"}, {"backward": "by_queries"}, 1),
    "gradients by queries": ({"mask": CAUSAL, "derivatives": "vjp"}, {"backward": "by_queries"}, 1),
    "gradients, two passes": ({"mask": CAUSAL, "score": (scores.alibi(),), "derivatives": "vjp"}, {"backward": "two_passes"}, 2),
}  # fmt: skip


def plan_of(case, batches, heads):
    fields, choices, each = CASES[case]
    spec = AttentionSpec(**BASE | fields, batch_shards=batches, head_shards=heads)
    fix = {"algorithm": "running", "q_chunk": 32, "k_chunk": 32} | choices
    if fix["algorithm"] == "dense":
        return attngen.plan(spec, fix={"algorithm": "dense"})
    of_a_tile = {
        "batch_chunk": spec.batch if each > 1 else batches,
        "head_chunk": min(each * heads, spec.kv_heads),
    }
    if spec.derivatives is not None:
        of_a_tile |= {f"backward_{n}": v for n, v in of_a_tile.items()}
        of_a_tile |= {"backward_q_chunk": 32, "backward_k_chunk": 48}
    return attngen.plan(spec, fix=fix | of_a_tile)


def inputs(spec):
    names = ["q", "k", "v", *(o.name for o in spec.operands)]
    generator = np.random.default_rng(0)

    def values(name):
        shape, dtype = spec.shape_of(name), spec.dtype_of(name)
        if dtype == "int32":
            return generator.integers(1, 80, shape).astype(dtype)
        return generator.standard_normal(shape).astype(jnp.dtype(dtype))

    made = {name: values(name) for name in names}
    pulled = {name: values(of) for name, of in slopes.cotangents(spec).items()}
    return made | pulled


def program(plan):
    function = load_function(building.stored(attngen.emit(plan)))
    of = slopes.gradients(plan.spec), slopes.cotangents(plan.spec)
    return jax.jit(programs.program(function, *of))


def temp_bytes(compiled):
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + scratch_bytes(compiled.as_text())


def call(function, arrays):
    named = dict(arrays)
    return function(*[named.pop(n) for n in "qkv"], **named)


def judge(case, batches, heads):
    plan = plan_of(case, batches, heads)
    spec, function, arrays = plan.spec, program(plan), inputs(plan.spec)
    devices = np.array(jax.devices()[: batches * heads]).reshape(batches, heads)
    mesh = Mesh(devices, shards.MESH)
    where = {
        name: NamedSharding(mesh, PartitionSpec(*axes))
        for name, axes in shards.mesh(spec)["arrays"].items()
    }

    def placed(arrays):
        return {n: jax.device_put(x, where[n]) for n, x in arrays.items()}

    def on_devices(q, k, v, **named):
        return call(function, placed({"q": q, "k": k, "v": v} | named))

    compiled = call(function.lower, placed(arrays)).compile()
    got = call(compiled, placed(arrays))
    names = [*spec.outputs, *slopes.gradients(spec)]
    got = dict(zip(names, got if len(names) > 1 else [got], strict=True))
    by = backends.get("jax")
    report = validator.validate(spec, plan, on_devices, to_array=by.array)
    mine = attngen.plan(shards.local(spec), fix=shards.local_choice(spec, plan.choice))
    alone = {
        n: jax.ShapeDtypeStruct(mine.spec.shape_of(of), mine.spec.dtype_of(of))
        for n, of in ((n, slopes.cotangents(spec).get(n, n)) for n in arrays)
    }
    return {
        "passed": report.passed,
        "report": str(report),
        "collectives": compiler._collectives(compiled.as_text()),
        "as asked": [
            got[n].sharding.is_equivalent_to(where[n], got[n].ndim)
            for n in spec.outputs
        ],
        "device": temp_bytes(compiled),
        "keys": mine.spec.bytes_of("k", "v"),
        "alone": temp_bytes(call(program(mine).lower, alone).compile()),
    }


if __name__ == "__main__":
    print(json.dumps([judge(case, *m) for case in sys.argv[1:] for m in MESHES]))
