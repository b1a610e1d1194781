"""Make the learner's copies of the notebooks in work/: exercises to fill in, answers folded away.

A copy is an .ipynb without outputs that is paired with no source. A copy that exists is the learner's own and
stays as it is.
"""

import argparse
import ast
import re
import shutil
import sys
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import ROOT, SOLUTION_MARKERS, Cell, CourseError, module_name, notebook_sources, read_cells

BEGIN, END = SOLUTION_MARKERS
SOLUTION = re.compile(rf"^( *){BEGIN}\n(.*?)^ *{END}(?:\n|\Z)", re.MULTILINE | re.DOTALL)
TO_FILL_IN = "...  # your code instead of this line"
FINISHED = "the finished function, so that the rest runs whatever you typed"


def learners_copy(source: Path) -> nbformat.NotebookNode:
    """A notebook for a learner: each exercise to fill in, its check, the answer, the finished function.

    The answer is folded; the cell that takes the finished function from the package is tagged `finished`.
    """
    cells, exercise = [], None  # the exercise whose check comes next
    for cell in read_cells(source):
        if exercise is not None and (cell.kind != "code" or "check(" not in cell.source):
            raise cell.error(1, "the cell right after an exercise calls its check")
        if "exercise" in cell.tags:
            exercise = cell
            cells.append(code_cell(to_fill_in(cell), *cell.tags))
        elif exercise is not None:
            finished = code_cell(finished_import(exercise, module_name(source)), "finished")
            cells += [code_cell(cell.source, *cell.tags), new_markdown_cell(answer(exercise)), finished]
            exercise = None
        elif cell.kind == "code":
            cells.append(code_cell(cell.source, *cell.tags))
        else:
            cells.append(new_markdown_cell(cell.source))
    if exercise is not None:
        raise exercise.error(1, "no cell follows that calls this exercise's check")
    kernelspec = jupytext.read(source).metadata["kernelspec"]
    return new_notebook(cells=cells, metadata={"kernelspec": kernelspec})


def code_cell(source: str, *tags: str) -> nbformat.NotebookNode:
    """A code cell without outputs."""
    return new_code_cell(source, metadata={"tags": list(tags)} if tags else {})


def to_fill_in(exercise: Cell) -> str:
    """The text of an exercise with `...` for its solution: signature, docstring and the rest stay."""
    if not SOLUTION.search(exercise.source):
        raise exercise.error(1, f"an exercise marks its solution by lines '{BEGIN}' and '{END}'")
    return SOLUTION.sub(rf"\1{TO_FILL_IN}\n", exercise.source).rstrip()


def answer(exercise: Cell) -> str:
    """The solution of an exercise as folded Markdown, indented as it stands in the function."""
    code = "\n".join(solution.group(2) for solution in SOLUTION.finditer(exercise.source))
    return f"<details>\n<summary>Answer</summary>\n\n```python\n{code.rstrip()}\n```\n\n</details>"


def finished_import(exercise: Cell, module: str) -> str:
    """The line that takes an exercise's functions from the package."""
    names = [node.name for node in ast.parse(exercise.source).body if isinstance(node, ast.FunctionDef)]
    return f"from lecture26.{module} import {', '.join(names)}  # {FINISHED}"


def make_copies(root: Path, names: list[str] | None = None) -> list[str]:
    """Put the copies that are not there yet into root/work; returns a line for each notebook."""
    work = root / "work"
    work.mkdir(exist_ok=True)
    shutil.copy(root / "notebooks" / "matplotlibrc", work)
    lines = []
    for source in notebook_sources(root, names):
        copy = work / f"{source.stem}.ipynb"
        if copy.exists():
            lines.append(f"kept work/{copy.name}, which is yours (rename it to get a fresh copy)")
        else:
            nbformat.write(learners_copy(source), copy)
            lines.append(f"made work/{copy.name}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the learner's copies of the notebooks in work/.")
    parser.add_argument("names", nargs="*", help="chapters, e.g. ddpm or 01_ddpm; none means all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    arguments = parser.parse_args()
    try:
        print("\n".join(make_copies(arguments.root, arguments.names)))
    except CourseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
