"""From a chapter's source to nbgrader's source notebook, with the solutions in it and every cell marked.

`nbgrader generate_assignment` makes of it what is handed out.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import Cell, read_cells
from own_code import Statement, statements, without_magics

from .assignments import HEADING, Assignment, Item, announced, folded_answer, is_paper_question, slug

IMPORTS = ast.Import | ast.ImportFrom
KEPT_TAGS = ("export", "exercise", "question")
FIRST_CELL = """\
# The checks that this assignment brings along. If this line fails, the notebook does not lie in its folder.
from lecture26.homework import check, check_answer, progress"""
INTRODUCTION = """\
> **Assignment: {title}**, notebook {number} of {count}, with {points} of {total} points.
>
> Write your functions in the place of `raise NotImplementedError`, and your answers in the place of the dots.
> The cell below each function checks it: it fails until the function is right, and says what is wrong. What a
> later cell draws, it draws with your functions, so it says *Not yet* where one is missing. At the end,
> `python hand_in.py` in this folder says what will be read, and packs it. Only your functions and answers
> count; the rest of the notebook is yours to change."""
LEFT_OUT = (
    "> *Left out here is a cell of the chapter that needs {names}, which does not come with this assignment.*"
)
NO_MILESTONE = "> *No milestone here: in this assignment, your functions are at work in all cells above.*"
LATER = "> *The answer is discussed after the homework.*"
DETAILS = re.compile(r"<details>\n<summary>Answer.*?</details>\n*", re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\((\d\d_\w+)\.ipynb(#[^)]*)?\)")
NAVIGATION = re.compile(r"^\[(Previous|Next): .*\n*", re.MULTILINE)


@dataclass(frozen=True)
class Built:
    """A source notebook, the answers to its questions, the rubrics of its paper questions.

    left_out: the cells that are left out, by their first lines.
    """

    notebook: nbformat.NotebookNode
    answers: dict[str, dict]
    rubrics: dict[str, str]
    left_out: list[str]


def source_notebook(source: Path, assignment: Assignment, may_import: Callable[[ast.stmt], bool]) -> Built:
    """The source notebook of a chapter.

    Args:
        source: notebooks/NN_name.py.
        assignment: that it is a part of.
        may_import: whether what an import statement names is handed out.
    """
    items = {item.exercise: item for item in assignment.items if item.notebook == source.stem}
    maker = _Maker(source, assignment, items, may_import)
    notebook = new_notebook(
        cells=maker.cells(), metadata={"kernelspec": dict(jupytext.read(source).metadata["kernelspec"])}
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:03d}"  # the same from build to build
    return Built(notebook, maker.answers, maker.rubrics, maker.left_out)


class _Maker:
    """Goes through a chapter's cells and makes those of the source notebook."""

    def __init__(
        self,
        source: Path,
        assignment: Assignment,
        items: dict[str, Item],
        may_import: Callable[[ast.stmt], bool],
    ) -> None:
        self.source, self.assignment, self.items, self.may_import = source, assignment, items, may_import
        self.course_cells = read_cells(source)
        self.by_title = {slug(item.title): item for item in items.values()}
        self.answers: dict[str, dict] = {}
        self.rubrics: dict[str, str] = {}
        self.left_out: list[str] = []
        self.missing: dict[str, str] = {}  # names that no cell sets, with what they would have needed
        self.exercise_above: Cell | None = None

    def cells(self) -> list[nbformat.NotebookNode]:
        """All cells."""
        found = []
        for cell in self.course_cells:
            found += self.markdown(cell) if cell.kind == "markdown" else self.code(cell)
            if len(found) == 1:  # below the title
                found.append(new_markdown_cell(self.introduction()))
                found.append(new_code_cell(FIRST_CELL))
        return found

    def introduction(self) -> str:
        """What stands below the title."""
        number = self.assignment.notebooks.index(self.source.stem) + 1
        return INTRODUCTION.format(
            title=self.assignment.title,
            number=number,
            count=len(self.assignment.notebooks),
            points=f"{sum(item.points for item in self.items.values()):g}",
            total=f"{self.assignment.points:g}",
        )

    # --- Markdown ---

    def markdown(self, cell: Cell) -> list[nbformat.NotebookNode]:
        """A Markdown cell without folded answers; behind a paper question, the cell to answer it in."""
        text = NAVIGATION.sub("", cell.source)
        if not text.strip():
            return []
        text = LINK.sub(self.linked, HEADING.sub(self.with_points, text))
        paper = is_paper_question(cell)
        text = DETAILS.sub("" if paper else LATER + "\n\n", text).rstrip()
        found = [new_markdown_cell(text)] if text else []
        if paper:
            item = self.by_title[slug(announced(cell.source).title)]
            self.rubrics[item.exercise] = folded_answer(self.course_cells, cell)
            answer = new_markdown_cell(self.rubrics[item.exercise])
            found.append(marked(answer, item.grade_id, grade=True, solution=True, points=item.points))
        return found

    def linked(self, link: re.Match) -> str:
        """A link to a chapter, or its text alone where that chapter is not in the folder."""
        return link[0] if link[2] in self.assignment.notebooks else link[1]

    def with_points(self, heading: re.Match) -> str:
        """The heading of an exercise, with its points."""
        title = f"{heading[1]}: {heading[2]}" if heading[2] else heading[1]
        item = self.by_title.get(slug(title))
        if item is None or item.points == 0:
            return heading[0]
        points = f" ({item.points:g} {'point' if item.points == 1 else 'points'})"
        return f"**{heading[1]}{points}.**" if heading[0].startswith("**") else heading[0] + points

    # --- Code ---

    def code(self, cell: Cell) -> list[nbformat.NotebookNode]:
        """A code cell: an exercise, its check, or another one, if what it needs is there."""
        above, self.exercise_above = self.exercise_above, None
        if "exercise" in cell.tags or "question" in cell.tags:
            self.exercise_above = cell
            item = self.items[called(self.course_cells[cell.number]).args[0].value]
            made = self.code_cell(cell, with_open_answer(cell))
            return [marked(made, item.solution_id, grade=False, solution=True)]
        if above is not None:
            return self.check(above, cell)
        if "milestone" in cell.tags:
            return [new_markdown_cell(NO_MILESTONE)]
        return self.other(cell)

    def check(self, exercise: Cell, cell: Cell) -> list[nbformat.NotebookNode]:
        """The graded cell that checks an exercise; above a question's, what else the course's cell sets."""
        call = called(cell)
        name, answered = call.args[0].value, ast.unparse(call.args[1])
        text, found = f'check("{name}", {answered})', []
        if "question" in exercise.tags:
            among = self.choices(call, cell)
            text = f'check_answer("{name}", {answered}' + (f", among={among!r})" if among else ")")
            self.answers[name] = answer_of(exercise, call)
            kept = self.read_below(cell, [s for s in code_of(cell) if not has_check(s.node)])
            found = [self.code_cell(cell, "\n".join(s.text for s in kept))] if kept else []
        made, item = self.code_cell(cell, text), self.items[name]
        return [*found, marked(made, item.grade_id, grade=True, solution=False, points=item.points)]

    def read_below(self, cell: Cell, measuring: list[Statement]) -> list[Statement]:
        """Those of some statements of a cell that set what a cell below it reads."""
        read: set[str] = set()
        for below in reversed(self.course_cells[cell.number :]):
            for statement in reversed(code_of(below)):
                read = read - statement.bound | statement.used
        kept = []
        for statement in reversed(measuring):
            if statement.bound & read:
                kept.insert(0, statement)
                read = read - statement.bound | statement.used
        return kept

    def choices(self, call: ast.Call, cell: Cell) -> tuple[str, ...]:
        """The choices of a question, if it is one, from the text of the notebook alone."""
        among = next((keyword.value for keyword in call.keywords if keyword.arg == "among"), None)
        match among:
            case None:
                return ()
            case ast.Tuple() | ast.List():
                return tuple(ast.literal_eval(among))
            case ast.Call(func=ast.Name("tuple"), args=[ast.Name(name)]):
                above = [s for c in self.course_cells[: cell.number] for s in code_of(c)]
                setting = [s.node for s in above if name in s.bound and isinstance(s.node, ast.Assign)]
                if setting and isinstance(setting[-1].value, ast.Dict):
                    return tuple(ast.literal_eval(key) for key in setting[-1].value.keys)
        raise cell.error(1, "among must be a tuple of texts, or the keys of a dict that stands above as such")

    def other(self, cell: Cell) -> list[nbformat.NotebookNode]:
        """A cell that is neither an exercise nor its check; a note where it cannot run."""
        here = code_of(cell)
        gone = [s for s in here if isinstance(s.node, IMPORTS) and not self.may_import(s.node)]
        for statement in gone:
            (name,) = statement.bound
            if not is_first_cells(statement.node):
                self.missing[name] = f"`{getattr(statement.node, 'module', None) or name}`"
        kept = [statement for statement in here if statement not in gone]
        needs = {self.missing[name] for s in kept for name in s.used & self.missing.keys()}
        if needs:
            reason = ", ".join(sorted(needs))
            self.missing |= {name: reason for s in kept for name in s.bound}
            self.left_out.append(cell.source.partition("\n")[0])
            return [new_markdown_cell(LEFT_OUT.format(names=reason))]
        for name in {name for statement in kept for name in statement.bound}:
            self.missing.pop(name, None)
        text = without(cell.source, gone) if gone else cell.source
        return [self.code_cell(cell, text)] if text.strip() else []

    def code_cell(self, cell: Cell, text: str) -> nbformat.NotebookNode:
        """A code cell; unless it does nothing but import, its failing does not stop a run of all cells."""
        tags = [tag for tag in cell.tags if tag in KEPT_TAGS]
        if not all(isinstance(statement.node, IMPORTS) for statement in code_of(cell)):
            tags.append("raises-exception")
        metadata = {"tags": tags} if tags else {}
        if "draw" in cell.tags:
            metadata["jupyter"] = {"source_hidden": True}
        return new_code_cell(text, metadata=metadata)


