"""What an assignment brings along for its notebooks: the checks, and messages where something is unsolved.

    from lecture26.homework import check, check_answer, progress

A check compares a function with numbers that were recorded beforehand. Where it fails, the cell fails.
"""

from collections.abc import Callable, Sequence
from numbers import Real

from lecture26.checks.judging import judge
from lecture26.checks.recording import Recording
from lecture26.kit.solved import note_solved, print_progress

from .messages import NotRightYet, explain_what_is_missing
from .own import forget, remember
from .reading import FOLDER

__all__ = ["check", "check_answer", "progress"]

explain_what_is_missing()


def check(exercise: str, candidate: Callable) -> None:
    """Check the function of an exercise, and print that it passed.

    From then on it is what the assignment's package runs on, in this notebook and in the others.

    Raises NotRightYet, which says what is wrong, if it did not pass.
    """
    result = judge(Recording.load(FOLDER / "checks" / f"{exercise}.safetensors"), candidate)
    if not result:
        forget(exercise)
        raise NotRightYet(str(result))
    remember(exercise, candidate)
    note_solved(exercise)
    print(result)


def check_answer(question: str, answer: object, among: Sequence[str] = ()) -> None:
    """Note the answer to a question; whether it is right, the grading will say.

    Args:
        question: its name.
        answer: a number, or one of several choices.
        among: the choices, if it is one.

    Raises NotRightYet if it is still open, or no answer to such a question.
    """
    if answer is ... or answer is None:
        raise NotRightYet(f"{question}: not answered yet.")
    if among and answer not in among:
        choices = ", ".join(map(repr, among))
        raise NotRightYet(f"{question}: the answer must be one of {choices}; you wrote {answer!r}.")
    if not among and (not isinstance(answer, Real) or isinstance(answer, bool)):
        raise NotRightYet(f"{question}: the answer must be a number; you wrote {answer!r}.")
    note_solved(question)
    print(f"{question}: noted, {answer!r}. Whether it is right, the grading will say.")


def progress() -> None:
    """Print which exercises have passed their checks, and which are open."""
    print_progress()
