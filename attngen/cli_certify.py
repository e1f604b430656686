"""`attngen certify`: what a plan, or a JAX function of the user's own, allocates."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from attngen import shapes
from attngen.cli_output import print_json, status
from attngen.cli_spec import plan_options, read_fix, read_spec
from attngen.errors import AttngenError, FunctionError, SpecError
from attngen.units import parse_bytes, show_bytes

if TYPE_CHECKING:
    from attngen.reports import Certificate

CHECK_FAILED = 1
IMPORTED = "a module that Python can import from here"
SHOWN = 3  # lines of the user's own code, where it raises


@click.command()
@click.option(
    "--shapes",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="Arguments of MODULE:FUNCTION, e.g. 'bf16[1,4096,8,64],n=s32[]'. Repeatable.",
)
@plan_options
def certify(
    texts: tuple[str, ...],
    target: str | None,
    backend: str | None,
    fix: tuple[str, ...],
    as_json: bool,
    **given: Any,
) -> None:
    """Ask the target's own compiler what the best plan allocates, a file, or a function.

    An emitted file, edited or not, is compiled as it is, for the target that its header
    names, or for --target.

    In place of SPEC.toml, MODULE:FUNCTION or FILE.py:FUNCTION names a JAX function of your
    own, a training step, say; --shapes says what it is called with: DTYPE[SIZE,…], or JSON
    with such strings where it takes trees.

    Exit code 1 where that is more than the budget, or where a GPU's kernel spills or doesn't
    fit a multiprocessor.
    """
    from attngen import api, descent

    name = given["spec"]
    if name is not None and ":" in name and not Path(name).exists():
        _refuse_options("a function", given, fix, backend)
        budget = given["budget"]
        most = None if budget is None else parse_bytes(budget)
        _print(_of_function(name, texts, target), most, None, as_json, inputs=True)
        return
    if texts:
        raise SpecError(
            "--shapes are those of a function.",
            got=f"--shapes {texts[0]}, and no MODULE:FUNCTION",
            needed="MODULE:FUNCTION, or no --shapes: a spec says its own",
        )
    if name is not None and Path(name).suffix == ".py":
        _refuse_options("a file", given, fix, backend)
        _print(*_of_file(Path(name), given["budget"], target), as_json)
        return
    spec = read_spec(given)
    made = api.plan(spec, target, backend, read_fix(fix))
    with status("compiling …"):
        certificate = api.certify(made)
    unfit = descent.unfit(certificate, made)
    _print(certificate, spec.budget_bytes, unfit, as_json)


def _print(
    certificate: Certificate,
    budget: int | None,
    unfit: str | None,
    as_json: bool,
    *,
    inputs: bool = False,
) -> None:
    """Args:
    unfit: why a kernel isn't to be used, whatever the budget.
    inputs: whether to say what inputs and outputs take, too.
    """
    need = certificate.temp_bytes
    fits = budget is None or need is None or need <= budget
    if as_json:
        print_json(certificate.to_dict() | {"fits": fits and not unfit})
    else:
        click.echo(str(certificate))
        if inputs and certificate.argument_bytes is not None:
            own = show_bytes(certificate.argument_bytes)
            out = show_bytes(certificate.output_bytes or 0)
            click.echo(f"  beside {own} of arguments and {out} of outputs")
        if not fits:
            over = show_bytes((need or 0) - (budget or 0))
            click.echo(f"over the budget of {show_bytes(budget or 0)} by {over}")
        if unfit:
            click.echo(f"not to be used: {unfit}")
    if unfit or not fits:
        sys.exit(CHECK_FAILED)


def _of_file(
    path: Path, budget: str | None, target: str | None
) -> tuple[Certificate, int | None, str | None]:
    """The certificate of an emitted file, its budget, and why it isn't to be used.

    Raises:
        As api.certify.
    """
    from attngen import api, descent

    made = api.plan_of(path)
    with status(f"compiling {path} …"):
        certificate = api.certify(path, target=target)
    most = made.spec.budget_bytes if budget is None else parse_bytes(budget)
    made = dataclasses.replace(made, target=certificate.target)
    return certificate, most, descent.unfit(certificate, made)


def _refuse_options(
    what: str, given: dict[str, Any], fix: tuple[str, ...], backend: str | None
) -> None:
    """Refuse what is said of a spec, which a function has not, and a file has already.

    Raises:
        SpecError: as it says.
    """
    kept = {n: v for n, v in given.items() if n not in ("spec", "budget")}
    said = [n for n, v in (kept | {"backend": backend}).items() if v is not None]
    said += ["fix"] if fix else []
    if said:
        raise SpecError(
            f"These options are of a spec, not of {what}.",
            got=", ".join("--" + n.replace("_", "-") for n in said),
            needed="--shapes, --target, --budget and --json beside MODULE:FUNCTION"
            if what == "a function"
            else "--target, --budget and --json beside an emitted file",
        )


def _of_function(name: str, texts: tuple[str, ...], target: str | None) -> Certificate:
    """The certificate of a function that is imported and traced here.

    Raises:
        FunctionError: there is no such function, it doesn't take these arguments, or it
            raises.
        ShapeError: the arguments can't be read.
        As api.certify.
    """
    from attngen import api, building, compilers, machine

    given, named = shapes.read(texts)
    compilers.check(building.where(target, "jax")[0], "jax")
    machine.start_jax()
    with status(f"tracing and compiling {name} …"):
        function = _found(name)
        _check_arguments(name, function, given, named)
        arguments = [_structs(x) for x in (*given, *([named] if named else []))]

        def by_name(*all_of_them: Any) -> Any:
            *some, rest = all_of_them
            return function(*some, **rest)

        with _users_own(
            f"{name} raises as it is traced.", "a function that JAX can trace"
        ):
            return api.certify(
                by_name if named else function, *arguments, target=target
            )


def _structs(tree: Any) -> Any:
    """A tree with JAX's own description in place of each shape.

    Raises:
        BackendError: one has 64 bits, which JAX has turned off.
    """
    import jax

    from attngen.backends.jax.loader import check_x64

    def struct(x: shapes.Shape) -> Any:
        if x.dtype in ("float64", "int64", "uint64", "complex128"):
            check_x64(str(x))
        return jax.ShapeDtypeStruct(x.sizes, x.dtype)

    return jax.tree.map(struct, tree)


# The user's own code.


def _found(name: str) -> Callable[..., Any]:
    """The function that `module:attribute` or `file.py:attribute` names.

    Imported as Python would from the current directory.

    Raises:
        FunctionError: there is none, or its module can't be imported.
    """
    where, _, attribute = name.rpartition(":")
    value = _module(where)
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise FunctionError(
                f"{where} has no function {attribute!r}.",
                got=name,
                needed=f"one of {_functions(value)}",
            ) from None
    if not callable(value):
        raise FunctionError(
            f"{name} is no function.",
            got=type(value).__name__,
            needed="a function of JAX arrays",
        )
    function: Callable[..., Any] = value
    return function


def _functions(module: Any) -> str:
    names = [n for n in dir(module) if not n.startswith("_")]
    own = [n for n in names if callable(getattr(module, n, None))][:20]
    return ", ".join(own) or "the functions that it defines"


def _module(name: str) -> Any:
    path = Path(name)
    from_file = path.suffix == ".py"
    if from_file and not path.is_file():
        raise FunctionError(
            f"There is no file {name}.", got=name, needed="FILE.py:FUNCTION"
        )
    folder = str(path.resolve().parent) if from_file else str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    if from_file:
        with _users_own(f"{name} can't be imported.", IMPORTED):
            spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
            return module
    if not all(part.isidentifier() for part in name.split(".")):
        raise FunctionError(
            f"{name or 'Nothing'} is no module's name.",
            got=repr(name),
            needed="MODULE:FUNCTION, or FILE.py:FUNCTION",
        )
    with _users_own(f"{name} can't be imported.", IMPORTED):
        return importlib.import_module(name)


@contextlib.contextmanager
def _users_own(what: str, needed: str) -> Iterator[None]:
    """Around the user's code: what it raises becomes a message, what it prints is no result.

    Raises:
        FunctionError: it raises.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except AttngenError:
        raise
    except (Exception, SystemExit) as error:  # whatever it is: not our code
        raise FunctionError(
            what,
            got="\n".join([f"{type(error).__name__}: {_short(error)}", *_where(error)]),
            needed=needed,
        ) from error


