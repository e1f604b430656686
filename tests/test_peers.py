"""Each peer against the reference on small, odd specs; what it refuses, and why."""

import importlib.util

import numpy as np
import pytest

from attngen import AttentionSpec, inputs, mask, masks, peers, reference, scores
from attngen.peers import forms, matrices
from attngen.validator import largest_error

# torch warns of itself when it is imported, compiled code of what it is compiled from
pytestmark = pytest.mark.filterwarnings("ignore")
TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch isn't installed"
)
COMPUTED = (
    "plain",
    "jax.nn",
    "paper",
    pytest.param("sdpa", marks=TORCH),
)
SIZES = {"q_heads": 4, "kv_heads": 2, "q_len": 50, "qk_dim": 12}
CAUSAL = masks.causal()
WINDOW = CAUSAL & masks.sliding_window(9)
MODULAR = mask(lambda b, h, q, k: ((k - q) % 3 == 0) & ((k - 30) // 7 < 2))
OVER = scores.bias("over", axes=("k", "b", "q"))  # in another order than the scores'
SPECS = {
    "causal, a batch": {"mask": CAUSAL, "batch": 2},
    "top left": {"mask": CAUSAL, "kv_len": 77, "q_offset": 0},
    "bottom right": {"mask": CAUSAL, "kv_len": 77, "q_offset": "bottom_right"},
    "window, bhtd": {"mask": WINDOW, "layout": "bhtd"},
    "both sides": {"mask": masks.sliding_window(9, 4), "kv_offset": 3},
    "lengths": {"batch": 3, "kv_lengths": True, "q_lengths": True},
    "bfloat16": {"mask": CAUSAL, "dtype": "bfloat16", "out_dtype": "float32"},
    "biases": {"batch": 2, "score": (scores.bias(axes="hqk"), OVER, scores.alibi())},
    "buckets": {"score": (scores.relative_buckets(),)},
    "packed": {"mask": masks.packed(3) & CAUSAL | masks.sliding_window(1, 0)},
    "documents": {"batch": 2, "mask": masks.documents() & (CAUSAL | masks.prefix("n"))},
    "floors": {"mask": MODULAR},
    "run-time offset": {
        "batch": 2,
        "kv_len": 77,
        "mask": WINDOW,
        "q_offset": "operand",
    },
    "one query": {
        "q_len": 1,
        "kv_len": 77,
        "mask": CAUSAL,
        "q_offset": "bottom_right",
    },
}
CAPPED = {"mask": CAUSAL, "score": (scores.softcap(5.0),)}
EMPTY = {"mask": CAUSAL, "kv_len": 30, "q_offset": "bottom_right"}
WIDE = {"mask": CAUSAL, "v_dim": 7}
LSE = {"mask": CAUSAL, "outputs": ("lse", "out")}
SINK = {"mask": CAUSAL, "sink": True}


def spec_of(**changes):
    return AttentionSpec(**(SIZES | changes))


def errors(name, spec):
    """The largest error of each output; checks shapes and dtypes."""
    arrays = inputs.arrays(spec, nan=False)
    operands = {n: x for n, x in arrays.items() if n not in ("q", "k", "v")}
    want = reference.attention(spec, *(arrays[n] for n in "qkv"), operands)
    peer = peers.get(name)
    assert peer.refuse(spec) is None
    ready = peers.make(peer, spec, arrays)
    found = []
    for output, made in zip(spec.outputs, ready.outputs(ready.call()), strict=True):
        assert made.shape == spec.shape_of(output)
        assert made.dtype == reference.numpy_dtype(spec.dtype_of(output))
        rows = reference.pick(spec, output, made, np.arange(spec.q_len))
        found.append(largest_error(rows, want[output]))
    return found


def right(name, spec):
    near = 3e-2 if spec.dtype == "bfloat16" else 1e-5
    return all(e is not None and e < near for e in errors(name, spec))


@pytest.mark.parametrize("peer", COMPUTED)
@pytest.mark.parametrize("case", SPECS)
@pytest.mark.sampled(3)
def test_it_computes_the_spec(case, peer):
    assert right(peer, spec_of(**SPECS[case]))


@pytest.mark.parametrize("layout", ["bthd", "bhtd"])
@pytest.mark.parametrize("own", ["bthd", "bhtd", None])
def test_arrays_are_in_the_peers_layout_before_its_call(own, layout):
    spec = spec_of(layout=layout, batch=2, dtype="bfloat16", outputs=("lse", "out"))
    arrays = inputs.arrays(spec)
    native = own or layout
    out = np.zeros(spec.shape_of("out")).swapaxes(1, 2 if native != layout else 1)
    lse = np.zeros(spec.shape_of("lse"))

    class Peer:
        name, package, layout = "peer", "numpy", own

        def make(self, given, moved):
            assert given.layout == native
            for name in "qkv":
                assert moved[name].shape == given.shape_of(name)
                assert moved[name].flags.c_contiguous
                same = reference.pick(given, "out", moved[name], slice(None))
                want = reference.pick(spec, "out", arrays[name], slice(None))
                assert (same == want).all()
            return peers.Ready(lambda: (lse, out), lambda made: made, "as it is")

    ready = peers.make(Peer(), spec, arrays)
    made = ready.call()
    assert made[1] is out
    assert [x.shape for x in ready.outputs(made)] == [lse.shape, spec.shape_of("out")]
    moved = f", arrays in {own}" if native != layout else ""
    assert ready.said == f"as it is{moved}"


@pytest.mark.parametrize("peer", ["plain", "paper"])
@pytest.mark.parametrize("case", [CAPPED, EMPTY, WIDE, LSE], ids=str)
def test_what_is_written_here_computes_everything(case, peer):
    assert right(peer, spec_of(**case))


def test_the_plain_peer_has_sinks():
    assert right("plain", spec_of(**SINK))


def test_the_paper_takes_ragged_chunks(monkeypatch):
    monkeypatch.setattr("attngen.peers.paper.Q_CHUNK", 16)
    monkeypatch.setattr("attngen.peers.paper.K_CHUNK", 24)
    assert right("paper", spec_of(**SPECS["biases"]))
    assert right("paper", spec_of(**SPECS["documents"]))
    assert right("paper", spec_of(**EMPTY, outputs=("lse", "out")))


def test_jax_nn_says_lse():
    assert right("jax.nn", spec_of(**LSE))


def test_jax_nn_computes_something_else_where_a_row_sees_no_key():
    assert errors("jax.nn", spec_of(**EMPTY))[0] > 0.01


@TORCH
def test_torch_computes_rows_that_see_no_key():
    assert right("sdpa", spec_of(**EMPTY))


@TORCH
@pytest.mark.slow
def test_flex_computes_masks_and_scores():
    """One compilation: a mask, a window's offset, a score that reads an operand."""
    pytest.importorskip("torch._inductor")
    spec = spec_of(
        **{"batch": 2, "mask": WINDOW & masks.documents(), "score": CAPPED["score"]},
        dtype="bfloat16",
    )
    try:
        assert right("flex", spec)
    except RuntimeError as error:
        if "compiler" in str(error).lower():  # none is on this machine
            pytest.skip(str(error).splitlines()[0])
        raise


REFUSED = {
    ("jax.nn", "bias"): CAPPED,
    ("jax.nn", "v_dim"): WIDE,
    ("jax.nn", "sinks"): SINK,
    ("paper", "sinks"): SINK,
    ("sdpa", "bias"): CAPPED,
    ("sdpa", "lse"): LSE,
    ("sdpa", "sinks"): SINK,
    ("flex", "lse"): LSE,
    ("flex", "sinks"): SINK,
}


@pytest.mark.parametrize(("peer", "word"), REFUSED)
def test_what_it_cannot_say_has_a_reason(peer, word):
    assert word in peers.get(peer).refuse(spec_of(**REFUSED[peer, word]))


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({}, (None, None)),
        ({"mask": CAUSAL}, (None, 0)),
        ({"mask": WINDOW}, (-8, 0)),
        ({"mask": mask(lambda b, h, q, k: (q >= k) & (q - k < 9))}, (-8, 0)),
        ({"mask": mask(lambda b, h, q, k: (2 + k > q) & (q + 5 > k))}, (-1, 4)),
        ({"mask": masks.sliding_window(9, 4)}, (-8, 4)),
        ({"mask": CAUSAL, "kv_len": 77, "q_offset": "bottom_right"}, (None, 27)),
        ({"mask": CAUSAL, "kv_len": 77, "q_offset": 5, "kv_offset": 7}, (None, -2)),
        ({"mask": CAUSAL, "q_len": 1, "kv_len": 9, "q_offset": 8}, (None, None)),
        ({"mask": masks.sliding_window(50)}, (None, None)),
        ({"mask": masks.sliding_window(49)}, (-48, None)),
    ],
)
def test_a_band_is_recognised(changes, limits):
    assert forms.band(spec_of(**changes)) == forms.Band(*limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": ~CAUSAL},
        {"mask": CAUSAL | masks.prefix(3)},
        {"mask": CAUSAL & masks.prefix(3)},
        {"mask": mask(lambda b, h, q, k: k <= 2 * q)},
        {"mask": mask(lambda b, h, q, k: k + q <= 9)},
        {"mask": masks.documents()},
        {"mask": CAUSAL, "kv_len": 77, "q_offset": "operand"},
    ],
)
def test_what_is_no_band_is_not(changes):
    assert forms.band(spec_of(**changes)) is None


