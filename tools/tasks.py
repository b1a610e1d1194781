"""The exercises of a notebook's source: the cells tagged `exercise`, each with the check behind it."""

import ast
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from course import Cell, read_cells
from own_code import without_magics


@dataclass(frozen=True)
class Task:
    """An exercise of a notebook's source: its name in the checks, its function, its cell."""

    name: str
    function: str
    cell: Cell


def tasks(source: Path) -> list[Task]:
    """The exercises of a notebook's source whose functions are a part of its module."""
    found = []
    for cell, check in pairwise(read_cells(source)):
        if {"exercise", "export"} <= set(cell.tags):
            found.append(Task(*checked(check), cell))
    return found


def checked(cell: Cell) -> tuple[str, str]:
    """The exercise and the function that a cell gives to `check`."""
    for node in ast.walk(ast.parse(without_magics(cell.source))):
        match node:
            case ast.Call(func=ast.Name("check"), args=[ast.Constant(str(name)), ast.Name(function)]):
                if name.partition(".")[2] == function:
                    return name, function
    raise cell.error(1, 'an exercise\'s check is called as check("chapter.function", function)')