def _short(error: BaseException) -> str:
    """The first line of what an error says, or what that announces: JAX's go on for pages."""
    said = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    return "\n".join(said[: 4 if said and said[0].endswith(":") else 1])[:800]


def _where(error: BaseException) -> list[str]:
    """The last lines of the user's own code on the way to where it was raised."""
    libraries = [sysconfig.get_path(n) for n in ("purelib", "platlib", "stdlib")]
    libraries += [str(Path(__file__).resolve().parent), "<"]
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(tuple(libraries))
    ]
    return [
        f"{Path(f.filename).name}:{f.lineno}, in {f.name}: {f.line or ''}".rstrip(": ")
        for f in own[-SHOWN:]
    ]


def _check_arguments(
    name: str, function: Callable[..., Any], given: list[Any], named: dict[str, Any]
) -> None:
    """Refuse arguments that a function can't be called with.

    Raises:
        FunctionError: as it says.
    """
    try:
        taken = inspect.signature(function)
    except (TypeError, ValueError):  # of a built-in: it will say itself
        return
    try:
        taken.bind(*given, **named)
    except TypeError as error:
        said = [*map(_shown, given), *(f"{n}={_shown(x)}" for n, x in named.items())]
        raise FunctionError(
            f"{name} doesn't take these arguments.",
            got=f"{', '.join(said) or 'no --shapes'}: {error}",
            needed=f"{name.rpartition(':')[2]}{taken}",
            hint="--shapes TEXT, with commas between the arguments",
        ) from None


def _shown(tree: Any) -> str:
    return str(tree) if isinstance(tree, shapes.Shape) else "a tree"