def test_what_is_added_to_scores_is_recognised():
    assert len(forms.added(spec_of(score=(scores.bias(), scores.alibi())))) == 2
    assert forms.added(spec_of()) == ()
    assert forms.added(spec_of(score=(scores.softcap(3.0),))) is None
    assert forms.added(spec_of(score=(scores.bias(), scores.softcap(3.0)))) is None


def test_how_large_arrays_will_be():
    spec = spec_of(batch=3, mask=masks.documents(), kv_len=60, q_offset=0)
    assert matrices.Matrix.of(spec, spec.mask.expr).elements == 3 * 50 * 60
    assert matrices.score_bytes(spec) == 2 * 4 * 3 * 4 * 50 * 60
    assert peers.get("jax.nn").matrix_bytes(spec) > matrices.score_bytes(spec)
    plain = spec_of(mask=CAUSAL)
    assert peers.get("sdpa").matrix_bytes(plain) == 0
    assert peers.get("flex").matrix_bytes(plain) == 20 * 50 * 50
    assert peers.get("jax.nn").matrix_bytes(plain) == matrices.score_bytes(plain)
    assert (matrices.available_bytes() or 1) > 0


def test_peers_import_nothing_before_they_are_made():
    assert set(peers.names()) == {"plain", "jax.nn", "paper", "sdpa", "flex"}
    for name in peers.names():
        assert peers.get(name).package in ("jax", "torch")
    assert peers.installed(peers.get("plain"))


@pytest.mark.parametrize(
    "change", [{"storage": "packed"}, {"storage": "paged"}, {"kv_dtype": "int8"}]
)
def test_stored_keys_are_refused_with_a_reason(change):
    spec = AttentionSpec(**SIZES, **change)
    for name in peers.names():
        assert "K/V" in peers.refuse(peers.get(name), spec)
