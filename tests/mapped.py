"""Run by test_shard_map.py on 4 host devices: emitted files inside jax.shard_map, as it is by default.

`python mapped.py CASE` prints JSON: how programs of whole arrays are judged, whose gradients are
taken outside of the shard_map or inside of it; and the bytes of the first of them on a device,
beside those of what one alone would run.
"""

import dataclasses
import json
import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import inputs, temp_bytes

import attngen
from attngen import AttentionSpec, backends, building, masks, scores, slopes, validator
from attngen.backends.jax import program as programs
from attngen.backends.jax.loader import load_function

CAUSAL = masks.causal()
BASE = {"batch": 4, "q_heads": 4, "q_len": 40, "qk_dim": 8}
SIZES = {
    "algorithm": "running",
    "q_chunk": 16,
    "k_chunk": 16,
    "head_chunk": 1,
    "batch_chunk": 1,
}
BACK = {
    "backward_q_chunk": 16,
    "backward_k_chunk": 24,
    "backward_head_chunk": 1,
    "backward_batch_chunk": 1,
}
BOTH = {"outputs": ("out", "lse")}
VJP = {"derivatives": "vjp"}
ALIBI = {"score": (scores.alibi(),), "mask": CAUSAL}
BIAS = {"score": (scores.bias(axes="hqk"),)}
SHARED = {"score": (scores.bias(axes="qk"),)}
TABLE = {"score": (scores.relative_buckets(),)}
# case → (fields, choices, devices along batches and heads)
CASES = {
    "running": ({"mask": CAUSAL} | BOTH, {}, (2, 2)),
    "bfloat16, heads first": ({"mask": CAUSAL, "dtype": "bfloat16", "layout": "bhtd"}, {}, (2, 2)),
    "a scan": ({"q_len": 48}, {"loop": "scan"}, (4, 1)),
    "stacked": ({"q_len": 48} | BOTH, {"steps": "map"}, (1, 4)),
    "twice": ({}, {"qk": "twice"}, (2, 2)),
    "ones": ({"mask": CAUSAL}, {"slices": "dn", "denominator": "ones"}, (2, 2)),
    "split_kv": (BOTH, {"algorithm": "split_kv", "parts": 2}, (2, 2)),
    "summaries": ({"mask": CAUSAL}, {"algorithm": "summaries"}, (2, 2)),
    "summaries, a map": ({"q_len": 48}, {"algorithm": "summaries", "loop": "map"}, (2, 2)),
    "dense": ({"mask": CAUSAL}, {"algorithm": "dense"}, (2, 2)),
    "a diagonal": ({"mask": CAUSAL, "q_len": 64}, {"diagonal": 8}, (2, 2)),
    "lengths": ({"kv_lengths": True, "q_lengths": True}, {}, (2, 2)),
    "a list": ({"mask": CAUSAL & masks.documents()}, {"skip": "list"}, (2, 2)),
    "positions": ({"mask": CAUSAL, "q_offset": "bottom_right", "kv_lengths": True}, {}, (2, 2)),
    "an idle axis": (ALIBI | VJP, {}, (2, None)),
    "slopes, copied": (ALIBI | VJP, {"backward": "by_queries"}, (4, 1)),
    "slopes, by heads": (ALIBI | VJP, {"backward": "by_keys"}, (1, 4)),
    "slopes, both": (ALIBI | VJP | BOTH, {"backward": "two_passes"}, (2, 2)),
    "a bias, copied": (SHARED | VJP, {"backward": "by_keys"}, (2, 2)),
    "a bias, by heads": (BIAS | VJP | BOTH, {"backward": "by_queries"}, (2, 2)),
    "a table": (TABLE | VJP, {"backward": "two_passes"}, (2, 2)),
    "a sink": ({"sink": True, "mask": CAUSAL} | VJP | BOTH, {"backward": "by_keys"}, (2, 2)),
    "lse alone": ({"outputs": ("lse",), "sink": True} | VJP, {}, (2, 2)),
    "listed gradients": ({"mask": CAUSAL & masks.documents()} | VJP, {"skip": "list", "backward_skip": "list"}, (2, 2)),
    "keys of all heads": ({"kv_heads": 1, "mask": CAUSAL} | VJP, {"backward": "by_keys"}, (1, 4)),
    "narrow gradients": ({"dtype": "bfloat16", "kv_heads": 2} | VJP, {"backward": "two_passes"}, (2, 2)),
    "dense gradients": ({"mask": CAUSAL} | VJP, {"algorithm": "dense"}, (2, 2)),
    "any order": (ALIBI | BOTH | {"derivatives": "any"}, {"algorithm": "scanned"}, (4, 1)),
}  # fmt: skip
RING, DROPOUT, UNCHECKED = "a ring", "dropout", "slopes, both"
INSIDE = ("slopes, copied", "a bias, by heads", "keys of all heads", "any order")
NAMES = (*CASES, RING, DROPOUT)


def function_of(spec, choices):
    """An emitted file's function, of a device's own arrays."""
    fix = {"algorithm": "dense"} if choices.get("algorithm") == "dense" else SIZES
    fix = fix | (BACK if spec.derivatives == "vjp" else {}) | choices
    return load_function(building.stored(attngen.emit(attngen.plan(spec, fix=fix))))


def given(spec):
    return ["q", "k", "v", *(o.name for o in spec.operands)]


