"""AttentionSpec: what to compute. A frozen value that checks itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attngen import expr, storage
from attngen.dtypes import BYTES, QUANTISED
from attngen.expr import Expr
from attngen.operands import Axis, Operand
from attngen.spec_checks import check
from attngen.storage import PAGE_SIZE
from attngen.tracing import Mask, Score
from attngen.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What attention to compute; DESIGN's semantics, one field for each choice.

    Shapes, in the layout "bthd" ("bhtd" swaps tokens and heads):
    q [batch, q_len, q_heads, qk_dim], k [batch, kv_len, kv_heads, qk_dim],
    v [batch, kv_len, kv_heads, v_dim] → out [batch, q_len, q_heads, v_dim], and
    lse [batch, q_heads, q_len] always.

    Args:
        batch, q_heads, q_len, qk_dim: sizes, at least 1.
        kv_heads, kv_len, v_dim: sizes; None: as q_heads, q_len, qk_dim. kv_heads divides
            q_heads; query head h reads kv head h // (q_heads / kv_heads).
        dtype: of q, k, v: float32, bfloat16, float16, float64.
        out_dtype: of out; None: as dtype.
        kv_dtype: of k and v; None: as dtype. float8_e4m3 and int8 are quantised: see
            kv_scale.
        layout: "bthd" or "bhtd".
        scale: of q·k; None: 1/√qk_dim.
        q_offset: position of query 0: an integer, "bottom_right" (kv_len − q_len, or
            kv_lengths − q_len), "operand" (int32 [batch] or scalar at run time), or None:
            0, which must be said where q_len ≠ kv_len and a mask or score relates q to k.
        kv_offset: position of key 0, an integer.
        mask: a Mask, or None: every key is seen.
        score: a tuple of Scores, applied in order after the scale.
        sink: True adds exp(sink[h]) to the denominator; a float32 operand [q_heads].
        dropout: probability, 0 ≤ p < 1, that a weight is 0; others are divided by 1 − p. Above
            0, a uint32 operand `seed` [2]; see philox.py for which weights are dropped.
        kv_lengths, q_lengths: True: an int32 operand [batch] says how many are there; below 0
            there are none.
        storage: "dense", "packed" (int32 operands cu_seqlens_q and cu_seqlens_k [batch + 1];
            q_len and kv_len are the tokens of all sequences; q [q_len, q_heads, qk_dim]
            and so on, lse [q_heads, q_len]) or "paged" (an int32 operand block_table
            [batch, ceil(kv_len / page_size)]; k [num_pages, page_size, kv_heads, qk_dim]
            and v alike, "bhtd" swaps tokens and heads). See storage.py.
        page_size: tokens of a page. num_pages: None: as many as all sequences could need.
        kv_scale: of quantised k and v, what has a factor of its own, in the float32
            operands k_scale and v_scale: "head" [kv_heads], "token" [batch, kv_heads,
            kv_len], or the tokens of a block, a number n: [batch, kv_heads,
            ceil(kv_len / n)]. Packed ones lack the batch; those of pages are [num_pages,
            kv_heads, page_size / n].
        outputs: "out" and/or "lse", in the order wanted.
        derivatives: None, "vjp", or "any" (any order, forward mode too).
        precision: of the matrix products: "default" or "highest".
        batch_shards, head_shards: how many parts the batch, and the heads, are sharded in
            over devices; they divide batch and kv_heads. All shapes stay those of the whole.
        memory_budget: bytes of temporaries beyond inputs and outputs of one device, an
            integer or text such as "64MiB"; None: what the target's memory leaves.

    Raises:
        SpecError: a field has a value that it can't have.
        OperandError: two operands share a name, or one is read outside its axis.
        BudgetError: memory_budget can't be read.
    """

    batch: int = 1
    q_heads: int
    kv_heads: int = None  # type: ignore[assignment]
    q_len: int
    kv_len: int = None  # type: ignore[assignment]
    qk_dim: int
    v_dim: int = None  # type: ignore[assignment]
    dtype: str = "float32"
    out_dtype: str | None = None
    kv_dtype: str | None = None
    layout: str = "bthd"
    scale: float | None = None
    q_offset: int | str | None = None
    kv_offset: int = 0
    mask: Mask | None = None
    score: tuple[Score, ...] = ()
    sink: bool = False
    dropout: float = 0.0
    kv_lengths: bool = False
    q_lengths: bool = False
    storage: str = "dense"
    page_size: int = PAGE_SIZE
    num_pages: int | None = None
    kv_scale: str | int = "head"
    outputs: tuple[str, ...] = ("out",)
    derivatives: str | None = None
    precision: str = "default"
    batch_shards: int = 1
    head_shards: int = 1
    memory_budget: int | str | None = None

    def __post_init__(self) -> None:
        for name, source in (
            ("kv_heads", "q_heads"),
            ("kv_len", "q_len"),
            ("v_dim", "qk_dim"),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, source))
        for name in ("scale", "dropout"):
            if isinstance(value := getattr(self, name), float):
                object.__setattr__(self, name, float(value))  # NumPy's float64, too
        if isinstance(self.score, Score):
            object.__setattr__(self, "score", (self.score,))
        if isinstance(self.score, list):
            object.__setattr__(self, "score", tuple(self.score))
        if isinstance(self.outputs, str):
            object.__setattr__(self, "outputs", (self.outputs,))
        if isinstance(self.outputs, list):
            object.__setattr__(self, "outputs", tuple(self.outputs))
        if isinstance(self.memory_budget, str):
            object.__setattr__(self, "memory_budget", self.memory_budget.strip(" "))
        check(self)

    # What follows from the fields.

    @property
    def repeats(self) -> int:
        """Query heads that share a kv head."""
        return self.q_heads // self.kv_heads

    @property
    def devices(self) -> int:
        """How many devices share the work."""
        return self.batch_shards * self.head_shards

    @property
    def scale_value(self) -> float:
        """The scale as a number."""
        return self.qk_dim**-0.5 if self.scale is None else float(self.scale)

    @property
    def out_dtype_name(self) -> str:
        return self.out_dtype or self.dtype

    @property
    def stats_dtype(self) -> str:
        """Of the softmax statistics, the accumulators and lse."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def is_narrow(self) -> bool:
        """Whether k and v have another dtype than q: a narrower one."""
        return self.kv_dtype not in (None, self.dtype)

    @property
    def is_quantised(self) -> bool:
        """Whether k and v have scales."""
        return self.kv_dtype in QUANTISED

    @property
    def budget_bytes(self) -> int | None:
        return None if self.memory_budget is None else parse_bytes(self.memory_budget)

    @property
    def static_q_offset(self) -> int | None:
        """The position of query 0 where it is known before the call, else None."""
        if self.q_offset is None:
            return 0
        if self.q_offset == "bottom_right":
            varied = self.kv_lengths or self.storage == "packed"
            return None if varied else self.kv_len - self.q_len
        return self.q_offset if isinstance(self.q_offset, int) else None

    @functools.cached_property
    def lengths(self) -> dict[str, int]:
        """The length of each lettered axis of an operand."""
        return {"b": self.batch, "h": self.q_heads, "q": self.q_len, "k": self.kv_len}

    @functools.cached_property
    def expressions(self) -> tuple[Expr, ...]:
        """The mask's and the scores' expressions."""
        mask = () if self.mask is None else (self.mask.expr,)
        return (*mask, *(s.expr for s in self.score))

    @functools.cached_property
    def own_operands(self) -> tuple[Operand, ...]:
        """The operands that fields ask for."""
        own = []
        if self.kv_lengths:
            own.append(own_operand("kv_lengths", "b", "int32"))
        if self.q_lengths:
            own.append(own_operand("q_lengths", "b", "int32"))
        if self.q_offset == "operand":
            own.append(own_operand("q_offset", "b", "int32"))
        if self.sink:
            own.append(own_operand("sink", "h", "float32"))
        if self.dropout:
            own.append(own_operand("seed", (2,), "uint32"))
        own += [own_operand(*given) for given in storage.own_operands(self)]
        return tuple(own)

    @functools.cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Every operand that the function takes by name, beside q, k and v."""
        return (*self.own_operands, *expr.operands(*self.expressions))

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of q, k, v, out, lse, or of an operand."""
        if name in ("q", "k", "v", "out", "lse"):
            return storage.shape_of(self, name)
        return next(o for o in self.operands if o.name == name).shape(self.lengths)

    def dtype_of(self, name: str) -> str:
        """The dtype of q, k, v, out, lse, or of an operand."""
        if name in ("k", "v"):
            return self.kv_dtype or self.dtype
        known = {"q": self.dtype, "out": self.out_dtype_name, "lse": self.stats_dtype}
        return known.get(name) or next(o for o in self.operands if o.name == name).dtype

    def bytes_of(self, *names: str) -> int:
        """Bytes of the named inputs and outputs together."""
        return sum(math.prod(self.shape_of(n)) * BYTES[self.dtype_of(n)] for n in names)

    # To files and back.

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Plain values; without `defaults`, fields at their default are left out."""
        from attngen import spec_files

        return spec_files.to_dict(self, defaults=defaults)

    def to_json(self, *, indent: int = 2) -> str:
        from attngen import spec_files

        return spec_files.to_json(self, indent=indent)

    def to_toml(self) -> str:
        from attngen import spec_files

        return spec_files.to_toml(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AttentionSpec:
        """The spec that `to_dict` wrote; the errors of the constructor, and unknown fields."""
        from attngen import spec_files

        return spec_files.from_dict(data)

    @classmethod
    def from_json(cls, text: str | bytes) -> AttentionSpec:
        from attngen import spec_files

        return spec_files.from_json(text)

    @classmethod
    def from_toml(cls, text: str) -> AttentionSpec:
        from attngen import spec_files

        return spec_files.from_toml(text)


def own_operand(
    name: str, axes: Iterable[Axis], dtype: str, rises_to: int | None = None
) -> Operand:
    """An operand whose name is the spec's own, which a user's may not be."""
    made = object.__new__(Operand)
    given = {"name": name, "axes": tuple(axes), "dtype": dtype, "rises_to": rises_to}
    for field, value in given.items():
        object.__setattr__(made, field, value)
    return made


FIELDS = tuple(f.name for f in dataclasses.fields(AttentionSpec))
