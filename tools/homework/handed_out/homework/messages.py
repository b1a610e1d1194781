"""Short messages in the place of tracebacks, where a cell fails since something is not solved yet."""

from types import TracebackType

from .own_code import statements
from .reading import assignment


class ShortError(Exception):
    """An error that a notebook shows as its text alone."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class NotRightYet(ShortError, AssertionError):
    """A check did not pass; the text says why."""


class NotSolvedYet(ShortError, NotImplementedError):
    """Something runs on the function of an exercise that is not solved; the text says which."""


def explain_what_is_missing() -> None:
    """In a notebook, let cells that fail for want of a solution say what they need, and nothing else."""
    try:
        from IPython import get_ipython
    except ImportError:  # a script, where tracebacks are what one wants
        return
    shell = get_ipython()
    if shell is not None:
        reasons: dict[str, str] = {}  # name: why no cell has set it

        def explain(shell, kind, error, trace, tb_offset=None):
            reason = reason_of(error, trace, reasons)
            if reason is None:
                lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
            else:
                lines = [f"Not yet: {reason}."]
            shell._showtraceback(kind, error, lines)
            return lines

        def note(result):
            error = result.error_in_exec
            reason = reason_of(error, getattr(error, "__traceback__", None), reasons) if error else None
            for name in set_by(result.info.raw_cell):
                if reason is not None:
                    reasons[name] = reason
                elif error is None:
                    reasons.pop(name, None)

        shell.set_custom_exc((NameError, NotImplementedError), explain)
        shell.events.register("post_run_cell", note)


def reason_of(error: BaseException, trace: TracebackType | None, reasons: dict[str, str]) -> str | None:
    """Why an error was raised, if it is for want of a solution; None if it is not."""
    if isinstance(error, NotSolvedYet):
        return str(error)
    if isinstance(error, NotImplementedError):
        functions = {item["function"]: item["title"] for item in assignment()["items"] if item["function"]}
        while trace is not None:
            name = trace.tb_frame.f_code.co_name
            trace = trace.tb_next
        return f"this needs {name} ({functions[name]}), which is not solved" if name in functions else None
    if isinstance(error, NameError):
        return reasons.get(error.name)
    return None


def set_by(cell: str) -> set[str]:
    """The names that a cell sets at the top level."""
    try:
        return {name for statement in statements(cell) for name in statement.bound}
    except SyntaxError:
        return set()
