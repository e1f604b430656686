"""What the JAX templates receive: a plan, spelled as the text of shapes and bounds."""

from __future__ import annotations

from typing import Any

from attngen.backends.jax.tile import Tile, heads, order, tile
from attngen.backends.jax.tile_code import Starts, tile_code
from attngen.expr import Expr
from attngen.intervals import interval
from attngen.plans import Plan
from attngen.printer import ArrayPrinter
from attngen.regions import analyse
from attngen.spec import AttentionSpec


def context(plan: Plan) -> dict[str, Any]:
    """Everything a template names, by section. See templates/README.md."""
    spec, at = plan.spec, tile(plan)
    return (
        _constants(plan, at)
        | _arrays(plan, at)
        | _products(plan, at)
        | (_dense(plan, at) if plan.algorithm == "dense" else _running(plan, at))
        | {"operands": [o.name for o in spec.operands]}
    )


def _constants(plan: Plan, at: Tile) -> dict[str, Any]:
    """The named constants at the top of the file, as (names, values, comment)."""
    spec = plan.spec
    dims: tuple[str, str]
    if spec.qk_dim == spec.v_dim:
        dims, dim_line = ("D", "D"), ("D", str(spec.qk_dim), "head dim")
    else:
        dims = ("QK_DIM", "V_DIM")
        dim_line = ("QK_DIM, V_DIM", f"{spec.qk_dim}, {spec.v_dim}", "head dims")
    lines = [
        ("B, T, S", f"{spec.batch}, {spec.q_len}, {spec.kv_len}", "batch, queries, keys"),
        ("H, G", f"{spec.q_heads}, {spec.kv_heads}", "query heads, kv heads"),
        ("R", "H // G", "query heads that share a kv head"),
        dim_line,
    ]
    if plan.algorithm == "running":
        lines.append(("Q_CHUNK, K_CHUNK", f"{plan.q_chunk}, {plan.k_chunk}", "of a tile"))
        if "b" in at.letters:
            lines.append(("B_CHUNK", str(plan.option("batch_chunk")), "batches of a tile"))
        if "g" in at.letters:
            lines.append(("G_CHUNK", str(plan.option("head_chunk")), "kv heads of a tile"))
    lines.append(("SCALE", repr(spec.scale_value), ""))
    if spec.static_q_offset not in (0, None):
        lines.append(("Q_OFFSET", str(spec.static_q_offset), "position of query 0"))
    if spec.kv_offset:
        lines.append(("K_OFFSET", str(spec.kv_offset), "position of key 0"))
    return {"constants": lines, "QK": dims[0], "V": dims[1]}


def _arrays(plan: Plan, at: Tile) -> dict[str, Any]:
    """Shapes and dtypes of arguments, for the check at the function's head."""
    spec = plan.spec
    qk, v = ("D", "D") if spec.qk_dim == spec.v_dim else ("QK_DIM", "V_DIM")
    names = {"b": "B", "q": "T", "k": "S", "h": "H", "g": "G"}

    def shape(axes: str, dim: str) -> str:
        return f"({', '.join(names[a] for a in order(spec.layout, axes))}, {dim})"

    kv = spec.dtype_of("k")
    checks = [
        ("q", shape("bqh", qk), spec.dtype),
        ("k", shape("bkg", qk), kv),
        ("v", shape("bkg", v), kv),
    ]
    for operand in spec.operands:
        if operand.name == "q_offset":
            continue  # [B] or a scalar: broadcast, then checked
        items = [names[a] if isinstance(a, str) else str(a) for a in operand.axes]
        text = f"({', '.join(items)}{',' if len(items) == 1 else ''})"
        checks.append((operand.name, text, operand.dtype))
    return {
        "checks": checks,
        "out_shape": shape("bqh", v),
        "stats": f"jnp.{spec.stats_dtype}",
        "out_dtype": f"jnp.{spec.out_dtype_name}",
        "out_cast": spec.out_dtype_name != spec.stats_dtype,
        "outputs": spec.outputs,
        "sink": spec.sink,
        "x64": "float64" in (spec.dtype, spec.out_dtype_name) or plan.index_dtype == "int64",
        "q_offset": spec.q_offset if spec.static_q_offset is None else None,
        "offset_from_lengths": spec.q_offset == "bottom_right" and spec.kv_lengths,
    }


