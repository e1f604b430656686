"""plan · emit · build · attention · tune · certify · validate: the pipeline, in order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attngen import backends, files, planner, targets
from attngen.backends import Backend
from attngen.calls import Call, InsideTrace, check_trace, spec_fields, split
from attngen.errors import (
    AttngenError,
    BackendError,
    FileError,
    NotBuiltError,
    PlanError,
    ValidationError,
)
from attngen.plans import Option, Plan, check_fix
from attngen.spec import AttentionSpec

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.kernel import Kernel
    from attngen.reports import Certificate, Report

EFFORTS = ("estimate", "measure", "patient")
Fix = Mapping[str, Option]
FixKey = tuple[tuple[str, Option], ...]


def plan(
    spec: AttentionSpec,
    target: str | None = None,
    backend: str | None = None,
    fix: Fix | None = None,
) -> Plan:
    """The modelled best plan. Imports neither jax nor torch, and compiles nothing.

    Args:
        spec: what to compute.
        target: where; None: this machine's processor.
        backend: "jax" (None).
        fix: choices that the caller makes, e.g. {"q_chunk": 1024, "k_chunk": 4096};
            legality is still checked.

    Raises:
        TargetError, BackendError: there is no such target or backend.
        NotBuiltError: the spec asks for what this version doesn't do.
        PlanError: a fixed choice is unknown, or leaves nothing legal.
        BudgetError: nothing fits the budget; the error names the least that would.
    """
    return planner.rank(spec, targets.get(target), backends.get(backend), fix)[0]


def emit(plan: Plan) -> Source:
    """The plan as readable source: a module that defines `attention(q, k, v, *, …)`.

    Raises:
        PlanError: it was edited, or read from JSON, and isn't legal.
    """
    from attngen import emitter

    by = backends.get(plan.backend)
    planner.check(plan, targets.get(plan.target), by)
    return emitter.emit(plan, by)


def build(
    spec: AttentionSpec,
    target: str | None = None,
    backend: str | None = None,
    effort: str = "estimate",
    fix: Fix | None = None,
) -> Kernel:
    """Plan, emit, certify, load and validate: a kernel that is right and that fits.

    Goes down the ranked plans until the target's compiler certifies one within the
    budget, then judges it by the reference.

    Args:
        spec, target, backend, fix: as for `plan`.
        effort: "estimate"; "measure" and "patient" aren't built yet.

    Returns:
        A Kernel: call it with arrays; it has spec, plan, source, report, certificate.

    Raises:
        As `plan`, and
        BudgetError: no plan was certified within the budget.
        CompileError: the compiler refused, crashed, or took too long.
        ValidationError: the numbers are further from the reference than the rule allows.
    """
    _check_effort(effort)
    by = backends.get(backend)
    ranked = planner.rank(spec, targets.get(target), by, fix)
    chosen, source, certificate = _first_certified(ranked, by)
    function = by.load(stored(source))
    report = _validate(chosen, by, function)
    if not report.passed:
        raise ValidationError(
            "The emitted kernel doesn't compute its spec.",
            got=str(report),
            needed="at most twice the plain implementation's error, plus two units in the "
            "last place",
            hint="this is a fault in attngen: please report it with spec.to_json()",
        )
    return _kernel(chosen, source, function, report, certificate)


def validate(kernel: Kernel | Source | str | Path, *, seed: int = 0) -> Report:
    """Judge a kernel, a source, or an emitted file (edited or not) by the reference.

    An edited file is judged against the spec in its header.

    Raises:
        FileError: the file can't be read, or attngen didn't emit it.
        ValidationError: it raises, or returns something else than its spec says.
    """
    from attngen.emitter import Source
    from attngen.kernel import Kernel

    if isinstance(kernel, Kernel):
        by = backends.get(kernel.plan.backend)
        return _validate(kernel.plan, by, kernel.function, seed)
    path = stored(kernel) if isinstance(kernel, Source) else Path(kernel)
    made = plan_of(path)
    by = backends.get(made.backend)
    edited = emit(made).text != files.read(path)
    return _validate(made, by, by.load(path), seed, rebuild=not edited)


def plan_of(path: Path) -> Plan:
    """The plan that the header of an emitted file describes.

    Raises:
        FileError: it can't be read, attngen didn't emit it, or its header has no plan.
    """
    from attngen.emitter import read_header

    head = read_header(path)
    try:
        return plan(head.spec, head.target, head.backend, head.choice)
    except AttngenError as error:
        raise FileError(
            f"{path} has a header that can't be met: {error.what}",
            got=error.got,
            needed=error.needed,
            hint=error.hint,
        ) from error


def certify(f: Any, *shapes: Any, target: str | None = None) -> Certificate:
    """What the target's own compiler says that a function allocates.

    Args:
        f: a JAX function (a training step, say), a Kernel, or a Plan.
        shapes: its arguments, as arrays or `jax.ShapeDtypeStruct`s, in pytrees where it
            takes pytrees. None for a Kernel or a Plan.
        target: None: the kernel's or plan's own, else this machine's processor.

    Raises:
        TargetError, NotBuiltError: there is no such target, or no compiler for it yet.
        CompileError: the compiler refused, crashed, or took too long.
    """
    from attngen.kernel import Kernel

    if isinstance(f, Kernel | Plan):
        chosen = f.plan if isinstance(f, Kernel) else f
        source = f.source if isinstance(f, Kernel) else emit(f)
        return _certify(chosen, source, targets.get(target or chosen.target).name)
    from attngen.backends.jax import exporting

    return exporting.certify(f, shapes, targets.get(target).name)


def tune(
    spec: AttentionSpec,
    target: str | None = None,
    backend: str | None = None,
    effort: str = "measure",
) -> Any:
    """Search over plans by measuring them. Not built yet.

    Raises:
        NotBuiltError: always.
    """
    raise NotBuiltError(
        "tune isn't built yet.",
        got=f"effort={effort!r}",
        needed="build(spec), which takes the model's best plan that is certified",
        hint="time a few plans yourself: build(spec, fix={'q_chunk': 512, 'k_chunk': 512})",
    )


# The steps that several of the above share.


def _first_certified(
    ranked: tuple[Plan, ...], by: Backend
) -> tuple[Plan, Source, Certificate]:
    """The first plan down the ranking whose certificate is within the budget."""
    least: tuple[Plan, int] | None = None
    for candidate in _tried(ranked):
        source = emit(candidate)
        certificate = _certify(candidate, source, candidate.target)
        budget, need = candidate.spec.budget_bytes, certificate.temp_bytes
        if budget is None or need is None or need <= budget:
            return candidate, source, certificate
        if least is None or need < least[1]:
            least = (candidate, need)
    assert least is not None
    spec = least[0].spec
    raise planner.no_fit(spec, targets.get(least[0].target), by, certified=least)


TRIES = 8


def _tried(ranked: tuple[Plan, ...]) -> list[Plan]:
    """The fastest few, then ever smaller ones: each with a quarter less memory."""
    tried = list(ranked[: TRIES // 2])
    for candidate in ranked[TRIES // 2 :]:
        if candidate.temp_bytes <= 0.75 * min(p.temp_bytes for p in tried):
            tried.append(candidate)
        if len(tried) == TRIES:
            break
    smallest = min(ranked, key=lambda p: p.temp_bytes)
    return tried if smallest in tried else [*tried, smallest]


def _certify(chosen: Plan, source: Source, target: str) -> Certificate:
    from attngen import certifier

    spec = chosen.spec
    names = ("q", "k", "v", *(o.name for o in spec.operands))
    return certifier.certify(
        backends.get(chosen.backend).compiler,
        target,
        shapes=[(n, spec.shape_of(n), spec.dtype_of(n)) for n in names],
        source=source.text,
        digest=source.digest,
        x64=needs_x64(chosen),
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


def _validate(
    chosen: Plan, by: Backend, function: Any, seed: int = 0, rebuild: bool = True
) -> Report:
    from attngen import validator

    def small(spec: AttentionSpec, choice: Fix) -> Any:
        return by.load(stored(emit(plan(spec, chosen.target, chosen.backend, choice))))

    return validator.validate(
        chosen.spec,
        chosen,
        function,
        to_array=by.array,
        rebuild=small if rebuild else None,
        seed=seed,
    )


def _kernel(
    chosen: Plan,
    source: Source,
    function: Any,
    report: Report | None,
    certificate: Certificate | None,
) -> Kernel:
    from attngen.kernel import Kernel

    return Kernel(chosen.spec, chosen, source, report, certificate, function)


def _check_effort(effort: str) -> None:
    if effort not in EFFORTS:
        raise PlanError(
            f"There is no effort {effort!r}.",
            got=f"effort={effort!r}",
            needed="one of " + ", ".join(EFFORTS),
        )
    if effort != "estimate":
        raise NotBuiltError(
            f"effort={effort!r} isn't built yet.",
            got=f"effort={effort!r}",
            needed='effort="estimate"',
        )


# attention(): a spec from the arrays, and kernels kept by spec.


@functools.lru_cache(maxsize=1024)
def _kernel_of(call: Call, traced: bool, target: str | None, fix: FixKey) -> Kernel:
    """The kernel of a call, built once.

    Inside a trace it is planned and emitted only: nothing is compiled or validated.
    """
    spec = AttentionSpec(**spec_fields(call))
    if not traced:
        check_trace()
        return build(spec, target, "jax", fix=dict(fix))
    chosen = plan(spec, target, "jax", dict(fix))
    source = emit(chosen)
    function = backends.get("jax").load(stored(source))
    return _kernel(chosen, source, function, None, None)


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    target: str | None = None,
    backend: str | None = None,
    effort: str = "estimate",
    fix: Fix | None = None,
    **options: Any,
) -> Any:
    """Attention of JAX arrays: the spec from their shapes, the kernel built once.

    Outside a trace the first call with a new spec builds (certifies and validates);
    inside `jax.jit` it plans and emits only. Gradients are JAX's own: right where it can
    differentiate the loops (not where bounds come from the data or the mask), and outside
    the memory budget.

    Args:
        q, k, v: [batch, tokens, heads, dim] in the layout "bthd"; see AttentionSpec.
        target, backend, effort, fix: as for `build`.
        options: fields of AttentionSpec (mask, score, layout, scale, memory_budget, …).
            kv_lengths, q_lengths, q_offset and sink may be arrays; every other name is an
            operand.

    Returns:
        out, or a tuple where several outputs are asked for.

    Raises:
        CallError: q, k, v don't fit together, and what `build` raises.
    """
    if backend not in (None, "jax"):
        raise BackendError("attention() takes JAX arrays.", got=backend, needed="jax")
    _check_effort(effort)
    call, operands, traced = split(q, k, v, options)
    fixed = tuple(sorted(check_fix(fix).items())) if fix else ()
    try:
        kernel = _kernel_of(call, traced, target, fixed)
    except InsideTrace:
        kernel = _kernel_of(call, True, target, fixed)
    return kernel(q, k, v, **operands)
