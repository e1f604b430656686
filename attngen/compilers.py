"""The targets' own compilers: which certifies what, and what has to be installed for it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass

from attngen.errors import BackendError
from attngen.machine import cuda_plugin
from attngen.targets import Target
from attngen.version import installed


@dataclass(frozen=True)
class Compiler:
    """Who certifies.

    Args:
        name: for people.
        modules: that have to be there to import.
        extra: of attngen, that installs them.
    """

    name: str
    modules: tuple[str, ...]
    extra: str

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(m for m in self.modules if not _is_there(m))

    @property
    def install(self) -> str:
        return f"pip install 'attngen[{self.extra}]'"

    def to_dict(self) -> dict[str, object]:
        """As `attngen targets --json` prints it."""
        missing = list(self.missing)
        return {"name": self.name, "install": self.install, "missing": missing}


_TRITON = Compiler("Triton's compiler", ("torch", "triton"), "triton")
# backend, kind of target
_COMPILERS = {
    ("jax", "cpu"): Compiler("XLA:CPU", ("jax", "jaxlib"), "jax"),
    ("jax", "tpu"): Compiler("XLA:TPU", ("jax", "libtpu"), "tpu"),
    ("triton", "cuda"): _TRITON,
    ("triton", "hip"): _TRITON,
}


def _xla_gpu() -> Compiler:
    """Through the CUDA plug-in that is installed."""
    plugin = cuda_plugin()
    modules = ("jax", f"jax_{plugin}_plugin", f"jax_plugins.xla_{plugin}")
    return Compiler("XLA:GPU", modules, "cuda")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def of(target: Target, backend: str) -> Compiler | None:
    """The compiler that certifies a backend's kernels for a target; None: not attngen's."""
    if (backend, target.kind) == ("jax", "cuda"):
        return _xla_gpu()
    return _COMPILERS.get((backend, target.kind))


def all_of(target: Target) -> tuple[Compiler, ...]:
    """The compilers of a target, its own backend's first."""
    found = (of(target, backend) for backend in target.backends)
    return tuple(c for c in found if c is not None)


def check(target: Target, backend: str) -> None:
    """Refuse to certify where the compiler isn't installed, or doesn't fit the rest.

    Raises:
        BackendError: as it says.
    """
    compiler = of(target, backend)
    if compiler is None:
        return
    if compiler.missing:
        raise BackendError(
            f"The compiler for {target.name} isn't installed.",
            got="no " + ", no ".join(compiler.missing),
            needed=f"{compiler.name}: {compiler.install}",
            hint="without it, plan and emit work: their figures are modelled, and not "
            "certified",
        )
    if target.tpu is not None and (wanted := _wanted_libtpu()):
        found = installed(["libtpu"]).get("libtpu", "none")
        if not re.fullmatch(re.escape(wanted).replace(r"\*", ".*"), found):
            raise BackendError(
                "libtpu isn't the one that this jax was made for.",
                got=f"libtpu {found}, jax {installed(['jax']).get('jax')}",
                needed=f"libtpu {wanted}",
                hint=f"pip install 'libtpu=={wanted}'",
            )


@functools.cache
def _wanted_libtpu() -> str | None:
    """The version that jax's own extra `tpu` asks for, as "0.0.42.*"."""
    for line in importlib.metadata.requires("jax") or []:
        if found := re.match(r"libtpu\s*==\s*([\w.*]+)", line):
            return found[1]
    return None
