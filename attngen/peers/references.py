"""Standard attention and the paper's algorithm, as a target's compiler sees them.

What attngen's own plans are put beside where the target isn't here: peers that are JAX
functions, compiled for the target from shapes alone. Where it is here they are called too,
in a process of their own.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from attngen import compilers, peers
from attngen.backends.jax import exporting
from attngen.errors import CompileError
from attngen.peers.matrices import available_bytes
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.units import show_bytes

if TYPE_CHECKING:
    from attngen.reports import Certificate

NAMES = {"plain": "standard attention", "paper": "the paper's algorithm"}
ROUNDS = 5  # of calls that are timed, where the target is here
TIMEOUT_S = 120.0  # of such a process


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A peer's program, compiled.

    Args:
        name: for people.
        certificate: what the compiler says; None where it refused.
        time_s: of a call: the median where it was timed, else by the estimated cycles; None
            where nothing says it.
        failed: why it has no certificate, or wasn't timed; None where all is known.
    """

    name: str
    certificate: Certificate | None = None
    time_s: float | None = None
    failed: str | None = None

    @property
    def temp_bytes(self) -> int | None:
        return None if self.certificate is None else self.certificate.temp_bytes

    @property
    def on_chip_bytes(self) -> int | None:
        return None if self.certificate is None else self.certificate.on_chip_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"temp_bytes": self.temp_bytes}


def compiled(
    peer: str, spec: AttentionSpec, target: Target, *, timed: bool = True
) -> Reference:
    """A peer of NAMES for a target.

    Args:
        timed: whether it is called, where the target is this machine's processor.

    Raises:
        BackendError: the target's compiler isn't installed.
    """
    compilers.check(target, "jax")
    name = NAMES[peer]
    made: Any = peers.get(peer)
    if (reason := peers.refuse(made, spec)) is not None:
        return Reference(name=name, failed=reason)
    if made.layout is not None:
        spec = replace(spec, layout=made.layout)
    function, shapes = _program(made, spec)
    try:
        certificate = exporting.certify(function, shapes, target)
    except CompileError as error:
        return Reference(name=name, failed=_words(error))
    seconds, failed = None, None
    if target.kind == "cpu" and timed:
        seconds, failed = _timed(made, spec, function, shapes, target)
    elif target.tpu is not None and certificate.estimated_cycles is not None:
        seconds = certificate.estimated_cycles / target.tpu.clock_hz
    return Reference(name=name, certificate=certificate, time_s=seconds, failed=failed)


def _timed(
    peer: Any, spec: AttentionSpec, function: Any, shapes: Any, target: Target
) -> tuple[float | None, str | None]:
    """Seconds of a call on this machine, or why there are none."""
    room, need = available_bytes(), peer.matrix_bytes(spec)
    if room is not None and need > room:
        said = f"not timed: needs {show_bytes(need)}, {show_bytes(room)} are free"
        return None, said
    try:
        found = exporting.measure(function, shapes, target, ROUNDS, TIMEOUT_S)
    except CompileError as error:
        return None, f"not timed: {_words(error)}"
    return statistics.median(found["times_s"]), None


def _program(peer: Any, spec: AttentionSpec) -> tuple[Any, list[Any]]:
    """A peer's function of positional arguments, operands after q, k, v; their shapes."""
    import jax

    operands = [o.name for o in spec.operands]
    function = peer.function(spec)

    def attention(q: Any, k: Any, v: Any, *more: Any) -> Any:
        return function(q, k, v, **dict(zip(operands, more, strict=True)))

    return attention, [
        jax.ShapeDtypeStruct(spec.shape_of(n), spec.dtype_of(n))
        for n in ("q", "k", "v", *operands)
    ]


def _words(error: CompileError) -> str:
    """An error in a line: what the compiler said, without what it advises."""
    said = " ".join(str(error.got).split())
    return f"{error.what} {said}"[:400]
