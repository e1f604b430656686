"""Random inputs for a spec: what validation and benchmarks feed a kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from attngen import expr, slopes, storage
from attngen.intervals import domain, interval
from attngen.operands import Operand
from attngen.quantisation import quantise
from attngen.reference import Array, by_heads, numpy_dtype
from attngen.spec import AttentionSpec
from attngen.spec_checks import relating

SMALL = 4  # integer operands take values below this, so that they often agree


def arrays(spec: AttentionSpec, *, seed: int = 0, nan: bool = True) -> dict[str, Array]:
    """q, k, v and every operand, as NumPy arrays in the spec's shapes and dtypes.

    q, k, v and float operands are standard normal; with derivatives, operands are of a size
    that leaves scores moderate. Lengths run from none to all; integer
    operands repeat a few values and rise along their last axis, as document ids do; those
    that are searched rise over all positions, as cumulative offsets do. Packed sequences are
    of any lengths, none among them, and the last tokens are of no sequence; pages lie in any order.

    Args:
        seed: of the generator.
        nan: fill keys that aren't there (past kv_lengths) with NaN, and entries of the
            block table that point to none with -1.
    """
    generator = np.random.default_rng(seed)
    made = _normal(spec, generator)
    if spec.is_quantised:
        made |= quantise(spec, made["k"], made["v"])
    made |= {n: made[n].astype(numpy_dtype(spec.dtype_of(n))) for n in ("q", "k", "v")}
    for operand in spec.operands:
        if operand.name not in made:
            made[operand.name] = _operand(spec, operand, generator)
    if spec.storage == "packed" and spec.q_offset is None and relating(spec):
        made["cu_seqlens_k"] = made["cu_seqlens_q"].copy()  # nothing else says where
    if nan and spec.kv_lengths:
        _poison(spec, made)
    return made


def unquantised(spec: AttentionSpec, *, seed: int = 0) -> dict[str, Array]:
    """k and v before `arrays` quantised them, in the spec's dtype."""
    made = _normal(spec, np.random.default_rng(seed))
    return {n: made[n].astype(numpy_dtype(spec.dtype)) for n in ("k", "v")}


def _normal(spec: AttentionSpec, generator: Any) -> dict[str, Array]:
    """q, k and v in float32."""
    return {
        name: generator.standard_normal(spec.shape_of(name), dtype=np.float32)
        for name in ("q", "k", "v")
    }


