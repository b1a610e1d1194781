"""Answers to questions: a number predicted, or one of several choices, against what the notebook measured."""

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from lecture26.kit.solved import note_solved

from .judging import CheckResult


def check_answer(
    name: str,
    answer: object,
    right: float | str,
    within: float = 0.0,
    among: Sequence[str] = (),
    hint: str = "",
) -> CheckResult:
    """Check the answer to a question, a number or a choice, against the right one that the caller measured.

    Args:
        name: "chapter.question", under which a right answer is recorded.
        answer: the learner's; `...` says that the question is still open.
        right: the right number, or the right one of the choices.
        within: how far a number may be from the right one.
        among: the choices, if it is one.
        hint: where to look, for an answer that is not right.

    Returns:
        A CheckResult, true if the answer is right. Whatever the answer is, nothing is raised.
    """

    def result(passed: bool, message: str) -> CheckResult:
        return CheckResult(name, passed, message)

    if answer is ... or answer is None:
        return result(False, "not answered yet.\nWrite your answer in place of the `...`.")
    problem = _not_right(answer, right, within, among)
    if problem:
        return result(False, "\n".join(filter(None, ["not right yet.", problem, hint])))
    note_solved(name)
    return result(True, "right." if among else f"right: you said {float(answer):.3g}, it is {right:.3g}.")


def _not_right(answer: object, right: float | str, within: float, among: Sequence[str]) -> str | None:
    """What is wrong with an answer, as a sentence that does not tell the right one; None if it is right."""
    if among:
        if not isinstance(answer, str) or answer not in among:
            return f"Choose one of {', '.join(map(repr, among))}; you wrote {answer!r}."
        return None if answer == right else f"It is not {answer!r}."
    number = answer.item() if isinstance(answer, Tensor) and answer.numel() == 1 else answer
    if not isinstance(number, Real) or isinstance(number, bool):
        return f"A number is expected, not something of type {type(answer).__name__}."
    if abs(number - right) <= within:
        return None
    return f"{float(number):.3g} is not a number." if number != number else _direction(number, right)


def _direction(number: float, right: float) -> str:
    return f"{float(number):.3g} is too {'large' if number > right else 'small'}."
