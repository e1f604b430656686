"""The axes of one tile of scores, as the emitted text spells them.

A tile is [b, g, r, q, k]: batch, kv head, query head within the kv head's group, query,
key. Axes of length 1 among the first three are left out, so that XLA sees matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attngen import targets
from attngen.backends.jax.candidates import DEFAULTS
from attngen.expr import Expr
from attngen.operands import Operand
from attngen.plans import Option, Plan


@dataclass(frozen=True)
class Tile:
    """Names of the axes present, and the text that shapes arrays to them.

    sizes: the emitted constant (or the literal 1) for each letter.
    """

    letters: str
    sizes: dict[str, str]

    @property
    def rows(self) -> str:
        """The axes of statistics: all but the keys."""
        return self.letters[:-1]

    def shape(self, letters: Iterable[str], *more: str) -> str:
        """The text of a shape tuple."""
        items = [*(self.sizes[a] for a in letters if a in self.letters), *more]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"

    def spread(self, letters: str) -> str:
        """The shape that lines up an array of some axes with the tile, by broadcasting."""
        present = [a for a in self.letters if a in letters]
        if not present:
            return "()"
        tail = self.letters[self.letters.index(present[0]) :]
        items = [self.sizes[a] if a in letters else "1" for a in tail]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


@dataclass(frozen=True)
class Starts:
    """Text for where the tile begins: batch, kv head, query index, key index."""

    b: str
    g: str
    q: str
    k: str


def chosen(plan: Plan, name: str) -> Option:
    """A choice of the plan, or what an algorithm that doesn't have it does."""
    return dict(plan.options).get(name, DEFAULTS[name])


def outputs_of(plan: Plan) -> tuple[str, ...]:
    """What the forward pass makes: the outputs, and what it keeps for a backward pass."""
    kept = ("mass",) if chosen(plan, "mass") == "kept" else ()
    return (*plan.spec.outputs, *kept)


def guards(plan: Plan) -> bool:
    """Whether a row may see no key, in a tile or at all."""
    spec = plan.spec
    lengths = spec.kv_lengths or spec.q_lengths
    return plan.drops_keys or lengths or spec.mask is not None


def drops(plan: Plan) -> bool:
    """Whether there are weights that dropout may drop: lse alone is of all."""
    return bool(plan.spec.dropout) and "out" in plan.spec.outputs


def without_keys(shape: str) -> str:
    """A shape that lines up with a tile → one that lines up with its statistics."""
    items = [x for x in shape.strip("()").split(", ") if x][:-1]
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def tile(plan: Plan) -> Tile:
    spec = plan.spec
    counts = {
        "b": plan.option("batch_chunk"),
        "g": plan.option("head_chunk"),
        "r": spec.repeats,
    }
    sizes = {"b": "B_CHUNK", "g": "G_CHUNK", "r": "R", "q": "Q_CHUNK", "k": "K_CHUNK"}
    if plan.algorithm == "dense":
        sizes = {"b": "B", "g": "G", "r": "R", "q": "T", "k": "S"}
    letters = "".join(a for a in "bgr" if counts[a] != 1) + "qk"
    sizes = {a: s if counts.get(a) != 1 else "1" for a, s in sizes.items()}
    return Tile(letters, sizes)


def triangle(at: Tile, starts: Starts) -> tuple[Tile, Tile, Starts]:
    """Along a diagonal: a tile of some keys and the queries from `low` on, and its edge."""
    part = at.sizes | {"q": "Q_CHUNK - low", "k": "keys"}
    edge = at.sizes | {"q": "K_STEP", "k": "K_STEP"}
    low = "low" if starts.q == "0" else f"{starts.q} + low"
    moved = Starts(b=starts.b, g=starts.g, q=low, k=starts.k)
    return Tile(at.letters, part), Tile(at.letters, edge), moved


def dimensions(shape: str) -> list[str]:
    """What reshape takes for a tuple's text: each dimension, or () for none."""
    return [x.strip() for x in shape.strip("()").split(",") if x.strip()] or ["()"]


def heads(at: Tile) -> str:
    """How many query heads a tile has, as text: G_CHUNK * R without its ones."""
    factors = [at.sizes[a] for a in "gr" if at.sizes[a] != "1"]
    return " * ".join(factors) or "1"


