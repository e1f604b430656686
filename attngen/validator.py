"""Kernel against reference: the tolerance rule.

A kernel passes when for each output its largest absolute error against float64 is at most
twice that of a plain implementation in the same dtypes, plus two units in the last place
of the output's dtype at the reference's largest magnitude. Rows that see no key must be
exactly 0, NaNs and infinities must be where the reference has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attngen import inputs, reference
from attngen.errors import FAULTS, OperandError, SpecError, ValidationError
from attngen.plans import Plan
from attngen.reference import Array, numpy_dtype
from attngen.regions import largest_constant
from attngen.reports import OutputCheck, Report
from attngen.spec import AttentionSpec

ELEMENTS = (
    2**22
)  # of the reference's scores in one case: more rows than that are sampled
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
        function: takes q, k, v and the operands by name.
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
    cases: list[str] = []
    whole = False
    if call_s <= limit or smaller is None:
        rows = sample_rows(spec, plan.q_chunk)
        whole = len(rows) == spec.q_len
        count = "all rows" if whole else f"{len(rows)} of {spec.q_len} rows"
        cases.append(f"full size, {count}")
        checks += _judge("full size", spec, function, rows, to_array, seed)
    if smaller is not None and not whole:
        assert rebuild is not None
        small_spec, choice = smaller
        rows = sample_rows(small_spec, int(choice["q_chunk"]))
        cases.append(
            f"small: {small_spec.q_len} queries × {small_spec.kv_len} keys in chunks of "
            f"{choice['q_chunk']} × {choice['k_chunk']}, {len(rows)} rows"
        )
        made = rebuild(small_spec, choice)
        checks += _judge("small", small_spec, made, rows, to_array, seed)
    return Report(tuple(checks), tuple(cases))


def _judge(
    case: str,
    spec: AttentionSpec,
    function: Function,
    rows: Array,
    to_array: Callable[[Array, str], Any],
    seed: int,
) -> list[OutputCheck]:
    given = inputs.arrays(spec, seed=seed)
    outputs = _call(spec, function, given, to_array)
    q, k, v = (given.pop(n) for n in ("q", "k", "v"))
    want = reference.attention(spec, q, k, v, given, rows=rows)
    plain = reference.attention(
        spec, q, k, v, given, rows=rows, rounding=reference.plain(spec)
    )
    checks = []
    for name, output in zip(spec.outputs, outputs, strict=True):
        dtype = numpy_dtype(spec.dtype_of(name))
        got = reference.pick(spec, name, output, rows)
        baseline = largest_error(plain[name].astype(dtype), want[name])
        base = 0.0 if baseline is None else baseline
        allowed = 2 * base + 2 * ulp(dtype, want[name])
        error = largest_error(got, want[name])
        if name == "out" and (got[np.isneginf(want["lse"])] != 0).any():
            error = None  # a row that sees no key is exactly 0
        checks.append(OutputCheck(case, name, error, base, allowed))
    return checks


def _call(
    spec: AttentionSpec,
    function: Function,
    given: Mapping[str, Array],
    to_array: Callable[[Array, str], Any],
) -> tuple[Array, ...]:
    """The function's outputs, each in the form that the spec says."""
    arrays = {n: to_array(x, spec.dtype_of(n)) for n, x in given.items()}
    try:
        returned = function(**arrays)
        outputs = returned if isinstance(returned, tuple | list) else (returned,)
        made = tuple(np.asarray(x) for x in outputs)
    except FAULTS as error:
        raise ValidationError(
            "The function raised an error when it was called.",
            got=f"{type(error).__name__}: {error!s:.500}",
            needed="its outputs: " + ", ".join(spec.outputs),
        ) from error
    got = [f"{x.dtype}{list(x.shape)}" for x in made]
    needed = [
        f"{numpy_dtype(spec.dtype_of(n))}{list(spec.shape_of(n))}" for n in spec.outputs
    ]
    if got != needed:
        raise ValidationError(
            "The function doesn't return what its spec says.",
            got=", ".join(got) or "nothing",
            needed=", ".join(
                f"{n} {x}" for n, x in zip(spec.outputs, needed, strict=True)
            ),
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
    least = max(200, largest_constant(spec) + 3 * min(plan.k_chunk, 48) + 7)
    length = min(spec.kv_len, -(-least // 240) * 240)  # 240 has many divisors
    q_length = min(spec.q_len, 120 if spec.q_len < spec.kv_len else length)
    if spec.q_len > spec.kv_len:
        q_length = min(spec.q_len, length + 120)
    batches = _fewer(spec.batch, choice.get("batch_chunk"), spec.batch_shards)
    heads = _fewer(spec.kv_heads, choice.get("head_chunk"), spec.head_shards)
    sizes: dict[str, Any] = {
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
    chunks = -(-spec.kv_len // plan.k_chunk)
    most = 48 if choice.get("loop") == "fori" else -(-length // min(chunks, 4))
    at_once = max(int(choice.get(n, 1)) for n in ("unroll", "parts"))  # key chunks
    most = min(most, max(1, length // at_once))
    choice["k_chunk"] = _chunk(plan.k_chunk, spec.kv_len, length, most)
    choice["q_chunk"] = _chunk(plan.q_chunk, spec.q_len, q_length, 32)
    if "batch_chunk" in choice:
        choice |= {"batch_chunk": batches[1], "head_chunk": heads[1]}
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