def _products(plan: Plan, at: Tile) -> dict[str, Any]:
    """The two matrix products: subscripts, casts before them, keywords."""
    spec = plan.spec
    product = str(plan.option("product_dtype"))
    keys = "".join(a for a in order(spec.layout, "bkg") if a in at.letters)
    keywords = []
    if spec.precision == "highest":
        keywords.append("precision=lax.Precision.HIGHEST")
    if product != spec.stats_dtype:
        keywords.append(f"preferred_element_type=jnp.{spec.stats_dtype}")
    return {
        "qk_subscripts": f"{at.rows}d,{keys}d->{at.letters}",
        "pv_subscripts": f"{at.letters},{keys}d->{at.rows}d",
        "einsum": "_product" if keywords else "jnp.einsum",
        "keywords": keywords,
        "cast": f".astype(jnp.{product})" if product != spec.dtype else "",
        "cast_p": f".astype(jnp.{product})" if product != spec.stats_dtype else "",
        "scale_rows": product == spec.stats_dtype,
        "keys_shape": _keys_shape(spec.layout, at),
        "rows_permutation": _permutation(order(spec.layout, "bqgr"), at.letters),
        "out_permutation": _inverse(order(spec.layout, "bqgr"), at.letters),
        "stats_shape": at.shape(at.rows),
        "guards": _guards(plan),
        "drops_keys": plan.drops_keys,
        "row_axes": _axes_text([at.letters.index(a) for a in at.rows if a in "rq"]),
        "there_order": _inverse_keys(keys, at.letters),
    }


def _keys_shape(layout: str, at: Tile) -> str:
    """The shape of keys without axes of length 1; "" where there are none to drop."""
    axes = order(layout, "bkg")
    return "" if set(axes) <= set(at.letters) else ", ".join(
        at.sizes[a] for a in axes if a in at.letters
    )


def _guards(plan: Plan) -> bool:
    """Whether a row may see no key, in a tile or at all."""
    spec = plan.spec
    lengths = spec.kv_lengths or spec.q_lengths
    return plan.drops_keys or lengths or spec.mask is not None


