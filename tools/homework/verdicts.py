"""Is an answer right? Judged by what a student's process claims, after all such processes have ended.

What is said of visible cases may quote them, and the student's own errors. Of hidden cases nothing is said
but which known mistake it is, or of what kind the fault is: neither arguments nor numbers, shapes or texts.
"""

import builtins
import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import EllipsisType

import torch

from lecture26.checks import CheckResult, Recording
from lecture26.checks.core import (
    Outcome,
    difference_in_results,
    difference_in_traces,
    with_traces,
    wrong_gradient,
)
from lecture26.checks.judging import judge_outcomes
from lecture26.checks.recording import record_exercise

from .assignments import Item
from .canary import sings
from .inputs import ExerciseCases
from .runner import Answers, Frame
from .wire import Claims, plain_text, read_claims

TAMPERED = (
    "not graded: the process told something else of the grader's own function than what this did. Code that "
    "changes torch or the checks themselves gets no points; your instructor has been told."
)


@dataclass(frozen=True)
class Score:
    """What an item earns.

    points: None where a person has to score it.
    lines: why, for the student; mistake: the name of a known one; suspicious: whether a person should look.
    cell: the student's cell, for the graded notebook.
    """

    item: Item
    points: float | None
    lines: tuple[str, ...]
    mistake: str | None = None
    suspicious: bool = False
    cell: str = ""


def unreadable(answers: Answers) -> dict[str, str]:
    """Why notebooks could not be read by the submission's process, by their names."""
    about = [frame.about for frame in answers.frames if "notebook" in frame.about]
    return {str(found["notebook"]): f"it cannot be read: {plain_text(found['problem'])}" for found in about}


class Judge:
    """Judges the items of an assignment; references are called for the first time here."""

    def __init__(
        self, tests: dict[str, ExerciseCases], answers: dict[str, dict], blank: dict[str, str]
    ) -> None:
        """Give it what it needs to know.

        tests: of the exercises, by name.
        answers: the right ones to questions, by name.
        blank: the text of each cell as it was handed out, by its grade_id.
        """
        self._tests, self._answers, self._blank = tests, answers, blank
        self._record = functools.cache(lambda name, seed: record_exercise(tests[name].exercise, seed))

    def scores(self, items: Iterable[Item], answers: Answers, problems: dict[str, str]) -> list[Score]:
        """Of each item what it earns.

        Args:
            items: of the assignment.
            answers: what came of the submission.
            problems: why a notebook could not be read, by its name.
        """
        frames = {}
        for frame in answers.frames:
            frames.setdefault(frame.about.get("name"), frame)
        return [
            self._score(item, frames.get(item.exercise), problems.get(item.notebook) or answers.problem)
            for item in items
        ]

    def _score(self, item: Item, frame: Frame | None, problem: str | None) -> Score:
        if frame is None:
            why = f"not graded: {problem or 'no answer came back'}."
            return Score(item, 0.0, (why,))
        notes = tuple(map(plain_text, frame.about.get("notes", ())))
        cell = str(frame.about.get("cell", ""))
        if found := frame.about.get("problem"):
            return Score(item, 0.0, (f"not right: {plain_text(found)}.", *notes), cell=cell)
        if item.kind == "paper" and cell.strip() in ("", self._blank.get(item.solution_id, "").strip()):
            return Score(item, 0.0, ("not answered.", *notes), cell=cell)
        if item.kind == "paper":
            return Score(item, None, ("scored by hand.", *notes), cell=cell)
        try:
            judged = self._judged(item, frame)
        except Exception as error:  # only a process that was made to do so answers in another form
            why = f"not graded: the answer has a wrong form ({type(error).__name__})."
            judged = Score(item, 0.0, (why,), suspicious=True)
        return replace(judged, lines=(*judged.lines, *notes), cell=cell)

    def _judged(self, item: Item, frame: Frame) -> Score:
        status, payloads = frame.about["status"], frame.payloads
        if status[0] != "ok":
            return Score(item, 0.0, (f"not right: it {status[0]}, on the notebook's cases.",))
        if item.kind == "question":
            return self._question(item, read_claims(payloads[0], 0, 0))
        visible = self.tried(item, payloads[0], hidden=False)
        if not visible.points:
            return visible
        if status[1] != "ok":
            return Score(
                item, 0.0, (f"not right: it passes the notebook's cases, but on hidden ones it {status[1]}.",)
            )
        return self.tried(item, payloads[1], hidden=True)

    def _question(self, item: Item, claims: Claims) -> Score:
        right = self._answers[item.exercise]
        if claims.problem:
            why = f"not right: {claims.problem}. Write the answer itself: a number, or a text in quotes."
            return Score(item, 0.0, (why,))
        if claims.value is None:
            return Score(item, 0.0, ("not answered.",))
        if _agrees(claims.value, right["right"], right.get("within", 0.0)):
            return Score(item, item.points, ("right.",))
        return Score(item, 0.0, ("not right.",))

    def tried(self, item: Item, payload: bytes, hidden: bool) -> Score:
        """What an exercise earns by the visible or the hidden cases alone.

        payload: what the student's process tells of its function; ValueError where it is no such thing.
        """
        tests = self._tests[item.exercise]
        recording = self._record(item.exercise, tests.hidden_seed if hidden else tests.visible_seed)
        claims = read_claims(payload, len(recording.cases), len(recording.parameters))
        if claims.problem:
            quiet = hidden or tests.references  # it has seen what must not be told on
            said = "it cannot be called, or ends in an error" if quiet else claims.problem.rstrip(".")
            return Score(item, 0.0, (f"not right: {said}.",))
        if not sings(claims.canary, tests.canary):
            return Score(item, 0.0, (TAMPERED,), suspicious=True)
        outcomes = tuple(
            with_traces(outcome, remains, case.arguments)
            for outcome, remains, case in zip(claims.outcomes, claims.remains, recording.cases, strict=True)
        )
        again = claims.again
        if tests.references:  # the same goes for other exercises' answers
            outcomes, again = (tuple(map(_without_words, some)) for some in (outcomes, again))
        result = judge_outcomes(recording, outcomes, lambda number: (outcomes[number], again[number]))
        if not result:
            lines = _about_hidden(recording, result, outcomes) if hidden else _about_visible(result)
            return Score(item, 0.0, lines, result.misconception)
        if judge_outcomes(never_right(recording), outcomes, lambda number: ()):
            return Score(item, 0.0, (TAMPERED,), suspicious=True)
        return Score(item, item.points, ("passed, on the notebook's cases and on hidden ones.",))


