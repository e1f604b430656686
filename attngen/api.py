"""plan · emit · build · attention · tune · certify · validate: the pipeline, in order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attngen import (
    backends,
    building,
    compilers,
    descent,
    files,
    offline,
    planner,
    recalling,
    sweeping,
    targets,
    tuner,
    tuning,
)
from attngen.building import stored
from attngen.calls import Call, InsideTrace, check_trace, spec_fields, split
from attngen.errors import (
    AttngenError,
    BackendError,
    FileError,
)
from attngen.plans import Option, Plan, check_fix
from attngen.spec import AttentionSpec

if TYPE_CHECKING:
    from attngen.emitter import Source
    from attngen.kernel import Kernel
    from attngen.records import Record
    from attngen.reports import Certificate, Report

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
        backend: "jax" or "triton"; None: "jax" for this processor, "triton" for GPUs.
        fix: choices that the caller makes, e.g. {"q_chunk": 1024, "k_chunk": 4096};
            legality is still checked.

    Raises:
        TargetError, BackendError: there is no such target or backend.
        NotBuiltError: the spec asks for what this version doesn't do.
        PlanError: a fixed choice is unknown, or leaves nothing legal.
        BudgetError: nothing fits the budget; the error names the least that would.
    """
    where, by = building.where(target, backend)
    return planner.rank(spec, where, by, fix, most=1)[0]


def emit(plan: Plan) -> Source:
    """The plan as readable source: a module that defines `attention(q, k, v, *, …)`.

    Raises:
        PlanError: it was edited, or read from JSON, and isn't legal.
    """
    return building.emit(plan)


