"""The student's functions in the place of the exercises': the assignment's package runs on them."""

import importlib
import linecache
from collections.abc import Callable

from lecture26.checks.judging import judge
from lecture26.checks.recording import Recording

from .messages import NotSolvedYet
from .reading import FOLDER, code, item, notebook, solution

_passed: dict[str, Callable] = {}  # what has passed its check in this process, by exercise


def remember(exercise: str, function: Callable) -> None:
    """Let the package run on a function from now on."""
    _passed[exercise] = function


def forget(exercise: str) -> None:
    """Let the package run on what was saved, if anything."""
    _passed.pop(exercise, None)


def own(exercise: str) -> Callable:
    """The student's function for an exercise: the one that has passed its check here, or the one saved.

    Raises NotSolvedYet where there is none, or the one saved does not pass.
    """
    if exercise not in _passed:
        _passed[exercise] = saved(exercise)
    return _passed[exercise]


def saved(exercise: str) -> Callable:
    """The function for an exercise in the student's saved notebook, if it passes its check."""
    wanted = item(exercise)
    where = f"{wanted['function']} ({wanted['title']}, in {wanted['notebook']})"
    found = solution(wanted, notebook(wanted["notebook"]))
    if found.problem:
        raise NotSolvedYet(f"this needs {where}, which is not solved")
    function = built(wanted, code(found))
    if not judge(Recording.load(FOLDER / "checks" / f"{exercise}.safetensors"), function):
        raise NotSolvedYet(f"this needs {where}, which does not pass its check")
    return function


def built(wanted: dict, text: str) -> Callable:
    """The function of an item that a piece of Python defines, among the names of the chapter's module."""
    module = importlib.import_module(f"lecture26.{wanted['exercise'].partition('.')[0]}")
    namespace = dict(vars(module))
    filename = f"<your {wanted['function']}>"
    linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename  # to quote a line
    exec(compile(text, filename, "exec"), namespace)
    return namespace[wanted["function"]]
