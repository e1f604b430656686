"""Assembly as text → instructions, loops, and what the main loop consists of.

Loops are natural loops: a back edge leads to a block without which its origin can't be
reached. Branches that only jump backwards in the text, from code that the compiler has
moved out of the way, make none.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """opcode with its suffixes; goes_on is False where the next one isn't reached."""

    opcode: str
    operands: str
    target: str | None = None
    goes_on: bool = True


@dataclass(frozen=True)
class Program:
    """labels: the position of the instruction that each stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_LABEL = re.compile(r"^\s*(\.?[A-Za-z_][\w.$]*):")
_SASS = re.compile(
    r"^\s+(?:\{\s*)?/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:(@!?U?P\w+)\s+)?"
    r"([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*([^;]*);"
)
_SASS_TARGET = re.compile(r"`\(([^)]+)\)")
_AMD = re.compile(r"^\s+((?:s|v|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)")


def parse_sass(text: str) -> Program:
    """NVIDIA's, as `nvdisasm -c` prints it."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
            continue
        matched = _SASS.match(line)
        if matched is None:
            continue
        predicate, opcode, operands = matched.groups()
        name = opcode.split(".")[0]
        target = None
        if name in ("BRA", "BRX", "JMP") and (where := _SASS_TARGET.search(operands)):
            target = where[1]
        # BRA.U UP0, `(.L): the condition is an operand
        conditional = predicate is not None or (
            name == "BRA" and operands.lstrip().startswith(("UP", "!UP", "P", "!P"))
        )
        leaves = name in ("BRA", "JMP", "EXIT", "RET") and not conditional
        found.append(Instruction(opcode, operands.strip(), target, not leaves))
    return Program(tuple(found), labels)


def parse_amdgcn(text: str) -> Program:
    """AMD's, as LLVM prints it."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
            continue
        matched = _AMD.match(line)
        if matched is None:
            continue
        opcode, operands = matched[1], matched[2].strip()
        target = operands if opcode.startswith(("s_branch", "s_cbranch")) else None
        leaves = opcode in ("s_branch", "s_endpgm")
        found.append(Instruction(opcode, operands, target, not leaves))
    return Program(tuple(found), labels)


def loops(program: Program) -> list[frozenset[int]]:
    """The natural loops, in the order of their heads: positions of their instructions."""
    starts, next_of = _blocks(program)
    order = _reachable(next_of)
    before: dict[int, set[int]] = {b: set() for b in order}
    for b in order:
        for after in next_of[b]:
            before[after].add(b)
    dominators = _dominators(order, before)
    bodies: dict[int, set[int]] = {}
    for b in order:
        for head in next_of[b]:
            if head in dominators[b]:
                bodies.setdefault(head, {head}).update(_body(b, head, before))
    ends = [*starts[1:], len(program.instructions)]
    return [
        frozenset(i for b in bodies[head] for i in range(starts[b], ends[b]))
        for head in sorted(bodies)
    ]


def _blocks(program: Program) -> tuple[list[int], list[list[int]]]:
    """Where basic blocks start, and the blocks that follow each."""
    count = len(program.instructions)
    cuts = {0} | {at for at in program.labels.values() if at < count}
    for i, instruction in enumerate(program.instructions[:-1]):
        if instruction.target is not None or not instruction.goes_on:
            cuts.add(i + 1)
    starts = sorted(cuts)
    block_at = {at: b for b, at in enumerate(starts)}
    next_of: list[list[int]] = []
    for b, _ in enumerate(starts):
        end = starts[b + 1] if b + 1 < len(starts) else count
        last = program.instructions[end - 1] if end else None
        after = []
        if last is not None and last.target in program.labels:
            after.append(block_at.get(program.labels[last.target], -1))
        if last is not None and last.goes_on and b + 1 < len(starts):
            after.append(b + 1)
        next_of.append([a for a in after if a >= 0])
    return starts, next_of


def _reachable(next_of: Sequence[Sequence[int]]) -> list[int]:
    """Blocks in reverse postorder from the first."""
    seen, order = {0}, []
    stack: list[tuple[int, Iterator[int]]] = [(0, iter(next_of[0]))]
    while stack:
        b, rest = stack[-1]
        after = next((a for a in rest if a not in seen), None)
        if after is None:
            order.append(b)
            stack.pop()
        else:
            seen.add(after)
            stack.append((after, iter(next_of[after])))
    return order[::-1]


def _dominators(
    order: Sequence[int], before: dict[int, set[int]]
) -> dict[int, set[int]]:
    """For each block, those that every way to it passes."""
    found = {b: set(order) for b in order}
    found[order[0]] = {order[0]}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = set.intersection(*(found[p] for p in before[b])) | {b}
            if new != found[b]:
                found[b], changed = new, True
    return found


def _body(tail: int, head: int, before: dict[int, set[int]]) -> set[int]:
    """The blocks from which a back edge's tail is reached without its head."""
    body, stack = {head}, [tail]
    while stack:
        b = stack.pop()
        if b not in body:
            body.add(b)
            stack.extend(before[b])
    return body


_MATRIX = re.compile(r"HMMA|IMMA|QMMA|OMMA|HGMMA|QGMMA|UTC\w*MMA|v_s?mfma|v_wmma")
_FEW = 32  # multiply-adds: fewer of them are no matrix product


def is_matrix(opcode: str) -> bool:
    return _MATRIX.match(opcode) is not None


def main_loops(program: Program) -> list[tuple[Instruction, ...]]:
    """The innermost loops with matrix products, in the order of the text.

    What loops inside of them (waiting for a copy, for tensor memory) is left out. Where no
    loop has a matrix instruction, multiply-adds are the products.
    """
    found = loops(program)
    at = program.instructions
    for products in (is_matrix, lambda opcode: opcode.startswith(("FFMA", "v_fma"))):
        least = 1 if products is is_matrix else _FEW
        multiplying = [
            body for body in found if sum(products(at[i].opcode) for i in body) >= least
        ]
        if multiplying:
            break
    made = []
    for body in multiplying:
        if any(other < body for other in multiplying):
            continue
        inner = frozenset().union(*(other for other in found if other < body))
        made.append(tuple(at[i] for i in sorted(body - inner)))
    return made


def mix(loop: Sequence[Instruction]) -> dict[str, int]:
    """Instructions by opcode, the most frequent first."""
    return dict(Counter(x.opcode for x in loop).most_common())
