"""The assignment in its folder: what is to be solved, and what stands in the student's notebooks."""

import json
from functools import cache
from pathlib import Path

from .own_code import OwnFunction, OwnNotebook, by_name, own_function, read_own_notebook, statements

PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = PACKAGE.parent


@cache
def assignment() -> dict:
    """What was handed out: "name", "title", and "items" with their exercise, function, notebook, points."""
    return json.loads((FOLDER / "assignment.json").read_text(encoding="utf-8"))


def item(exercise: str) -> dict:
    """One of the items."""
    return next(item for item in assignment()["items"] if item["exercise"] == exercise)


def notebook(name: str) -> OwnNotebook:
    """One of the student's notebooks, as it was saved."""
    return read_own_notebook(FOLDER / f"{name}.ipynb")


def solution(wanted: dict, found: OwnNotebook) -> OwnFunction:
    """The student's function for an item, with what it needs from its notebook.

    Args:
        wanted: the item.
        found: the notebook.
    """
    return own_function(found, wanted["function"], by_name(statements(module_text(wanted))))


def module_text(wanted: dict) -> str:
    """The text of the module that an item's function belongs to."""
    chapter = wanted["exercise"].partition(".")[0]
    return (PACKAGE / f"{chapter}.py").read_text(encoding="utf-8")


def code(own: OwnFunction) -> str:
    """The Python of a student's function and of what it needs."""
    return "\n\n\n".join([*(statement.text for statement in own.needs), own.definition.text]) + "\n"
