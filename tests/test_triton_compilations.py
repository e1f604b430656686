"""How often Triton compiles the kernels of an emitted file: counted with no GPU.

What is called is the file alone: nothing is emitted again for another length.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import attngen
from attngen import AttentionSpec, api, masks, scores

# calls a file's launchers, each with tensors of other sizes; prints for each kernel how often
# it was launched, and with how many keys of Triton's cache, of which each is a compilation
KEYS = """
import collections, importlib.util, inspect, json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit
made = importlib.util.spec_from_file_location("emitted", sys.argv[1])
module = sys.modules["emitted"] = importlib.util.module_from_spec(made)
made.loader.exec_module(module)
gpu = make_backend(GPUTarget("cuda", 90, 32))
keys = collections.defaultdict(list)

class Launched:
    def __init__(self, name, kernel):
        self.name = name
        self.bind = jit.create_function_from_signature(kernel.signature, kernel.params, gpu)

    def __getitem__(self, grid):
        def launch(*args, **options):
            _, specialised, options = self.bind(*args, **options)
            keys[self.name].append(jit.compute_cache_key({}, specialised, options))
        return launch

names_of = ["forward", *getattr(module, "BACKWARD", ())]
for name in [*names_of, *["combine"] * hasattr(module, "combine")]:
    setattr(module, name, Launched(name, getattr(module, name)))

def names(operation):
    return inspect.signature(operation._init_fn).parameters

def tensor(of):  # from the first columns of wider rows
    dtype = getattr(torch, of["dtype"])
    if "values" in of:
        return torch.tensor(of["values"], dtype=dtype)
    return torch.zeros(of["shape"], dtype=dtype)[..., : of.get("columns")]

for call in json.loads(sys.argv[2]):
    given = {name: tensor(of) for name, of in call.items()}
    outputs = module._attention(*(given[n] for n in names(module._attention)))
    if hasattr(module, "_gradients"):
        given |= zip(("out", "norm"), outputs)
        module._gradients(*(given[n] for n in names(module._gradients)))
print(json.dumps({name: (len(x), len(set(x))) for name, x in keys.items()}))
"""


def zeros(*shape, dtype="float16", more=0):
    """A tensor; more: columns of its rows beside those that are its own."""
    *rest, columns = shape
    return {"dtype": dtype, "shape": [*rest, columns + more], "columns": columns}


def ints(values):
    return {"dtype": "int32", "values": values}


def qkv(q, k, more=0):
    """q, k, v and dout, of [batch, tokens] each."""
    of_q, of_k = zeros(*q, 4, 64, more=more), zeros(*k, 2, 64, more=more)
    return {"q": of_q, "k": of_k, "v": of_k, "dout": of_q}


def dense(b, t, s, offset, more):
    """Args:
    b, t, s: batch, lengths of queries and keys; more: columns beside each head.
    """
    return qkv((b, t), (b, s), more) | {
        "bias": zeros(4, t, s, dtype="float32"), "slopes": zeros(4, dtype="float32"),
        "kv_lengths": ints([s - 1] * b), "q_offset": ints([offset] * b),
    }  # fmt: skip


def packed(q, k):
    """Of cumulative offsets; three tokens of q are of no sequence."""
    offsets = {"cu_seqlens_q": ints(q), "cu_seqlens_k": ints(k)}
    return qkv((1, q[-1] + 3), (1, k[-1])) | offsets


def paged(b, t, pages, table, lengths):
    told = {"block_table": ints(table), "kv_lengths": ints(lengths)}
    return qkv((b, t), (pages, 8)) | told


CALLS = [
    dense(*sizes)
    for sizes in (
        (1, 100, 100, 0, 0), (2, 16, 1600, 7, 0), (1, 1, 4097, 4096, 0), (3, 2048, 33, 0, 0),
        (2, 64, 80, 3, 64), (1, 17, 96, 3, 16),
    )
]  # fmt: skip
PACKED = [
    packed([0, 5, 17], [0, 5, 17]),
    packed([0, 128], [0, 1]),
    packed([0, 0, 16, 2000, 2001], [0, 16, 16, 320, 4097]),
]
PAGED = [
    paged(1, 1, 9, [[0, 1, 2]], [17]),
    paged(2, 16, 64, [[5, 1, 2, 9], [60, 3, 1, 0]], [32, 1]),
    paged(3, 4, 16, [[1], [2], [15]], [8, 7, 6]),
]
SPEC = AttentionSpec(
    q_heads=4, kv_heads=2, q_len=100, kv_len=100, qk_dim=64, dtype="float16",
    mask=masks.causal(), kv_lengths=True, q_offset="operand",
)  # fmt: skip


def counted(calls, fix=None, **changes):
    """Of each kernel how often it is launched, and compiled."""
    spec = dataclasses.replace(SPEC, **changes)
    plan = attngen.plan(spec, target="h100", backend="triton", fix=fix)
    ran = subprocess.run(
        [sys.executable, "-c", KEYS, api.stored(attngen.emit(plan)), json.dumps(calls)],
        capture_output=True,
        text=True,
        env={n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize(
    ("kernels", "fix"),
    [
        (["forward"], {"loads": "pointers"}),
        (["forward"], {"loads": "descriptors"}),
        (["forward"], {"pack_gqa": True}),
        (["forward", "combine"], {"kv_splits": 4}),
        (["forward", "combine"], {"pack_gqa": True, "kv_splits": 8}),
    ],
)
def test_a_new_length_batch_or_offset_compiles_nothing(kernels, fix):
    assert counted(CALLS, fix) == {name: [len(CALLS), 1] for name in kernels}


VJP = {"derivatives": "vjp", "score": (scores.alibi(), scores.bias(axes="hqk"))}
KERNELS = ("forward", "backward_queries", "backward_keys", "backward_bias_at_hqk")


def test_nor_does_it_for_the_backward_pass():
    assert counted(CALLS, **VJP) == {name: [len(CALLS), 1] for name in KERNELS}


def test_strides_that_are_aligned_otherwise_compile_once_more():
    """What is counted can be more than one."""
    calls = [*CALLS, dense(1, 100, 100, 0, 1), dense(2, 50, 70, 9, 3)]
    assert counted(calls, **VJP) == {name: [len(calls), 2] for name in KERNELS}


STORED = {"kv_lengths": False, "q_offset": "bottom_right", "storage": "packed"}
PAGES = {"q_offset": "bottom_right", "storage": "paged", "page_size": 8, "kv_len": 96}


@pytest.mark.parametrize(
    ("kernels", "derivatives", "fix"),
    [
        (["forward"], None, {}),
        (["forward", "combine"], None, {"pack_gqa": True, "kv_splits": 4}),
        (KERNELS[:3], "vjp", {}),
    ],
)
def test_nor_do_other_offsets_of_packed_sequences(kernels, derivatives, fix):
    found = counted(PACKED, fix, **STORED, derivatives=derivatives)
    assert found == {name: [len(PACKED), 1] for name in kernels}


@pytest.mark.parametrize("splits", [1, 4])
def test_nor_does_another_table_of_pages(splits):
    kernels = ["forward", *(["combine"] if splits > 1 else [])]
    found = counted(PAGED, {"kv_splits": splits}, **PAGES)
    assert found == {name: [len(PAGED), 1] for name in kernels}
