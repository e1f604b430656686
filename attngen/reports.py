"""Report and Certificate: is it right, does it fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import msgspec

from attngen.errors import FileError
from attngen.units import show_bytes, show_count

T = TypeVar("T")


def _encode(value: Any, indent: int) -> str:
    return msgspec.json.format(
        msgspec.json.encode(asdict(value)), indent=indent
    ).decode()


def _decode(text: str | bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise FileError(
            f"This isn't a {kind.__name__.lower()}.",
            got=str(error),
            needed=f"what {kind.__name__}.to_json() writes",
        ) from error


@dataclass(frozen=True)
class OutputCheck:
    """One output against the reference: largest absolute errors.

    error is None where the kernel's NaNs or infinities aren't the reference's.
    """

    case: str
    name: str
    error: float | None
    baseline_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


@dataclass(frozen=True)
class Quantised:
    """What quantised K/V cost in accuracy: against float64 of K/V before they were.

    Args:
        case, name: as of an OutputCheck.
        kv_dtype: of the numbers; dtype: of K/V as plain attention has them.
        error: the kernel's; None where NaNs or infinities aren't the reference's.
        plain_error: of plain attention, of K/V in dtype.
    """

    case: str
    name: str
    kv_dtype: str
    dtype: str
    error: float | None
    plain_error: float


@dataclass(frozen=True)
class Report:
    """What validation found.

    Args:
        checks: of each output, in each case that was run.
        cases: what each case was, in words.
        ran: where, in words: on which GPU, or in an interpreter; "" on this processor.
        quantised: of each output where K/V are quantised: stated, and not judged.
    """

    checks: tuple[OutputCheck, ...]
    cases: tuple[str, ...]
    ran: str = ""
    quantised: tuple[Quantised, ...] = ()

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def max_error(self) -> float:
        """The largest absolute error of any output; inf where NaNs or infinities differ."""
        return max(
            (float("inf") if c.error is None else c.error for c in self.checks),
            default=0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"passed": self.passed, "max_error": self.max_error} | asdict(self)

    def to_json(self, *, indent: int = 2) -> str:
        return _encode(self, indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        return _decode(text, cls)

    def __str__(self) -> str:
        said = "passed" if self.passed else "FAILED"
        where = f" {self.ran}" if self.ran else ""
        lines = [f"{said}{where}: {'; '.join(self.cases)}"]
        wide = max((len(c.name) for c in self.checks), default=0)
        for c in self.checks:
            error = "NaN or infinity astray" if c.error is None else f"{c.error:.2e}"
            lines.append(
                f"  {c.name:<{max(wide, 4)}} {c.case:<10} error {error}, allowed {c.tolerance:.2e} "
                f"(plain attention: {c.baseline_error:.2e})"
            )
        for x in self.quantised:
            error = "NaN or infinity astray" if x.error is None else f"{x.error:.1e}"
            lines.append(
                f"  {x.name:<{max(wide, 4)}} {x.case:<10} K/V in {x.kv_dtype}: error {error}, "
                f"in {x.dtype}: {x.plain_error:.1e}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Certificate:
    """What the target's own compiler says of a program.

    Bytes are those of one device. None where the compiler says nothing, never 0 instead.

    Args:
        temp_bytes: of temporaries beyond inputs and outputs.
        scratch_bytes: the part of temp_bytes that the compiler's own figure leaves out (see
            backends/jax/scratch.py).
        argument_bytes, output_bytes: of inputs and outputs.
        on_chip_bytes: of a TPU's own memory, which temp_bytes leaves out.
        spill_bytes: of a thread's registers that didn't suffice and went to memory.
        estimated_cycles: the compiler's own estimate, weighted by the plan.
        compile_s: how long the compiler took.
        compiler: its name and version.
        digest: SHA-256 of the source that was compiled; None for a user's function.
        registers, warps, shared_bytes: of a GPU's kernel: a thread's registers, a block's
            warps and shared memory, which can be more than the target has.
        scalar_spills: scalar registers that AMD's compiler keeps in vector registers.
        blocks_per_multiprocessor: that run at once; 0 if not even one can.
        occupancy: warps of them, of the most that a multiprocessor holds.
        matrix_instruction: the main loop's, as the target's assembly spells it.
        mix: instructions of a warp in one turn of the main loop, by opcode.
        tiles_per_turn: tiles of keys that such a turn does.
        pipe_cycles: of a tile, that each pipe of a multiprocessor is busy.
        bound_cycles, bound_pipe: the most of them, and whose it is.
        flops_per_cycle: useful ones, of a multiprocessor that reaches the bound.
        kernels: of a file with several, those beside the forward pass's, by name: these
            same figures of each.
        devices: that share the work; all figures are of one of them.
        collectives: what they exchange, by the operation's name, as often as the program
            has it; None for a program of one device.
    """

    target: str
    compiler: str
    temp_bytes: int | None
    scratch_bytes: int | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    on_chip_bytes: int | None = None
    spill_bytes: int | None = None
    estimated_cycles: int | None = None
    compile_s: float | None = None
    digest: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    registers: int | None = None
    warps: int | None = None
    shared_bytes: int | None = None
    scalar_spills: int | None = None
    blocks_per_multiprocessor: int | None = None
    occupancy: float | None = None
    matrix_instruction: str | None = None
    mix: dict[str, int] | None = None
    tiles_per_turn: int | None = None
    pipe_cycles: dict[str, float] | None = None
    bound_cycles: float | None = None
    bound_pipe: str | None = None
    flops_per_cycle: float | None = None
    kernels: dict[str, dict[str, Any]] | None = None
    devices: int = 1
    collectives: dict[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def every_kernel(self) -> dict[str, dict[str, Any]]:
        """The figures of each kernel of a file by name, the forward pass's first, as ""."""
        return {"": self.to_dict(), **(self.kernels or {})}

    def to_json(self, *, indent: int = 2) -> str:
        return _encode(self, indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Certificate:
        return _decode(text, cls)

    def __str__(self) -> str:
        known = "unknown" if self.temp_bytes is None else show_bytes(self.temp_bytes)
        exact = "" if self.temp_bytes is None else f" ({self.temp_bytes} bytes)"
        first = f"{self.target}: {known} of temporaries{exact}, says {self.compiler}"
        return "\n".join([first, *self._shards(), *self._tpu(), *self._kernel()])

    def _shards(self) -> list[str]:
        """What devices that share the work exchange, in a line."""
        if self.collectives is None:
            return []
        found = ", ".join(f"{n} {name}" for name, n in self.collectives.items())
        return [
            f"  of each of {self.devices} devices, which exchange {found or 'nothing'}"
        ]

    def _tpu(self) -> list[str]:
        """What a TPU's compiler says beside, in a line."""
        parts = []
        if self.on_chip_bytes:
            parts.append(f"{show_bytes(self.on_chip_bytes)} on the chip")
        if self.estimated_cycles is not None:
            parts.append(f"about {show_count(self.estimated_cycles)}cycles (estimated)")
        return ["  " + ", ".join(parts)] if parts else []

    def _kernel(self) -> list[str]:
        """A GPU's kernel in a line, and its main loop in another; so others of the file."""
        if self.registers is None:
            return []
        lines = self._own_kernel()
        for name, figures in (self.kernels or {}).items():
            one = Certificate(self.target, self.compiler, None, **figures)
            first, *rest = one._own_kernel()
            lines += [f"  {name}: {first.strip()}", *rest]
        return lines

    def _own_kernel(self) -> list[str]:
        parts = [f"{self.registers} registers"]
        if self.spill_bytes is not None:
            parts.append(f"{show_bytes(self.spill_bytes)} spilled")
        if self.shared_bytes is not None:
            parts.append(f"{show_bytes(self.shared_bytes)} shared")
        if self.blocks_per_multiprocessor is not None:
            parts.append(
                f"{self.blocks_per_multiprocessor} × {self.warps} warps at once"
            )
        lines = ["  " + ", ".join(parts)]
        if self.bound_cycles is not None:
            lines.append(
                f"  {self.matrix_instruction or 'no matrix instruction'}; a tile takes "
                f"{self.bound_cycles:.0f} cycles or more ({self.bound_pipe}): "
                f"{self.flops_per_cycle or 0:.0f} FLOP a cycle"
            )
        return lines
