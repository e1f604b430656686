"""What TPU's compiler expects a program to take: its own estimates, weighted by turns.

Each instruction of a compiled module carries an estimate in cycles. A loop's body counts as
often as it is gone through: as the module itself says where its bounds are constants, else as
the plan says of the loop of that name. Where neither does, where there is a branch, or where
something large has no estimate, the whole is unknown.

Copies beside the work have no estimate: what they move to or from HBM takes its time, and a
computation takes as long as its work or its copies, whichever is longer. A slice that is
written in place has none either, nor has a reshape that moves what it is of: they take the
time of their bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from attngen.backends.jax.hlo import Instruction, Module, parse

Turns = Mapping[str, Sequence[float]]  # of the loops with that function, in their order
Known = dict[int, int]  # element of a tuple → its value
# what moves no data
FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id", "opt-barrier",
)  # fmt: skip
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast")  # targets of custom calls
SMALL_BYTES = 4096  # of one vector register: index arithmetic has no estimate


def estimated_cycles(
    hlo: str, bytes_per_cycle: float, turns: Turns | None = None
) -> int | None:
    """Cycles of a compiled module; None where some of it is unknown.

    Args:
        hlo: the optimised module's text.
        bytes_per_cycle: to and from the device's memory.
        turns: for each function that loops call in their turns, how often each of these
            loops does so on average, in the order in which the program has them.
    """
    module = parse(hlo)
    if not module.entry:
        return None
    total = _Weights(module, bytes_per_cycle, turns or {}).cost(module.entry, {})
    return None if total is None or total <= 0 else round(total)


class _Weights:
    def __init__(self, module: Module, bytes_per_cycle: float, turns: Turns) -> None:
        self.module, self.turns = module, turns
        self.bytes_per_cycle = bytes_per_cycle
        self.loops = self._named_loops()

    def cost(self, computation: str, known: Known) -> float | None:
        """Cycles of a computation, of whose argument some elements are known numbers."""
        work = copied = 0.0
        for i in self.module.computations.get(computation, []):
            if i.opcode.endswith("-start"):
                continue
            if i.opcode.endswith("-done"):
                copied += i.bytes / self.bytes_per_cycle
                continue
            own = self._own(computation, i, known)
            if own is None:
                return None
            work += own
        return max(work, copied)

    def _own(self, computation: str, i: Instruction, known: Known) -> float | None:
        if i.opcode == "while":
            return self._loop(computation, i, known)
        if i.opcode == "conditional":
            return None
        if i.opcode == "call":
            return self.cost(i.called("to_apply") or "", {})
        if i.cycles is not None:
            return i.cycles
        if i.opcode == "dynamic-update-slice":
            written = self.module.find(computation, i.operands[1])
            return None if written is None else written.bytes / self.bytes_per_cycle
        small = i.opcode in FREE or i.bytes <= SMALL_BYTES
        small = small or any(f'"{target}"' in i.attributes for target in FREE_CALLS)
        if i.opcode == "reshape" and not small:  # no bitcast: all is read, and written
            read = self.module.find(computation, i.operands[0])
            moved = None if read is None else read.bytes + i.bytes
            return None if moved is None else moved / self.bytes_per_cycle
        return 0.0 if small else None

    def _loop(self, computation: str, loop: Instruction, known: Known) -> float | None:
        body, condition = loop.called("body"), loop.called("condition")
        if body is None or condition is None:
            return None
        start = self._tuple(computation, loop.operands[0], known)
        kept = {n: v for n, v in start.items() if self._is_kept(body, n)}
        turns: float | None = self._constant_turns(body, condition, start, kept)
        if turns is None:
            turns = self.loops.get(loop.name)
        once = self.cost(body, kept)
        return None if turns is None or once is None else turns * once

    # What a loop's bounds are, where they are constants.

    def _tuple(self, computation: str, name: str, known: Known) -> Known:
        """Which elements of a tuple are known numbers."""
        found = self.module.find(computation, name)
        if found is None or found.opcode != "tuple":
            return {}
        values = [self._value(computation, x, known) for x in found.operands]
        return {n: v for n, v in enumerate(values) if v is not None}

    def _value(self, computation: str, name: str, known: Known) -> int | None:
        i = self.module.find(computation, name)
        if i is None:
            return None
        if i.opcode == "constant":
            return int(i.inside) if i.inside.lstrip("-").isdigit() else None
        if i.opcode in ("copy", "bitcast", "convert"):
            return self._value(computation, i.operands[0], known)
        if i.opcode == "get-tuple-element":
            source = self.module.find(computation, i.operands[0])
            index = i.number("index")
            if (
                source is not None
                and source.opcode == "parameter"
                and index is not None
            ):
                return known.get(index)
        return None

    def _element(self, computation: str, name: str) -> int | None:
        """Which element of the computation's argument a value is, unchanged."""
        i = self.module.find(computation, name)
        while i is not None and i.opcode in ("copy", "bitcast"):
            i = self.module.find(computation, i.operands[0])
        if i is None or i.opcode != "get-tuple-element":
            return None
        source = self.module.find(computation, i.operands[0])
        is_argument = source is not None and source.opcode == "parameter"
        return i.number("index") if is_argument else None

    def _is_kept(self, body: str, element: int) -> bool:
        root = self.module.root(body)
        if root is None or root.opcode != "tuple" or element >= len(root.operands):
            return False
        return self._element(body, root.operands[element]) == element

    def _constant_turns(
        self, body: str, condition: str, start: Known, kept: Known
    ) -> int | None:
        test = self.module.root(condition)
        if (
            test is None
            or test.opcode != "compare"
            or "direction=LT" not in test.attributes
        ):
            return None
        counter = self._element(condition, test.operands[0])
        if counter is None or counter not in start:
            return None
        end = self._value(condition, test.operands[1], kept)
        step = self._step(body, counter, kept)
        if end is None or not step or step < 0:
            return None
        return max(0, -(-(end - start[counter]) // step))

    def _step(self, body: str, counter: int, kept: Known) -> int | None:
        """What a turn adds to the counter."""
        root = self.module.root(body)
        if root is None or root.opcode != "tuple":
            return None
        added = self.module.find(body, root.operands[counter])
        while added is not None and added.opcode in ("copy", "bitcast"):
            added = self.module.find(body, added.operands[0])
        if added is None or added.opcode != "add":
            return None
        for own, other in (added.operands, added.operands[::-1]):
            if self._element(body, own) == counter:
                return self._value(body, other, kept)
        return None

    # Which loop of the program a loop of the module is.

    def _named_loops(self) -> dict[str, float]:
        """The turns of each loop that a function of the plan's own loops makes."""
        of_name: dict[str, list[tuple[int, str]]] = {}
        for instructions in self.module.computations.values():
            for loop in (i for i in instructions if i.opcode == "while"):
                name = self._function(loop.called("body") or "")
                if name is not None:
                    of_name.setdefault(name, []).append((self._line(loop), loop.name))
        found = {}
        for name, loops in of_name.items():
            turns = self.turns[name]
            if len(turns) == len(loops) or len(set(turns)) == 1:
                for n, (_, own) in enumerate(sorted(loops)):
                    found[own] = turns[min(n, len(turns) - 1)]
        return found

    def _function(self, body: str) -> str | None:
        """The function that most of a loop's body came from, of those that turns names."""
        votes: Counter[str | None] = Counter()
        for i in self.module.computations.get(body, []):
            if i.opcode == "while":
                return None  # loops of that name have none inside
            if i.opcode not in FREE and i.frame is not None:
                calls = self.module.calls(i.frame)
                names = (f.function.rsplit(".", 1)[-1] for f in calls)
                votes[next((n for n in names if n in self.turns), None)] += 1
        return votes.most_common(1)[0][0] if votes else None

    def _line(self, loop: Instruction) -> int:
        """Where the program starts the loop."""
        calls = self.module.calls(loop.frame)
        return calls[-1].line if calls else 0
