"""The steps that `attngen.api` joins: emit, certify, load, validate."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attngen import backends, compilers, files, planner, slopes, targets
from attngen.backends import Backend
from attngen.errors import CompileError, InternalError, PlanError, ValidationError
from attngen.plans import Option, Plan
from attngen.records import EFFORTS
from attngen.spec import AttentionSpec

if TYPE_CHECKING:
    from attngen.certifier import Program
    from attngen.emitter import Source
    from attngen.kernel import Kernel
    from attngen.reports import Certificate, Report
    from attngen.targets import Target

    Answer = Certificate | CompileError | InternalError  # of one of several

Fix = Mapping[str, Option]


def check_effort(effort: str) -> None:
    """Refuse an unknown effort.

    Raises:
        PlanError: as it says.
    """
    if effort not in EFFORTS:
        raise PlanError(
            f"There is no effort {effort!r}.",
            got=f"effort={effort!r}",
            needed="one of " + ", ".join(EFFORTS),
        )


def where(target: str | None, backend: str | None) -> tuple[Target, Backend]:
    """A target and its backend: the one that is named, or the target's own.

    Raises:
        TargetError, BackendError: there is no such target or backend, or not together.
        NotBuiltError: the contract has it, this version doesn't.
    """
    device = targets.get(target)
    by = backends.get(device.backends[0] if backend is None else backend)
    targets.check(device, by.name)
    return device, by


# Plan → source → certificate → function → report.


def emit(plan: Plan) -> Source:
    """See `attngen.emit`."""
    from attngen import emitter

    by = backends.get(plan.backend)
    planner.check(plan, targets.get(plan.target), by)
    return emitter.emit(plan, by)


def certify(
    chosen: Plan, source: Source, target: str, *, edited: bool = False
) -> Certificate:
    """What the compiler of a target says of a plan's source.

    Args:
        edited: whether its loops may turn otherwise than the plan says.

    Raises:
        BackendError: its compiler isn't installed here.
        CompileError: it refused, crashed, or took too long.
    """
    from attngen import certifier

    device, by = targets.get(target), backends.get(chosen.backend)
    compilers.check(device, by.name)
    program = vars(_program(chosen, source, by))
    made = certifier.certify(by.compiler, target, **program)
    if edited:
        made = dataclasses.replace(made, estimated_cycles=None)
    return plausible(made, chosen, device)


def certify_many(
    sources: Sequence[tuple[Plan, Source]], by: Backend, target: str
) -> list[Answer]:
    """`certify` for several, with few processes: what it returns, or raises.

    An internal error of one is among them: what the others certify isn't lost. Fewer where
    this thread is stopped (see interrupts.py).
    """
    from attngen import certifier

    device = targets.get(target)
    compilers.check(device, by.name)
    programs = [_program(*s, by) for s in sources]
    answers = certifier.certify_many(by.compiler, target, programs)
    found: list[Answer] = []
    for (plan, _), answer in zip(sources[: len(answers)], answers, strict=True):
        if isinstance(answer, CompileError):
            found.append(answer)
            continue
        try:
            found.append(plausible(answer, plan, device))
        except InternalError as error:
            found.append(error)
    return found


def tell(faults: Sequence[InternalError]) -> None:
    """Warn of faults in attngen that a search went past, when it has ended."""
    if faults:
        count = f"{len(faults)} plan{'' if len(faults) == 1 else 's'}"
        warnings.warn(f"{count} left out. {faults[0]}", stacklevel=3)


LEAST = 0.98  # of the bound: tiles are counted by samples


def plausible(certificate: Certificate, plan: Plan, device: Target) -> Certificate:
    """The certificate, unless its estimate is one that no device could reach.

    Raises:
        InternalError: it is less than the products of the tiles that are visited take.
    """
    cycles, tpu = certificate.estimated_cycles, device.tpu
    if cycles is not None and tpu is not None:
        bound = plan.flop / plan.spec.devices / tpu.flop_per_cycle
        if cycles < LEAST * bound:
            raise InternalError(
                f"{device.name}: an estimate of {cycles} cycles is below the {bound:.0f} "
                f"that its matrix units take: {dict(plan.choice)}."
            )
    return certificate


def _program(chosen: Plan, source: Source, by: Backend) -> Program:
    from attngen import certifier

    spec = chosen.spec
    arrays = {n: n for n in ("q", "k", "v", *(o.name for o in spec.operands))}
    arrays |= slopes.cotangents(spec)  # each as the output that it is of
    return certifier.Program(
        shapes=[(n, spec.shape_of(x), spec.dtype_of(x)) for n, x in arrays.items()],
        source=source.text,
        digest=source.digest,
        x64=needs_x64(chosen),
        facts=by.facts(chosen),
    )


def needs_x64(chosen: Plan) -> bool:
    """Whether a plan computes with 64-bit numbers."""
    spec = chosen.spec
    used = (spec.dtype, spec.out_dtype_name, *(o.dtype for o in spec.operands))
    return chosen.index_dtype == "int64" or bool({"float64", "int64"} & set(used))


def stored(source: Source) -> Path:
    """The source as a file in the cache: what is loaded is what was emitted."""
    path = files.cache_folder() / "kernels" / f"{source.digest}.py"
    if not path.exists() or path.read_bytes() != source.text.encode():
        source.write(path)
    return path


def validate(
    chosen: Plan,
    by: Backend,
    path: Path,
    function: Any,
    seed: int = 0,
    rebuild: bool = True,
    seconds: float | None = None,
) -> Report:
    """A function judged by the reference; see `validator.validate`.

    Args:
        path: the file that it was loaded from.
        rebuild: whether the plan makes the same file, so that another size can be made.
    """
    from attngen import validator

    target = targets.get(chosen.target)
    judged = by.program(chosen.spec, by.trial(path, function))

    def remade(spec: AttentionSpec, choice: Fix) -> Any:
        if by.any_size and spec.mask == chosen.spec.mask:
            return judged
        file = stored(emit(planner.rank(spec, target, by, choice)[0]))
        return by.program(spec, by.trial(file, by.load(file, target)))

    report = validator.validate(
        chosen.spec,
        chosen,
        judged,
        to_array=lambda values, dtype: by.array(values, dtype, target),
        rebuild=remade if rebuild or by.any_size else None,
        small=(lambda: by.small(chosen, rebuild=rebuild)) if by.any_size else None,
        time_s=by.trial_s(chosen),
        seed=seed,
        seconds=seconds,
    )
    return dataclasses.replace(report, ran=by.ran(target))


def passed(
    chosen: Plan,
    by: Backend,
    source: Source,
    function: Any,
    seconds: float | None = None,
) -> Report:
    """The report of a kernel that attngen made; seconds as for `validator.validate`.

    Raises:
        ValidationError: its numbers are further from the reference than the rule allows.
    """
    report = validate(chosen, by, stored(source), function, seconds=seconds)
    if not report.passed:
        raise ValidationError(
            "The emitted kernel doesn't compute its spec.",
            got=str(report),
            needed="at most twice the plain implementation's error, plus two units in the "
            "last place",
            hint="this is a fault in attngen: please report it with spec.to_json()",
        )
    return report


def kernel(
    chosen: Plan,
    source: Source,
    function: Any,
    report: Report | None,
    certificate: Certificate | None,
) -> Kernel:
    from attngen.kernel import Kernel

    by, target = backends.get(chosen.backend), targets.get(chosen.target)
    here = by.any_size or by.is_here(target)  # the former say so themselves
    return Kernel(
        chosen.spec,
        chosen,
        source,
        report,
        certificate,
        by.entry(chosen.spec, function),
        any_size=by.any_size,
        absent="" if here else target.name,
    )
