"""What the templates receive for K/V that are pages, or quantised; and for packed tokens.

Pages are gathered for one chunk of keys at a time: whole pages where chunks are made of
them, a slice of a page where pages are made of chunks, else key by key. Scales of heads are
part of the factor of scores, and of what is summed at last; those of tokens, or of blocks of
them, multiply the columns of scores, and of weights before their product with the values.
"""

from __future__ import annotations

from typing import Any

from attngen.backends.jax import packed
from attngen.backends.jax.statements import as_tuple, assign
from attngen.backends.jax.tile import Starts, Tile, dimensions, order, without_keys
from attngen.dtypes import ARRAYS, LARGEST
from attngen.operands import Operand
from attngen.plans import Plan
from attngen.spec import AttentionSpec

WIDTH = 76
NOTHING: dict[str, Any] = {
    "rows": [],
    "keys": [],
    "scaled": "",
    "larger": "",
    "end": "",
}


def context(plan: Plan, at: Tile, starts: Starts) -> dict[str, Any]:
    """Statements, for `_chunked.jinja`: before the key loop, in a tile; its factors.

    rows: what heads' scales are; keys: kc and vc of pages, and their scales.
    scaled: the scales of a tile's values, by name, larger: what they are multiplied by; end: of
        all values.
    """
    spec = plan.spec
    if spec.storage == "dense" and not spec.is_quantised:
        return {"stored": NOTHING}
    made = _Writer(plan, at, starts)
    found: dict[str, Any] = {
        "keys": [],
        "rows": [],
        "scaled": "",
        "larger": "",
        "end": "",
    }
    if spec.storage == "paged":
        found["keys"] += made.pages()
    factor = "SCALE"
    if spec.is_quantised and spec.kv_scale == "head":
        found["rows"] = made.of_heads()
        found["end"] = "v_scale_at_g"
        factor = "SCALE * k_scale_at_g"
    elif spec.is_quantised:
        found["keys"] += made.scales()
        found["scaled"] = "v_scale_at_c"
        if (
            plan.option("product_dtype") == "float16"
        ):  # which has few digits of small ones
            largest = LARGEST[str(spec.kv_dtype)]
            found["larger"] = f" * {largest}"
            found["end"] = f"(1 / {largest})"
    return {"stored": found, "factor": factor}