def _axes_text(axes: list[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else f"({', '.join(map(str, axes))})"


def _inverse_keys(keys: str, letters: str) -> str:
    """How the keys that are there, in tile order, line up with the values' axes."""
    present = [a for a in letters if a in keys]
    order_ = [present.index(a) for a in keys]
    return "" if order_ == sorted(order_) else f".transpose{tuple(order_)}"


def _permutation(memory: str, letters: str) -> str:
    """How to transpose rows [memory order, d] to [tile order, d]; "" where they agree."""
    present = [a for a in memory if a in letters]
    wanted = [a for a in letters if a in present]
    if present == wanted:
        return ""
    return f"({', '.join(str(present.index(a)) for a in wanted)}, {len(present)})"


def _inverse(memory: str, letters: str) -> str:
    present = [a for a in letters if a in memory]
    wanted = [a for a in memory if a in letters]
    if present == wanted:
        return ""
    return f"({', '.join(str(present.index(a)) for a in wanted)}, {len(present)})"


def _dense(plan: Plan, at: Tile) -> dict[str, Any]:
    spec = plan.spec
    code = tile_code(plan, at, Starts("0", "0", "0", "0"), indent=4, ragged=False)
    own, v = {"b": "B", "q": "T", "h": "H"}, "D" if spec.qk_dim == spec.v_dim else "V_DIM"
    return {
        "code": code,
        "rows_shape": at.shape(order(spec.layout, "bqgr")),
        "out_tile_shape": f"{', '.join(own[a] for a in order(spec.layout, 'bqh'))}, {v}",
        "lse_shape": "B, H, T",
        "sink_shape": _without_keys(at.spread("gr")),
        "looped_heads": False,
        "sink_slice": False,
    }


def _running(plan: Plan, at: Tile) -> dict[str, Any]:
    spec = plan.spec
    levels = _levels(plan, at)
    indexed = {name for name, _ in levels}
    ragged = spec.kv_len % plan.k_chunk != 0
    starts = Starts(
        b="b" if "b" in indexed else "0",
        g="g" if "g" in indexed else "0",
        q="q_start" if "i" in indexed else "0",
        k="k_start",
    )
    sizes = {"b": at.sizes["b"], "q": "Q_CHUNK", "k": "K_CHUNK"}
    memory: dict[str, Any] = {
        "rows": _slice_texts(spec.layout, "bqh", sizes | {"h": heads(at)}, starts, spec),
        "keys": _slice_texts(spec.layout, "bkg", sizes | {"g": at.sizes["g"]}, starts, spec),
    }
    code = tile_code(plan, at, starts, indent=12, ragged=ragged)
    writer_length = _Lengths(plan, at, starts)
    bounds = _bounds(plan, at, starts, ragged, _Lengths(plan, at, starts))
    v = "D" if spec.qk_dim == spec.v_dim else "V_DIM"
    unit = {"b": at.sizes["b"], "q": "Q_CHUNK", "h": heads(at)}
    head_begin = starts.g if starts.g == "0" or spec.repeats == 1 else f"{starts.g} * R"
    memory["lse_begin"] = f"({starts.b}, {head_begin}, {starts.q})"
    return {
        "code": code,
        "levels": _level_lines(levels, spec, at),
        "steps": " * ".join(count for _, count in levels),
        "looped": bool(levels),
        "looped_heads": starts.g != "0",
        "sink_begin": head_begin,
        "sink_shape": _without_keys(at.spread("gr")),
        "carried": ", ".join(f"{o}_all" for o in spec.outputs),
        "q_start": starts.q != "0",
        "q_ragged": spec.q_len % plan.q_chunk != 0,
        "ragged": ragged,
        "edge_start": any("k_start" in line for line in code.edge),
        "memory": memory,
        "rows_shape": at.shape(order(spec.layout, "bqgr")),
        "out_tile_shape": f"{', '.join(unit[a] for a in order(spec.layout, 'bqh'))}, {v}",
        "lse_shape": f"{unit['b']}, {unit['h']}, Q_CHUNK",
        "heads": heads(at),
        "starts": starts,
        "guard": bool(plan.option("guard")),
        "loop_kind": str(plan.option("loop")),
        "bounds": bounds,
        "kinds": {kind for kind, _, _ in bounds["loops"]},
    }


def _without_keys(shape: str) -> str:
    """A shape that lines up with a tile → one that lines up with its statistics."""
    items = [x for x in shape.strip("()").split(", ") if x][:-1]
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _slice_texts(
    layout: str, axes: str, sizes: dict[str, str], starts: Starts, spec: AttentionSpec
) -> dict[str, str]:
    """Text of the start and of the size of a slice, without the last axis."""
    head = starts.g if starts.g == "0" or spec.repeats == 1 else f"{starts.g} * R"
    begin = {"b": starts.b, "q": starts.q, "k": starts.k, "h": head, "g": starts.g}
    ordered = order(layout, axes)
    return {
        "begin": f"({', '.join(begin[a] for a in ordered)}, 0)",
        "size": ", ".join(sizes[a] for a in ordered),
    }


def _levels(plan: Plan, at: Tile) -> list[tuple[str, str]]:
    """The loops around the key loop that have more than one step, outermost first."""
    spec = plan.spec
    found = []
    if spec.batch != plan.option("batch_chunk"):
        found.append(("b", "B" if at.sizes["b"] == "1" else "(B // B_CHUNK)"))
    if spec.kv_heads != plan.option("head_chunk"):
        found.append(("g", "G" if at.sizes["g"] == "1" else "(G // G_CHUNK)"))
    if spec.q_len != plan.q_chunk:
        found.append(("i", "Q_CHUNKS"))
    return found


def _level_lines(
    levels: list[tuple[str, str]], spec: AttentionSpec, at: Tile
) -> list[str]:
    """Statements that take the flat step apart, the innermost loop first."""
    lines = []
    inner: list[str] = []
    for name, count in reversed(levels):
        text = "step"
        if inner:
            divisor = inner[0] if len(inner) == 1 else f"({' * '.join(inner)})"
            text += f" // {divisor}"
        if len(inner) + 1 < len(levels):
            text += f" % {count}"
        chunk = {"b": "B_CHUNK", "g": "G_CHUNK", "i": ""}[name]
        if chunk and at.sizes[name] != "1":
            text += f" * {chunk}"
        lines.append(f"{name} = {text}")
        inner.insert(0, count)
    return lines


class _Lengths:
    """Run-time lengths and offsets of a tile's batches, as scalars for the bounds."""

    def __init__(self, plan: Plan, at: Tile, starts: Starts) -> None:
        self.many = "b" in at.letters
        self.start = starts.b
        self.size = at.sizes["b"]

    def part(self, operand: str) -> str:
        if not self.many:
            return f"{operand}[{self.start}]"
        if self.start == "0":
            return operand
        return f"lax.dynamic_slice({operand}, ({self.start},), ({self.size},))"

    def extreme(self, name: str, which: str) -> str:
        return f"{name}.{which}()" if self.many else name


def _bounds(
    plan: Plan, at: Tile, starts: Starts, ragged: bool, lengths: _Lengths
) -> dict[str, Any]:
    """The key chunks to visit: statements, and the loops with their ends as text."""
    spec, span = plan.spec, analyse(plan.spec)
    lines: list[str] = []
    if spec.kv_lengths:
        lines.append(f"kv_count = {lengths.part('kv_lengths')}")
    if spec.q_lengths:
        lines.append(f"q_count = {lengths.part('q_lengths')}")
    whole = spec.kv_len // plan.k_chunk
    chunks = whole + ragged
    if not span.some:
        return {"lines": [], "loops": [], "note": "No query sees any key."}
    limits = _Limits(plan, lines, lengths)
    first = limits.chunk("first", span.low, up=False, otherwise="0")
    low_edge = span.any_full and span.full_low is not None
    high_edge = span.full_high is not None or spec.kv_lengths
    high = limits.high(span.high, lengths.extreme("kv_count", "max"))
    last = limits.chunk("last", high, up=True, otherwise=str(chunks))
    if spec.q_lengths:
        q_most = lengths.extreme("q_count", "max")
        lines.append(f"last = jnp.where({starts.q} < {q_most}, {last}, {first})")
        last = "last"
    if not span.any_full:
        return {"lines": lines, "loops": [("edge", first, last)], "note": ""}
    inner_first, inner_last = first, last
    if low_edge:
        text = limits.text(span.full_low, up=True)
        lines.append(f"full_first = jnp.clip({text}, {first}, {last})")
        inner_first = "full_first"
    if high_edge:
        full = limits.high(span.full_high, lengths.extreme("kv_count", "min"))
        text = limits.text(full, up=False)
        lines.append(f"full_last = jnp.clip({text}, {inner_first}, {last})")
        inner_last = "full_last"
    elif ragged and last == str(chunks):
        inner_last = str(whole)
    elif ragged:
        lines.append(f"full_last = jnp.clip({whole}, {inner_first}, {last})")
        inner_last = "full_last"
    if spec.q_lengths:
        every = f"{starts.q} + Q_CHUNK <= {lengths.extreme('q_count', 'min')}"
        lines.append(f"full_last = jnp.where({every}, {inner_last}, {inner_first})")
        inner_last = "full_last"
    loops = [
        ("edge", first, inner_first),
        ("interior", inner_first, inner_last),
        ("edge", inner_last, last),
    ]
    return {"lines": lines, "loops": [x for x in loops if x[1] != x[2]], "note": ""}


class _Limits:
    """Limits in positions → key chunks, as text; defines q_lo and q_hi when first used."""

    def __init__(self, plan: Plan, lines: list[str], lengths: _Lengths) -> None:
        self.plan, self.spec, self.lines, self.lengths = plan, plan.spec, lines, lengths
        self.printer = ArrayPrinter("jnp", {"q_lo": "q_lo", "q_hi": "q_hi"}, repr)
        self.defined = False
        self.count = 0

    def _define(self) -> None:
        if self.defined:
            return
        self.defined = True
        spec, static = self.spec, self.spec.static_q_offset
        start = "q_start" if spec.q_len != self.plan.q_chunk else "0"
        if self.plan.index_dtype == "int64":
            start = f"jnp.int64({start})"
        end = "Q_CHUNK" if start == "0" else f"{start} + Q_CHUNK"
        low = start
        if static is None:
            self.lines.append(f"offset = {self.lengths.part('q_offset')}")
            low += f" + {self.lengths.extreme('offset', 'min')}"
            end += f" + {self.lengths.extreme('offset', 'max')}"
        elif static:
            low, end = f"{low} + Q_OFFSET", f"{end} + Q_OFFSET"
        self.lines += ["# q_lo and q_hi are positions, half-open", f"q_lo = {low}", f"q_hi = {end}"]

    def _range(self, limit: Expr) -> tuple[float, float]:
        spec, static = self.spec, self.spec.static_q_offset
        if static is None:
            return (float("-inf"), float("inf"))
        last = spec.q_len - self.plan.q_chunk
        env = {"q_lo": (static, static + last)}
        env["q_hi"] = (static + self.plan.q_chunk, static + spec.q_len)
        low, high = interval(limit, env)
        return (low - spec.kv_offset, high - spec.kv_offset)

    def high(self, limit: Expr | None, length: str) -> tuple[str, int] | None:
        """An upper limit in key indices, no higher than the keys that are there.

        As text with its precedence: 0 for a sum, 1 for what binds tighter.
        """
        if limit is None:
            return (length, 1) if self.spec.kv_lengths else None
        text, level = self._index(limit)
        if self.spec.kv_lengths:
            return (f"jnp.minimum({text}, {length})", 1)
        if self._range(limit)[1] > self.spec.kv_len:
            return (f"jnp.minimum({text}, S)", 1)
        return (text, level)

    def _index(self, limit: Expr) -> tuple[str, int]:
        if limit.op != "const":
            self._define()
        text = self.printer.text(limit)
        level = 0 if limit.op in ("add", "sub", "floordiv", "mul") else 1
        if len(text) > 30 and limit.op != "const":  # a step of its own
            self.count += 1
            text, level = f"limit_{self.count}", 1
            self.lines += self.printer.lines(text, limit, width=76)
        if self.spec.kv_offset:
            return (f"{text} - K_OFFSET", 0)
        return (text, level)

    def text(self, limit: Expr | tuple[str, int] | None, *, up: bool) -> str:
        """The chunk that a limit falls into, rounded down, or up."""
        assert limit is not None
        text, level = limit if isinstance(limit, tuple) else self._index(limit)
        inner = text if level else f"({text})"
        return f"-(-{inner} // K_CHUNK)" if up else f"{inner} // K_CHUNK"

    def chunk(
        self, name: str, limit: Expr | tuple[str, int] | None, *, up: bool, otherwise: str
    ) -> str:
        if limit is None:
            return otherwise
        if isinstance(limit, Expr) and self._range(limit)[0] < 0:
            limit = (f"jnp.maximum({self._index(limit)[0]}, 0)", 1)
        self.lines.append(f"{name} = {self.text(limit, up=up)}")
        return name
