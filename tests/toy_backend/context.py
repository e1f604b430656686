"""What the toy's template receives: a plan as the text of bounds, scores and the mask."""

from __future__ import annotations

from typing import Any

from attngen import expr
from attngen.expr import Expr
from attngen.intervals import domain, proven
from attngen.plans import Plan
from attngen.printer import ArrayPrinter
from attngen.regions import spans
from attngen.spec import AttentionSpec

# of the template, beyond those that attngen reserves for its own
NAMES = ("np", "itertools", "ml_dtypes", "here", "i", "keys", "values", "q_stop")
INDENT = 16


def context(plan: Plan) -> dict[str, Any]:
    spec = plan.spec
    static = spec.static_q_offset
    per_batch = (
        "kv_lengths[b] - T" if spec.q_offset == "bottom_right" else "q_offset[b]"
    )
    mask = () if spec.mask is None else (spec.mask.expr,)
    return {
        "spec": spec,
        "plan": plan,
        "operands": [o.name for o in spec.operands],
        "checks": [(n, spec.shape_of(n), spec.dtype_of(n)) for n in _inputs(spec)],
        "shapes": {name: spec.shape_of(name) for name in spec.outputs},
        "dtypes": {name: _dtype(spec.dtype_of(name)) for name in spec.outputs},
        "bfloat16": "bfloat16" in (spec.out_dtype_name,),
        "stats": _dtype(spec.stats_dtype),
        "head": "b, :, h" if spec.layout == "bthd" else "b, h",
        "kv_head": "b, :, h // R" if spec.layout == "bthd" else "b, h // R",
        "q_pos": "q_index + " + (per_batch if static is None else "Q_OFFSET"),
        "static": static,
        "bounds": _bounds(plan),
        "score": [line for i in range(len(spec.score)) for line in _score(spec, i)],
        "mask": [
            line
            for node in mask
            for line in _printer(spec, "float32", "part").lines(
                "seen", _typed(node), width=88 - INDENT - 4
            )
        ],
        "reads_outside": any(
            n.op == "load" and not proven(n, domain(spec))
            for root in spec.expressions
            for n in expr.walk(root)
        ),
    }


def _inputs(spec: AttentionSpec) -> list[str]:
    named = [o.name for o in spec.operands if o.name != "q_offset"]
    return ["q", "k", "v", *named]


def _dtype(name: str) -> str:
    return "ml_dtypes.bfloat16" if name == "bfloat16" else f"np.{name}"


def _score(spec: AttentionSpec, i: int) -> list[str]:
    printer = _printer(spec, spec.stats_dtype, f"score{i}")
    node = _typed(spec.score[i].expr)
    lines = printer.lines("s", node, width=88 - INDENT)
    if "s" not in expr.variables(node):  # perhaps not of every axis
        lines.append("s = np.broadcast_to(s, (len(rows), len(k_index)))")
    return lines


def _printer(spec: AttentionSpec, float_dtype: str, prefix: str) -> ArrayPrinter:
    names = {"b": "b", "h": "h", "q": "q_pos", "k": "k_pos", "s": "s"}

    def load(node: Expr) -> str:
        if node.op == "searchsorted":
            return f"np.greater_equal.outer({text(node.args[0])}, {node.value.name}).sum(-1)"
        index = [
            f"{i.value}_index" if i.op == "var" and i.value in ("q", "k") else text(i)
            for i in node.args
        ]
        name = node.value.name
        if proven(node, domain(spec)):
            read = f"{name}[{', '.join(index)}]"
        else:
            read = f"_read({name}, {', '.join(index)})"
        dtype = {"float": float_dtype, "int": "int64"}.get(node.kind)
        return read if dtype in (None, node.value.dtype) else f"np.{dtype}({read})"

    def text(node: Expr) -> str:
        return ArrayPrinter("np", names, load, float_dtype, "int64").text(_typed(node))

    return ArrayPrinter("np", names, load, float_dtype, "int64", prefix)


def _typed(node: Expr) -> Expr:
    """Floats where nothing else says their width: np.tanh(0.5) would be a float64."""

    def change(n: Expr) -> Expr | None:
        if n.kind != "float" or any(
            a.op != "const" for a in n.args if a.kind != "bool"
        ):
            return None
        if n.op == "where":
            return Expr("float", (n,), "float")
        if n.op in expr.ARITY and n.op != "float":
            args = tuple(Expr("float", (a,), "float") for a in n.args)
            return Expr(n.op, args, n.kind)
        return None

    return expr.substitute(node, change)


def _bounds(plan: Plan) -> dict[str, list[str]]:
    """Ranges of key chunks that a chunk of queries visits, and of those without a mask."""
    spec = plan.spec
    printer = ArrayPrinter("np", {"q_lo": "q_lo", "q_hi": "q_hi"}, repr)

    def index(limit: Expr | None, otherwise: str) -> str:
        if limit is None:
            return otherwise
        return f"({printer.text(limit)})" + (" - K_OFFSET" if spec.kv_offset else "")

    visited, full = [], []
    for span in spans(spec):
        if not span.some:
            continue
        low, high = index(span.low, "0"), index(span.high, "kv_length")
        first = f"max({low}, 0) // K_CHUNK"
        visited.append(f"range({first}, -(-min({high}, kv_length) // K_CHUNK))")
        if span.any_full and spec.mask is not None:
            first = f"-(-({index(span.full_low, '0')}) // K_CHUNK)"
            last = f"({index(span.full_high, 'S + K_CHUNK')}) // K_CHUNK"
            full.append(f"range({first}, {last})")
    return {"visited": visited, "full": full}
