"""Which key chunks a chunk of queries visits, as a list: what each tile holds, told at run time.

The verdict on a tile (verdicts.py) is emitted as arithmetic over all key chunks at once: on their
ends, and on the least and the greatest value that an operand has in each, which is all that is
looked at. The chunks that all queries see come first in the list, then those that some see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from attngen.backends.jax.lengths import Lengths
from attngen.backends.jax.statements import assign, searched
from attngen.backends.jax.tile import Starts, Tile, heads, times
from attngen.expr import variables
from attngen.extremes import FALSE
from attngen.lists import Blocks, Extremes, Offset, Search, held, listed, pairs
from attngen.operands import Operand
from attngen.plans import Plan
from attngen.printer import ArrayPrinter, read_name, stepwise
from attngen.verdicts import ENDS

WIDTH = 76
KEYS = "key = jnp.arange(K_CHUNKS) * K_CHUNK"


@dataclass
class Listing:
    """Statements, `ahead` of the loops over queries and in them, and the key loops."""

    lines: list[str] = field(default_factory=list)
    ahead: list[str] = field(default_factory=list)
    functions: set[str] = field(default_factory=set)  # that these call
    loops: list[tuple[str, str, str]] = field(default_factory=list)


def listing(
    plan: Plan,
    at: Tile,
    starts: Starts,
    ragged: bool,
    lengths: Lengths,
    *,
    apart: bool = False,
) -> Listing:
    """Statements for `order`: key chunks, of which the first `full` are full, and those up
    to `visited` on an edge.

    Args:
        apart: as for `bounds`.
    """
    return _Writer(plan, at, starts, ragged, lengths, apart).write()


class _Writer:
    def __init__(
        self,
        plan: Plan,
        at: Tile,
        starts: Starts,
        ragged: bool,
        lengths: Lengths,
        apart: bool,
    ) -> None:
        self.plan, self.spec, self.at = plan, plan.spec, at
        self.starts, self.ragged, self.lengths = starts, ragged, lengths
        self.apart = apart
        assert plan.spec.mask is not None
        found = listed(plan.spec.mask.expr)
        self.verdict, self.told = found.verdict, found.told
        self.made = Listing()
        self.names: frozenset[str] = frozenset()

    def write(self) -> Listing:
        lines, some, every = self.made.lines, self.verdict.some, self.verdict.every
        names = variables(some) | variables(every)
        read = names
        for x in self.told:
            read |= frozenset(v for e in x.made_from for v in variables(e))
        self.names = read
        texts = {n: n for n in read}
        lines += self._ends(read)
        for x in self.told:
            if isinstance(x, Extremes):
                lines += self._extremes(x)
            elif isinstance(x, Offset):
                lines += self._offset(x, texts)
            elif isinstance(x, Search):
                lines += self._search(x, texts)
            else:
                lines += self._blocks(x, texts)
        for name, condition in (("some", some), ("every", every)):
            if condition == FALSE:
                continue
            printer = ArrayPrinter("jnp", texts, repr, prefix=f"{name}_part")
            lines += stepwise(printer, name, condition, WIDTH)
        lines += self._lengths()
        of_keys = {"k_lo", "k_hi"}
        of_keys |= {n for x in self.told if x.of_keys for n in x.names}
        if not names & of_keys:
            lines.append("some = jnp.broadcast_to(some, K_CHUNKS)")
        if every == FALSE:
            lines += [
                "order = jnp.argsort(~some)  # the empty ones last",
                "visited = some.sum()",
            ]
            self.made.loops = [("edge", "0", "visited")]
            return self.made
        lines += [
            "kind = jnp.where(every, 0, jnp.where(some, 1, 2))",
            "order = jnp.argsort(kind)  # the full ones first, the empty ones last",
            "full, visited = (kind == 0).sum(), (kind < 2).sum()",
        ]
        self.made.loops = [("interior", "0", "full"), ("edge", "full", "visited")]
        return self.made

    def _lengths(self) -> list[str]:
        """What else a key chunk must be, to be visited, or to need no mask."""
        spec, q = self.spec, self.starts.q
        some, every = [], []
        if self.ragged:
            every.append("key + K_CHUNK <= S")  # the last overlaps
        if self.apart:
            every.append(f"{q} == i * Q_CHUNK")
        if spec.kv_lengths:
            self.made.lines.insert(0, f"kv_count = {self.lengths.part('kv_lengths')}")
            some.append(f"key < {self.lengths.extreme('kv_count', 'max')}")
            least = self.lengths.extreme("kv_count", "min")
            every.append(f"key + K_CHUNK <= {least}")
        if spec.q_lengths:
            self.made.lines.insert(0, f"q_count = {self.lengths.part('q_lengths')}")
            some.append(f"{q} < {self.lengths.extreme('q_count', 'max')}")
            least = self.lengths.extreme("q_count", "min")
            every.append(f"{q} + Q_CHUNK <= {least}")
        lines = [f"some &= {x}" for x in some]
        if self.verdict.every != FALSE:
            lines += [f"every &= {x}" for x in every]
        return lines

    def _ends(self, names: frozenset[str]) -> list[str]:
        """Where the tile's queries, and all key chunks, begin and end."""
        spec, static = self.spec, self.spec.static_q_offset
        lines = []
        shift = " + K_OFFSET" if spec.kv_offset else ""
        low = high = "" if static == 0 else " + Q_OFFSET"
        if static is None and {"q_lo", "q_hi"} & names:
            lines.append(f"offset = {self.lengths.part('q_offset')}")
            low = f" + {self.lengths.extreme('offset', 'min')}"
            high = f" + {self.lengths.extreme('offset', 'max')}"
        q, b = self.starts.q, self.starts.b
        h = times(self.starts.g, spec.repeats)
        end = "jnp.minimum(key + K_CHUNK, S)" if self.ragged else "key + K_CHUNK"
        texts = {
            "q_lo": _sum(q, low),
            "q_hi": _sum("Q_CHUNK" if q == "0" else f"{q} + Q_CHUNK", high),
            "k_lo": f"key{shift}",
            "k_hi": f"{end}{shift}",
            "b_lo": b,
            "b_hi": _sum(b, f" + {self.at.sizes['b']}"),
            "h_lo": h,
            "h_hi": _sum(h, f" + {heads(self.at)}"),
        }
        return [*lines, KEYS, *(f"{n} = {texts[n]}" for n in ENDS if n in names)]

    def _extremes(self, x: Extremes) -> list[str]:
        if not x.of_keys:  # as the mask reads it: the tile's own part
            assert isinstance(x.node.value, Operand)
            name = read_name(x.node)
            ends = ((x.least, "min"), (x.greatest, "max"))
            return [f"{end} = {name}.{how}()" for end, how in ends if end in self.names]
        return self._of_keys(x)

    def _of_keys(self, x: Extremes) -> list[str]:
        """Of each key chunk: over all keys ahead of the loops, then of the tile's batches."""
        assert isinstance(x.node.value, Operand)
        name, letters = x.node.value.name, [i.value for _, i in pairs(x.node)]
        axis = letters.index("k")
        source = name
        if axis != len(letters) - 1:
            source = f"jnp.moveaxis({name}, {axis}, -1)"
        if x.node.value.axes[axis] != "k":  # as long as the queries
            source += "[..., :S]"
        every = f"{name}_at_chunks"
        if any(line.startswith(f"{every} = ") for line in self.made.ahead):
            every += f"_{axis}"
        line = f"{every} = _extremes({source}, K_CHUNK)"
        for known in self.made.ahead:  # the same numbers, read elsewhere
            if known.endswith(f" = _extremes({source}, K_CHUNK)"):
                every, line = known.partition(" = ")[0], known
        self.made.functions.add("_extremes")
        if line not in self.made.ahead:
            self.made.ahead.append(line)
        start = {"b": self.starts.b, "h": times(self.starts.g, self.spec.repeats)}
        size = {"b": self.at.sizes["b"], "h": heads(self.at)}
        begins, sizes = [], []
        for _, index in pairs(x.node):
            letter = str(index.value)
            if letter != "k":
                begins.append(start.get(letter, letter))
                sizes.append(size.get(letter, "1"))
        count, lines = len(begins), []
        axes = "0" if count == 1 else f"({', '.join(map(str, range(count)))})"
        whole = set(begins) == {"0"} and all(i.op == "var" for _, i in pairs(x.node))
        for number, (target, how) in enumerate(((x.least, "min"), (x.greatest, "max"))):
            if target not in self.names:
                continue
            own = f"{every}[{number}]"
            if all(s == "1" for s in sizes):
                at = f"[{', '.join(begins)}]" if begins else ""
                lines.append(f"{target} = {own}{at}")
                continue
            if whole:
                lines.append(f"{target} = {own}.{how}({axes})")
                continue
            at, extent = ", ".join([*begins, "0"]), ", ".join([*sizes, "K_CHUNKS"])
            calls = [["lax.dynamic_slice", own, f"({at})", f"({extent})"]]
            lines += assign(target, [*calls, [f".{how}", axes]], WIDTH)
        return lines

    def _search(self, x: Search, texts: Mapping[str, str]) -> list[str]:
        assert isinstance(x.node.value, Operand)
        text = ArrayPrinter("jnp", texts, repr).text(x.end)
        return searched(x.name, x.node.value, text, WIDTH)

    def _offset(self, x: Offset, texts: Mapping[str, str]) -> list[str]:
        assert isinstance(x.node.value, Operand)
        printer = ArrayPrinter("jnp", texts, repr, prefix="limit")
        lines = stepwise(printer, x.name, x.end, WIDTH)
        return [*lines, f"{x.name} = {x.node.value.name}[{x.name}]"]

    def _blocks(self, x: Blocks, texts: Mapping[str, str]) -> list[str]:
        """How many blocks of a tile hold: by sums over all blocks, ahead of the loops."""
        assert isinstance(x.node.value, Operand)
        name = x.node.value.name
        printer = ArrayPrinter("jnp", texts, repr)
        sums = f"{name}_at_sums"
        line = f"{sums} = _sums({name})"
        self.made.functions.add("_sums")
        if line not in self.made.ahead:
            self.made.ahead.append(line)
        lines = held(x, sums, printer)
        count, area = f"{name}_at_tiles", f"{name}_at_area"
        several: list[str] = []
        if x.letters:
            start = {"b": self.starts.b, "h": times(self.starts.g, self.spec.repeats)}
            size = {"b": self.at.sizes["b"], "h": heads(self.at)}
            begins = ", ".join([*(start[a] for a in x.letters), "0"])
            sizes = ", ".join([*(size[a] for a in x.letters), "K_CHUNKS"])
            axes = "0" if len(x.letters) == 1 else "(0, 1)"
            calls = [["lax.dynamic_slice", count, f"({begins})", f"({sizes})"]]
            lines += assign(count, [*calls, [".sum", axes]], WIDTH)
            several = [size[a] for a in x.letters if size[a] != "1"]
        area = " * ".join([area, *several])
        return [*lines, f"{x.some} = {count} > 0", f"{x.every} = {count} == {area}"]


def _sum(start: str, more: str) -> str:
    """start + more, without a zero."""
    if start != "0":
        return f"{start}{more}"
    return more.removeprefix(" + ") or "0"
