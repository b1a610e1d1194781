"""The verdict on a candidate, in words a learner can act on."""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .core import (
    Outcome,
    call,
    describe,
    difference,
    difference_in_kind,
    difference_in_results,
    difference_in_traces,
    wrong_gradient,
)
from .recording import RecordedMisconception, Recording

WIDTH = 90  # columns of text, which fit into a cell's output in JupyterLab


@dataclass(frozen=True, repr=False)
class CheckResult:
    """What a check found: true when the candidate passed, and readable as text.

    message: what there is to say; the text is the message in lines of at most WIDTH columns.
    misconception: the name of the mistake the candidate makes; None if it passed or the mistake is unknown.
    """

    exercise: str
    passed: bool
    message: str
    misconception: str | None = None

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        wrapper = textwrap.TextWrapper(
            WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        return "\n".join(map(wrapper.fill, f"{self.exercise}: {self.message}".splitlines()))


def judge(recording: Recording, candidate: Callable) -> CheckResult:
    """Compare a candidate with a recording; it never raises an Exception, whatever the candidate does.

    What the candidate prints is shown for the first case and swallowed for the others.
    """
    problem = not_callable_with(recording.parameters, candidate)
    if problem:
        return CheckResult(recording.exercise, False, f"not right yet.\n{problem}")
    outcomes = [call(candidate, case, silent=i > 0) for i, case in enumerate(recording.cases)]

    def repeated(number: int) -> list[Outcome]:
        return [call(candidate, recording.cases[number], seed) for seed in range(3)]

    return judge_outcomes(recording, outcomes, repeated)


def judge_outcomes(
    recording: Recording, outcomes: Sequence[Outcome], repeated: Callable[[int], Iterable[Outcome]]
) -> CheckResult:
    """Compare what a candidate did, here or elsewhere, with a recording.

    Args:
        recording: the check.
        outcomes: what the candidate did on each of its cases.
        repeated: a function of a case's number: what the candidate did on it in several calls, for each of
            which another seed was set.
    """

    def failed(*lines: str, misconception: str | None = None) -> CheckResult:
        return CheckResult(recording.exercise, False, "\n".join(lines), misconception)

    if all(outcome.unfilled for outcome in outcomes):
        return failed("not filled in yet.", "Write its body, and `return` the result.")
    trial = _Trial(recording, outcomes)
    if not any(trial.differences):
        return CheckResult(recording.exercise, True, f"passed, on all {len(outcomes)} cases.")
    derivation = f"See {recording.derivation}."
    mistake, number = _known_mistake(trial)
    if mistake:
        lines = _about_known_mistake(trial, mistake, number)
        return failed("not right yet.", *lines, derivation, misconception=mistake.name)
    return failed("not right yet.", *_about_unknown_mistake(trial, repeated, number), derivation)


def not_callable_with(parameters: tuple[str, ...], candidate: object) -> str | None:
    """Why the candidate cannot be called with these parameters in this order; None where it can."""
    if not callable(candidate):
        return f"A function is expected, not something of type {type(candidate).__name__}."
    try:
        signature = inspect.signature(candidate)
    except (TypeError, ValueError):  # built-in functions have none to show
        return None
    names = tuple(signature.parameters)
    wanted = f"It must take ({', '.join(parameters)})"
    try:
        signature.bind(*parameters)
    except TypeError:
        return f"{wanted}, but takes ({', '.join(names)})."
    if sorted(names) == sorted(parameters) and names != parameters:
        return f"{wanted} in this order, but takes ({', '.join(names)})."
    return None


class _Trial:
    """What a candidate did on the cases of a recording.

    differences: for each case, how it differs from what is right; in_results: in its results alone.
    """

    def __init__(self, recording: Recording, outcomes: Sequence[Outcome]) -> None:
        pairs = list(zip(outcomes, recording.expected, strict=True))
        self.recording, self.outcomes = recording, outcomes
        self.differences = [difference(*pair, recording.parameters) for pair in pairs]
        self.in_results = [difference_in_results(*pair) for pair in pairs]

    def case(self, number: int) -> str:
        return f"case {number + 1} of {len(self.outcomes)} ({self.recording.cases[number].note})"

    def arguments(self, number: int) -> str:
        values = self.recording.cases[number].arguments
        return f"Arguments: {', '.join(map(describe, self.recording.parameters, values))}."

    def alike(self, wrong: RecordedMisconception) -> list[bool]:
        """For each case, whether a mistake gives the same results."""
        return [not difference_in_results(*pair) for pair in zip(self.outcomes, wrong.outcomes, strict=True)]

    def equal(self, wrong: RecordedMisconception) -> list[bool]:
        """For each case, whether a mistake does the same in every respect."""
        pairs = zip(self.outcomes, wrong.outcomes, strict=True)
        return [not difference(*pair, self.recording.parameters) for pair in pairs]


def _first(facts: Iterable) -> int | None:
    """The number of the first one that is true."""
    return next((number for number, fact in enumerate(facts) if fact), None)


def _known_mistake(trial: _Trial) -> tuple[RecordedMisconception | None, int]:
    """The mistake that the candidate makes, if it is known, and the number of the case that shows it.

    This is the first case that fails; or, where an argument was overwritten before that, say, the first one
    with a wrong result. Of several mistakes, the one that is made on more cases.
    """
    first, first_result = _first(trial.differences), _first(trial.in_results)
    for number in (first,) if first_result is None else (first, first_result):
        found = [wrong for wrong in trial.recording.misconceptions if _makes(trial, wrong, number)]
        if found:
            return max(found, key=lambda wrong: (sum(trial.alike(wrong)), sum(trial.equal(wrong)))), number
    return None, first


def _makes(trial: _Trial, wrong: RecordedMisconception, number: int) -> bool:
    """Whether the candidate makes a mistake on a case and on most of all.

    On that case the results must be the same; if these are right, all the rest must be the same, too.
    """
    pair = trial.outcomes[number], wrong.outcomes[number]
    results_are_right = trial.in_results[number] is None
    if difference(*pair, trial.recording.parameters) if results_are_right else difference_in_results(*pair):
        return False
    alike = trial.alike(wrong)
    # Errors of one type may have different causes: some results must be the same, unless there are none.
    returned = any(same and not outcome.error for same, outcome in zip(alike, trial.outcomes, strict=True))
    only_errors = all(outcome.error for outcome in (*trial.outcomes, *wrong.outcomes))
    return 2 * sum(alike) > len(alike) and (returned or only_errors)


def _about_known_mistake(trial: _Trial, mistake: RecordedMisconception, number: int) -> list[str]:
    lines = [
        f"On {trial.case(number)}, {trial.in_results[number] or trial.differences[number]}",
        trial.arguments(number),
        f"The mistake is known: {mistake.name}. {mistake.hint}",
    ]
    others = [_besides(trial, mistake, i) for i in range(len(trial.outcomes))]
    alike = trial.alike(mistake)
    if any(others):
        other = _first(others)
        lines.append(f"And besides, on {trial.case(other)}, {others[other]}")
    elif not all(alike):
        lines.append(f"On {trial.case(alike.index(False))}, however, it is right, where this mistake is not.")
    return lines


def _besides(trial: _Trial, mistake: RecordedMisconception, number: int) -> str | None:
    """What is wrong with a candidate on a case, other than the mistake, as a sentence; None if nothing is."""
    parameters, right = trial.recording.parameters, trial.recording.expected[number]
    outcome, wrong = trial.outcomes[number], mistake.outcomes[number]
    if difference_in_results(outcome, wrong):
        return trial.differences[number]
    trace = difference_in_traces(outcome, right, parameters)
    if trace and trace != difference_in_traces(wrong, right, parameters):
        return trace
    if outcome.attached == wrong.attached and (name := wrong_gradient(outcome, wrong, parameters)):
        return f"the gradient with respect to {name} is not that of its values: is it cut on the way?"
    return None


def _about_unknown_mistake(
    trial: _Trial, repeated: Callable[[int], Iterable[Outcome]], number: int
) -> list[str]:
    lines = [f"On {trial.case(number)}, {trial.differences[number]}", trial.arguments(number)]
    if _varies(trial, repeated(number), number):
        lines.append(
            "Two calls with the same arguments give different results: it draws random numbers, or keeps "
            "something between calls. Use the arguments alone."
        )
    relation = _relation(trial.outcomes, trial.recording.expected)
    if relation:
        lines.append(f"On every case its values are {relation}.")
    right = trial.differences.count(None)
    if right:
        lines.append(f"It is right on {right} of {len(trial.differences)} cases.")
    return lines


def _varies(trial: _Trial, outcomes: Iterable[Outcome], number: int) -> bool:
    """Whether calls with the same arguments, but other random numbers, are wrong in different ways."""
    expected, parameters = trial.recording.expected[number], trial.recording.parameters
    return len({difference(outcome, expected, parameters) for outcome in outcomes}) > 1


def _relation(outcomes: Sequence[Outcome], expected: tuple[Outcome, ...]) -> str | None:
    """A simple relation between all results and the right ones, in words; None if none of these holds."""
    pairs = []
    for outcome, right in zip(outcomes, expected, strict=True):
        kinds = map(difference_in_kind, outcome.outputs, right.outputs)
        if len(outcome.outputs) != len(right.outputs) or any(kinds):
            return None
        pairs += zip(outcome.outputs, right.outputs, strict=True)
    result, wanted = (
        torch.cat([tensor.double().flatten() for tensor in side]) for side in zip(*pairs, strict=True)
    )
    relations = {
        "the right ones with the opposite sign": -wanted,
        "the squares of the right ones": wanted.square(),
        "the square roots of the right ones": wanted.sqrt(),
        "the reciprocals of the right ones": wanted.reciprocal(),
        "the logarithms of the right ones": wanted.log(),
        "the exponentials of the right ones": wanted.exp(),
    }
    for relation, value in relations.items():
        if torch.allclose(result, value, rtol=1e-3, atol=1e-3, equal_nan=True):
            return relation
    factor = (result @ wanted / wanted.square().sum()).item()
    if min(abs(factor), abs(factor - 1)) > 1e-3 and torch.allclose(
        result, factor * wanted, rtol=1e-3, atol=1e-6
    ):
        return f"{factor:.2g} times the right ones"
    return None
