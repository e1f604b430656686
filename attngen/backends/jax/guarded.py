"""The statements of a tile that JAX differentiates itself, guarded: see singular.py."""

from __future__ import annotations

from collections.abc import Iterable

from attngen import expr
from attngen.backends.jax.tile import Starts, Tile
from attngen.backends.jax.tile_code import WIDTH, TileCode, Writer
from attngen.expr import Expr
from attngen.plans import Plan
from attngen.singular import LIVE, guarded, hides_keys

WHY = "# 0 times an infinite slope is NaN: "
HIDDEN = (
    WHY + "where a key isn't there, what might be",
    "# infinite is given a harmless number",
)
BRANCH = (
    WHY + "in a branch that isn't taken, what",
    "# might be infinite is given a harmless number",
)
FIRST = "# a score of -inf hides a key as well: a first pass tells which are there"


def tile_code(
    plan: Plan, at: Tile, starts: Starts, indent: int, ragged: bool
) -> tuple[TileCode, bool]:
    """The statements, and whether those of scores read `seen`: which keys a mask shows."""
    writer = GuardedWriter(plan, at, starts, WIDTH - indent, ragged, None)
    return writer.write(), writer.reads_seen


class GuardedWriter(Writer):
    """Writes scores whose derivatives are finite also where a key is hidden."""

    reads_seen = False

    def scores(self, expressions: Iterable[Expr]) -> None:
        spec, drops_keys = self.spec, hides_keys(self.spec)
        own = tuple(expressions)
        safe = guarded(spec)
        if safe == own:
            return super().scores(own)
        by_live = any(n == LIVE for x in safe for n in expr.walk(x))
        masked = spec.mask is not None or spec.kv_lengths or spec.q_lengths
        self.reads_seen = by_live and masked
        if by_live and drops_keys:
            self._first(own)
        self.code.score += HIDDEN if by_live else BRANCH
        super().scores(safe)
        if by_live and drops_keys:
            self.code.score.append("s = jnp.where(live, s, -jnp.inf)")

    def _first(self, own: tuple[Expr, ...]) -> None:
        """The scores as they are, which tell what is there."""
        self.code.score += [FIRST, "s_0 = s"]
        super().scores(own)
        seen = "seen & (s != -jnp.inf)" if self.reads_seen else "s != -jnp.inf"
        self.code.score += [f"live = {seen}", "s = s_0"]

    def _names(self) -> dict[str, str]:
        live = "live" if hides_keys(self.spec) else "seen"
        return super()._names() | {"live": live}