def marked(
    cell: nbformat.NotebookNode, grade_id: str, *, grade: bool, solution: bool, points: float | None = None
) -> nbformat.NotebookNode:
    """A cell with nbgrader's marks: to write in (`solution`), earning points (`grade`), or both."""
    cell.metadata["nbgrader"] = {
        "schema_version": 3,
        "grade_id": grade_id,
        "grade": grade,
        "solution": solution,
        "locked": not solution,
        "task": False,
        "cell_type": cell.cell_type,
    }
    if points is not None:
        cell.metadata["nbgrader"]["points"] = points
    return cell


def code_of(cell: Cell) -> list[Statement]:
    """The statements of a code cell; none of a Markdown cell."""
    return list(statements(cell.source)) if cell.kind == "code" else []


def called(cell: Cell) -> ast.Call:
    """The call of `check` or `check_answer` in a cell."""
    for node in ast.walk(ast.parse(without_magics(cell.source))):
        if has_check(node) and isinstance(node, ast.Call):
            return node
    raise cell.error(1, "the cell right after an exercise calls its check")


def has_check(node: ast.AST) -> bool:
    """Whether a piece of Python calls a check."""
    return any(
        isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Name)
        and inner.func.id in ("check", "check_answer")
        for inner in ast.walk(node)
    )


