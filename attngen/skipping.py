"""What a plan skips, said once: its share, what decides it at run time, who sees nothing.

`explain()`, the header of an emitted file and the picture of a plan's tiles all say what
these functions find.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from attngen.cost import square_flop
from attngen.expr import Expr, variables
from attngen.intervals import INT_LIMITS, Interval, domain, interval
from attngen.lists import Blocks, decided, listed
from attngen.operands import Operand
from attngen.plans import Plan, grouped
from attngen.spec import AttentionSpec


def share(plan: Plan) -> float:
    """The part of the square's operations that the plan skips, from 0 to 1.

    Where operands decide at run time (`decided_by`), the least that is skipped. With
    gradients of the tiles, which both passes skip alike.
    """
    if plan.spec.derivatives is not None:
        return plan.tiles.empty / max(1, plan.tiles.total)
    return max(0.0, 1 - plan.flop / square_flop(plan.spec))


def percent(part: float) -> str:
    """A share in words: neither 0 nor 100 % unless it is that."""
    if 0 < part < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 <= part < 1 else f"{part:.0%}"


def decided_by(plan: Plan) -> tuple[str, ...]:
    """The operands whose values say at run time which more tiles are empty, or full."""
    if not _by_list(plan) or plan.spec.mask is None:
        return ()
    return _operands_of(plan.spec.mask.expr)


def _operands_of(mask: Expr) -> tuple[str, ...]:
    """Those that tell of whole tiles of a mask."""
    read = (x.node.value for x in listed(mask).told)
    return tuple(sorted({o.name for o in read if isinstance(o, Operand)}))


def say_which(names: tuple[str, ...]) -> str:
    """The operands as the subject of what they decide."""
    return f"{' and '.join(names)} {'says' if len(names) == 1 else 'say'} which"


def counted(plan: Plan) -> tuple[str, ...]:
    """Where tiles differ between heads or batches, whose are counted: "head 0"."""
    if not _by_list(plan) or plan.spec.mask is None:
        return ()
    found = listed(plan.spec.mask.expr)
    read = variables(found.verdict.some) | variables(found.verdict.every)
    read |= {a for x in found.told if isinstance(x, Blocks) for a in _ends(x)}
    several = (
        ("batch", "b_lo", "b_hi", plan.spec.batch),
        ("head", "h_lo", "h_hi", plan.spec.q_heads),
    )
    return tuple(
        f"{name} 0" for name, lo, hi, n in several if n > 1 and read & {lo, hi}
    )


def a_head(plan: Plan) -> str:
    """Whose tiles are counted, in words."""
    own = "a kv head" if grouped(plan.spec, plan.choice) > 1 else "a head"
    return " of " + (", ".join(counted(plan)) or own)


def of_mean(plan: Plan, seen: Plan) -> str:
    """In words, that the tiles are those of a packed sequence of the mean length; "" else.

    Args:
        seen: the plan of the dense spec whose tiles are counted.
    """
    if plan.spec.storage != "packed" or seen.spec.batch != plan.spec.batch:
        return ""
    length = seen.spec.q_len
    queries = "query" if length == 1 else "queries"
    return f" of a sequence of the mean length ({length} {queries})"


def _ends(blocks: Blocks) -> tuple[str, ...]:
    """The ends of batches and heads, where an operand of blocks has these axes."""
    return tuple(f"{a}_lo" for a in blocks.letters)


def _by_list(plan: Plan) -> bool:
    return dict(plan.options).get("skip") == "list"


# Queries that see no key.


@functools.lru_cache(maxsize=64)
def sees_nothing(spec: AttentionSpec) -> bool:
    """Whether it is proven that no query sees any key, whatever operands hold."""
    return spec.mask is not None and _empty(spec)(0, spec.q_len)


def warnings(spec: AttentionSpec) -> tuple[str, ...]:
    """What is legal, and hardly meant: queries that see no key, tiles that aren't skipped."""
    return (*_blind(spec), *_unskipped(spec))


def _unskipped(spec: AttentionSpec) -> tuple[str, ...]:
    """Masks whose tiles operands decide on, where all are visited nevertheless."""
    if spec.mask is None or spec.derivatives != "any" or not decided(spec):
        return ()
    names = _operands_of(spec.mask.expr)
    return (
        f"what {' and '.join(names)} {'rules' if len(names) == 1 else 'rule'} out isn't "
        'skipped: derivatives="any" goes over a list of tiles that is known beforehand',
    )


def _blind(spec: AttentionSpec) -> tuple[str, ...]:
    """Queries that are proven to see no key."""
    if spec.mask is None:
        return ()
    lse = " and their lse -inf" if "lse" in spec.outputs else ""
    if sees_nothing(spec):
        all_lse = " and lse -inf" if "lse" in spec.outputs else ""
        return (f"no query sees any key: the output is all zeros{all_lse}",)
    if spec.static_q_offset is None:
        return ()
    empty, n = _empty(spec), spec.q_len
    ends = (
        ("first", _most(lambda count: empty(0, count), n)),
        ("last", _most(lambda count: empty(n - count, n), n)),
    )
    return tuple(
        f"the {name} query sees no key: its output is zeros{lse.replace('their', 'its')}"
        if count == 1
        else f"the {name} {count} queries see no key: their output is zeros{lse}"
        for name, count in ends
        if count
    )


def _most(holds: Callable[[int], bool], n: int) -> int:
    """The largest count below n for which it holds, where it holds for all smaller ones."""
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _empty(spec: AttentionSpec) -> Callable[[int, int], bool]:
    """Whether some queries, by index, are proven to see no key in any batch and head."""
    assert spec.mask is not None
    found = listed(spec.mask.expr)
    around = domain(spec)
    limit = INT_LIMITS["int64"]
    env: dict[str, Interval] = {}
    for name in "kbh":
        low, high = around[name]
        env |= {f"{name}_lo": (low, low), f"{name}_hi": (high + 1, high + 1)}
    for x in found.told:
        known = (0, 1) if x.node.kind == "bool" else (-limit, limit)
        env |= dict.fromkeys(x.names, known)
    first, last = around["q"][0], around["q"][1] - spec.q_len + 1  # of query 0

    def empty(start: int, stop: int) -> bool:
        queries = {
            "q_lo": (first + start, first + start),
            "q_hi": (last + stop, last + stop),
        }
        return interval(found.verdict.some, env | queries)[1] == 0

    return empty
