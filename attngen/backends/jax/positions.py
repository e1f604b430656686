"""The statements that define where a tile stands: its batches, heads, queries and keys."""

from __future__ import annotations

from attngen.backends.jax import shards
from attngen.backends.jax.statements import as_tuple, assign
from attngen.backends.jax.tile import Starts, Tile, dimensions, heads, ranged, times
from attngen.plans import Plan


def definition(
    plan: Plan, at: Tile, starts: Starts, name: str, width: int
) -> list[str]:
    """Statements that define a name: b_index, h_index, q_index, k_index, q_pos, k_pos, away,
    shift, kv_length or q_length."""
    spec = plan.spec
    if name in ("b_index", "h_index") and shards.is_split(plan, name[0]):
        return _of_shards(plan, at, starts, name, width)
    if name == "b_index":
        return [f"{name} = {ranged(plan, at, starts.b, 'b', at.sizes['b'])}"]
    if name == "h_index":
        return _heads(plan, at, starts, width)
    if name in ("q_index", "k_index"):
        letter = name[0]
        start = starts.q if letter == "q" else starts.k
        return [f"{name} = {ranged(plan, at, start, letter, at.sizes[letter])}"]
    if name == "away":  # XLA makes both on the fly, in the tile's own layout
        keys, queries = (ranged(plan, at, "0", a, at.sizes[a]) for a in "kq")
        return [f"away = {keys} - {queries}"]
    if name == "shift":
        q = starts.q + (" + Q_OFFSET" if spec.static_q_offset else "")
        k = f"({starts.k} + K_OFFSET)" if spec.kv_offset else starts.k
        return [f"shift = {q} - {k}  # of the tile's first query from its first key"]
    if name == "k_pos":
        return ["k_pos = k_index + K_OFFSET"]
    if name == "q_pos" and spec.static_q_offset is not None:
        return ["q_pos = q_index + Q_OFFSET"]
    if name == "q_pos":
        offset = _per_batch(plan, at, starts, "offset_at_b", "q_offset", width)
        return [*offset, "q_pos = q_index + offset_at_b"]
    operand = {"kv_length": "kv_lengths", "q_length": "q_lengths"}[name]
    return _per_batch(plan, at, starts, name, operand, width)


def _heads(plan: Plan, at: Tile, starts: Starts, width: int) -> list[str]:
    first = times(starts.g, plan.spec.repeats)
    line = f"h_index = {ranged(plan, at, first, 'gr', heads(at))}"
    if len(line) <= width:
        return [line]
    made = line.partition(f"h_index = {first} + ")[2]
    numbers, _, rest = made.partition(".reshape")
    return [f"h_index = {numbers}", f"h_index = {first} + h_index.reshape{rest}"]


def _per_batch(
    plan: Plan, at: Tile, starts: Starts, name: str, operand: str, width: int
) -> list[str]:
    """Define an operand [b] for the tile's batches."""
    size, shape = at.sizes["b"], at.spread("b")
    if size == "1":
        return [f"{name} = {operand}[{starts.b}]"]
    if starts.b == "0":
        part = [operand]
    else:
        begins = as_tuple(shards.begins(plan, "b", {"b": starts.b}))
        sizes = as_tuple(shards.sizes(plan, "b", {"b": size}))
        part = ["lax.dynamic_slice", operand, begins, sizes]
    return assign(name, [part, [".reshape", *dimensions(shape)]], width)


def _of_shards(
    plan: Plan, at: Tile, starts: Starts, name: str, width: int
) -> list[str]:
    """The batches, or query heads, of a tile that has some of every shard."""
    letter = name[0]
    begin = starts.b if letter == "b" else times(starts.g, plan.spec.repeats)
    begins = shards.begins(plan, letter, {letter: begin})
    sizes = shards.sizes(plan, letter, {})
    whole, view = {"b": "B", "h": "H"}[letter], shards.shape(plan, letter, {})
    dtype = ", dtype=jnp.int64" if plan.index_dtype == "int64" else ""
    line = f"{name} = jnp.arange({whole}{dtype}).reshape({', '.join(view)})"
    spread = at.spread({"b": "b", "h": "gr"}[letter])
    calls = [["lax.dynamic_slice", name, as_tuple(begins), as_tuple(sizes)]]
    calls.append([".reshape", *dimensions(spread)])
    return [line, *assign(name, calls, width)]
