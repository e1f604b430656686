"""A user's own JAX function, serialised as StableHLO for the compiler's process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attngen import certifier
from attngen.errors import CallError
from attngen.reports import Certificate
from attngen.targets import Target

COMPILER = "attngen.backends.jax.compiler"


def certify(
    f: Callable[..., Any], shapes: Sequence[Any], target: Target
) -> Certificate:
    """Trace here, compile in a child process. Raises as `api.certify`."""
    return certifier.certify(COMPILER, target.name, **_program(f, shapes, target))


def measure(
    f: Callable[..., Any],
    shapes: Sequence[Any],
    target: Target,
    rounds: int,
    timeout_s: float,
) -> dict[str, Any]:
    """What `certify` says and seconds of each call, in a child process on this machine.

    Raises:
        CompileError: it was refused, crashed, ran out of memory or of time.
    """
    program = _program(f, shapes, target)
    with tempfile.TemporaryDirectory(prefix="attngen-") as folder:
        path = Path(folder) / "exported"
        path.write_bytes(program.pop("exported"))
        job = {"target": target.name, "exported": str(path), "rounds": rounds} | program
        found: dict[str, Any] = certifier.run(
            COMPILER, "measure", job, timeout_s=timeout_s
        )
    return found


def _program(
    f: Callable[..., Any], shapes: Sequence[Any], target: Target
) -> dict[str, Any]:
    """A function as the compiler's process takes it."""
    import jax
    import jax.export

    if not callable(f):
        raise CallError(
            "certify takes a function.",
            got=type(f).__name__,
            needed="a JAX function and its arguments' shapes",
        )
    structs = jax.tree.map(_struct, tuple(shapes))
    leaves, tree = jax.tree.flatten(structs)

    def flat(*arguments: Any) -> Any:
        return f(*jax.tree.unflatten(tree, arguments))

    exported = jax.export.export(jax.jit(flat), platforms=[target.kind])(*leaves)
    return {
        "shapes": [(f"x{i}", x.shape, str(x.dtype)) for i, x in enumerate(leaves)],
        "exported": bytes(exported.serialize()),
        "x64": bool(jax.config.jax_enable_x64),
    }


def _struct(x: Any) -> Any:
    import jax

    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise CallError(
            "certify takes shapes.",
            got=repr(x)[:80],
            needed="arrays or jax.ShapeDtypeStruct(shape, dtype)",
        )
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
