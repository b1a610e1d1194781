"""Students' notebooks for the tests of grading, made of what was handed out and of the solutions."""

import copy
from pathlib import Path

import nbformat


class Handed:
    """An assignment's notebooks as they were handed out, and the solution of each cell.

    `cohort` is one of tools/homework.
    """

    def __init__(self, cohort, assignment) -> None:
        self.assignment = assignment
        release, source = cohort.release(assignment.name), cohort.source(assignment.name)
        self.blank = {name: _read(release / f"{name}.ipynb") for name in assignment.notebooks}
        self.solutions = {
            _mark(cell): cell.source
            for name in assignment.notebooks
            for cell in _read(source / f"{name}.ipynb").cells
            if cell.metadata.get("nbgrader", {}).get("solution")
        }

    def untouched(self) -> dict:
        """The notebooks as they were handed out, by name."""
        return copy.deepcopy(self.blank)

    def solved(self, changes: dict[str, str] | None = None) -> dict:
        """The notebooks with all solutions, or with other texts in the cells of the given marks."""
        texts = self.solutions | (changes or {})
        notebooks = self.untouched()
        for notebook in notebooks.values():
            for cell in notebook.cells:
                if _mark(cell) in texts:
                    cell.source = texts[_mark(cell)]
        return notebooks


def _read(file: Path) -> nbformat.NotebookNode:
    return nbformat.read(file, as_version=4)


def _mark(cell: nbformat.NotebookNode) -> str | None:
    return cell.metadata.get("nbgrader", {}).get("grade_id")


def place_of(notebook: nbformat.NotebookNode, mark: str) -> int:
    """The number of the cell with a grade_id."""
    return next(i for i, cell in enumerate(notebook.cells) if _mark(cell) == mark)


def hand_in(folder: Path, student: str, assignment: str, notebooks: dict) -> Path:
    """Put notebooks, or the texts of files, where nbgrader has a student's; returns the folder."""
    place = folder / student / assignment
    place.mkdir(parents=True, exist_ok=True)
    for name, notebook in notebooks.items():
        text = notebook if isinstance(notebook, str) else nbformat.writes(notebook)
        (place / f"{name}.ipynb").write_text(text, encoding="utf-8")
    return place
