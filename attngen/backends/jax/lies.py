"""How chunks of queries and keys lie in arrays, and in the tiles of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from attngen.backends.jax import shards
from attngen.backends.jax.loops import WHOLE
from attngen.backends.jax.statements import as_tuple
from attngen.backends.jax.tile import (
    Starts,
    Tile,
    chosen,
    dimensions,
    heads,
    inverse,
    order,
    permutation,
    times,
)
from attngen.plans import Plan


def head_dims(plan: Plan) -> tuple[str, str]:
    same = plan.spec.qk_dim == plan.spec.v_dim
    return ("D", "D") if same else ("QK_DIM", "V_DIM")


def key_letters(plan: Plan, at: Tile) -> str:
    """The axes of a chunk of keys, as it lies, but for its vectors' own."""
    dn = chosen(plan, "slices") == "dn"
    memory_order = "bgk" if dn else order(plan.spec.layout, "bkg")
    return "".join(a for a in memory_order if a in at.letters)


@dataclass(frozen=True)
class Lies:
    """How a chunk of queries (axis q) or of keys (k) of an array lies in memory, and in a tile.

    dim: of its vectors, as text. With slices = dn these lie across, the tokens last.
    """

    plan: Plan
    at: Tile
    starts: Starts
    axis: str
    dim: str

    @property
    def dn(self) -> bool:
        return chosen(self.plan, "slices") == "dn"

    @property
    def letters(self) -> str:
        """The array's axes: of queries h, of keys g."""
        heads_ = "h" if self.axis == "q" else "g"
        if self.dn:
            return f"b{heads_}{self.axis}"
        return order(self.plan.spec.layout, f"b{self.axis}{heads_}")

    def _with_dim(self, items: list[str], dim: str) -> list[str]:
        return [*items[:-1], dim, items[-1]] if self.dn else [*items, dim]

    @property
    def begin(self) -> str:
        starts = self.starts
        head = times(starts.g, self.plan.spec.repeats)
        of = {"b": starts.b, "q": starts.q, "k": starts.k, "h": head, "g": starts.g}
        begins = shards.begins(self.plan, self.letters, of, ahead=True)
        return as_tuple(self._with_dim(begins, "0"))

    @property
    def size(self) -> str:
        of = self.at.sizes | {"h": heads(self.at)}
        sizes = shards.sizes(self.plan, self.letters, of, ahead=True)
        return as_tuple(self._with_dim(sizes, self.dim))

    @property
    def whole(self) -> str:
        """The shape of the array."""
        shape = shards.shape(self.plan, self.letters, WHOLE, ahead=True)
        return as_tuple(self._with_dim(shape, self.dim))

    @property
    def _back(self) -> str:
        return "" if self.dn else shards.moved(self.plan, f"{self.letters}d", back=True)

    @property
    def _ahead(self) -> str:
        return "" if self.dn else shards.moved(self.plan, f"{self.letters}d")

    @property
    def _memory_order(self) -> str:
        return self.letters.replace("h", "gr")

    @property
    def _tile_order(self) -> str:
        """Of queries as a tile has them; of keys as they lie."""
        if self.axis == "k":
            return key_letters(self.plan, self.at)
        return self.at.rows

    @property
    def subscripts(self) -> str:
        letters = self._tile_order
        return f"{letters[:-1]}d{letters[-1]}" if self.dn else f"{letters}d"

    @property
    def shape(self) -> str:
        """Of the sums of a chunk: dq as rows of a tile, dk and dv tokens last."""
        if self.axis == "q":
            sizes = [self.at.sizes[a] for a in self._tile_order]
            return as_tuple(self._with_dim(sizes, self.dim))
        every = self.at.sizes | {"d": self.dim}
        return as_tuple([every[a] for a in sums_of(self.plan, self.at)])

    def sliced(self, source: str) -> list[list[str]]:
        """The calls that take a chunk, at `at`, as a tile has it."""
        calls = [["lax.dynamic_slice", source, "at", self.size]]
        if self._back:
            calls.append([".transpose", *dimensions(self._back)])
        present = [a for a in self._memory_order if a in self.at.letters]
        sizes = [self.at.sizes[a] for a in present]
        calls.append([".reshape", *self._with_dim(sizes, self.dim)])
        if self.axis == "q" and not self.dn:
            moved = permutation(self._memory_order, self.at.letters)
            calls += [[".transpose", *dimensions(moved)]] if moved else []
        return calls

    def put(self) -> list[str]:
        """How the sums of a chunk become one of the array: methods, as text."""
        calls: list[str] = []
        if self.axis == "q" and not self.dn:
            moved = inverse(self._memory_order, self.at.letters)
            calls += [f".transpose{moved}"] if moved else []
        elif not self.dn:
            summed = sums_of(self.plan, self.at)
            order_ = [summed.index(a) for a in f"{key_letters(self.plan, self.at)}d"]
            calls += [f".transpose{as_tuple(list(map(str, order_)))}"]
        sizes = shards.sizes(
            self.plan, self.letters, self.at.sizes | {"h": heads(self.at)}
        )
        calls.append(f".reshape{as_tuple(self._with_dim(sizes, self.dim))}")
        return [*calls, *([f".transpose{self._ahead}"] if self._ahead else [])]

    @property
    def across(self) -> str:
        """How the whole array is transposed ahead, with slices = dn."""
        return "(0, 2, 3, 1)" if self.plan.spec.layout == "bthd" else "(0, 1, 3, 2)"

    @property
    def along(self) -> str:
        """And back."""
        return "(0, 3, 1, 2)" if self.plan.spec.layout == "bthd" else "(0, 1, 3, 2)"


def sums_of(plan: Plan, at: Tile) -> str:
    """The axes of dk and dv as they are summed up: tokens last."""
    return "".join(a for a in "bg" if a in at.letters) + "dk"


def subscripts(plan: Plan, at: Tile) -> tuple[str, str, str]:
    """Of s and dp; of dq; of dk and dv, whose vectors lie across.

    Processors multiply a tile from the right, where its rows are summed over.
    """
    none = Starts("0", "0", "0", "0")
    rows, keys = (Lies(plan, at, none, axis, "D").subscripts for axis in "qk")
    letters = at.letters
    return (
        f"{rows},{keys}->{letters}",
        f"{letters},{keys}->{rows}",
        f"{rows},{letters}->{sums_of(plan, at)}",
    )
