"""Short messages in the place of tracebacks, where a cell fails since something is not solved yet."""

import sys
from types import TracebackType

from .own_code import Statement, statements
from .reading import assignment


class ShortError(Exception):
    """An error that a notebook shows as its text alone."""

    def _render_traceback_(self) -> list[str]:
        return str(self).splitlines()


class NotRightYet(ShortError, AssertionError):
    """A check did not pass; the text says why."""


class NotSolvedYet(ShortError, NotImplementedError):
    """Something runs on the function of an exercise that is not solved; the text says which."""


class Missing:
    """What a notebook's cells have not set for want of a solution.

    reasons: the names, each with what is missing.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.cell: list[Statement] = []

    def begin(self, text: str) -> None:
        """Note the cell that is about to run."""
        try:
            self.cell = list(statements(text))
        except SyntaxError:
            self.cell = []

    def end(self, error: BaseException | None) -> None:
        """Note how the cell has ended, by what it raised if anything."""
        bound = {name for statement in self.cell for name in statement.bound}
        reason = self.reason(error) if error is not None else None
        if reason is not None:
            self.reasons |= dict.fromkeys(bound, reason)
        elif error is None:
            for name in bound:
                self.reasons.pop(name, None)

    def reason(self, error: BaseException) -> str | None:
        """What is missing, if an error of the cell has come from that; None if it has not."""
        if isinstance(error, NotRightYet):
            return None
        if isinstance(error, NotSolvedYet):
            return str(error)
        name = unsolved_function(error.__traceback__) if isinstance(error, NotImplementedError) else None
        if name is not None:
            return f"this needs {name} ({titles()[name]}), which is not solved"
        read = [name for statement in self.cell for name in sorted(statement.used)]
        return next((self.reasons[name] for name in read if name in self.reasons), None)


def titles() -> dict[str, str]:
    """The functions to be written, with the titles of their exercises."""
    return {item["function"]: item["title"] for item in assignment()["items"] if item["function"]}


def unsolved_function(trace: TracebackType | None) -> str | None:
    """The function in which an error was raised, if it is one of those to be written."""
    name = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_name
        trace = trace.tb_next
    return name if name in titles() else None


def explain_what_is_missing() -> None:
    """In a notebook, let cells that fail for want of a solution say what they need, and nothing else."""
    try:
        from IPython import get_ipython
    except ImportError:  # a script, where tracebacks are what one wants
        return
    shell = get_ipython()
    if shell is None:
        return
    missing = Missing()

    def explain(shell, kind, error, trace, tb_offset=None):
        reason = missing.reason(error)
        if reason is not None:
            lines = [f"Not yet: {reason}."]
            if "matplotlib.pyplot" in sys.modules:  # no figure that is half drawn
                sys.modules["matplotlib.pyplot"].close("all")
        elif isinstance(error, ShortError):
            lines = error._render_traceback_()
        else:
            lines = shell.InteractiveTB.structured_traceback(kind, error, trace, tb_offset=tb_offset)
        shell._showtraceback(kind, error, lines)
        return lines

    shell.set_custom_exc((Exception,), explain)
    shell.events.register("pre_run_cell", lambda info: missing.begin(info.raw_cell))
    shell.events.register("post_run_cell", lambda result: missing.end(result.error_in_exec))
