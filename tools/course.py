"""What every tool needs: where the course lies, which notebooks it has, and their cells with line numbers."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import jupytext
import nbformat

# Tools are the course's own, whatever package the notebooks beside them have been switched to.
os.environ.pop("LECTURE26_MINE", None)

ROOT = Path(__file__).resolve().parent.parent
OWN_METADATA = "lecture26"  # a stored notebook's: the digest of the source it was built from
# an equation's number; perhaps ", definition" or ", step" stands behind it
EQUATION_TAG = re.compile(r"\\tag\{(\d+\.\d+)[^}]*\}")
SOLUTION_MARKERS = ("### BEGIN SOLUTION", "### END SOLUTION")
SECOND_READING = " *(at a second reading)*"  # how the heading of an optional section ends


class CourseError(Exception):
    """A mistake in a notebook or a stored file; the message says where it is and what mends it."""


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook's source; `number` counts from 1, `first_line` is a line of the .py file."""

    notebook: str
    number: int
    first_line: int
    kind: str  # "code", "markdown" or "raw"
    source: str
    tags: tuple[str, ...]
    slide: tuple[str, ...] = ()  # what the lecture's slides show of it: see tools/slide_texts.py

    def error(self, line: int, message: str) -> CourseError:
        """An error at a line of this cell (1 is its first), named by notebook, cell and line of the file."""
        return CourseError(f"{self.notebook}:{self.first_line + line - 1} (cell {self.number}): {message}")


def notebook_sources(root: Path, names: list[str] | None = None) -> list[Path]:
    """The notebooks `notebooks/NN_name.py` in order, or those called by `names`: 01_ddpm, ddpm, or a path."""
    sources = sorted((root / "notebooks").glob("[0-9][0-9]_*.py"))
    if not names:
        return sources
    by_name = {key: source for source in sources for key in (source.stem, module_name(source))}
    unknown = [name for name in names if Path(name).stem not in by_name]
    if unknown:
        known = ", ".join(source.stem for source in sources)
        raise CourseError(f"no notebook is called {', '.join(unknown)}; there are: {known}")
    return sorted({by_name[Path(name).stem] for name in names})


def module_name(source: Path) -> str:
    """The module that a notebook makes: notebooks/01_ddpm.py makes ddpm."""
    return source.stem[3:]


def read_cells(source: Path) -> list[Cell]:
    """The cells of a notebook's source, each with the line of the file at which its text begins."""
    text = source.read_text(encoding="utf-8")
    where = f"notebooks/{source.name}"
    markers = [number for number, line in enumerate(text.splitlines(), start=1) if re.match(r"# %%", line)]
    cells = jupytext.reads(text, fmt="py:percent").cells
    if len(cells) != len(markers):
        raise CourseError(f"{where}: text stands before the first cell's line '# %%'")
    read = [
        Cell(where, number, marker + 1, cell.cell_type, cell.source, *own_metadata(cell))
        for number, (cell, marker) in enumerate(zip(cells, markers, strict=True), start=1)
    ]
    for cell, slide in zip(read, (cell.metadata.get("slide", []) for cell in cells), strict=True):
        if not isinstance(slide, list) or not all(isinstance(text, str) for text in slide):
            raise cell.error(0, f"`slide` must be a list of texts; got {slide!r}")
    return read


def own_metadata(cell: nbformat.NotebookNode) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tags and the slide texts of a cell."""
    return tuple(cell.metadata.get("tags", ())), tuple(cell.metadata.get("slide", ()))


def digest(cells: Iterable[tuple]) -> str:
    """What tells a notebook's text from others: a hash of what `cells_of_notebook` tells of its cells."""
    return hashlib.sha256(json.dumps([list(cell) for cell in cells]).encode()).hexdigest()


def cells_of_source(source: Path) -> list[tuple]:
    """Kind, source, tags and slide texts of the cells of a notebook's source."""
    return [_compared(cell.kind, cell.source, cell.tags, cell.slide) for cell in read_cells(source)]


def cells_of_notebook(notebook: nbformat.NotebookNode) -> list[tuple]:
    """Kind, source, tags and slide texts of the cells of a stored notebook."""
    return [_compared(cell.cell_type, cell.source, *own_metadata(cell)) for cell in notebook.cells]


def _compared(kind: str, source: str, tags: tuple[str, ...], slide: tuple[str, ...]) -> tuple:
    """A cell without slide texts is told as before there were any, so that older digests stay right."""
    return (kind, source, tags, slide) if slide else (kind, source, tags)


def edited_sides(source: Path, notebook: nbformat.NotebookNode) -> set[str] | None:
    """Which of ".py" and ".ipynb" have another text than when the notebook was built.

    None where that is not known, since the notebook does not say from what it was built.
    """
    built_from = notebook.metadata.get(OWN_METADATA, {}).get("built_from")
    if built_from is None:
        return None
    found = {".py": digest(cells_of_source(source)), ".ipynb": digest(cells_of_notebook(notebook))}
    return {suffix for suffix, text in found.items() if text != built_from}


def check_nothing_is_lost(source: Path) -> None:
    """Raise CourseError if the stored notebook holds edits that its source, from which all is made, lacks."""
    stored = source.with_suffix(".ipynb")
    if not stored.exists():
        return
    notebook = nbformat.read(stored, as_version=4)
    texts = [
        "\n".join(line for _, text, _, *slide in cells for line in (text, *chain(*slide)))
        for cells in (cells_of_source(source), cells_of_notebook(notebook))
    ]
    edited = edited_sides(source, notebook)
    if not edited or ".ipynb" not in edited or cells_of_source(source) == cells_of_notebook(notebook):
        return
    newer = "it is the newer of the two" if edited == {".ipynb"} else "both were edited since they were built"
    raise CourseError(
        f"notebooks/{stored.name} holds edits that notebooks/{source.name} lacks; {newer}"
        f"{first_difference(*texts)}"
        f"  to keep the .ipynb's text, run `jupytext --to py:percent notebooks/{stored.name}`\n"
        f"  to keep the .py's, run `jupytext --update --to ipynb notebooks/{source.name}`"
    )


def first_difference(source: str, stored: str) -> str:
    """The first lines that differ between a source and what the stored notebook makes of it."""
    lines = list(difflib.unified_diff(source.splitlines(), stored.splitlines(), n=0, lineterm=""))
    return "".join(f"\n    {line}" for line in lines[2:5]) + "\n"
