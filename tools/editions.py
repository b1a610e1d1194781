"""Make the learner's copies of the notebooks in work/: exercises to fill in, answers folded away.

A copy is an .ipynb without outputs that is paired with no source. A copy that exists is the learner's own and
stays as it is; so does the record of solved exercises beside the copies, but for the names of new exercises.

With `--update` a copy of an older version of its chapter gives way to a new one, into which the solved
exercises are carried over; the old one goes to work/old/.

With `--rehearse FOLDER` it makes the rehearsals there instead, on which `make nbval` tries both a learner who
solves every exercise and one who solves none.
"""

import argparse
import ast
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import jupytext
import nbformat
from ipykernel.ipkernel import IPythonKernel
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from carry_over import carry_over
from course import (
    OWN_METADATA,
    ROOT,
    SOLUTION_MARKERS,
    Cell,
    CourseError,
    cells_of_notebook,
    digest,
    module_name,
    notebook_sources,
    read_cells,
)
from lecture26.kit import solved
from lecture26.kit.files import replace_when_complete
from own_code import read_own_notebook
from wrong_sides import load_wrong_sides, trials

BEGIN, END = SOLUTION_MARKERS
SOLUTION = re.compile(rf"^( *){BEGIN}\n(.*?)^ *{END}(?:\n|\Z)", re.MULTILINE | re.DOTALL)
TO_FILL_IN = "...  # your code instead of this line"
TO_ANSWER = "...  # your answer instead of the dots"
FINISHED = "the finished function, so that the rest runs whatever you typed"


def learners_copy(source: Path) -> nbformat.NotebookNode:
    """A notebook for a learner: each exercise to fill in, its check, the answer, the finished function.

    The answer is folded; the cell that takes the finished function from the package is tagged `finished`. A
    question has none: nothing below depends on its answer.
    """
    cells = []
    for cell, exercise in with_exercise_above(read_cells(source)):
        if exercise is not None:
            cells += unsolved(exercise, cell, module_name(source))
        elif not is_to_solve(cell):
            cells.append(code_cell(cell) if cell.kind == "code" else new_markdown_cell(cell.source))
    return unpaired(source, cells)


def unpaired(source: Path, cells: list[nbformat.NotebookNode]) -> nbformat.NotebookNode:
    """A notebook of these cells, with the kernel of a source but paired with none."""
    kernelspec = jupytext.read(source).metadata["kernelspec"]
    # JupyterLab writes down the kernel's language when it opens a notebook; where that stands already, an
    # untouched notebook stays unmodified.
    language = IPythonKernel.language_info
    metadata = {"kernelspec": kernelspec, "language_info": language}
    notebook = new_notebook(cells=cells, metadata=metadata)
    notebook.metadata[OWN_METADATA] = {"built_from": digest(cells_of_notebook(notebook))}
    return notebook


def rehearsal(source: Path) -> nbformat.NotebookNode:
    """The stored notebook, outputs included; behind each solved exercise, the cells of the unsolved one.

    One run of it serves three: every cell of the notebook runs and must give its stored output, the checks of
    the solved exercises among them; and so does the learner's copy run with all exercises left open, since
    what follows an exercise gets the finished function from the package. Behind a proof stand the trials of
    its wrong sides, and at the end each section runs once more.
    """
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    stored, notebook.cells = notebook.cells, []
    cells = read_cells(source)
    wrong = trials(cells, load_wrong_sides(source.parents[1]))
    for stored_cell, (cell, exercise) in zip(stored, with_exercise_above(cells), strict=True):
        notebook.cells.append(stored_cell)
        notebook.cells += [hidden_cell(trial) for trial in wrong.get(cell.number, [])]
        if exercise is not None:
            to_solve, check, *rest = unsolved(exercise, cell, module_name(source))
            notebook.cells += [to_solve, hidden_cell(check.source), *rest]  # the check of what is not solved
    notebook.cells += [hidden_cell(cell.source) for cell in once_more(cells)]
    return notebook