def _about_visible(result: CheckResult) -> tuple[str, ...]:
    """What the check says, but that nobody is to go on."""
    first, *others = result.message.splitlines()
    return ("not filled in.",) if first.startswith("not filled in") else ("not right.", *others)


def _about_hidden(
    recording: Recording, result: CheckResult, outcomes: tuple[Outcome, ...]
) -> tuple[str, ...]:
    """What may be said of hidden cases that are wrong."""
    first = "not right: it passes the notebook's cases, but not hidden ones with other shapes and numbers."
    derivation = f"See {recording.derivation}."
    for wrong in recording.misconceptions:
        if wrong.name == result.misconception:
            return first, f"The mistake is known: {wrong.name}. {wrong.hint}", derivation
    pairs = zip(outcomes, recording.expected, strict=True)
    fault = next(filter(None, (_kind_of_fault(*pair, recording.parameters) for pair in pairs)))
    return first, fault, derivation


def _kind_of_fault(outcome: Outcome, expected: Outcome, parameters: tuple[str, ...]) -> str | None:
    """In what respect an outcome is wrong, in words that hold nothing of its arguments; None if right."""
    if outcome.error:
        return "It ends in an error."
    if difference_in_results(outcome, expected):
        return "Its results are wrong."
    if sentence := difference_in_traces(outcome, expected, parameters):
        return f"{sentence[0].upper()}{sentence[1:]}"
    if name := wrong_gradient(outcome, expected, parameters):
        return f"The gradient with respect to {name} is wrong."
    return None


def _without_words(outcome: Outcome) -> Outcome:
    """An outcome without what a student's code can choose freely: an error's text, names of its own types."""
    error = outcome.error
    if error and not isinstance(getattr(builtins, error, None), type):
        error = "Exception"
    known = torch.Tensor | None | EllipsisType
    outputs = tuple(output if isinstance(output, known) else object() for output in outcome.outputs)
    return replace(outcome, outputs=outputs, error=error, error_text="")


def never_right(recording: Recording) -> Recording:
    """A check that no answer passes, unless the comparison itself has been tampered with."""

    def spoiled(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        return ~value if value.dtype == torch.bool else value + 1

    expected = tuple(
        replace(
            outcome,
            outputs=tuple(map(spoiled, outcome.outputs)),
            weights=tuple(map(spoiled, outcome.weights)),
        )
        for outcome in recording.expected
    )
    return replace(recording, expected=expected, misconceptions=())


def _agrees(value: object, right: object, within: float) -> bool:
    if isinstance(right, str) or isinstance(value, str | bool):
        return value == right and type(value) is type(right)
    return abs(value - right) <= within  # false for what is not a number
