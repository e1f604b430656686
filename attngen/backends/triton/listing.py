"""Which key blocks each chunk of queries visits, as a list that the launcher makes with torch.

The verdict on a tile (verdicts.py), over all tiles at once: [batch, head, chunk of queries, key
block], of which an axis has length 1 where the mask doesn't depend on it. Operands tell by
their least and greatest value in each block. A row of the list holds how many blocks are full,
how many are visited, and then the blocks, the full ones first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from attngen.backends.triton.bounds import offset_source
from attngen.expr import POSTFIX, Expr, variables
from attngen.extremes import FALSE
from attngen.lists import Blocks, Extremes, Search, held, listed, pairs
from attngen.operands import Operand
from attngen.plans import Plan
from attngen.printer import ArrayPrinter, Part, stepwise
from attngen.verdicts import ENDS

WIDTH = 84
PLACE = {
    "b": "[:, None, None, None]",
    "h": "[:, None, None]",
    "q": "[:, None]",
    "k": "",
}


class TorchPrinter(ArrayPrinter):
    """As ArrayPrinter: torch has no minimum of a tensor and a number."""

    def _print(self, node: Expr, args: list[Part]) -> str:
        if node.op in ("minimum", "maximum"):
            for i, a in enumerate(node.args):
                if a.op == "const":
                    text, level = args[1 - i]
                    text = text if level >= POSTFIX else f"({text})"
                    side = "max" if node.op == "minimum" else "min"
                    return f"{text}.clamp({side}={args[i][0]})"
        if node.op == "int":
            text, level = args[0]
            return f"{text if level >= POSTFIX else f'({text})'}.to(torch.int32)"
        return super()._print(node, args)


@dataclass
class Listing:
    """The statements of `_tiles`, and what it takes.

    Args:
        arguments: q, k and operands.
        interior: whether a block can be full.
        extremes, sums: whether the functions that find them are needed.
    """

    lines: list[str] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    interior: bool = True
    extremes: bool = False
    sums: bool = False


def listing(plan: Plan) -> Listing:
    spec = plan.spec
    assert spec.mask is not None
    found = listed(spec.mask.expr)
    some, every = found.verdict.some, found.verdict.every
    names = variables(some) | variables(every)
    read = names
    for x in found.told:
        read |= frozenset(v for e in x.made_from for v in variables(e))
    read |= {n.replace("_hi", "_lo") for n in read & {"b_hi", "h_hi"}}
    made = Listing(interior=every != FALSE)
    made.arguments = ["q", "k"]
    lines = made.lines
    offset = _offset(made, plan, read)
    key_shift = " + K_OFFSET.value" if spec.kv_offset else ""
    lines += [
        "key = torch.arange(0, S, K_BLOCK.value, device=q.device)",
        "query = torch.arange(0, T, Q_BLOCK.value, device=q.device)[:, None]",
    ]
    texts = {
        "q_lo": f"query{offset}",
        "q_hi": f"(query + Q_BLOCK.value).clamp(max=T){offset}",
        "k_lo": f"key{key_shift}",
        "k_hi": f"(key + K_BLOCK.value).clamp(max=S){key_shift}",
        "b_lo": f"torch.arange(B, device=q.device){PLACE['b']}",
        "b_hi": "b_lo + 1",
        "h_lo": f"torch.arange(H, device=q.device){PLACE['h']}",
        "h_hi": "h_lo + 1",
    }
    lines += [f"{n} = {texts[n]}" for n in ENDS if n in read]
    own = {n: n for n in read}
    for x in found.told:
        assert isinstance(x.node.value, Operand)
        if x.node.value.name not in made.arguments:
            made.arguments.append(x.node.value.name)
        if isinstance(x, Extremes):
            lines += _extremes(made, x)
        elif isinstance(x, Search):
            text = TorchPrinter("torch", own, repr).text(x.end)
            entries = x.node.value.name
            each = text if x.end.op == "const" else f"{_wrapped(text)}[..., None]"
            lines += [
                f"{x.name} = {each} >= {entries}",
                f"{x.name} = {x.name}.sum(-1)",
            ]
        else:
            lines += _blocks(made, x, TorchPrinter("torch", own, repr))
    for name, condition in (("some", some), ("every", every)):
        if condition.op == "const":
            if name == "some":
                lines.append("some = torch.ones_like(key, dtype=torch.bool)")
            continue
        printer = TorchPrinter("torch", own, repr, prefix=f"{name}_part")
        lines += stepwise(printer, name, condition, WIDTH, in_place=False)
    _lengths(made, plan)
    return made


def _wrapped(text: str) -> str:
    return text if text.isidentifier() else f"({text})"


def _blocks(made: Listing, x: Blocks, printer: TorchPrinter) -> list[str]:
    """How many blocks of a tile hold, by sums over all blocks."""
    assert isinstance(x.node.value, Operand)
    made.sums = True
    name, sums = x.node.value.name, f"{x.node.value.name}_at_sums"
    lines = [f"{sums} = _sums({name})"]
    if list(x.letters) == ["h", "b"]:
        lines.append(f"{sums} = {sums}.transpose(0, 1)")
    if len(x.letters) == 1:
        view = ":, None" if x.letters == ("b",) else "None, :"
        lines.append(f"{sums} = {sums}[{view}]")
    count, area = f"{name}_at_tiles", f"{name}_at_area"
    return [
        *lines,
        *held(x, sums, printer),
        f"{x.some} = {count} > 0",
        f"{x.every} = {count} == {area}",
    ]


def _offset(made: Listing, plan: Plan, names: frozenset[str]) -> str:
    """What is added to the index of a query, as text; after statements that define it."""
    source = offset_source(plan.spec)
    if not source or not {"q_lo", "q_hi"} & names:
        return ""
    if source == "constant":
        return " + Q_OFFSET.value"
    if source == "bottom_right":
        return " + (S - T)"
    name = "kv_lengths" if source == "lengths" else "q_offset"
    made.arguments.append(name)
    shift = " - T" if source == "lengths" else ""
    made.lines.append(f"offset = {name}{PLACE['b']}{shift}")
    return " + offset"


def _extremes(made: Listing, x: Extremes) -> list[str]:
    """An operand's least and greatest value in each block, along the axes of the tiles."""
    assert isinstance(x.node.value, Operand)
    name = x.node.value.name
    fixed = [i.value if i.op == "const" else ":" for _, i in pairs(x.node)]
    letters = [str(i.value) for _, i in pairs(x.node) if i.op == "var"]
    text = name
    if any(i != ":" for i in fixed):
        text += f"[{', '.join(map(str, fixed))}]"
    ordered = sorted(letters, key="bhqk".index)
    if letters != ordered:
        text += f".permute({', '.join(str(letters.index(a)) for a in ordered)})"
    token = next((a for a in ordered if a in "qk"), None)
    view = ", ".join(":" if a in ordered else "None" for a in "bhqk")
    if token is None:
        view = f"[{view}]"
        return [f"{x.least} = {text}{view}", f"{x.greatest} = {x.least}"]
    made.extremes = True
    length = {"q": "T", "k": "S"}[token]
    block = {"q": "Q_BLOCK", "k": "K_BLOCK"}[token]
    call = [f"{text}[..., :{length}], {block}.value"]
    lines = [f"{x.least}, {x.greatest} = _extremes({call[0]})"]
    if len(lines[0]) > WIDTH:
        lines = [f"{x.least}, {x.greatest} = _extremes(", f"    {call[0]}", ")"]
    if view != ":, :, :, :":
        lines += [f"{n} = {n}[{view}]" for n in (x.least, x.greatest)]
    return lines


def _lengths(made: Listing, plan: Plan) -> None:
    """What else a key block must be, to be visited, or to need no mask."""
    spec, lines = plan.spec, made.lines
    if spec.kv_lengths:
        if "kv_lengths" not in made.arguments:
            made.arguments.append("kv_lengths")
        lines.append(f"kv_end = kv_lengths.clamp(max=S){PLACE['b']}")
        lines.append("some = some & (key < kv_end)")
    end = "kv_end" if spec.kv_lengths else "S"
    if made.interior:
        lines.append(f"every = every & (key + K_BLOCK.value <= {end})")
    if spec.q_lengths:
        made.arguments.append("q_lengths")
        lines.append(f"q_end = q_lengths{PLACE['b']}")
        lines.append("some = some & (query < q_end)")
        if made.interior:
            last = "(query + Q_BLOCK.value).clamp(max=T)"
            lines.append(f"every = every & ({last} <= q_end)")
