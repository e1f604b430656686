"""What candidates cost: tiles counted, bytes and time modelled, plans made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from attngen import joint, slopes
from attngen.backends import Backend, modelled
from attngen.cost import Cost, executed_flop, moved_bytes
from attngen.intervals import Ranges, examine
from attngen.lists import SPAN, decided
from attngen.plans import Alternative, Choice, Option, Plan, grouped
from attngen.regions import spans
from attngen.skipping import sees_nothing, warnings
from attngen.spec import AttentionSpec
from attngen.targets import Target
from attngen.tiles import Limits, Tiles, chunk_limits, count_tiles

COMMON = ("algorithm", "q_chunk", "k_chunk")

Priced = tuple[dict[str, Option], Tiles, Cost]


class Pricing:
    """What the candidates of a spec cost, and the plans they make."""

    def __init__(
        self,
        spec: AttentionSpec,
        target: Target,
        backend: Backend,
        fix: Mapping[str, Option],
    ) -> None:
        self.spec, self.target, self.backend = spec, target, backend
        self.fixed = tuple(fix)
        self.forward, self.kept = joint.forward_spec(spec), 0
        if spec.derivatives == "vjp" and backend.backward is not None:
            self.kept = backend.backward.kept_bytes(spec, target)
        self.of = modelled(spec, backend)
        self.ranges = _ranges(spec, self.of)
        self.count = Counter(self.of)
        self.warnings = warnings(self.of)
        self.budget = budget_of(spec, target)

    def price(self, choice: dict[str, Option]) -> Priced:
        tiles = self.count(choice)
        cost = self.backend.cost(self.forward, self.target, choice, tiles)
        if self.kept:
            cost = replace(cost, temp_bytes=cost.temp_bytes + self.kept)
        return (choice, tiles, self._skipped(choice, cost))

    def _skipped(self, choice: Choice, cost: Cost) -> Cost:
        """Of what operands decide at run time a list visits some: a guess."""
        if choice.get("skip") != "list" or not decided(self.of):
            return cost
        seen = SPAN + int(choice["q_chunk"]) + int(choice["k_chunk"])
        left = min(1.0, seen / self.of.kv_len)
        return replace(cost, time_s=cost.time_s * left)

    def price_backward(self, choice: dict[str, Option]) -> Priced:
        """Of the backward pass alone."""
        passes = self.backend.backward
        assert passes is not None
        tiles = self.count(choice)
        cost = passes.cost(self.spec, self.target, choice, tiles)
        return (choice, tiles, self._skipped(choice, cost))

    def join(self, forward: Priced, backward: Priced) -> Priced:
        """One after the other: their time adds up, their memory is the larger.

        And beside it the larger of what libraries need, whichever pass has it.
        """
        cost, other = forward[2], backward[2]
        library = max(cost.library_bytes, other.library_bytes)
        both = replace(
            cost,
            temp_bytes=max(cost.own_bytes, other.own_bytes) + library,
            library_bytes=library,
            time_s=cost.time_s + other.time_s,
        )
        return (forward[0] | joint.backward_names(backward[0]), forward[1], both)

    def fits(self, priced: Priced) -> bool:
        return self.budget is None or priced[2].temp_bytes <= self.budget

    def plan(self, priced: Priced, alternatives: tuple[Alternative, ...] = ()) -> Plan:
        choice, tiles, cost = priced
        options = {n: v for n, v in choice.items() if n not in COMMON}
        sizes = int(choice["q_chunk"]), int(choice["k_chunk"])
        return Plan(
            spec=self.spec,
            target=self.target.name,
            backend=self.backend.name,
            algorithm=str(choice["algorithm"]),
            q_chunk=sizes[0],
            k_chunk=sizes[1],
            options=tuple(options.items()),
            tiles=tiles,
            index_dtype=self.ranges.index_dtype,
            drops_keys=self.ranges.drops_keys,
            temp_bytes=cost.temp_bytes,
            time_s=cost.time_s,
            flop=executed_flop(self.of, tiles, *sizes, cost.edge_share)
            // grouped(self.spec, choice)
            + self._backward_flop(choice),
            moved_bytes=moved_bytes(self.of, tiles, sizes[1]),
            fixed=self.fixed,
            warnings=self.warnings,
            alternatives=alternatives,
        )

    def _backward_flop(self, choice: Choice) -> int:
        if self.spec.derivatives != "vjp":
            return 0
        passes, own = self.backend.backward, joint.backward_part(choice)
        assert passes is not None
        return passes.flop(self.spec, own, self.count(own))


def _ranges(spec: AttentionSpec, of: AttentionSpec) -> Ranges:
    """Of a spec, and of the one that stands for it, the wider."""
    found = []
    for each in dict.fromkeys((spec, of)):
        limits = tuple(limit for span in spans(each) for limit in span.limits)
        found.append(examine(each, limits))
    wide = any(r.index_dtype == "int64" for r in found)
    return Ranges("int64" if wide else "int32", any(r.drops_keys for r in found))


class Counter:
    """Tiles by chunk sizes: most candidates share them."""

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self.tiles: dict[tuple[int, int, int], Tiles] = {}
        self.listed: dict[tuple[int, int, int], Tiles] = {}
        self.limits: dict[tuple[int, int], list[tuple[Limits, ...]]] = {}

    def __call__(self, choice: Choice) -> Tiles:
        q_chunk, k_chunk = int(choice["q_chunk"]), int(choice["k_chunk"])
        heads = grouped(self.spec, choice)
        key = (q_chunk, k_chunk, heads)
        if choice.get("skip") == "list":
            if key not in self.listed:
                found = _count_listed(self.spec, q_chunk, k_chunk, exact=False)
                self.listed[key] = found
            return self.listed[key]
        of = q_chunk, heads
        if of not in self.limits:
            known = chunk_limits(self.spec, q_chunk, exact=False, grouped=heads)
            self.limits[of] = known
        if key not in self.tiles:
            self.tiles[key] = count_tiles(
                self.spec, q_chunk, k_chunk, grouped=heads, limits=self.limits[of]
            )
        return self.tiles[key]


def exact(spec: AttentionSpec, choice: Choice, q_chunk: int, k_chunk: int) -> Tiles:
    """The tiles of one head, not by a sample."""
    if sees_nothing(spec):  # its chunks are small, and many
        return Tiles(0, 0, -(-spec.q_len // q_chunk) * -(-spec.kv_len // k_chunk))
    if choice.get("skip") == "list":
        return _count_listed(spec, q_chunk, k_chunk)
    return count_tiles(spec, q_chunk, k_chunk, grouped=grouped(spec, choice))


def _count_listed(
    spec: AttentionSpec, q_chunk: int, k_chunk: int, *, exact: bool = True
) -> Tiles:
    from attngen.tilemap import count_listed  # needs NumPy

    return count_listed(spec, q_chunk, k_chunk, exact=exact)


def budget_of(spec: AttentionSpec, target: Target) -> int | None:
    """The spec's budget, or what the target's memory leaves beside inputs and outputs."""
    if spec.budget_bytes is not None or target.memory_bytes is None:
        return spec.budget_bytes
    arrays = ("q", "k", "v", *spec.outputs, *slopes.cotangents(spec).values())
    own = spec.bytes_of(*arrays, *slopes.gradients(spec).values()) // spec.devices
    return target.memory_bytes - own - spec.bytes_of(*(o.name for o in spec.operands))