class _Writer:
    """Writes how a chunk of keys is found."""

    def __init__(self, plan: Plan, at: Tile, starts: Starts) -> None:
        self.plan, self.spec, self.at, self.starts = plan, plan.spec, at, starts
        self.many = "b" in at.letters
        self.one_head = "g" not in at.letters
        self.all_heads = starts.g == "0" and not self.one_head
        self.source = "_here" if plan.option("guard") else ""
        self.told: set[str] = set()

    @property
    def how(self) -> str:
        """What is gathered: "pages", "slice" of one, or "keys"."""
        spec, k, page = self.spec, self.plan.k_chunk, self.spec.page_size
        whole = self.all_heads or self.one_head or spec.layout == "bhtd"
        if k % page == 0 and spec.kv_len % page == 0 and whole:
            return "pages"
        one = page % k == 0 and spec.kv_len % k == 0 and not self.many
        return "slice" if one else "keys"

    def pages(self) -> list[str]:
        """kc and vc, of a chunk's pages."""
        how = self.how
        if how == "slice":
            return self._slice()
        lines = self._of_keys() if how == "keys" else self._of_pages()
        index = self._index(how)
        lines += self._heads(index)
        if ", " in index and ":, " not in index:
            lines.append(f"at = {index}")
            index = "at"
        for name, target in (("k", "kc"), ("v", "vc")):
            lines.append(f"{target} = {name}{self.source}[{index}]")
        return lines

    def _slice(self) -> list[str]:
        bthd = self.spec.layout == "bthd"
        g, heads = self.starts.g, self.at.sizes["g"]
        place = "k_start % PAGE_SIZE"
        middle = [place, g] if bthd else [g, place]
        sizes = ["K_CHUNK", heads] if bthd else [heads, "K_CHUNK"]
        qk, v = _dims(self.spec)
        lines = [
            f"page_at_c = block_table[{self.starts.b}, k_start // PAGE_SIZE]",
            f"page_at_c = {self._clipped('page_at_c')}",
        ]
        begin = as_tuple(["page_at_c", *middle, "0"])
        for name, target, dim in (("k", "kc", qk), ("v", "vc", v)):
            size = as_tuple(["1", *sizes, dim])
            call = ["lax.dynamic_slice", f"{name}{self.source}", begin, size]
            lines += assign(target, [call], WIDTH)
        return lines

    def _clipped(self, table: str) -> str:
        """Entries behind the last key that is there may be any number."""
        return f"jnp.clip({table}, 0, PAGES - 1)"

    def _of_pages(self) -> list[str]:
        """`pages`, of whole ones: [n], or [batch, n]."""
        begin = as_tuple([self.starts.b, "k_start // PAGE_SIZE"])
        size = as_tuple([self.at.sizes["b"], "K_CHUNK // PAGE_SIZE"])
        call = ["lax.dynamic_slice", "block_table", begin, size]
        lines = assign("pages_at_c", [call], WIDTH)
        shown = "pages_at_c" if self.many else "pages_at_c[0]"
        return [*lines, f"pages_at_c = {self._clipped(shown)}"]

    def _tokens(self) -> list[str]:
        if "tokens" in self.told:
            return []
        self.told.add("tokens")
        return ["tokens_at_c = k_start + jnp.arange(K_CHUNK)"]

    def _of_keys(self) -> list[str]:
        """`pages` and `places`, of each key: [k], or [batch, k]."""
        if "places" in self.told:
            return []
        self.told.add("places")
        lines = [*self._tokens(), "places_at_c = tokens_at_c % PAGE_SIZE"]
        b = self.starts.b
        rows = f"block_table[{b}, tokens_at_c // PAGE_SIZE]"
        if self.many:
            if b != "0":
                part = (
                    f"lax.dynamic_slice_in_dim(block_table, {b}, {self.at.sizes['b']})"
                )
                lines.append(f"table_at_b = {part}")
            table = "block_table" if b == "0" else "table_at_b"
            rows = f"{table}[:, tokens_at_c // PAGE_SIZE]"
        lines.append(f"pages_at_c = {rows}")
        return [*lines, f"pages_at_c = {self._clipped('pages_at_c')}"]

    def _heads(self, index: str) -> list[str]:
        """The indices of a tile's kv heads, where they are read."""
        if "heads_at_c" not in index or "heads" in self.told:
            return []
        self.told.add("heads")
        made = f"jnp.arange({self.at.sizes['g']})"
        start = "" if self.starts.g == "0" else f"{self.starts.g} + "
        return [f"heads_at_c = {start}{made}"]

    def _index(self, how: str) -> str:
        """The indices of keys in [page, token, head, dim], or heads before tokens."""
        bthd = self.spec.layout == "bthd"
        if how == "pages" and (self.all_heads and bthd):
            return "pages_at_c"
        if how == "pages" and self.one_head:
            middle = ":, " if bthd else ""
            return f"pages_at_c, {middle}{self.starts.g}"
        if how == "pages":
            return "pages_at_c[..., None, :], heads_at_c[:, None]"
        if self.one_head:
            g = self.starts.g
            return (
                f"pages_at_c, places_at_c, {g}"
                if bthd
                else f"pages_at_c, {g}, places_at_c"
            )
        if bthd and self.all_heads:
            return "pages_at_c, places_at_c"
        if bthd:
            return "pages_at_c[..., None], places_at_c[:, None], heads_at_c"
        return "pages_at_c[..., None, :], heads_at_c[:, None], places_at_c"

    # Scales.

    def of_heads(self) -> list[str]:
        lines: list[str] = []
        shape = dimensions(without_keys(self.at.spread("g")))
        shape = [*shape, "1"] if shape != ["()"] else shape
        for x in "kv":
            name = f"{x}_scale_at_g"
            if self.one_head:
                lines.append(f"{name} = {x}_scale[{self.starts.g}]")
                continue
            part = [f"{x}_scale"]
            if not self.all_heads:
                begin, size = f"({self.starts.g},)", f"({self.at.sizes['g']},)"
                part = ["lax.dynamic_slice", f"{x}_scale", begin, size]
            lines += assign(name, [part, [".reshape", *shape]], WIDTH)
        return lines

    def scales(self) -> list[str]:
        """k_scale_at_c and v_scale_at_c, as they line up with a tile."""
        lines = []
        if self.spec.storage == "paged":
            lines += self._of_keys()
            index = self._scale_index()
            lines += self._heads(index)
            if self.spec.kv_scale != "token":
                lines.append("blocks_at_c = places_at_c // SCALE_BLOCK")
            lines.append(f"at = {index}")
            made = [[f"{x}_scale[at]"] for x in "kv"]
        else:
            block = self.spec.kv_scale != "token"
            at, sizes = self.starts, self.at.sizes
            begin = as_tuple([at.b, at.g, "0" if block else "k_start"])
            keys = "-(-S // SCALE_BLOCK)" if block else "K_CHUNK"
            size = as_tuple([sizes["b"], sizes["g"], keys])
            made = [["lax.dynamic_slice", f"{x}_scale", begin, size] for x in "kv"]
            lines += self._tokens() if block else []
        for x, call in zip("kv", made, strict=True):
            name = f"{x}_scale_at_c"
            if self.spec.storage != "paged" and self.spec.kv_scale != "token":
                lines += assign(name, [call], WIDTH)
                call = [f"{name}[:, :, tokens_at_c // SCALE_BLOCK]"]
            shape = dimensions(self.at.spread("bgk"))
            lines += assign(name, [call, [".reshape", *shape]], WIDTH)
        return lines

    def _scale_index(self) -> str:
        """The indices of keys in [page, head, block]."""
        places = "places_at_c"
        if self.spec.kv_scale != "token":
            places = "blocks_at_c"
        if self.one_head:
            return f"pages_at_c, {self.starts.g}, {places}"
        return f"pages_at_c[..., None, :], heads_at_c[:, None], {places}"


