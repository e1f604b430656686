"""What the template of the backward pass receives: kernels, what they take, what they sum up."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attngen import slopes
from attngen.backends.triton.arguments import is_beside, kept, sizes_of
from attngen.backends.triton.bounds import Bounds, bounds, offset_source
from attngen.backends.triton.candidates import pieces
from attngen.backends.triton.guards import overflows
from attngen.backends.triton.slope_code import (
    SIZES,
    Kind,
    Part,
    SlopeCode,
    SlopeWriter,
    entries_of,
    placed,
)
from attngen.backends.triton.tile_code import power_of_two
from attngen.dtypes import DIGITS
from attngen.expr import variables
from attngen.intervals import Interval
from attngen.joint import backward_part
from attngen.plans import Plan
from attngen.spec import AttentionSpec
from attngen.transposed import transposed

LATE = "LATE_OFFSET"  # for an offset of queries that comes at run time
IN_QUERIES: tuple[Kind, ...] = ("rows", "entries", "row_entries")  # who sums them up
IN_KEYS: tuple[Kind, ...] = ("columns", "column_entries")


class Backward:
    """The backward pass of a plan.

    Args:
        env: what variables can be, whatever the lengths are at run time.
        index_dtype: of positions.
        helpers: small functions that the text calls.
        axes: of q, k and v, as their strides are named.
        differences: whether norm is a natural logarithm: see guards.py.
    """

    def __init__(
        self,
        plan: Plan,
        env: Mapping[str, Interval],
        index_dtype: str,
        helpers: set[str],
        axes: Sequence[str],
        differences: bool,
    ) -> None:
        self.plan, self.spec, self.env, self.helpers = plan, plan.spec, env, helpers
        self.packed = self.spec.storage == "packed"
        self.axes, self.choice = axes, backward_part(plan.choice)
        self.block, self.step = int(self.choice["q_chunk"]), int(self.choice["k_chunk"])
        self.head_dim = self.choice.get("head_dim", "padded")
        self.out, self.dlse = "out" in self.spec.outputs, "lse" in self.spec.outputs
        self.drops, self.differences = overflows(self.spec, env), differences
        self.beside = is_beside(self.spec)
        self.made = SlopeWriter(plan, env, index_dtype, helpers).slopes()
        self.of_queries, self.of_keys = self._of_queries(), self._of_keys()
        # of out, as it was rounded, delta is the mean of dp no better than out is
        coarse = DIGITS[self.spec.out_dtype_name] < DIGITS[self.spec.dtype]
        self.summed = self.out and (
            coarse or any(o.name != "sink" for o in slopes.trained(self.spec))
        )

    # Which tiles are visited.

    def _of_queries(self) -> Bounds:
        plan = dataclasses.replace(self.plan, q_chunk=self.block, k_chunk=self.step)
        return bounds(plan, self.env, self.helpers, interior=not self.drops)

    def _of_keys(self) -> Bounds:
        """Which query blocks see any of a block of keys."""
        shift = LATE if offset_source(self.spec) not in ("", "constant") else ""
        known = dataclasses.replace(self.spec, q_offset=0) if shift else self.spec
        spec = transposed(known)
        assert spec is not None
        plan = dataclasses.replace(
            self.plan, spec=spec, q_chunk=self.block, k_chunk=self.step
        )
        exchange = {
            "q": self.env["k"], "k": self.env["q"],
            "q_index": self.env["k_index"], "k_index": self.env["q_index"],
        }  # fmt: skip
        env = {**self.env, **exchange}
        found = bounds(plan, env, self.helpers, interior=not self.drops, shift=shift)
        found.lines = [exchanged(x).replace(LATE, "offset") for x in found.lines]
        found.about = [exchanged(x) for x in found.about]
        found.interiors = [(exchanged(x), exchanged(y)) for x, y in found.interiors]
        found.edges = [(exchanged(x), exchanged(y)) for x, y in found.edges]
        return found

    # What kernels take.

    def _strides(self, tensors: Sequence[str]) -> list[str]:
        return [f"{x}_stride_{a}" for x in tensors for a in self.axes]

    def _operand_strides(self) -> list[str]:
        return [
            f"{o.name}_stride_{i}"
            for o in self.spec.operands
            for i in range(len(o.axes))
        ]

    def _kernel(self, strided: list[str], others: list[str]) -> dict[str, Any]:
        names = [o.name for o in self.spec.operands]
        sizes = sizes_of(self.spec)
        parameters = [f"{x}_ptr" for x in (*strided, *others, *names)]
        parameters += [*sizes, *self._strides(strided), *self._operand_strides()]
        return {"strided": strided, "others": others, "parameters": parameters}

    def _launch(
        self,
        name: str,
        kernel: Mapping[str, Any],
        grid: str,
        more: list[str] | None = None,
    ) -> dict[str, Any]:
        operands = [o.name for o in self.spec.operands]
        pointers = [*kernel["strided"], *kernel["others"], *operands]
        arguments = [f"{x}," for x in pointers]
        more = [*(["sequences"] if self.packed else []), *(more or [])]
        arguments += ["T,", "S,", "H,", *(f"{x}," for x in more)]
        arguments += [f"*{x}.stride()," for x in (*kernel["strided"], *operands)]
        return {"name": name, "grid": grid, "arguments": arguments}

    def context(self) -> dict[str, Any]:
        spec, parts = self.spec, self.made.parts
        kept_ = kept(spec)
        values = ["v", "dout"] if self.out else []
        rows = [p.name for p in parts if p.kind in IN_QUERIES]
        sink = ["d_sink"] if spec.sink else []
        lse = ["lse", "dlse"] if self.beside else []
        dlse = ["dlse"] if self.dlse and not self.beside else []
        first = ["out"] if self.out and not self.summed else []
        queries = self._kernel(
            ["q", "k", *values, *first, "dq"],
            [*lse, *kept_, *dlse, "delta", *sink, *rows],
        )
        columns = [p.name for p in parts if p.kind in IN_KEYS]
        keys = self._kernel(
            ["q", "k", *values, "dk", *(["dv"] if self.out else [])],
            [*lse, *kept_, "delta", *columns],
        )
        block, step = "BACKWARD_BLOCK", "BACKWARD_STEP"
        grids = [f"triton.cdiv(T, {block}) * H * B", f"triton.cdiv(S, {block}) * G * B"]
        if self.packed:
            grids = [
                f"(T // {block} + sequences + 1) * H",
                f"(S // {block} + sequences + 1) * G",
            ]
        launches = [
            self._launch("backward_queries", queries, grids[0]),
            self._launch("backward_keys", keys, grids[1]),
        ]
        shown = []
        for p in parts:
            more: dict[str, Any] = {"name": p.name, "kind": p.kind, "node": p.node}
            if p.kind.endswith("entries"):
                more |= {
                    "count": entries_of(p.node),
                    "padded": power_of_two(entries_of(p.node)),
                }
            if p.kind == "pairs":
                more["pairs"] = pairs = self._pairs(p, values, [*lse, *kept_])
                grid = f"triton.cdiv(T, {block}) * triton.cdiv(S, {step})"
                grid += "".join(
                    f" * {SIZES[a]}" for a in "bh" if a in variables(p.node)
                )
                name = f"backward_{pairs['suffix']}"
                launches.append(self._launch(name, pairs, grid, ["B"]))
            shown.append(more)
        operands = [o.name for o in spec.operands]
        cotangents = list(slopes.cotangents(spec))
        saved = [*first, *lse[:1], *kept_]
        given = ["q", "k", "v", *operands, *saved, *cotangents]
        made = list(slopes.gradients(spec))
        pointed = dict.fromkeys([*queries["strided"], *keys["strided"]])
        return {
            "code": self.made.code,
            "back": self.made.back,
            "parts": shown,
            "of_queries": self.of_queries,
            "of_keys": self.of_keys,
            "offset": self._offset(),
            "needs_v": self.out,
            "summed": self.summed,
            "dlse": self.dlse,
            "beside": self.beside,
            "drops": self.drops,
            "differences": self.differences,
            "queries_kernel": queries,
            "keys_kernel": keys,
            "launches": launches,
            "pointed": list(pointed),
            "given": given,
            "saved": saved,
            "unpacked": [n if n in saved else f"_{n}" for n in (*spec.outputs, *kept_)],
            "fake_given": given if len(", ".join(given)) < 60 else _fake(spec),
            "pulled": cotangents,
            "made": made,
            "fakes": [
                f"{n}.new_empty({n}.shape)" for n in slopes.gradients(spec).values()
            ],
            "answers": [
                f"d{n}" if n in "qkv" else f"d_{n}" if f"d_{n}" in made else "None"
                for n in ("q", "k", "v", *operands)
            ],
            "buffers": self._buffers(),
            "sums": self._sums(),
            "no_parts": _results(parts, ()),
            "query_parts": _results(parts, IN_QUERIES),
            "key_parts": _results(parts, IN_KEYS),
            "tile_parameters": self._tile_parameters(),
            "block": self.block,
            "step": self.step,
            "num_warps": self.choice["num_warps"],
            "num_stages": self.choice["num_stages"],
            "runtime": [
                *(["batches"] if any(p.kind == "pairs" for p in parts) else []),
                *self._strides(list(pointed)),
            ],
        }

    def _offset(self) -> str:
        lines = [*self.of_queries.lines, *self.of_keys.lines, *self._lines()]
        named = any(re.search(r"\boffset\b", x) for x in lines)
        return offset_source(self.spec) if named else ""

    def _lines(self) -> list[str]:
        code: SlopeCode = self.made
        lines = [*code.code.rows, *code.code.keys, *code.code.score, *code.code.mask]
        lines += code.code.kept
        return [*lines, *(x for x, _ in code.back)]

    def _tile_parameters(self) -> list[str]:
        """What `_tile` takes: its blocks, and of the rest what its statements read."""
        dims = self.spec.qk_dim, self.spec.v_dim
        qk, v = (_suffixes(len(pieces(dim, self.head_dim))) for dim in dims)
        blocks = [x + suffix for x in "qk" for suffix in qk]
        blocks += [x + suffix for x in ("v", "dout") for suffix in v if self.out]
        blocks += [n for n in kept(self.spec) if n != "lse_mass"]
        blocks += ["delta", *(["lse", "dlse"] if self.beside else [])]
        lines = self._lines()
        if self.spec.dropout and self.out:
            lines.append("seed_ptr seed_stride_0")
        text = "\n".join(lines)
        names = ["q_start", "c", "q_len", "kv_len", "kv_end", "q_length", "offset"]
        names += ["b_index", "h_index", "q_first", "k_first"]
        names += [f"{o.name}_ptr" for o in self.spec.operands] + self._operand_strides()
        return [*blocks, *(n for n in names if re.search(rf"\b{n}\b", text))]

    def _pairs(self, part: Part, values: list[str], kept_: list[str]) -> dict[str, Any]:
        """The kernel of a dense bias: of each tile of it, over the heads that share it."""
        reads = variables(part.node)
        own = {
            (True, True): ("own // heads", "own % heads", "1"),
            (True, False): ("own", "other", "heads"),
            (False, True): ("other", "own", "batches"),
            (False, False): ("other // heads", "other % heads", "batches * heads"),
        }[("b" in reads, "h" in reads)]
        kernel = self._kernel(["q", "k", *values], [*kept_, "delta", part.name])
        place = kernel["parameters"].index("heads") + 1
        kernel["parameters"].insert(place, "batches")
        return kernel | {
            "suffix": part.name.removeprefix("d_"),
            "b": own[0],
            "h": own[1],
            "sharing": own[2],
            "results": "".join(
                f", {'' if p is part else '_'}{p.name}" for p in self.made.parts
            ),
            "at": "(tl.cast(own, tl.int64) * q_len + row) * kv_len + column",
        }

    # What the launcher adds up.

    def _buffers(self) -> list[dict[str, str]]:
        """Of what kernels write for operands: float32, each element once."""
        found = []
        shapes = {"rows": "(B, H, T)", "columns": "(B, H, S)"}
        if self.spec.sink:
            found.append(("d_sink", shapes["rows"]))
        for p in self.made.parts:
            shape = shapes.get(p.kind, "")
            if p.kind in ("row_entries", "column_entries"):
                axis = "T" if p.kind == "row_entries" else "S"
                shape = f"(B, H, {axis}, {entries_of(p.node)})"
            if p.kind == "entries":
                blocks = "triton.cdiv(T, BACKWARD_BLOCK)"
                if self.packed:
                    blocks = "T // BACKWARD_BLOCK + sequences + 1"
                shape = f"(B, H, {blocks}, {entries_of(p.node)})"
            if p.kind == "pairs":
                kept_ = [SIZES[a] for a in "bh" if a in variables(p.node)]
                shape = f"({', '.join([*kept_, 'T', 'S'])})"
            found.append((p.name, shape))
        # a packed sequence may have fewer blocks than it could: these write nothing
        some = (
            {p.name for p in self.made.parts if p.kind == "entries"}
            if self.packed
            else ()
        )
        made = [(n, "new_zeros" if n in some else "new_empty", s) for n, s in found]
        return [{"name": n, "make": f"norm.{how}({s})"} for n, how, s in made]

    def _sums(self) -> list[str]:
        lines = []
        for operand in slopes.trained(self.spec):
            name = f"d_{operand.name}"
            if operand.name == "sink":
                lines.append("d_sink = d_sink.sum((0, 2)).to(sink.dtype)")
                continue
            parts = [p for p in self.made.parts if p.operand == operand]
            (first, whole), *rest = [placed(p) for p in parts]
            if not rest and not whole:
                first += ".contiguous()" if ".permute(" in first else ""
                lines.append(f"{name} = {first}.to({operand.name}.dtype)")
                continue
            shape = f"{operand.name}.shape"
            lines.append(f"{name} = norm.new_zeros({shape})  # of float32")
            for text, at in [(first, whole), *rest]:
                lines.append(f"{name}[{at}] += {text}" if at else f"{name} += {text}")
            lines.append(f"{name} = {name}.to({operand.name}.dtype)")
        return lines


def _fake(spec: AttentionSpec) -> list[str]:
    """The first of what `_gradients` takes, as far as its fake reads them; and the rest."""
    names = list(slopes.gradients(spec).values())
    operands = [o.name for o in spec.operands]
    last = max((operands.index(n) for n in names if n in operands), default=-1)
    return ["q", "k", "v", *operands[: last + 1], "*_"]


def _results(parts: Sequence[Part], kinds: tuple[str, ...]) -> str:
    return "".join(f", {'' if p.kind in kinds else '_'}{p.name}" for p in parts)


def _suffixes(count: int) -> list[str]:
    """Of the names of a head dim's pieces."""
    return [f"_{i}" for i in range(count)] if count > 1 else [""]


_PAIRS = (
    ("q_start", "k_start"), ("Q_BLOCK", "K_BLOCK"), ("q_len", "kv_len"), ("q_lo", "k_lo"),
    ("q_hi", "k_hi"), ("Q_OFFSET", "K_OFFSET"), ("key", "query"), ("Key", "Query"),
)  # fmt: skip
_NAMES = {x: y for pair in _PAIRS for x, y in (pair, pair[::-1])}
_NAMES |= {"kv_end": "q_end", "q_length": "kv_end"}
_WORD = re.compile(r"\b(" + "|".join(_NAMES) + r")\b")


def exchanged(line: str) -> str:
    """A statement about queries that visit keys as one about keys that visit queries."""
    line = re.sub(r"\boffset\b", "Q_OFFSET", line)  # a chunk's own position: K_OFFSET
    return _WORD.sub(lambda found: _NAMES[found[0]], line)