def build(
    spec: AttentionSpec,
    target: str | None = None,
    backend: str | None = None,
    effort: str = "estimate",
    fix: Fix | None = None,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> Kernel:
    """Plan, emit, certify, load and validate: a kernel that is right and that fits.

    Takes the fastest plan that was timed here before and fits the budget. Where there is
    none, goes down the ranked plans until the target's compiler certifies one within it.
    Then judges it by the reference.

    Args:
        spec, target, backend, fix: as for `plan`.
        effort: "estimate" times nothing; "measure" and "patient" tune first, unless a
            search of that effort, or a greater one, has been done.
        on_progress: receives what tuning tries, a line each.

    Returns:
        A Kernel: call it with arrays; it has spec, plan, source, report, certificate.

    Raises:
        As `plan`, and
        BudgetError: no plan was certified within the budget.
        CompileError: the compiler refused, crashed, or took too long.
        ValidationError: the numbers are further from the reference than the rule allows.
        TimingError, WisdomError: as `tune`. With "estimate", damaged wisdom is a warning.
    """
    building.check_effort(effort)
    device, by = building.where(target, backend)
    by.refuse(spec)
    fixed = check_fix(fix)
    known = recalling.recall(spec, device, by, effort, fixed)
    if known is None and effort != "estimate":
        search = tuning.tune if by.is_here(device) else offline.tune
        search(spec, device, by, effort, fixed, say=on_progress)
        known = recalling.recall(spec, device, by, effort, fixed)
    found = None
    if known is not None:
        found = *known, building.certify(*known, device.name)
    if found is None or not descent.within(found[2], spec):
        ranked = planner.rank(spec, device, by, fixed, smallest=descent.TRIES)
        found = descent.first_certified(ranked, by)
    chosen, source, certificate = found
    function = by.load(stored(source), device)
    report = building.passed(chosen, by, source, function)
    return building.kernel(chosen, source, function, report, certificate)


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
        path = stored(kernel.source)
        return building.validate(kernel.plan, by, path, kernel.function, seed)
    path = stored(kernel) if isinstance(kernel, Source) else Path(kernel)
    made = plan_of(path)
    by = backends.get(made.backend)
    function = by.load(path, targets.get(made.target))
    edited = emit(made).text != files.read(path)
    return building.validate(made, by, path, function, seed, rebuild=not edited)


def plan_of(path: Path) -> Plan:
    """The plan that the header of an emitted file describes.

    Raises:
        FileError: it can't be read, attngen didn't emit it, or its header has no plan.
    """
    from attngen.emitter import read_header

    head = read_header(path)
    try:
        device, by = targets.get(head.target), backends.get(head.backend)
        return planner.rank(head.spec, device, by, head.choice, smallest=1)[0]
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
        f: a JAX function (a training step, say), a Kernel, a Plan, a Source, or the path of
            an emitted file, edited or not.
        shapes: a function's arguments, as arrays or `jax.ShapeDtypeStruct`s, in pytrees
            where it takes pytrees.
        target: None: the kernel's, plan's or file's own, else this machine's processor.

    Raises:
        TargetError, BackendError, NotBuiltError: there is no such target, or no compiler
            for it yet.
        CompileError: the compiler refused, crashed, or took too long.
        FileError: the file can't be read, or attngen didn't emit it.
    """
    from attngen.emitter import Source
    from attngen.kernel import Kernel

    if isinstance(f, Source | str | Path):
        path = stored(f) if isinstance(f, Source) else Path(f)
        made, text = plan_of(path), files.read(path)
        device, _ = building.where(target or made.target, made.backend)
        edited = emit(made).text != text
        source = Source(text, made.backend)
        return building.certify(made, source, device.name, edited=edited)
    if isinstance(f, Kernel | Plan):
        chosen = f.plan if isinstance(f, Kernel) else f
        source = f.source if isinstance(f, Kernel) else emit(f)
        device, _ = building.where(target or chosen.target, chosen.backend)
        return building.certify(chosen, source, device.name)
    from attngen.backends.jax import exporting

    device, _ = building.where(target, "jax")
    compilers.check(device, "jax")
    return exporting.certify(f, shapes, device)


def tune(
    spec: AttentionSpec,
    target: str | None = None,
    backend: str | None = None,
    effort: str = "measure",
    *,
    seconds: float | None = None,
    fix: Fix | None = None,
    sweep: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Record:
    """Time plans side by side on this device; what is found is kept as wisdom.

    `build` uses it from then on, whatever its effort, without timing anything. Tuning
    again adds samples. An interrupt loses nothing that was finished. Only plans within the
    spec's budget are timed: a larger one that lets faster plans in is tuned anew.

    For a device that isn't here plans are compiled instead: a TPU's are ranked by its
    compiler's estimate of cycles, a GPU's by the bound of their main loops, the cycles of
    its busiest pipe. A plan that shows a fault in attngen is left out, with a warning.

    Args:
        spec, target, backend, fix: as for `plan`.
        effort: "measure" tries the model's best 8 plans; "patient" its best 48, those that
            failed before too, and the neighbours of the fastest. "estimate" times nothing:
            it certifies and validates the model's best.
        seconds: about how long it may take; None: 60, and 900 for patient.
        sweep: tunes for smaller budgets too, each half the one before, down to 128 KiB: for
            the frontier of memory and time. Then it may take five times as long.
        on_progress: receives what is being tried, a line each.

    Raises:
        As `plan`, and
        PlanError: seconds isn't a positive number, or there is no such effort.
        BackendError: the target's compiler isn't installed.
        TimingError: nothing could be timed, or the machine is too noisy to tell.
        WisdomError: the wisdom file is damaged, or can't be written.
    """
    building.check_effort(effort)
    tuning.check_seconds(seconds)
    device, by = building.where(target, backend)
    by.refuse(spec)
    compilers.check(device, by.name)
    search = tuning.tune if by.is_here(device) else offline.tune
    fixed = check_fix(fix)
    if not sweep:
        return search(spec, device, by, effort, fixed, seconds, on_progress)
    whole = sweeping.SHARE * tuner.SECONDS[effort] if seconds is None else seconds
    return sweeping.sweep(
        spec,
        lambda s, left: search(s, device, by, effort, fixed, left, on_progress),
        effort=effort,
        seconds=float(whole),
        fix=fixed,
        say=on_progress or (lambda _: None),
    )


# attention(): a spec from the arrays, and kernels kept by spec.


@functools.lru_cache(maxsize=1024)
def _kernel_of(
    call: Call, traced: bool, target: str | None, effort: str, fix: FixKey
) -> Kernel:
    """The kernel of a call, built once.

    Inside a trace it is planned and emitted only, or recalled: nothing is compiled,
    validated or timed.
    """
    spec = AttentionSpec(**spec_fields(call))
    if not traced:
        check_trace()
        return build(spec, target, "jax", effort, fix=dict(fix))
    by, device = backends.get("jax"), targets.get(target)
    by.refuse(spec)
    known = recalling.recall(spec, device, by, "estimate", dict(fix))
    if known is None:
        chosen = plan(spec, target, "jax", dict(fix))
        known = chosen, emit(chosen)
    function = by.load(stored(known[1]), device)
    return building.kernel(*known, function, None, None)


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
    inside `jax.jit` it plans, or recalls what was timed, and emits only. It has the derivatives
    that are asked for: `derivatives="vjp"` gradients, "any" all orders and modes, None none.

    Args:
        q, k, v: [batch, tokens, heads, dim] in the layout "bthd"; see AttentionSpec.
        target, backend, effort, fix: as for `build`.
        options: fields of AttentionSpec (mask, score, layout, scale, memory_budget, …).
            kv_lengths, q_lengths, q_offset and sink may be arrays; every other name is an
            operand, so also the seed of dropout. cu_seqlens_q and cu_seqlens_k say that
            tokens are packed ([tokens, heads, dim]), block_table that k and v are pages,
            k_scale and the dtype of k how these are quantised.

    Returns:
        out, or a tuple where several outputs are asked for.

    Raises:
        CallError: q, k, v don't fit together, and what `build` raises.
    """
    if backend not in (None, "jax"):
        raise BackendError("attention() takes JAX arrays.", got=backend, needed="jax")
    building.check_effort(effort)
    call, operands, traced = split(q, k, v, options)
    fixed = tuple(sorted(check_fix(fix).items())) if fix else ()
    try:
        kernel = _kernel_of(call, traced, target, effort, fixed)
    except InsideTrace:
        kernel = _kernel_of(call, True, target, effort, fixed)
    return kernel(q, k, v, **operands)
