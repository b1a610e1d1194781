"""What every tool needs: where the course lies, which notebooks it has, and their cells with line numbers."""

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parent.parent
SOLUTION_MARKERS = ("### BEGIN SOLUTION", "### END SOLUTION")


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
    return [
        Cell(where, number, marker + 1, cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ())))
        for number, (cell, marker) in enumerate(zip(cells, markers, strict=True), start=1)
    ]
