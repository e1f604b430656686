"""Kernel against reference: the tolerance rule.

A kernel passes when for each output, and each gradient, its largest absolute error against
float64 is at most twice that of a plain implementation in the same dtypes, plus two units in
the last place of its dtype at the reference's largest magnitude. NaNs and infinities must be
where the reference has them. What must be exactly 0: out and dq of rows that see no key, dk
and dv of keys past kv_lengths, and dq of rows whose cotangents are 0.

Gradients are judged alike. The plain baseline of dq, dk and dv is the worse of two: the mean of
dp by p, which softmax's derivative subtracts, as Σ p · dp, or of the outputs as Σ dout · out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attngen import accuracy, inputs, reference, reference_gradients, slopes
from attngen.errors import FAULTS, OperandError, SpecError, ValidationError
from attngen.plans import Plan
from attngen.reference import Array, numpy_dtype
from attngen.regions import largest_constant
from attngen.reports import OutputCheck, Quantised, Report
from attngen.spec import AttentionSpec

ELEMENTS = (
    2**22
)  # of the reference's scores in one case: more rows than that are sampled
PARTS = 8  # of the rows: see `_gradients`
SECONDS = 30.0  # see `validate`

Function = Callable[..., Any]
Small = tuple[AttentionSpec, dict[str, Any]]


def validate(
    spec: AttentionSpec,
    plan: Plan,
    function: Function,
    *,
    to_array: Callable[[Array, str], Any],
    rebuild: Callable[[AttentionSpec, Mapping[str, Any]], Function] | None = None,
    small: Callable[[], Small | None] | None = None,
    time_s: float | None = None,
    seed: int = 0,
    seconds: float | None = None,
) -> Report:
    """Judge a function by the reference.

    Args:
        function: takes q, k, v and the operands by name, and returns the outputs; with
            derivatives the program of `Backend.program`, which takes cotangents too, and
            returns gradients behind the outputs. Where rows are sampled, the others'
            cotangents are 0, so that each gradient is judged whole.
        to_array: makes the function's arrays of NumPy's, given a dtype's name.
        rebuild: makes the function of another spec with other choices; None where the
            function can't be made anew (a file that was edited). With it, a spec too
            large to be judged whole is judged at a smaller size too, all rows of it.
        small: makes a smaller spec and its choices, for `rebuild`; None: `shrink`.
        time_s: about how long a call takes; None: as the plan is modelled.
        seed: of the random inputs.
        seconds: of time_s; a slower function is run at full size only where it must be.
            None: SECONDS.
    """
    limit = SECONDS if seconds is None else seconds
    call_s = plan.time_s if time_s is None else time_s
    smaller = None
    if rebuild is not None:
        smaller = shrink(spec, plan) if small is None else small()
    checks: list[OutputCheck] = []
    quantised: list[Quantised] = []
    cases: list[str] = []
    whole = False
    if call_s <= limit or smaller is None:
        rows = sample_rows(spec, plan.q_chunk)
        whole = len(rows) == spec.q_len
        count = "all rows" if whole else f"{len(rows)} of {spec.q_len} rows"
        cases.append(f"full size, {count}")
        found = _judge("full size", spec, function, rows, to_array, seed)
        checks, quantised = checks + found[0], quantised + found[1]
    if smaller is not None and not whole:
        assert rebuild is not None
        small_spec, choice = smaller
        rows = sample_rows(small_spec, int(choice["q_chunk"]))
        cases.append(
            f"small: {small_spec.q_len} queries × {small_spec.kv_len} keys in chunks of "
            f"{choice['q_chunk']} × {choice['k_chunk']}, {len(rows)} rows"
        )
        made = rebuild(small_spec, choice)
        found = _judge("small", small_spec, made, rows, to_array, seed)
        checks, quantised = checks + found[0], quantised + found[1]
    return Report(tuple(checks), tuple(cases), quantised=tuple(quantised))


def _judge(
    case: str,
    spec: AttentionSpec,
    function: Function,
    rows: Array,
    to_array: Callable[[Array, str], Any],
    seed: int,
) -> tuple[list[OutputCheck], list[Quantised]]:
    given = inputs.arrays(spec, seed=seed)
    pulled = inputs.cotangents(spec, seed=seed, rows=rows)
    returned = _call(spec, function, given | pulled, to_array)
    q, k, v = (given.pop(n) for n in ("q", "k", "v"))
    rounding = reference.plain(spec)
    want = reference.attention(spec, q, k, v, given, rows=rows)
    plain = reference.attention(spec, q, k, v, given, rows=rows, rounding=rounding)
    unseen = np.isneginf(want["lse"])
    parts: dict[str, float] = {}
    if pulled:
        exact, baseline, parts = _gradients(spec, (q, k, v, given, pulled), rows)
        want, plain = want | exact, plain | baseline

    @functools.cache
    def other() -> dict[str, float]:
        return _of_outputs(spec, (q, k, v, given, pulled), rows, want)

    checks = []
    for (name, of), array in zip(_returns(spec).items(), returned, strict=True):
        dtype = numpy_dtype(spec.dtype_of(of))
        by_rows = name in ("out", "lse", "dq")
        got = reference.pick(spec, name, array, rows) if by_rows else array
        base = largest_error(plain[name].astype(dtype), want[name]) or 0.0
        base = max(base, parts.get(name, 0.0))
        allowed = 2 * base + 2 * ulp(dtype, want[name])
        error = largest_error(got, want[name])
        if name in ("dq", "dk", "dv") and (error or 0.0) > allowed:
            base = max(base, other()[name])
            allowed = 2 * base + 2 * ulp(dtype, want[name])
        if any(
            (x != 0).any() for x in _nothing(spec, name, array, rows, unseen, given)
        ):
            error = None
        checks.append(OutputCheck(case, name, error, base, allowed))
    if not spec.is_quantised:
        return checks, []
    outputs = dict(zip(spec.outputs, returned, strict=True))
    told = accuracy.of_quantising(
        spec, outputs, (q, given), rows, seed=seed, case=case, measure=largest_error
    )
    return checks, told


def _gradients(
    spec: AttentionSpec, arrays: tuple[Any, ...], rows: Array
) -> tuple[dict[str, Array], dict[str, Array], dict[str, float]]:
    """Gradients: the reference's, the plain baseline's, and the latter's errors in parts.

    A gradient of few numbers, a sink's say, is the sum of as many terms as there are pairs:
    by luck their errors cancel. So rows are taken in PARTS, and the largest sum of the
    parts' absolute errors counts as the baseline's error, where it is larger.

    Args:
        arrays: q, k, v, operands and cotangents.
    """
    want: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    errors: dict[str, Array] = {}
    how = reference.plain(spec)
    for i in range(min(PARTS, len(rows))):
        part = rows[i::PARTS]
        exact = reference_gradients.gradients(spec, *arrays, rows=part)
        baseline = reference_gradients.gradients(spec, *arrays, rows=part, rounding=how)
        for made, found in ((want, exact), (plain, baseline)):
            dq = found.pop("dq")
            shape = (*dq.shape[:2], len(rows), dq.shape[-1])
            made.setdefault("dq", np.zeros(shape, dq.dtype))[:, :, i::PARTS] = dq
            for name, x in found.items():
                made[name] = made[name] + x if name in made else x
        with np.errstate(invalid="ignore"):
            for name, x in exact.items():
                errors[name] = errors.get(name, 0) + np.abs(baseline[name] - x)
    return want, plain, {n: float(np.nanmax(x, initial=0)) for n, x in errors.items()}


def _of_outputs(
    spec: AttentionSpec, arrays: tuple[Any, ...], rows: Array, want: Mapping[str, Array]
) -> dict[str, float]:
    """The baseline's errors of dq, dk and dv where it makes the mean of dp of the outputs.

    Plain attention is differentiated in two ways that are the same but for rounding. Where a
    query sees few keys, theirs differs: one of them is exact for a single key.
    """
    made = reference_gradients.gradients(
        spec, *arrays, rows=rows, rounding=reference.plain(spec), of_outputs=True
    )
    errors = {}
    for name, of in (("dq", "q"), ("dk", "k"), ("dv", "v")):
        narrow = made[name].astype(numpy_dtype(spec.dtype_of(of)))
        errors[name] = largest_error(narrow, want[name]) or 0.0
    return errors


def _returns(spec: AttentionSpec) -> dict[str, str]:
    """What a function returns, in order: outputs and gradients, and what each is of."""
    return {name: name for name in spec.outputs} | slopes.gradients(spec)


def _nothing(
    spec: AttentionSpec,
    name: str,
    array: Array,
    rows: Array,
    unseen: Array,
    operands: Mapping[str, Array],
) -> list[Array]:
    """The parts of what was returned that must be exactly 0.

    Args:
        unseen: whether a row sees no key, [batch, q_heads, rows].
    """
    parts = []
    if name in ("out", "dq"):
        parts.append(reference.pick(spec, name, array, rows)[unseen])
    if name == "dq":
        others = np.delete(np.arange(spec.q_len), rows)
        parts.append(reference.pick(spec, name, array, others))
    if name in ("dk", "dv") and spec.kv_lengths:
        by_heads = reference.by_heads(spec, array)
        lengths = operands["kv_lengths"]
        parts += [x[:, max(n, 0) :] for x, n in zip(by_heads, lengths, strict=True)]
    return parts


def _call(
    spec: AttentionSpec,
    function: Function,
    given: Mapping[str, Array],
    to_array: Callable[[Array, str], Any],
) -> tuple[Array, ...]:
    """What the function returns, each in the form that the spec says."""
    of = slopes.cotangents(spec)
    arrays = {n: to_array(x, spec.dtype_of(of.get(n, n))) for n, x in given.items()}
    names = _returns(spec)
    try:
        returned = function(**arrays)
        outputs = returned if isinstance(returned, tuple | list) else (returned,)
        made = tuple(np.asarray(x) for x in outputs)
    except FAULTS as error:
        raise ValidationError(
            "The function raised an error when it was called.",
            got=f"{type(error).__name__}: {error!s:.500}",
            needed="its outputs: " + ", ".join(names),
        ) from error
    got = [f"{x.dtype}{list(x.shape)}" for x in made]
    needed = [
        f"{numpy_dtype(spec.dtype_of(n))}{list(spec.shape_of(n))}"
        for n in names.values()
    ]
    if got != needed:
        raise ValidationError(
            "The function doesn't return what its spec says.",
            got=", ".join(got) or "nothing",
            needed=", ".join(f"{n} {x}" for n, x in zip(names, needed, strict=True)),
        )
    return made


def largest_error(got: Array, want: Array) -> float | None:
    """The largest absolute error; None where NaNs or infinities aren't the reference's."""
    wide = got.astype(want.dtype)
    odd = ~np.isfinite(want)
    if not np.array_equal(wide[odd], want[odd], equal_nan=True):
        return None
    if not np.isfinite(wide[~odd]).all():
        return None
    return float(np.abs(wide[~odd] - want[~odd]).max(initial=0.0))


def ulp(dtype: np.dtype[Any], want: Array) -> float:
    """One unit in the last place of a dtype at the largest finite magnitude."""
    import ml_dtypes

    largest = float(np.abs(want[np.isfinite(want)]).max(initial=0.0))
    info = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(max(largest, float(info.tiny))))
    return float(2.0**exponent * float(info.eps))


def sample_rows(spec: AttentionSpec, q_chunk: int) -> Array:
    """Queries to judge: all where there are few, else the ends of chunks and some more."""
    room = max(8, ELEMENTS // (spec.batch * spec.q_heads * spec.kv_len))
    if room >= spec.q_len:
        return np.arange(spec.q_len)
    generator = np.random.default_rng(1)
    starts = np.arange(0, spec.q_len, q_chunk)
    ends = np.concatenate([starts, starts - 1, [spec.q_len - 1]])
    ends = np.unique(ends[ends >= 0])
    if len(ends) > room // 2:
        picked = generator.choice(ends[1:-1], max(room // 2 - 2, 0), replace=False)
        ends = np.concatenate([ends[[0, -1]], picked])
    more = generator.choice(spec.q_len, room - len(ends), replace=False)
    return np.unique(np.concatenate([ends, more]))


def shrink(spec: AttentionSpec, plan: Plan) -> Small | None:
    """A smaller spec and choices that keep the plan's loops, with every kind of tile.

    None where the spec can't be made smaller (an operand that is read at a fixed index
    beyond the smaller size, say).
    """
    choice = plan.choice
    k_chunks = {n: int(c) for n, c in choice.items() if n.endswith("k_chunk")}
    q_chunks = {n: int(c) for n, c in choice.items() if n.endswith("q_chunk")}
    least = max(200, largest_constant(spec) + 3 * min(max(k_chunks.values()), 48) + 7)
    length = min(spec.kv_len, -(-least // 240) * 240)  # 240 has many divisors
    q_length = min(spec.q_len, 120 if spec.q_len < spec.kv_len else length)
    if spec.q_len > spec.kv_len:
        q_length = min(spec.q_len, length + 120)
    batches = _fewer(spec.batch, choice.get("batch_chunk"), spec.batch_shards)
    heads = _fewer(spec.kv_heads, choice.get("head_chunk"), spec.head_shards)
    sizes: dict[str, Any] = {
        "num_pages": None,
        "batch": batches[0],
        "kv_heads": heads[0],
        "q_heads": heads[0] * min(spec.repeats, 2),
        "q_len": q_length,
        "kv_len": length,
    }
    try:
        small = dataclasses.replace(
            spec, **sizes, **_offsets(spec, q_length, length), memory_budget=None
        )
    except (OperandError, SpecError):
        return None
    at_once = max(int(choice.get(n, 1)) for n in ("unroll", "parts"))  # key chunks
    for name, chunk in k_chunks.items():
        chunks = -(-spec.kv_len // chunk)
        most = 48 if choice.get("loop") == "fori" else -(-length // min(chunks, 4))
        most = min(most, max(1, length // at_once))
        choice[name] = _chunk(chunk, spec.kv_len, length, most)
    for name, chunk in q_chunks.items():
        choice[name] = _chunk(chunk, spec.q_len, q_length, 32)
    if "batch_chunk" in choice:
        choice |= {"batch_chunk": batches[1], "head_chunk": heads[1]}
    for name, whole, count, shards in (
        ("backward_batch_chunk", spec.batch, batches[0], spec.batch_shards),
        ("backward_head_chunk", spec.kv_heads, heads[0], spec.head_shards),
    ):
        if name in choice:
            choice[name] = count if choice[name] == whole else shards
    if diagonal := int(plan.choice.get("diagonal", 0)):
        return _shrink_diagonal(plan, diagonal, small, choice)
    return small, choice


def _shrink_diagonal(
    plan: Plan, diagonal: int, small: AttentionSpec, choice: dict[str, Any]
) -> tuple[AttentionSpec, dict[str, Any]] | None:
    """Chunks of queries in as many steps, and of as many chunks of keys, as the plan's."""
    steps, chunks = plan.q_chunk // diagonal, plan.q_chunk // plan.k_chunk
    for q_chunk in (40, 48, 80, 120, 240):
        if small.q_len % q_chunk == q_chunk % steps == q_chunk % chunks == 0:
            sizes = {"q_chunk": q_chunk, "k_chunk": q_chunk // chunks}
            return small, choice | sizes | {"diagonal": q_chunk // steps}
    return None


def _chunk(chunk: int, length: int, small: int, most: int) -> int:
    """A chunk of the smaller length that is all of it, or divides it, where it did."""
    if chunk == length:
        return small
    divides = length % chunk == 0
    sizes = range(min(chunk, most, small), 0, -1)
    return next((n for n in sizes if (small % n == 0) == divides), 1)


def _offsets(spec: AttentionSpec, q_length: int, length: int) -> dict[str, Any]:
    """Offsets for a smaller spec: its queries still begin, or end, where they did."""

    def near(distance: int) -> int:
        return max(-length // 4, min(distance, length // 4))

    moved: dict[str, Any] = {"kv_offset": near(spec.kv_offset)}
    if isinstance(spec.q_offset, int):
        first = spec.q_offset - spec.kv_offset  # of query 0 behind key 0
        last = first + spec.q_len - spec.kv_len  # of the last query behind the last key
        ends = abs(last) < abs(first)
        first = near(last) + length - q_length if ends else near(first)
        moved["q_offset"] = first + moved["kv_offset"]
    return moved


def _fewer(count: int, chunk: Any, shards: int) -> tuple[int, int]:
    """A smaller count and chunk that keep whether there is a loop, and whether it has one."""
    small = shards * min(int(chunk or shards) // shards, 2)
    return (small, small) if chunk == count else (2 * small, small)
