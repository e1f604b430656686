"""Peers: other ways to compute attention, which `attngen bench` puts beside attngen.

A peer says whether it is installed, whether it can say a spec, and makes a `Ready` of the
spec's arrays: in the layout that it is at home in, laid out before anything is timed.
Nothing here imports an array library before a peer is made.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from attngen.errors import PeerError
from attngen.reference import Array
from attngen.spec import AttentionSpec


@dataclass(frozen=True)
class Ready:
    """A peer on the arrays of a spec, compiled and ready to be timed.

    Args:
        call: computes, and returns when the work is done.
        outputs: what `call` returned as NumPy arrays: the spec's outputs, in their order,
            layout and dtypes.
        said: how the spec was said: what is computed in the call, what was made outside.
        temp_bytes: of temporaries, as its compiler says; None where nothing says it.
        prepared_s: seconds that were spent before the first call, by what they went to.
    """

    call: Callable[[], Any]
    outputs: Callable[[Any], tuple[Array, ...]]
    said: str
    temp_bytes: int | None = None
    prepared_s: Mapping[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """One way to compute attention."""

    name: str
    package: str  # what must be installed
    layout: (
        str | None
    )  # of q, k, v and out that it takes without moving them; None: any

    def refuse(self, spec: AttentionSpec) -> str | None:
        """Why it can't say the spec; None where it can."""

    def matrix_bytes(self, spec: AttentionSpec) -> int:
        """About how much the arrays take that are as large as the scores."""

    def make(self, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
        """The peer on `inputs.arrays`: q, k, v and the operands by name.

        spec.layout is the peer's, where it has one: `peers.make` sees to that.
        Raises what its library raises.
        """


_MODULES = {  # by the word that --peers takes
    "plain": ("attngen.peers.jax_peers", "PLAIN"),
    "jax.nn": ("attngen.peers.jax_peers", "JAX_NN"),
    "paper": ("attngen.peers.paper", "PAPER"),
    "sdpa": ("attngen.peers.torch_peers", "SDPA_PEER"),
    "flex": ("attngen.peers.torch_peers", "FLEX"),
}


def names() -> tuple[str, ...]:
    """The words by which peers are asked for."""
    return tuple(_MODULES)


def get(name: str) -> Peer:
    """The peer of that name.

    Raises:
        PeerError: there is none.
    """
    if name not in _MODULES:
        raise PeerError(
            f"There is no peer {name!r}.",
            got=repr(name),
            needed="some of " + ", ".join(_MODULES),
        )
    module, member = _MODULES[name]
    peer: Peer = getattr(importlib.import_module(module), member)
    return peer


def installed(peer: Peer) -> bool:
    """Whether the peer's package can be found; it isn't imported."""
    return find_spec(peer.package) is not None


def refuse(peer: Peer, spec: AttentionSpec) -> str | None:
    """Why a peer can't say the spec; None where it can."""
    if spec.dropout:
        return "drops other weights: dropout's bits are attngen's own"
    if spec.storage != "dense":
        return f"isn't asked for {spec.storage} K/V: these are said in other arguments"
    if spec.is_narrow:
        return f"takes K/V in the dtype of q, not in {spec.kv_dtype}"
    return peer.refuse(spec)


def make(peer: Peer, spec: AttentionSpec, arrays: Mapping[str, Array]) -> Ready:
    """A peer on arrays of the spec, handed over in its own layout and contiguous.

    Its call returns out in its own layout; `outputs`, which isn't timed, in the spec's.

    Args:
        arrays: `inputs.arrays` of the spec.
    """
    if peer.layout in (None, spec.layout):
        return peer.make(spec, arrays)
    own = replace(spec, layout=peer.layout)
    moved = {n: np.ascontiguousarray(arrays[n].swapaxes(1, 2)) for n in "qkv"}
    ready = peer.make(own, {**arrays, **moved})

    def outputs(made: Any) -> tuple[Array, ...]:
        pairs = zip(spec.outputs, ready.outputs(made), strict=True)
        return tuple(x.swapaxes(1, 2) if n == "out" else x for n, x in pairs)

    return replace(ready, outputs=outputs, said=f"{ready.said}, arrays in {own.layout}")
