"""The function of a kernel as it is called: it says which derivatives it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from attngen.errors import DerivativeError
from attngen.spec import AttentionSpec

Function = Callable[..., Any]
ALL = (
    'derivatives="vjp" has gradients (reverse mode, once), "any" all orders and modes: '
    "AttentionSpec(…, derivatives=…), or attngen.attention(…, derivatives=…)"
)


def entry(spec: AttentionSpec, function: Function) -> Function:
    """A function that raises DerivativeError where JAX differentiates what has no derivative.

    JAX's own derivative of loops over tiles would keep all scores, or be an error that names
    none of attngen's options.
    """
    if spec.derivatives == "any":
        return function
    return _undifferentiated(function) if spec.derivatives is None else _once(function)


def _undifferentiated(function: Function) -> Function:
    import jax

    forward_only = _forward_only()

    @functools.wraps(function)
    def call(q: Any, k: Any, v: Any, **operands: Any) -> Any:
        traced = jax.core.Tracer
        if any(isinstance(x, traced) for x in (q, k, v, *operands.values())):
            q, k, v, operands = forward_only((q, k, v, operands))
        return function(q, k, v, **operands)

    return call


@functools.cache
def _forward_only() -> Function:
    """The identity, whose derivative is an error."""
    import jax

    def refuse(x: Any, dx: Any) -> Any:
        raise DerivativeError(
            "This kernel was built without derivatives.",
            got="jax.grad, jax.vjp, jax.jvp, or the like, of it",
            needed="derivatives other than None in its spec",
            hint=ALL,
        )

    forward_only = jax.custom_jvp(lambda x: x)
    forward_only.defjvp(refuse)
    return forward_only  # type: ignore[no-any-return]


def _once(function: Function) -> Function:
    @functools.wraps(function)
    def call(*arrays: Any, **operands: Any) -> Any:
        try:
            return function(*arrays, **operands)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            raise DerivativeError(
                "This kernel has no forward-mode derivative.",
                got='jax.jvp, or the like, of a kernel built with derivatives="vjp"',
                needed='derivatives="any"',
                hint=ALL,
            ) from error

    return call
