"""A GPU that is here and isn't the target: nothing runs on it as if it were."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton", reason="needs attngen[triton]")

import torch
from test_triton import LIKE

import attngen
from attngen import backends, masks, targets
from attngen.backends.triton import loader
from attngen.errors import BackendError, ValidationError

TRITON = backends.get("triton")
SPEC = dataclasses.replace(LIKE, mask=masks.causal(), dtype="float16")
FIX = {"q_chunk": 64, "k_chunk": 32, "num_warps": 4}


class Moved(Exception):
    """A tensor was sent to the GPU."""


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch say that a GPU of some name and compute capability is here."""

    def moved(self, *_, **__):
        raise Moved

    def here(name, capability):
        monkeypatch.setattr(loader, "DRIVERS", ("/",))
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.Tensor, "cuda", moved)

    return here


def test_another_gpu_neither_validates_nor_runs_a_kernel(gpu):
    gpu("NVIDIA GeForce RTX 4090", (8, 9))
    kernel = attngen.build(SPEC, target="h100", fix=FIX)
    assert kernel.report.passed
    assert kernel.report.ran == "in Triton's interpreter"
    assert str(kernel.report).startswith("passed in Triton's interpreter: ")
    with pytest.raises(BackendError, match="can't be called here") as raised:
        kernel(None, None, None)
    assert raised.value.got == "a GPU of sm89"
    assert "a GPU of sm90" in raised.value.needed
    assert attngen.validate(kernel.source).ran == "in Triton's interpreter"


def test_the_target_itself_runs_its_kernels(gpu, certified):
    gpu("NVIDIA H100 80GB HBM3", (9, 0))
    with pytest.raises(Moved):
        attngen.build(SPEC, target="h100", fix=FIX)
    source = attngen.emit(attngen.plan(SPEC, target="h100", fix=FIX))
    with pytest.raises(Moved):
        attngen.validate(source)


def test_what_ran_on_a_gpu_says_so(gpu, certified, monkeypatch):
    """The emitted function is called: it has no GPU to run on here, and says that."""
    gpu("NVIDIA H100 80GB HBM3", (9, 0))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    with pytest.raises(ValidationError, match="needs a GPU"):
        attngen.build(SPEC, target="h100", fix=FIX)
    assert TRITON.ran(targets.get("h100")) == "on NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("name", "capability", "target", "here", "runs"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "h100", True, True),
        ("NVIDIA H200", (9, 0), "h100", False, True),  # its times are others
        ("NVIDIA H200", (9, 0), "cuda-sm90", True, True),
        (
            "NVIDIA RTX A6000",
            (8, 6),
            "rtx3090",
            True,
            True,
        ),  # unknown: it stands for it
        ("NVIDIA GeForce RTX 4090", (8, 9), "h100", False, False),
        ("NVIDIA GeForce RTX 4090", (8, 9), "mi300x", False, False),
    ],
)
def test_what_is_here_and_what_runs_here(gpu, name, capability, target, here, runs):
    gpu(name, capability)
    device = targets.get(target)
    assert TRITON.is_here(device) is here
    assert loader.runs_here(device) is runs
    values = np.zeros(3, np.float16)
    if runs:
        with pytest.raises(Moved):
            TRITON.array(values, "float16", device)
    else:
        assert TRITON.array(values, "float16", device) is values


def test_tuning_for_another_gpu_times_nothing_on_this_one(gpu, certified):
    gpu("NVIDIA GeForce RTX 4090", (8, 9))
    record = attngen.tune(SPEC, target="h100", effort="estimate", fix=FIX)
    assert record.key.device == "h100, not here"
    assert all(not c.samples_s for c in record.candidates)
