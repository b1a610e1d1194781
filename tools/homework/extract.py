"""What a student has written, from the bytes of a notebook: nothing of it is executed here.

`own_code` takes a function with what it needs from the notebook. Here the notebook is a stranger's: it is
read without any trust in its form, and an exercise's cell is known by its mark (nbgrader's grade_id).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from own_code import (
    OwnCell,
    OwnNotebook,
    Statement,
    by_name,
    own_cell,
    own_function,
    statements,
    without_magics,
)


@dataclass(frozen=True)
class Marked:
    """A cell of a notebook: its number from 1, its grade_id or None, its kind, its text."""

    number: int
    grade_id: str | None
    kind: str
    text: str


@dataclass(frozen=True)
class Found:
    """A student's answer to an item.

    code: what is to be executed for it; problem: why there is none, in words.
    cell: the text of the student's cell; notes: what is odd about it, in words.
    """

    code: str = ""
    cell: str = ""
    notes: tuple[str, ...] = ()
    problem: str | None = None


def cells_of(raw: bytes) -> list[Marked]:
    """The cells of a notebook. Raises ValueError, in words, where the bytes are none."""
    try:
        notebook = json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON ({str(error)[:100]})") from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise ValueError("it has no list of cells")
    return [_marked(number, cell) for number, cell in enumerate(cells, start=1) if isinstance(cell, dict)]


def _marked(number: int, cell: dict) -> Marked:
    text = cell.get("source", "")
    text = "".join(map(str, text)) if isinstance(text, list) else str(text)
    metadata = cell.get("metadata")
    mark = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = mark.get("grade_id") if isinstance(mark, dict) else None
    return Marked(number, grade_id if isinstance(grade_id, str) else None, str(cell.get("cell_type")), text)


def statements_of(cells: list[Marked], name: str, marks: set[str]) -> OwnNotebook:
    """A notebook's code cells; one with any of these marks counts as code, whatever kind it was made."""
    code = [cell for cell in cells if cell.kind == "code" or cell.grade_id in marks]
    return OwnNotebook(name, tuple(_own_cell(cell) for cell in code))


def _own_cell(cell: Marked) -> OwnCell:
    try:
        return own_cell(cell.number, cell.text, ())
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, or nested too deeply
        problem = f"its cell cannot be read as Python ({type(error).__name__})"
        return OwnCell(cell.number, (), cell.text, problem=problem)


def function_of(
    cells: list[Marked],
    notebook: OwnNotebook,
    function: str,
    mark: str,
    known: Mapping[str, Statement],
    finished: Sequence[str],
) -> Found:
    """The function of an exercise. A cell with its mark comes before any other; among several, the last.

    Args:
        cells: of the notebook.
        notebook: the same, as `statements_of` gives it.
        function: its name.
        mark: the grade_id of its cell.
        known: what the chapter itself defines, by name.
        finished: the other exercises that this one builds on, which are right whatever the student wrote.
    """
    known = known | by_name(statements("\n".join(f"def {name}(): ..." for name in finished)))
    numbers = {cell.number for cell in cells if cell.grade_id == mark}
    tagged = replace(
        notebook,
        cells=tuple(replace(c, tags=("exercise",)) if c.number in numbers else c for c in notebook.cells),
    )
    own = own_function(tagged, function, known)
    text = {cell.number: cell.text for cell in cells}
    shown = text[max(numbers)] if numbers else ""
    notes = _oddities(cells, numbers)
    if own.problem:
        return Found("", shown, notes, own.problem)
    if own.definition.cell in numbers:
        shown = text[own.definition.cell]
    else:
        shown = own.definition.text
        notes = (*notes, f"It was found by its name, in cell {own.definition.cell}, which has not its mark.")
    if own.needs:
        names = sorted({name for statement in own.needs for name in statement.bound})
        notes = (*notes, f"Also taken from the notebook: {', '.join(names)}.")
    if hidden := [name for name in own.hidden if name not in finished]:
        notes = (*notes, f"{', '.join(hidden)} in it is the chapter's, not the notebook's own.")
    if finished:
        notes = (*notes, f"It was tried with the finished {', '.join(finished)}.")
    code = "\n\n".join([*(statement.text for statement in own.needs), own.definition.text])
    return Found(code, shown, notes)


def answer_of(cells: list[Marked], mark: str) -> Found:
    """The answer to a question: the last cell with its mark, which is code that sets a name, or text."""
    marked = [cell for cell in cells if cell.grade_id == mark]
    if not marked:
        return Found(problem="no cell has its mark")
    notes = _oddities(cells, {cell.number for cell in marked})
    cell = marked[-1]
    try:
        code = without_magics(cell.text)
    except (ValueError, RecursionError, MemoryError):
        code = ""
    return Found(code, cell.text, notes)


def _oddities(cells: list[Marked], numbers: set[int]) -> tuple[str, ...]:
    if len(numbers) < 2:
        return ()
    return (f"{len(numbers)} cells have its mark; the last one that is filled in counts.",)
