"""Triton's interpreter as a process that stays: to judge many kernels without a GPU.

attngen itself starts a process for each call; that costs seconds, most of it imports. This
one also refuses every load outside of tensors, and begins empty ones with NaN; and what a block's
negative entries give when divided is nonsense, as Triton's compiler supposes wrongly that
neighbours have equal quotients.

Where a GPU is here, the process compiles kernels for it instead, and calls them there.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import attngen
from attngen import api, slopes, targets, validator
from attngen.backends.triton import interpreter
from attngen.backends.triton.loader import has_gpu, target_here

_SERVER = """
import json, os, sys, traceback
import numpy as np
import torch
from attngen.backends.triton import interpreter, loader
from triton.runtime.interpreter import InterpreterBuilder

inside, plain_tensor = [], loader.tensor  # where the arrays of a call lie
plain_cat, plain_empty = torch.cat, torch.Tensor.new_empty
plain_load = InterpreterBuilder.create_masked_load
plain_sdiv, plain_srem = InterpreterBuilder.create_sdiv, InterpreterBuilder.create_srem

def known(made):
    inside.append((made.data_ptr(), made.data_ptr() + made.nbytes))
    return made

def tensor(values, dtype):
    return known(plain_tensor(values, dtype))

def new_empty(self, *shape, **named):  # NaN, until a kernel writes it
    made = plain_empty(self, *shape, **named)
    return known(made.fill_(float("nan")) if made.is_floating_point() else made)

def load(self, pointers, mask, *rest, **named):
    at = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if not np.any([(at >= low) & (at < high) for low, high in inside], axis=0).all():
        raise IndexError("a load outside of every tensor")
    return plain_load(self, pointers, mask, *rest, **named)

def divided(plain):
    def operation(self, x, y):
        made = plain(self, x, y)
        if x.data.size > 1:
            made.data = np.where(x.data < 0, made.data - 7, made.data)
        return made
    return operation

def cat(*what, **how):  # which ends what makes a list of tiles
    return known(plain_cat(*what, **how))

if os.environ.get("TRITON_INTERPRET") == "1":
    torch.cat, torch.Tensor.new_empty = cat, new_empty
    loader.tensor, InterpreterBuilder.create_masked_load = tensor, load
    InterpreterBuilder.create_sdiv = divided(plain_sdiv)
    InterpreterBuilder.create_srem = divided(plain_srem)
else:
    loader.tensor = lambda values, dtype: plain_tensor(values, dtype).cuda()
for line in sys.stdin:
    inside.clear()
    try:
        answer = {"dtypes": interpreter.call(json.loads(line))}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Failed(Exception):
    """The emitted function raised an error in the interpreter."""


def _end(process):
    process.kill()
    process.communicate()  # waits for it, and closes its pipes


@functools.cache
def _server():
    kept = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=kept if has_gpu() else kept | {"TRITON_INTERPRET": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, process)
    return process


def program(spec, path):
    """What `Backend.program` is of a file: gradients, too, if the spec has any."""
    return functools.partial(
        call, path, (slopes.gradients(spec), slopes.cotangents(spec))
    )


def call(path, derivatives=({}, {}), **given):
    """An emitted file's function of NumPy arrays, in the interpreter.

    derivatives: the names of gradients and of cotangents, as `slopes` has them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dtypes = interpreter.save(folder, given)
        job = {"source": str(path), "folder": name, "dtypes": dtypes}
        job |= dict(zip(("gradients", "cotangents"), derivatives, strict=True))
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = json.loads(server.stdout.readline())
        if "error" in answer:
            raise Failed(answer["error"])
        return interpreter.outputs(folder, answer["dtypes"])


def plan(spec, target=None, **fix):
    """A plan for the GPU here; where there is none, for one that has everything."""
    target = target or target_here() or "h100"
    descriptors = targets.get(target).gpu.tensor_descriptors
    if fix.get("loads") == "descriptors" and has_gpu() and not descriptors:
        pytest.skip(f"{target} has no tensor descriptors")
    return attngen.plan(spec, target=target, backend="triton", fix=fix)


def as_it_is(x, dtype):
    return x


def report_of(spec, **fix):
    """What validation says of the kernel that is emitted for a spec; the plan."""
    made = plan(spec, **fix)
    path = api.stored(attngen.emit(made))
    found = validator.validate(
        spec,
        made,
        program(spec, path),
        to_array=as_it_is,
        time_s=0,
    )
    return found, made


def judge(spec, **fix):
    """Assert that the kernel emitted for a spec computes it; the report."""
    report, made = report_of(spec, **fix)
    assert report.passed, f"{report}\n{made.choice}\n{spec.to_json()}"
    return report
