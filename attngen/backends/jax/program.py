"""What a spec's kernel computes as one program: its outputs, and their gradients if it has any.

That is what is certified, validated and timed: (q, k, v, operands) → outputs, or with
derivatives (q, k, v, operands, dout) → (out, dq, dk, dv, …), forward and backward in one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]


def program(
    function: Function, gradients: Mapping[str, str], cotangents: Mapping[str, str]
) -> Function:
    """A kernel's function as a program.

    Args:
        function: takes q, k, v and operands by name; returns one output, or a tuple.
        gradients: as `slopes.gradients` of the spec; where empty, the function itself.
        cotangents: as `slopes.cotangents`.

    Returns:
        A function of q, k, v, then of operands and cotangents by name. It returns the
        outputs, then the gradients, in order.
    """
    if not gradients:
        return function
    import jax

    def both(q: Any, k: Any, v: Any, **named: Any) -> tuple[Any, ...]:
        given = {"q": q, "k": k, "v": v} | named
        pulled = tuple(given.pop(name) for name in cotangents)

        def outputs(of: dict[str, Any]) -> Any:
            return function(**given | of)

        of = {name: given[name] for name in gradients.values()}
        made, pull = jax.vjp(outputs, of)
        single = len(cotangents) == 1
        (found,) = pull(pulled[0] if single else pulled)
        firsts = (made,) if single else tuple(made)
        return (*firsts, *(found[name] for name in gradients.values()))

    return both