def of(spec):
    return slopes.gradients(spec), slopes.cotangents(spec)


def mesh_of(*shape):
    return jax.make_mesh(shape, ("b", "h"), axis_types=(AxisType.Auto,) * 2)


def local(spec, batches, heads):
    """What a device computes."""
    return dataclasses.replace(
        spec,
        batch=spec.batch // batches,
        q_heads=spec.q_heads // heads,
        kv_heads=max(spec.kv_heads // heads, 1),
    )


def placed(spec, name, heads):
    """How an array of the spec lies: batches along b of the mesh, heads along h, if at all."""
    axes = {o.name: o.axes for o in spec.operands} | {"lse": "bht"}
    if name in ("k", "v") and spec.kv_heads == 1:
        heads = None
    letters = axes.get(name, spec.layout)
    return P(*({"b": "b", "h": heads}.get(a) for a in letters))


def sharded_by_axes(case):
    """By batches and by heads: the spec, programs of it, and what a device runs alone.

    That is its spec, the program, and the bytes of gradients that devices add up.
    """
    fields, choices, (batches, heads) = CASES[case]
    spec = AttentionSpec(**BASE | fields)
    mine = local(spec, batches, heads or 1)
    function = function_of(mine, choices)
    gradients, cotangents = of(spec)

    def mapped(function, names, lie_as, made, **options):
        """A function of names, which lie as other arrays do, each device's own part on it."""
        where = [placed(spec, n, heads and "h") for n in (*lie_as, *made)]
        within, without = where[: len(names)], where[len(names) :]
        body = jax.shard_map(
            lambda *arrays: function(**dict(zip(names, arrays, strict=True))),
            mesh=mesh_of(batches, 4 // batches),
            in_specs=tuple(within),
            out_specs=tuple(without) if len(made) > 1 else without[0],
            **options,
        )

        def whole(q, k, v, **named):
            arrays = {"q": q, "k": k, "v": v} | named
            return body(*(arrays[n] for n in names))

        return whole

    def outside(**options):
        names = given(spec)
        made = mapped(function, names, names, spec.outputs, **options)
        return programs.program(made, gradients, cotangents)

    found = {"outside": outside()}
    if case in INSIDE:
        found["inside"] = mapped(
            programs.program(function, gradients, cotangents),
            [*given(spec), *cotangents],
            [*given(spec), *cotangents.values()],
            [*spec.outputs, *gradients.values()],
        )
    if case == UNCHECKED:
        found["unchecked"] = outside(check_vma=False)
    axes = {"b"} | ({"h"} if heads else set())
    added = [n for n in gradients.values() if axes - {*placed(spec, n, "h")}]
    own = mine, programs.program(function, *of(mine)), mine.bytes_of(*added)
    return spec, found, own


def ring(_):
    """Each device has a part of the keys and all queries; lse joins what they make of these."""
    spec = AttentionSpec(q_heads=2, q_len=40, kv_len=48, qk_dim=8, **VJP)
    mine = dataclasses.replace(spec, kv_len=12, outputs=("out", "lse"))
    function = function_of(mine, {"k_chunk": 4, "backward_k_chunk": 6})

    def joined(q, k, v):
        out, lse = function(q, k, v)
        most = lax.pmax(lax.stop_gradient(lse), "b")
        share = jnp.exp(lse - most).swapaxes(1, 2)[..., None]
        return lax.psum(out * share, "b") / lax.psum(share, "b")

    where = P(), P(None, "b"), P(None, "b")
    mapped = jax.shard_map(joined, mesh=mesh_of(4, 1), in_specs=where, out_specs=P())

    def whole(q, k, v):
        return mapped(q, k, v)

    return spec, {"outside": programs.program(whole, *of(spec))}, None


def dropout(_):
    """The same on every device, but for the seed, which is the spec's on the first."""
    spec = AttentionSpec(q_heads=2, q_len=40, qk_dim=8, dropout=0.3, **VJP)
    function = function_of(spec, {})

    def each(seeds, *arrays):
        return function(*arrays, seed=seeds[0])[None]

    where = P("b"), P(), P(), P()
    mapped = jax.shard_map(each, mesh=mesh_of(4, 1), in_specs=where, out_specs=P("b"))

    def first(q, k, v, seed):
        seeds = seed ^ jnp.arange(4, dtype=jnp.uint32)[:, None]
        return mapped(seeds, q, k, v)[0]

    return spec, {"outside": programs.program(first, *of(spec))}, None


def judge(case):
    make = {RING: ring, DROPOUT: dropout}.get(case, sharded_by_axes)
    spec, found, alone = make(case)
    plan, array = attngen.plan(spec), backends.get("jax").array
    said = {}
    for how, program in found.items():
        compiled = jax.jit(program).lower(**inputs(spec)).compile()

        def run(*qkv, compiled=compiled, **named):
            return compiled(**dict(zip("qkv", qkv, strict=False)) | named)

        report = validator.validate(spec, plan, run, to_array=array)
        said[how] = {"passed": report.passed, "report": str(report)}
        said[how]["device"] = temp_bytes(compiled)
    if alone is not None:
        mine, program, added = alone
        compiled = jax.jit(program).lower(**inputs(mine)).compile()
        said["outside"] |= {"alone": temp_bytes(compiled), "added": added}
    return said


if __name__ == "__main__":
    print(json.dumps(judge(sys.argv[1])))
