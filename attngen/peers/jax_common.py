"""What the peers written in JAX share: their language, whole frames, compiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attngen.backends import get
from attngen.backends.jax.scratch import scratch_bytes
from attngen.peers import Ready
from attngen.reference import Array
from attngen.spec import AttentionSpec


class JaxLanguage:
    """See `expressions.Language`. Positions are int32, JAX's own integers."""

    integer = "int32"

    def cast(self, x: Any, dtype: str) -> Any:
        import jax.numpy as jnp

        return jnp.asarray(x, dtype)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        import jax.numpy as jnp

        return jnp.clip(x, low, high)

    def permuted(self, x: Any, axes: tuple[int, ...]) -> Any:
        return x.transpose(axes)

    def call(self, name: str, *args: Any) -> Any:
        import jax.numpy as jnp

        return getattr(jnp, name)(*args)


JAX = JaxLanguage()


def jax_arrays(spec: AttentionSpec, arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The arrays as JAX's."""
    to_array = get("jax").array
    return {n: to_array(x, spec.dtype_of(n)) for n, x in arrays.items()}


def ready(
    function: Callable[..., Any],
    given: Mapping[str, Any],
    said: str,
    prepared_s: Mapping[str, float] | None = None,
) -> Ready:
    """A function of named JAX arrays, compiled ahead for them.

    temp_bytes is XLA's own figure and what that leaves out (backends/jax/scratch.py).
    """
    import jax

    start = time.perf_counter()
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    compiled = jitted.lower(**given).compile()
    seconds = time.perf_counter() - start
    temp = int(compiled.memory_analysis().temp_size_in_bytes)
    return Ready(
        call=lambda: jax.block_until_ready(compiled(**given)),
        outputs=_outputs,
        said=said,
        temp_bytes=temp + scratch_bytes(compiled.as_text()),
        prepared_s={"compile": seconds, **(prepared_s or {})},
    )


def _outputs(made: Any) -> tuple[Array, ...]:
    return tuple(np.asarray(x) for x in (made if isinstance(made, tuple) else (made,)))


def select(spec: AttentionSpec, out: Any, lse: Any) -> Any:
    """The outputs that are asked for, in their order; one alone not in a tuple."""
    made = tuple({"out": out, "lse": lse}[n] for n in spec.outputs)
    return made if len(made) > 1 else made[0]


def finite(m: Any) -> Any:
    """A maximum, or 0 where no key was seen."""
    import jax.numpy as jnp

    return jnp.where(m == -jnp.inf, 0, m)
