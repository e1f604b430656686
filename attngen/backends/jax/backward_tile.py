"""The statements of a tile of the backward pass: scores made again, p, and ds.

p = exp(s - lse)      dp = dout·v      ds = p · (dp - delta)      delta = Σ dout·out
"""

from __future__ import annotations

import re

from attngen.backends.jax.backward_chunks import (
    WIDTH,
    ChunkWriter,
    keeps_mass,
    scale_name,
    start,
    trained,
)
from attngen.backends.jax.lies import key_letters, subscripts
from attngen.backends.jax.slope_code import SUMS, Line, SlopeWriter
from attngen.backends.jax.statements import as_tuple
from attngen.backends.jax.tile import (
    axes_text,
    chosen,
    drops,
    inverse_keys,
    ranged,
)


class TileWriter(ChunkWriter):
    """Writes the statements of a tile."""

    def tile(self) -> list[str]:
        """p and ds, and what gradients of operands are made of."""
        self._add(*start(self.loops, "q"), *start(self.loops, "k"))
        self._add(f"{', '.join(self.of_queries)} = of_queries")
        self._add(f"{', '.join(self.of_keys)} = of_keys")
        writer = SlopeWriter(self.plan, self.at, self.starts, WIDTH, False, None)
        made = writer.slopes(masked=self.loops.masked, seen=self.seen)
        self._add(*made.code.rows, *made.code.keys)
        s, _, _ = subscripts(self.plan, self.at)
        self._add(f's = {self.einsum}("{s}", rows, kc)')
        if chosen(self.plan, "scale") != "queries":
            self._add(f"s *= {scale_name(self.plan)}")
        self._add(*made.code.score)
        self._weights(made.code.edge)
        self._store()
        if drops(self.plan):
            self._add(*made.code.kept)
            self._add("kept = lax.optimization_barrier(kept)  # made once")
        p = "jnp.where(kept, p, 0)" if drops(self.plan) else "p"
        if self.out and self.twice:
            self._ds_twice(s, made.back)
            self._add(f"return {p}, ds, again, kc")
            self._without_unused()
            return self._text()
        if self.out:
            self._add(*self._dp(s))
            if self.summed:
                self._add(
                    "if delta_row is None:  # it is what is summed here",
                    "    return p.sum(-1), (p * dp).sum(-1)",
                )
            self._add(f"ds = {self.p} * (dp - delta_row[..., None])")
        else:
            self._add(f"ds = {self.p} * dlse_row[..., None]")
        names = [f"d_{name}" for name in trained(self.plan)]
        if names:
            self.lines.append((f"{as_tuple(names)} = sums", (SUMS,)))
        self.lines += made.back
        if names:
            tuple_ = ", ".join(names) if len(names) > 1 else as_tuple(names)
            self.lines.append((f"sums = {tuple_}", (SUMS,)))
        if chosen(self.plan, "store") == "both":
            cast = self._cast(self.spec.stats_dtype)
            self._add(f"ds = lax.optimization_barrier(ds{cast})")
        self._add(f"return {p}, ds, kc" + (", sums" if names else ""))
        self._without_unused()
        return self._text()

    def _dp(self, s: str) -> list[str]:
        """The cotangent of p, of which dropout passes a part."""
        lines = [f'dp = {self.einsum}("{s}", d_rows, vc)']
        if self.spec.dropout:
            lines.append("dp = jnp.where(kept, dp, 0)")
        return lines

    def _store(self) -> None:
        """p where it is made once, and kept for its products."""
        store = chosen(self.plan, "store")
        if store == "free":
            return
        cast = self._cast(self.spec.stats_dtype) if store != "p" else ""
        self._add(f"p = lax.optimization_barrier(p{cast})  # made once")
        if cast:
            self.p = f"p.astype({self.stats})"

    def _ds_twice(self, s: str, back: list[Line]) -> None:
        """ds for dk, and again for dq: each product is fused with its own."""
        made = [
            *self._dp(s),
            f"ds = {self.p} * (dp - delta_row[..., None])",
        ]
        self._add("", "def ds_of(d_rows, vc, delta_row):")
        self._add(*(f"    {line}" for line in made))
        outer, self.lines = self.lines, [*back]
        lines = self._text()
        self.lines = outer
        self._add(*(f"    {line}" for line in lines), "    return ds", "")
        self._add(
            "ds = ds_of(d_rows, vc, delta_row)",
            "same = lax.optimization_barrier((d_rows, vc, delta_row))",
            "again = ds_of(*same)  # each is fused with a product of its own",
        )

    def _without_unused(self) -> None:
        """Leave out where chunks begin, if nothing else here asks."""
        for name in ("q_start", "k_start"):
            reads = [x for x, _ in self.lines if re.search(rf"\b{name}\b", x)]
            if len(reads) == 1:
                self.lines = [x for x in self.lines if x[0] != reads[0]]

    def _weights(self, mask: list[str]) -> None:
        """p, which is 0 where the key isn't seen; what those hold doesn't matter."""
        inner = "s - lse_row[..., None]"
        if self.how["exp_scaled"]:
            inner = f"({inner}) * LOG2E"
        self._add(f"p = {self.how['exp']}({inner})")
        if self.summed:
            self._add(
                "if mass_row is not None:",
                "    p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded",
            )
        elif keeps_mass(self.plan):
            self._add(
                "p *= (1 / mass_row)[..., None]  # it adds up to 1: lse is rounded"
            )
        if self.plan.drops_keys:
            self._add("scored = s != -jnp.inf")
        lines = list(mask)
        for letter in sorted(self.loops.ragged):
            lines += self._counted(letter, lines)
        if self.loops.masked:
            self._add(*lines, masked=True)
            if self.plan.drops_keys and lines:
                self._add("scored &= seen", masked=True)
        if self.plan.drops_keys or self.loops.masked:
            self._add(*self._blank(), masked=not self.plan.drops_keys)

    def _counted(self, letter: str, before: list[str]) -> list[str]:
        """That a chunk which overlaps the one before it counts none twice."""
        index, chunk = {"q": ("i", "Q_CHUNK"), "k": ("c", "K_CHUNK")}[letter]
        lines = []
        name = f"{letter}_index"
        known = any(
            x.startswith(f"{name} = ") for x in (*(x for x, _ in self.lines), *before)
        )
        if not known:
            begin = self.starts.q if letter == "q" else self.starts.k
            made = ranged(self.plan, self.at, begin, letter, self.at.sizes[letter])
            lines.append(f"{name} = {made}")
        sign = "&=" if any(x.startswith("seen = ") for x in before) else "="
        return [*lines, f"seen {sign} {name} >= {index} * {chunk}"]

    def _blank(self) -> list[str]:
        """p of what isn't seen is 0; keys that no query here sees may hold NaN."""
        letters, keys = self.at.letters, key_letters(self.plan, self.at)
        rows = [letters.index(a) for a in letters if a not in keys]
        moved = inverse_keys(keys, letters)
        any_ = f"there = jnp.broadcast_to({self.seen}, s.shape).any({axes_text(rows)})"
        lines = [f"{any_}{moved}{self.spread}"]
        if len(lines[0]) > WIDTH - 4:
            lines = [any_, f"there = there{moved}{self.spread}"]
        lines.append("kc = jnp.where(there, kc, 0)  # else NaN, perhaps")
        if self.out:
            lines.append("vc = jnp.where(there, vc, 0)")
        return [*lines, f"p = jnp.where({self.seen}, p, 0)"]
