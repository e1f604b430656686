"""Whether a chunk of queries can have a full tile at all: proven from bounds in closed form."""

from __future__ import annotations

from fractions import Fraction

from attngen.expr import Expr
from attngen.regions import Span, spans
from attngen.spec import AttentionSpec

# (a, b, c): a * q_lo + b * q_hi + c
Form = tuple[Fraction, Fraction, Fraction]


def none_full(spec: AttentionSpec, q_chunk: int, k_chunk: int) -> bool:
    """Whether no key chunk is seen by all of q_chunk queries, wherever they stand.

    Of whole chunks of queries, and lengths of any size: the last chunk, with fewer queries,
    may see more. False where it isn't proven.
    """
    queries = min(q_chunk, spec.q_len)
    return all(
        not span.any_full or _narrower(span, queries, k_chunk) for span in spans(spec)
    )


def _narrower(span: Span, queries: int, keys: int) -> bool:
    """Whether [full_low, full_high) always holds fewer keys than a chunk."""
    low, high = span.full_low, span.full_high
    return low is not None and high is not None and _less(high, low, queries, keys)


def _less(high: Expr, low: Expr, queries: int, keys: int) -> bool:
    """Whether high - low < keys is proven for q_hi = q_lo + queries."""
    for node, other, one in ((high, "minimum", any), (low, "maximum", any)):
        if node.op in ("minimum", "maximum"):
            each = one if node.op == other else all
            pairs = [(a, low) if node is high else (high, a) for a in node.args]
            return each(_less(*pair, queries, keys) for pair in pairs)
    most, least = _form(high, largest=True), _form(low, largest=False)
    if most is None or least is None:
        return False
    a, b, c = (x - y for x, y in zip(most, least, strict=True))
    return a + b == 0 and b * queries + c < keys


def _form(node: Expr, *, largest: bool) -> Form | None:
    """A form that a limit never exceeds, or never falls below; None: not found."""
    if node.op == "const" and isinstance(node.value, int):
        return (Fraction(0), Fraction(0), Fraction(node.value))
    if node.op == "var":
        at_low = node.value == "q_lo"
        return (Fraction(at_low), Fraction(not at_low), Fraction(0))
    if node.op not in ("add", "sub", "mul", "floordiv"):
        return None
    left, right = node.args
    x = _form(left, largest=largest)
    y = _form(right, largest=largest != (node.op == "sub"))
    if x is None or y is None:
        return None
    if node.op in ("add", "sub"):
        sign = 1 if node.op == "add" else -1
        return (x[0] + sign * y[0], x[1] + sign * y[1], x[2] + sign * y[2])
    if right.op != "const":
        return None
    n = y[2]
    if node.op == "floordiv":  # rounded down by (n - 1) / n at most
        if n <= 0:
            return None
        rounded = 0 if largest else n - 1
        return (x[0] / n, x[1] / n, (x[2] - rounded) / n)
    if n < 0:  # by a negative number the other bound is needed
        z = _form(left, largest=not largest)
        if z is None:
            return None
        x = z
    return (x[0] * n, x[1] * n, x[2] * n)