def order(layout: str, axes: str) -> str:
    """The letters of an array as it lies in memory: axes ⊂ b, t (as q or k), heads, d."""
    batch, token, *head = list(axes)
    inner = [token, *head] if layout == "bthd" else [*head, token]
    return "".join([batch, *inner])


def times(start: str, factor: int) -> str:
    """Where query heads begin, by where kv heads do."""
    return start if factor == 1 or start == "0" else f"{start} * R"


def ranged(plan: Plan, at: Tile, start: str, letters: str, size: str) -> str:
    """start, start + 1, … along some axes of the tile."""
    dtype = ", dtype=jnp.int64" if plan.index_dtype == "int64" else ""
    if size == "1" and not set(letters) & set("qk"):
        # never a Python number: ~ of a Python bool is another thing
        return f"jnp.{plan.index_dtype}({start})"
    made = f"jnp.arange({size}{dtype})"
    shape = at.spread(letters)
    present = [a for a in at.letters if a in letters]
    if len(present) == 1:
        after = len(at.letters) - at.letters.index(present[0]) - 1
        made += f"[:{', None' * after}]" if after else ""
    else:
        made += f".reshape({', '.join(dimensions(shape))})"
    return made if start == "0" else f"{start} + {made}"


def letters_of(node: Expr) -> list[str]:
    """The variables that index a slice, in the operand's own order."""
    return [str(i.value) for i in node.args if i.op == "var"]


def is_whole(plan: Plan, node: Expr) -> bool:
    """Whether a slice that begins at 0 everywhere is all of the operand."""
    assert isinstance(node.value, Operand)
    if plan.algorithm != "dense":
        return False
    lengths = plan.spec.lengths
    return all(
        index.op == "var" and lengths[str(axis)] == lengths[str(index.value)]
        for axis, index in zip(node.value.axes, node.args, strict=True)
    )


def exponential(plan: Plan) -> dict[str, Any]:
    """How a tile, and a row, are raised.

    base_2: scores come in units of log 2. Not where there are score functions: their
    values can be large, and another rounding of them costs more than the difference's.
    """
    kind = str(plan.option("exp"))
    base_2 = kind != "exp" and not plan.spec.score
    rows = "jnp.exp2" if base_2 else "jnp.exp"
    return {
        "base_2": base_2,
        "exp_scaled": kind != "exp" and not base_2,
        "polynomial": kind == "polynomial",
        "exp": {"exp": "jnp.exp", "exp2": "jnp.exp2"}.get(kind, "_exp2"),
        "exp_rows": rows,
    }


def axes_text(axes: list[int]) -> str:
    return str(axes[0]) if len(axes) == 1 else f"({', '.join(map(str, axes))})"


def inverse_keys(keys: str, letters: str) -> str:
    """How the keys that are there, in tile order, line up with the values' axes."""
    present = [a for a in letters if a in keys]
    order_ = [present.index(a) for a in keys]
    return "" if order_ == sorted(order_) else f".transpose{tuple(order_)}"


def permutation(memory: str, letters: str) -> str:
    """How to transpose rows [memory order, d] to [tile order, d]; "" where they agree."""
    present = [a for a in memory if a in letters]
    wanted = [a for a in letters if a in present]
    if present == wanted:
        return ""
    return f"({', '.join(str(present.index(a)) for a in wanted)}, {len(present)})"


def inverse(memory: str, letters: str) -> str:
    present = [a for a in letters if a in memory]
    wanted = [a for a in memory if a in letters]
    if present == wanted:
        return ""
    return f"({', '.join(str(present.index(a)) for a in wanted)}, {len(present)})"


def all_bits(plan: Plan) -> bool:
    """Whether products are told to keep all bits of float32.

    XLA:GPU else makes them in TensorFloat-32, with 10 of its 23 bits.
    """
    on_gpu = targets.get(plan.target).kind == "cuda"
    rounded = on_gpu and plan.option("product_dtype") == "float32"
    return rounded or plan.spec.precision == "highest"


def product_keywords(plan: Plan) -> list[str]:
    """What products are told beside their operands, as text."""
    keywords = []
    if all_bits(plan):
        keywords.append("precision=lax.Precision.HIGHEST")
    if plan.option("product_dtype") != plan.spec.stats_dtype:
        keywords.append(f"preferred_element_type=jnp.{plan.spec.stats_dtype}")
    return keywords