def _poison(spec: AttentionSpec, made: dict[str, Array]) -> None:
    """NaN in k and v, or their scales, where keys aren't there; -1 in tables."""
    names: tuple[str, ...] = ("k", "v")
    if spec.kv_dtype == "int8":
        names = () if spec.kv_scale == "head" else ("k_scale", "v_scale")
    if spec.storage == "paged":
        _poison_pages(spec, made, names)
        return
    block = 1 if spec.kv_scale == "head" else storage.scale_block(spec)
    for name in names:
        by_tokens = made[name]
        if name.endswith("_scale"):
            by_tokens = np.moveaxis(by_tokens, 2, 1)
        elif spec.layout == "bhtd":
            by_tokens = by_tokens.swapaxes(1, 2)
        for keys, count in zip(by_tokens, made["kv_lengths"], strict=True):
            first = -(-count // block) if name.endswith("_scale") else count
            keys[first:] = np.nan


def _poison_pages(
    spec: AttentionSpec, made: dict[str, Array], names: tuple[str, ...]
) -> None:
    table, unused = made["block_table"], set(range(len(made["k"])))
    for pages, count in zip(table, made["kv_lengths"], strict=True):
        used = -(-count // spec.page_size)
        unused -= set(pages[:used].tolist())
        pages[used:] = -1
    for name in names:
        made[name][sorted(unused)] = np.nan


def cotangents(
    spec: AttentionSpec, *, seed: int = 0, rows: Array | None = None
) -> dict[str, Array]:
    """Cotangents of the spec's outputs, as `slopes.cotangents` names them: standard normal.

    Args:
        seed: of the generator; another than that of `arrays` with the same seed.
        rows: indices of queries; all others' are 0. None: all are random.
    """
    generator = np.random.default_rng([seed, 1])
    made: dict[str, Array] = {}
    for name, output in slopes.cotangents(spec).items():
        values = generator.standard_normal(spec.shape_of(output), dtype=np.float32)
        if rows is not None:
            others = np.ones(spec.q_len, bool)
            others[rows] = False
            if output == "lse":
                values[..., others] = 0
            else:
                by_heads(spec, values)[:, :, others] = 0
        made[name] = values.astype(numpy_dtype(spec.dtype_of(output)))
    return made


def _operand(spec: AttentionSpec, operand: Operand, generator: Any) -> Array:
    shape = spec.shape_of(operand.name)
    if operand.name in ("kv_lengths", "q_lengths"):
        most = spec.kv_len if operand.name == "kv_lengths" else spec.q_len
        counts = generator.integers(0, most + 1, shape)
        counts[:2] = [most, most // 3] if len(counts) > 1 else [most - most // 3]
        return np.asarray(counts, np.int32)
    if operand.name == "q_offset":
        most = max(spec.kv_len - spec.q_len, 1)
        return np.asarray(generator.integers(0, most + 1, shape), np.int32)
    if operand.name == "seed":
        return np.asarray(generator.integers(0, 2**32, shape, np.uint32))
    own = operand in spec.own_operands
    if own and operand.name.startswith("cu_seqlens"):
        return _offsets(spec, operand.name, generator)
    if own and operand.name == "block_table":
        pages = generator.permutation(storage.pages(spec))
        return np.resize(pages, shape).astype(np.int32)
    if operand.kind == "bool":
        return np.asarray(generator.random(shape) < 0.7)
    if operand.kind == "int":
        most = max(spec.q_len, spec.kv_len) + 1 if _searched(spec, operand) else SMALL
        values = generator.integers(0, most, shape)
        return np.sort(values, axis=-1).astype(operand.dtype)
    values = generator.standard_normal(shape, dtype=np.float32)
    if spec.derivatives is not None:
        values = _moderate(spec, operand, values)
    return np.asarray(values.astype(numpy_dtype(operand.dtype)))


def _offsets(spec: AttentionSpec, name: str, generator: Any) -> Array:
    """Cumulative offsets; the second sequence is empty where there are three or more."""
    total = spec.q_len if name.endswith("q") else spec.kv_len
    last = total - total // 16 if spec.batch > 1 else total
    inner = np.sort(generator.integers(0, last + 1, spec.batch - 1))
    if spec.batch > 2:
        inner[1] = inner[0]
    return np.asarray([0, *inner, last], np.int32)


def _moderate(spec: AttentionSpec, operand: Operand, values: Array) -> Array:
    """Values by which scores stay moderate, as in a model that is trained.

    Slopes of positions, say, that make scores of hundreds leave each query one key, whose
    gradients are 0 but for rounding. What scores are divided by keeps away from 0.
    """
    reads = [
        (score.expr, node)
        for score in spec.score
        for node in slopes.reads(score)
        if node.value == operand
    ]
    bounds = [0.0]
    for root, node in reads:
        divides = any(
            n.op == "div" and node in expr.walk(n.args[1]) for n in expr.walk(root)
        )
        if divides:
            values = np.abs(values) + np.float32(0.5)
        low, high = interval(slopes.slope(root, node), domain(spec) | {"s": (-8, 8)})
        bounds.append(max(abs(low), abs(high)))
    bound = max(bounds)
    return values * np.float32(8 / bound) if 8 < bound < np.inf else values


def _searched(spec: AttentionSpec, operand: Operand) -> bool:
    return any(
        node.op == "searchsorted" and node.value == operand
        for root in spec.expressions
        for node in expr.walk(root)
    )