def _dims(spec: AttentionSpec) -> tuple[str, str]:
    return ("D", "D") if spec.qk_dim == spec.v_dim else ("QK_DIM", "V_DIM")


Constant = tuple[str, str, str]
LETTERS = {"b": "B", "q": "T", "k": "S", "h": "H", "g": "G"}


def constants(spec: AttentionSpec, lines: list[Constant]) -> list[Constant]:
    """The constants of a dense file, and those of how K/V are stored."""
    own: list[Constant] = []
    if spec.storage == "packed":
        first = ("B, T, S", f"1, {spec.q_len}, {spec.kv_len}", "one batch, all tokens")
        lines = [first, *lines[1:]]
        own.append(("SEQUENCES", str(spec.batch), "packed behind each other"))
    if spec.storage == "paged":
        pages = f"{spec.shape_of('k')[0]}, {spec.page_size}"
        own.append(("PAGES, PAGE_SIZE", pages, "pages of K/V, tokens of a page"))
    if spec.is_quantised and spec.kv_scale not in ("head", "token"):
        own.append(("SCALE_BLOCK", str(spec.kv_scale), "tokens that share a scale"))
    return [lines[0], *own, *lines[1:]]


def checks(spec: AttentionSpec) -> list[tuple[str, str, str]]:
    """(name, shape, dtype) of each argument as the user passes it."""
    qk, v = _dims(spec)
    kv = ARRAYS.get(spec.dtype_of("k"), spec.dtype_of("k"))
    found = [
        ("q", _tokens(spec, "bqh", qk), spec.dtype),
        ("k", _tokens(spec, "bkg", qk), kv),
        ("v", _tokens(spec, "bkg", v), kv),
    ]
    for operand in spec.operands:
        if operand.name == "q_offset":
            continue  # for each sequence or a scalar: broadcast, then checked
        found.append((operand.name, _shape(spec, operand), operand.dtype))
    return found


def _tokens(spec: AttentionSpec, axes: str, dim: str) -> str:
    """The shape of q, k, v or out."""
    letters = list(order(spec.layout, axes))
    if spec.storage == "packed":
        letters.remove("b")
    names = [LETTERS[a] for a in letters]
    if spec.storage == "paged" and axes == "bkg":
        names[0] = "PAGES"
        names[letters.index("k")] = "PAGE_SIZE"
    return f"({', '.join(names)}, {dim})"


def out_shape(spec: AttentionSpec) -> str:
    return _tokens(spec, "bqh", _dims(spec)[1])


def _shape(spec: AttentionSpec, operand: Operand) -> str:
    names = LETTERS | ({"b": "SEQUENCES"} if spec.storage == "packed" else {})
    items = [names[a] if isinstance(a, str) else str(a) for a in operand.axes]
    offsets = operand.name.startswith("cu_seqlens") and operand in spec.own_operands
    items = ["SEQUENCES + 1"] if offsets and spec.storage == "packed" else items
    return as_tuple(items)


def wrapper(spec: AttentionSpec) -> dict[str, Any] | None:
    """How a packed file calls the function of one batch; None for others."""
    if spec.storage != "packed":
        return None
    read = [o.name for o in packed.lowered(spec).operands]
    tokens = spec.is_quantised and spec.kv_scale != "head"
    ahead = ["q", "k", "v"] + (["k_scale", "v_scale"] if tokens else [])
    return {
        "takes": ["q", "k", "v", *read],
        "ahead": ahead,
        "returned": [f"{name}[0]" for name in spec.outputs],
    }