def is_first_cells(node: ast.stmt) -> bool:
    """Whether an import brings what the first cell of the notebook brings instead."""
    return isinstance(node, ast.ImportFrom) and node.module == "lecture26.checks"


def with_open_answer(cell: Cell) -> str:
    """An exercise's text as it is; a question's with the open answer above the right one.

    `ClearAnswers` takes away the right one.
    """
    if "question" not in cell.tags:
        return cell.source
    return f"{answer_node(cell).targets[0].id} = ...  # your answer in the place of the dots\n{cell.source}"


def answer_node(question: Cell) -> ast.Assign:
    """The assignment that answers a question."""
    match ast.parse(question.source).body:
        case [ast.Assign(targets=[ast.Name()]) as answer]:
            return answer
    raise question.error(1, "the solution of a question is one assignment, name = answer")


def answer_of(question: Cell, call: ast.Call) -> dict:
    """The right answer of a question, and how far from it a number may be."""
    try:
        within = [ast.literal_eval(k.value) for k in call.keywords if k.arg == "within"]
        return {"right": ast.literal_eval(answer_node(question).value), "within": [*within, 0.0][0]}
    except ValueError:
        raise question.error(1, "a question's answer, and within=, are numbers or texts as such") from None


def without(text: str, gone: list[Statement]) -> str:
    """The text of a cell without some of the names that it imports."""
    lines = text.split("\n")
    names = {name for statement in gone for name in statement.bound}
    for node in reversed(
        [node for node in ast.parse(without_magics(text)).body if isinstance(node, IMPORTS)]
    ):
        kept = [a for a in node.names if (a.asname or a.name).split(".")[0] not in names]
        if len(kept) < len(node.names):
            node.names = kept
            lines[node.lineno - 1 : node.end_lineno] = [ast.unparse(node)] if kept else []
    return "\n".join(lines).strip("\n")
