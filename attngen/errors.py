"""Every error that a user can meet: what is wrong, what was got, what is needed, what to do.

All derive from `AttngenError`, and each from the built-in error it resembles, so that
`except ValueError` works as one expects. `InternalError` stands apart: it is a fault of
attngen itself and asks for a report.
"""

from __future__ import annotations


class AttngenError(Exception):
    """A request that attngen can't meet.

    Args:
        what: one sentence that names the problem.
        got: what was found.
        needed: what would have been right.
        hint: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        needed: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.got = got
        self.needed = needed
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        for label in ("got", "needed", "hint"):
            value = getattr(self, label)
            if value is not None:
                seen = _seen(value).replace("\n", "\n" + " " * 11)
                lines.append(f"  {label:<8} {seen}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The error as plain values, as `--json` prints it."""
        text: dict[str, object] = {"error": type(self).__name__, "what": self.what}
        for label in ("got", "needed", "hint"):
            value = getattr(self, label)
            text[label] = None if value is None else _seen(value)
        return text


def _seen(value: object) -> str:
    """A value as text, one of no characters in quotes."""
    return str(value) or "''"


class SpecError(AttngenError, ValueError):
    """A field of an `AttentionSpec` has a value that it can't have."""


class NotBuiltError(AttngenError, NotImplementedError):
    """The contract has it, this version of attngen doesn't do it yet."""


class ExpressionError(AttngenError, TypeError):
    """A mask or a score does something that the language can't express."""


class OperandError(AttngenError, ValueError):
    """An operand is missing, surplus, misnamed, or of the wrong shape or dtype."""


class CallError(AttngenError, ValueError):
    """An array given to a kernel doesn't match the kernel's spec."""


class PresetError(AttngenError, LookupError):
    """There is no preset of that name."""


class TargetError(AttngenError, LookupError):
    """There is no such target, or it can't do what was asked of it."""


class BackendError(AttngenError, LookupError):
    """There is no such backend, or what it needs isn't installed."""


class PeerError(AttngenError, LookupError):
    """There is no such peer to compare with."""


class PlanError(AttngenError, ValueError):
    """A fixed choice isn't known, or isn't legal for this spec."""


class BudgetError(AttngenError, ValueError):
    """No plan fits the memory budget, or the budget can't be read."""


class CompileError(AttngenError, RuntimeError):
    """The target's compiler refused the program, crashed, or took too long."""


class FunctionError(AttngenError, RuntimeError):
    """A user's own function can't be found, doesn't take what it is given, or raises."""


class ShapeError(AttngenError, ValueError):
    """What a function is called with can't be read."""


class ValidationError(AttngenError, ArithmeticError):
    """A kernel's numbers are further from the reference than the rule allows."""


class DerivativeError(AttngenError, TypeError):
    """A kernel was differentiated in a way that it wasn't built for."""


class FileError(AttngenError, OSError):
    """A file can't be read, written, or isn't what it should be."""


class WisdomError(FileError):
    """A file of records is damaged, of another format, or can't be written."""


class TimingError(AttngenError, RuntimeError):
    """Nothing can be told from times: the clock stands, the machine is too noisy or full."""


# What code that isn't attngen's own (an edited file, say) raises where it is wrong.
FAULTS: tuple[type[BaseException], ...] = (
    SystemExit,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
# What a call on real arrays raises beside that, of whatever library it is.
CALL_FAULTS: tuple[type[BaseException], ...] = (*FAULTS, MemoryError)


class InternalError(RuntimeError):
    """A fault of attngen itself, never of its user."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}\n  This is a fault in attngen. Please report it with the spec "
            "(spec.to_json()) and this message."
        )
