"""Scores and comments in nbgrader's gradebook, and the notebooks that its formgrader and feedback show.

Such a notebook is the one that was handed out, with the student's cells of the assignment's items in it:
nothing else of a student's gets there. Scores and comments that a person has entered stay.
"""

import copy
import html
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_output
from nbgrader.api import Grade, Gradebook
from nbgrader.utils import parse_utc
from sqlalchemy.exc import SAWarning

from .assignments import Assignment, Cohort
from .collect import Submission
from .verdicts import Score

MAX_CELL = 50_000  # characters of a student's cell that are shown


@dataclass(frozen=True)
class Entered:
    """What the gradebook holds of an item after all: points, or None where a person has to score it.

    comment: what a person has written.
    """

    points: float | None
    comment: str = ""


@dataclass(frozen=True)
class Entry:
    """What the gradebook holds of a submission: its items by their names, and seconds after the due date."""

    items: dict[str, Entered]
    late_s: float


class Book:
    """The gradebook of a cohort, for one assignment. Use it as a context."""

    def __init__(self, cohort: Cohort, assignment: Assignment) -> None:
        self._cohort, self._assignment = cohort, assignment
        self._released = {
            name: nbformat.read(cohort.release(assignment.name) / f"{name}.ipynb", as_version=4)
            for name in assignment.notebooks
        }

    def blank(self) -> dict[str, str]:
        """The text of each marked cell as it was handed out, by its grade_id."""
        return {
            cell.metadata.nbgrader.grade_id: cell.source
            for notebook in self._released.values()
            for cell in notebook.cells
            if "nbgrader" in cell.metadata
        }

    def __enter__(self) -> "Book":
        self._book = Gradebook(f"sqlite:///{self._cohort.gradebook}", self._cohort.name)
        return self

    def __exit__(self, *_: object) -> None:
        self._book.close()

    def enter(self, submission: Submission, scores: list[Score]) -> Entry:
        """Enter a student's scores, write the graded notebooks; returns what the gradebook then says."""
        name, student = self._assignment.name, submission.student
        timestamp = _parsed(submission.timestamp)
        self._book.update_or_create_student(student)
        with warnings.catch_warnings(action="ignore", category=SAWarning):  # nbgrader's own affair
            self._book.update_or_create_submission(
                name, student, **({"timestamp": timestamp} if timestamp else {})
            )
        for score in scores:
            self._enter_score(student, score)
        self._book.db.commit()
        self._write_notebooks(submission, scores)
        entered = {score.item.exercise: self._entered(student, score) for score in scores}
        return Entry(entered, self._book.find_submission(name, student).total_seconds_late)

    def _enter_score(self, student: str, score: Score) -> None:
        item = score.item
        grade = self._grade(student, score)
        grade.auto_score = score.points
        grade.needs_manual_grade = score.points is None and grade.manual_score is None
        comment = self._book.find_comment(item.solution_id, item.notebook, self._assignment.name, student)
        comment.auto_comment = as_markdown(score.lines)

    def _grade(self, student: str, score: Score) -> Grade:
        return self._book.find_grade(score.item.grade_id, score.item.notebook, self._assignment.name, student)

    def _entered(self, student: str, score: Score) -> Entered:
        grade = self._grade(student, score)
        comment = self._book.find_comment(
            score.item.solution_id, score.item.notebook, self._assignment.name, student
        )
        points = None if grade.needs_manual_grade else grade.score
        return Entered(points, comment.manual_comment or "")

    def _write_notebooks(self, submission: Submission, scores: list[Score]) -> None:
        place = Path(submission.student) / self._assignment.name
        submitted = self._cohort.folder / "submitted" / place
        graded = self._cohort.folder / "autograded" / place
        for folder in (submitted, graded):
            folder.mkdir(parents=True, exist_ok=True)
            if submission.timestamp:
                (folder / "timestamp.txt").write_text(submission.timestamp, encoding="utf-8")
        for name, released in self._released.items():
            if name in submission.notebooks:
                (submitted / f"{name}.ipynb").write_bytes(submission.notebooks[name])
            of_notebook = [score for score in scores if score.item.notebook == name]
            nbformat.write(graded_notebook(released, of_notebook), graded / f"{name}.ipynb")
        for name in ("checks", "lecture26"):  # a graded notebook does not run: what it needs stays away
            shutil.rmtree(graded / name, ignore_errors=True)


def graded_notebook(released: nbformat.NotebookNode, scores: list[Score]) -> nbformat.NotebookNode:
    """The notebook that was handed out, with a student's cells, and below each check what was found."""
    notebook = copy.deepcopy(released)
    by_solution = {score.item.solution_id: score for score in scores}
    by_grade = {score.item.grade_id: score for score in scores if score.points is not None}
    for cell in notebook.cells:
        mark = cell.metadata.get("nbgrader", {}).get("grade_id")
        if score := by_solution.get(mark):
            if score.cell:
                text = score.cell[:MAX_CELL]
                cell.source = text if cell.cell_type == "code" else harmless(text)
        elif score := by_grade.get(mark):
            cell.outputs = [new_output("stream", name="stdout", text="\n".join(score.lines) + "\n")]
    return notebook


def as_markdown(lines: tuple[str, ...]) -> str:
    """Lines as Markdown that shows them as they are: nbgrader renders comments, HTML included."""
    escaped = (html.escape(line, quote=False) for line in lines)
    return "  \n".join(re.sub(r"([\\`*_{}\[\]#$|~])", r"\\\1", line) for line in escaped)


def harmless(markdown: str) -> str:
    """A student's Markdown in which no HTML begins: it would be alive in the page of whoever grades."""
    return re.sub(r"<(?=[A-Za-z/!?])", "< ", markdown)


def _parsed(timestamp: str | None) -> object:
    try:
        return parse_utc(timestamp) if timestamp else None
    except (ValueError, OverflowError):
        return None
