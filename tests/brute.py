"""What an expression is worth at one place, over Python's own numbers.

Independent of every evaluator in attngen: the meaning that they are tested against.
"""

import math
import operator

OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "neg": operator.neg,
    "abs": abs,
    "minimum": min,
    "maximum": max,
    "exp": math.exp,
    "log": math.log,
    "tanh": math.tanh,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "not": operator.not_,
    "where": lambda condition, x, y: x if condition else y,
    "int": int,
    "float": float,
}


def evaluate(node, at, arrays=None, index=None):
    """The value of `node`.

    at: the value of each variable, e.g. {"q": 3, "k": 5}: for q and k the positions.
    arrays: for each operand's name nested lists.
    index: what q and k are alone in an operand's brackets; None: their positions.
    """
    if node.op == "const":
        return node.value
    if node.op == "var":
        return at[node.value]
    if node.op == "load":
        element = arrays[node.value.name]
        for i in node.args:
            alone = i.op == "var" and index is not None
            element = element[evaluate(i, index if alone else at, arrays, index)]
        return element
    if node.op == "searchsorted":
        x = evaluate(node.args[0], at, arrays, index)
        return sum(entry <= x for entry in arrays[node.value.name])
    return OPERATIONS[node.op](*(evaluate(a, at, arrays, index) for a in node.args))


def seen(mask, q_len, kv_len, **at):
    """The pairs (q, k) that the mask lets see each other, by calling it on each."""
    place = {"b": 0, "h": 0} | at
    arrays = place.pop("arrays", None)
    return {
        (q, k)
        for q in range(q_len)
        for k in range(kv_len)
        if evaluate(mask.expr, place | {"q": q, "k": k}, arrays)
    }