def once_more(cells: list[Cell]) -> list[Cell]:
    """The code of a chapter's sections, the last section first: going back breaks no proof.

    A milestone runs in a process of its own, and need not be tried again.
    """
    sections: list[list[Cell]] = []
    for cell in cells:
        if cell.source.startswith("## ") and {"core", "optional"} & set(cell.tags):
            sections.append([])
        elif sections and cell.kind == "code" and "milestone" not in cell.tags:
            sections[-1].append(cell)
    return [cell for section in reversed(sections) for cell in section]


def is_to_solve(cell: Cell) -> bool:
    """Whether a cell holds an exercise's function, or the answer to a question."""
    return "exercise" in cell.tags or "question" in cell.tags


def with_exercise_above(cells: list[Cell]) -> Iterator[tuple[Cell, Cell | None]]:
    """Each cell with the exercise or question it checks, which is the cell above, or None."""
    exercise = None
    for cell in cells:
        if exercise is not None and (
            cell.kind != "code" or not re.search(r"\bcheck(_answer)?\(", cell.source)
        ):
            raise cell.error(1, "the cell right after an exercise calls its check")
        yield cell, exercise
        exercise = cell if is_to_solve(cell) else None
    if exercise is not None:
        raise exercise.error(1, "no cell follows that calls this exercise's check")


def unsolved(exercise: Cell, check: Cell, module: str) -> list[nbformat.NotebookNode]:
    """What a learner finds at an exercise: to fill in, its check, the answer, the finished function."""
    to_solve = replace(exercise, source=to_fill_in(exercise))
    cells = [code_cell(to_solve), code_cell(check), new_markdown_cell(answer(exercise))]
    if "exercise" in exercise.tags:
        finished = replace(exercise, source=finished_import(exercise, module), tags=("finished",))
        cells.append(code_cell(finished))
    return cells


def code_cell(cell: Cell) -> nbformat.NotebookNode:
    """A code cell without outputs; one that only draws is folded, so that the picture is what one sees."""
    metadata = {"tags": list(cell.tags)} if cell.tags else {}
    if "draw" in cell.tags:
        metadata["jupyter"] = {"source_hidden": True}
    return new_code_cell(cell.source, metadata=metadata)


def hidden_cell(code: str) -> nbformat.NotebookNode:
    """A code cell that must run, whatever its output."""
    return new_code_cell(code, metadata={"tags": ["nbval-ignore-output"]})


def to_fill_in(exercise: Cell) -> str:
    """The text of an exercise with `...` for its solution: signature, docstring and the rest stay.

    A question keeps the name that its answer is given.
    """
    if not SOLUTION.search(exercise.source):
        raise exercise.error(1, f"an exercise marks its solution by lines '{BEGIN}' and '{END}'")
    if "question" in exercise.tags:
        return SOLUTION.sub(
            lambda found: f"{answered_name(exercise, found)} = {TO_ANSWER}\n", exercise.source
        ).rstrip()
    return SOLUTION.sub(rf"\1{TO_FILL_IN}\n", exercise.source).rstrip()


def answered_name(question: Cell, solution: re.Match) -> str:
    """The name of the variable that a question's solution sets."""
    statements = ast.parse(solution.group(2)).body
    if len(statements) != 1 or not isinstance(statements[0], ast.Assign):
        raise question.error(1, "the solution of a question is one assignment, name = answer")
    return ast.unparse(statements[0].targets[0])


def answer(exercise: Cell) -> str:
    """The solution of an exercise as folded Markdown, indented as it stands in the function."""
    code = "\n".join(solution.group(2) for solution in SOLUTION.finditer(exercise.source))
    return f"<details>\n<summary>Answer</summary>\n\n```python\n{code.rstrip()}\n```\n\n</details>"


def finished_import(exercise: Cell, module: str) -> str:
    """The line that takes an exercise's functions from the package."""
    names = [node.name for node in ast.parse(exercise.source).body if isinstance(node, ast.FunctionDef)]
    return f"from lecture26.{module} import {', '.join(names)}  # {FINISHED}"


