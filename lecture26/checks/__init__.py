"""Checks of the exercises: is a candidate right, and if not, which mistake is it?

`check("ddpm.q_sample", q_sample)` runs the exercise's reference and its misconceptions on a spread of cases,
and compares what the candidate does on the same cases. Recorded beforehand (`record`, `Recording.save`), a
check judges without the reference. A chapter's exercises stand in the module of its name in `chapters`, and
are imported when first asked for.

A function of the learner's own that passes, and an answer that `check_answer` finds right, are entered in the
record of solved exercises beside the notebook, if there is one; `progress()` prints it.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

from lecture26.kit.solved import note_solved, print_progress

from . import chapters
from .answers import check_answer
from .core import Case, Exercise, Misconception
from .judging import CheckResult, judge
from .recording import Recording, record_exercise

__all__ = [
    "Case",
    "CheckResult",
    "Exercise",
    "Misconception",
    "Recording",
    "check",
    "check_answer",
    "check_recorded",
    "exercise",
    "exercises",
    "progress",
    "record",
]


def check(exercise: str, candidate: Callable) -> CheckResult:
    """Check a candidate for an exercise, for instance check("ddpm.q_sample", q_sample).

    The result is true when the candidate passed, and reads as text. A wrong candidate never raises here,
    whatever it does; what it prints is shown for the first case only.

    Raises ValueError for an unknown exercise.
    """
    result = judge(record(exercise), candidate)
    # the finished function, imported from the package, solves nothing
    if result and isinstance(candidate, FunctionType) and candidate.__module__ == "__main__":
        note_solved(exercise)
    return result


def progress() -> None:
    """Print which exercises are solved and which are open, by the record beside the notebook."""
    print_progress()


def check_recorded(recording: Recording | str | Path, candidate: Callable) -> CheckResult:
    """Check a candidate against a recording or the path of one; needs no reference and no chapter module.

    Raises FileNotFoundError or ValueError for a file that is missing or no recording.
    """
    return judge(recording if isinstance(recording, Recording) else Recording.load(recording), candidate)


def record(name: str, seed: int = 0) -> Recording:
    """Record an exercise's check. Another seed gives other cases: a hidden test of the same exercise.

    Raises ValueError for an unknown exercise.
    """
    return record_exercise(exercise(name), seed)


def exercise(name: str) -> Exercise:
    """The exercise of a name "chapter.function".

    Raises TypeError for a name that is no text, ValueError for an unknown one.
    """
    if not isinstance(name, str):
        raise TypeError(f"exercise must be a name such as 'ddpm.q_sample', got {type(name).__name__}")
    chapter = name.partition(".")[0]
    if chapter not in _chapters():
        raise ValueError(
            f"exercise must begin with a chapter's name, one of {', '.join(_chapters())}; got {name!r}"
        )
    found = {known.name: known for known in _load(chapter)}
    if name not in found:
        raise ValueError(f"exercise must be one of {', '.join(found)}; got {name!r}")
    return found[name]


def exercises() -> list[str]:
    """The names of all exercises, chapter by chapter."""
    return [known.name for chapter in _chapters() for known in _load(chapter)]


def _chapters() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(chapters.__path__))


def _load(chapter: str) -> list[Exercise]:
    return importlib.import_module(f"{chapters.__name__}.{chapter}").EXERCISES
