"""The verdict on a candidate, in words a learner can act on."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .core import Case, Outcome, call, describe, difference, difference_in_kind
from .recording import Recording


@dataclass(frozen=True, repr=False)
class CheckResult:
    """What a check found: true when the candidate passed, and readable as text.

    misconception: the name of the mistake the candidate makes; None if it passed or the mistake is unknown.
    """

    exercise: str
    passed: bool
    message: str
    misconception: str | None = None

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"{self.exercise}: {self.message}"


def judge(recording: Recording, candidate: Callable) -> CheckResult:
    """Compare a candidate with a recording; it never raises an Exception, whatever the candidate does.

    What the candidate prints is shown for the first case and swallowed for the others.
    """

    def failed(*lines: str, misconception: str | None = None) -> CheckResult:
        return CheckResult(recording.exercise, False, "\n".join(lines), misconception)

    parameters, cases = recording.parameters, recording.cases
    problem = _not_callable_with(parameters, candidate)
    if problem:
        return failed("not right yet.", problem)
    outcomes = [call(candidate, case, silent=i > 0) for i, case in enumerate(cases)]
    if all(outcome.unfilled for outcome in outcomes):
        return failed("not filled in yet.", "Write its body in place of the `...`, and `return` the result.")
    differences = _differences(outcomes, recording.expected, parameters)
    if not any(differences):
        return CheckResult(recording.exercise, True, f"passed, on all {len(cases)} cases.")

    number = next(i for i, sentence in enumerate(differences) if sentence)
    case, expected = cases[number], recording.expected[number]
    lines = [
        "not right yet.",
        f"On case {number + 1} of {len(cases)} ({case.note}), {differences[number]}",
        f"Arguments: {', '.join(map(describe, parameters, case.arguments))}.",
    ]
    derivation = f"See {recording.derivation}."
    for wrong in recording.misconceptions:
        if not any(_differences(outcomes, wrong.outcomes, parameters)):
            known = f"The mistake is known: {wrong.name}. {wrong.hint}"
            return failed(*lines, known, derivation, misconception=wrong.name)
    if _varies(candidate, case, expected, parameters):
        lines.append(
            "Two calls with the same arguments give different results: it draws random numbers, or keeps "
            "something between calls. Use the arguments alone."
        )
    return failed(*lines, *_remarks(outcomes, recording.expected, differences), derivation)


def _not_callable_with(parameters: tuple[str, ...], candidate: object) -> str | None:
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


def _differences(
    outcomes: list[Outcome], expected: tuple[Outcome, ...], parameters: tuple[str, ...]
) -> list[str | None]:
    return [difference(*pair, parameters) for pair in zip(outcomes, expected, strict=True)]


def _varies(candidate: Callable, case: Case, expected: Outcome, parameters: tuple[str, ...]) -> bool:
    """Whether calls with the same arguments, but other random numbers, are wrong in different ways."""
    outcomes = (call(candidate, case, seed) for seed in range(3))
    return len({difference(outcome, expected, parameters) for outcome in outcomes}) > 1


def _remarks(
    outcomes: list[Outcome], expected: tuple[Outcome, ...], differences: list[str | None]
) -> list[str]:
    """What else there is to say of a mistake that is not a known one."""
    relation = _relation(outcomes, expected)
    right = differences.count(None)
    remarks = []
    if relation:
        remarks.append(f"On every case its values are {relation}.")
    if right:
        remarks.append(f"It is right on {right} of {len(differences)} cases.")
    return remarks


def _relation(outcomes: list[Outcome], expected: tuple[Outcome, ...]) -> str | None:
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
    if abs(factor) > 1e-3 and torch.allclose(result, factor * wanted, rtol=1e-3, atol=1e-6):
        return f"{factor:.2g} times the right ones"
    return None