def names_to_solve(source: Path) -> list[str]:
    """The exercises and questions of a notebook, by the names that they have in their checks."""
    calls = (check.source for check, exercise in with_exercise_above(read_cells(source)) if exercise)
    return [re.search(r"\bcheck(?:_answer)?\(\s*[\"']([^\"']+)", call)[1] for call in calls]


def make_copies(root: Path, names: list[str] | None = None, update: bool = False) -> list[str]:
    """Put the copies that are not there yet into root/work; returns lines on each notebook.

    `update`: bring those that are there up to date, and keep the old ones in work/old.
    """
    work = root / "work"
    work.mkdir(exist_ok=True)
    lines = []
    for source in notebook_sources(root, names):
        copy = work / f"{source.stem}.ipynb"
        if copy.exists() and update:
            lines += update_copy(copy, source)
        elif copy.exists():
            lines.append(f"kept work/{copy.name}, which is yours (rename it to get a fresh copy)")
        else:
            with replace_when_complete(copy) as temporary:
                nbformat.write(learners_copy(source), temporary)
            lines.append(f"made work/{copy.name}")
    if update:
        known = {f"{source.stem}.ipynb" for source in notebook_sources(root)}
        others = sorted({file.name for file in work.glob("*.ipynb")} - known)
        lines += [f"kept work/{name} as it is: no chapter has that name" for name in others]
    every = {source.stem: names_to_solve(source) for source in notebook_sources(root)}
    try:
        solved.lay_out(work, {chapter: names for chapter, names in every.items() if names})
    except ValueError as error:
        lines.append(f"nothing will be recorded as solved: {error}")
    return lines


def update_copy(copy: Path, source: Path) -> list[str]:
    """Bring a learner's copy up to date with its chapter, and keep the old one; returns what was done."""
    old, fresh = read_own_notebook(copy), learners_copy(source)
    if old.problem:
        return [f"kept {old.path}: {old.problem}"]
    before = nbformat.read(copy, as_version=4).metadata.get(OWN_METADATA, {})
    if before.get("built_from") == fresh.metadata[OWN_METADATA]["built_from"]:
        return [f"kept {old.path}, which is up to date"]
    carried = carry_over(old, fresh, source)
    kept = put_aside(copy)
    with replace_when_complete(copy) as temporary:
        nbformat.write(fresh, temporary)
    return [
        f"updated {old.path}; the old one, with whatever else you wrote, is work/old/{kept.name}",
        *carried,
    ]


def put_aside(copy: Path) -> Path:
    """Keep a copy of a notebook in old/ beside it, under a name that tells the time; returns where."""
    kept = copy.parent / "old" / f"{copy.stem}_{datetime.now():%Y-%m-%d_%H%M%S_%f}.ipynb"
    kept.parent.mkdir(exist_ok=True)
    with replace_when_complete(kept) as temporary:
        shutil.copyfile(copy, temporary)
    return kept


def make_rehearsals(root: Path, folder: Path, names: list[str] | None = None) -> list[str]:
    """Put the rehearsals of the notebooks into a folder; returns a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for source in notebook_sources(root, names):
        nbformat.write(rehearsal(source), folder / f"{source.stem}.ipynb")
        lines.append(f"made {folder}/{source.stem}.ipynb")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the learner's copies of the notebooks in work/.")
    parser.add_argument("names", nargs="*", help="chapters, e.g. ddpm or 01_ddpm; none means all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    parser.add_argument(
        "--update", action="store_true", help="bring copies up to date, solutions carried over"
    )
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="make the rehearsals in this folder")
    arguments = parser.parse_args()
    try:
        if arguments.rehearse:
            lines = make_rehearsals(arguments.root, arguments.rehearse, arguments.names)
        else:
            lines = make_copies(arguments.root, arguments.names, arguments.update)
        print("\n".join(lines))
    except CourseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
