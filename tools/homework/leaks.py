"""The search for what must not be handed out: solutions, wrong answers, hidden tests, answers, rubrics.

Texts are compared without white space, and Python also as its syntax tree writes it, so that neither layout
nor brackets nor comments hide anything. Whatever is packed in notebooks, JSON or archives is unpacked.
"""

import ast
import io
import json
import re
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from course import SOLUTION_MARKERS, Cell, module_name, notebook_sources, read_cells
from own_code import without_magics

from .assignments import Assignment, folded_answer, is_paper_question

SHORTEST = 24  # characters without white space: shorter ones, such as `x = x + 1`, say nothing
BEGIN, END = SOLUTION_MARKERS
SOLUTION = re.compile(rf"^ *{BEGIN}\n(.*?)^ *{END}(?:\n|\Z)", re.MULTILINE | re.DOTALL)
COMPILED = (".pyc", ".pyo")


@dataclass(frozen=True)
class Secret:
    """A piece of text, without white space, that must not be handed out, and what it is."""

    text: str
    what: str


def squeezed(text: str) -> str:
    """A text without its white space."""
    return re.sub(r"\s+", "", text)


class Secrets:
    """What a course's assignments must not hold, but for what its chapters say outside of the answers."""

    def __init__(self, course: Path) -> None:
        checks = course / "lecture26" / "checks" / "chapters"
        self.by_notebook: dict[str, list[Secret]] = {}
        told = []
        for source in notebook_sources(course):
            file, cells = checks / f"{module_name(source)}.py", read_cells(source)
            found = [*in_notebook(cells), *(in_checks(file) if file.exists() else ())]
            self.by_notebook[source.stem] = [secret for secret in found if len(secret.text) >= SHORTEST]
            told += outside_answers(cells)
        self.told = "\n".join(told)

    def of(self, assignment: Assignment) -> list[Secret]:
        """What an assignment must not hold: of its own notebooks and of those that come after its first."""
        first = min(assignment.notebooks)
        found = [secret for name, secrets in self.by_notebook.items() if name >= first for secret in secrets]
        return [secret for secret in found if secret.text not in self.told]

    def told_by_chapters(self) -> list[str]:
        """Which answers a chapter tells outside of them, as sentences for its author."""
        found = [secret for secrets in self.by_notebook.values() for secret in secrets]
        found = [s for s in found if s.text in self.told and s.what.startswith("an answer")]
        return list(dict.fromkeys(f"{s.what} stands in the chapters' text, too: {s.text}" for s in found))


def in_notebook(cells: list[Cell]) -> Iterator[Secret]:
    """The answers of a chapter's exercises and questions, and the rubrics of those on paper."""
    for cell in cells:
        if {"exercise", "question"} & set(cell.tags):
            for answer in SOLUTION.findall(cell.source):
                yield from pieces(answer, f"an answer in {cell.notebook}, cell {cell.number}")
        elif is_paper_question(cell):
            for line in folded_answer(cells, cell).splitlines():
                yield Secret(squeezed(line), f"the answer on paper in {cell.notebook}, cell {cell.number}")


def in_checks(file: Path) -> Iterator[Secret]:
    """The wrong answers of a chapter's exercises, and how their cases are made."""
    what = f"a check in lecture26/checks/chapters/{file.name}"
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Lambda):
            yield Secret(squeezed(ast.unparse(node.body)), what)
        elif isinstance(node, ast.FunctionDef):
            for statement in node.body:
                if not is_text(statement):
                    yield Secret(squeezed(ast.unparse(statement)), what)


def pieces(answer: str, what: str) -> Iterator[Secret]:
    """The lines of an answer, comments among them, and what its statements compute."""
    for line in answer.splitlines():
        yield Secret(squeezed(line), what)
    inside = "async def answer():\n" + textwrap.indent(textwrap.dedent(answer), "    ")
    for node in ast.walk(ast.parse(inside)):
        if isinstance(node, ast.Return | ast.Assign | ast.AugAssign | ast.Expr) and node.value is not None:
            yield Secret(squeezed(ast.unparse(node.value)), what)


def is_text(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def outside_answers(cells: list[Cell]) -> Iterator[str]:
    """The text of a chapter without its answers."""
    for cell in cells:
        yield from forms(cell, SOLUTION.sub("\n", cell.source))


def forms(cell: Cell, text: str) -> Iterator[str]:
    """A cell's text as it is searched."""
    if is_paper_question(cell):
        text = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    yield squeezed(text)
    if cell.kind == "code":
        yield from normalised(text)


def normalised(text: str) -> Iterator[str]:
    """A piece of Python as its syntax tree writes it; nothing for what is no Python."""
    try:
        yield squeezed(ast.unparse(ast.parse(without_magics(text))))
    except (SyntaxError, ValueError, RecursionError):
        return


def leaks(folder: Path, secrets: Iterable[Secret]) -> list[str]:
    """What a folder holds that it must not, a sentence each."""
    secrets, found = list(secrets), []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        where = file.relative_to(folder).as_posix()
        if file.suffix in COMPILED:
            found.append(f"{where} is compiled Python, which cannot be searched")
        for haystack in texts_in(file.name, file.read_bytes()):
            found += [f"{where} holds {s.what}: {s.text}" for s in secrets if s.text in haystack]
    return sorted(set(found))


def texts_in(name: str, content: bytes) -> Iterator[str]:
    """All texts in a file, without white space: as it stands, and with what it packs unpacked."""
    if name.endswith(".safetensors"):  # of these, the texts; the rest are numbers
        content = content[8 : 8 + int.from_bytes(content[:8], "little")]
    text = content.decode("utf-8", errors="ignore")
    yield squeezed(text)
    if name.endswith(".py"):
        yield from normalised(text)
    elif name.endswith((".ipynb", ".json")):
        for string in strings_in(json.loads(text)):
            if len(string) >= SHORTEST:
                yield squeezed(string)
                yield from normalised(string)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from texts_in(member, archive.read(member))


def strings_in(plain: object) -> Iterator[str]:
    """All strings in what JSON holds; a list of lines, as notebooks have them, is one string as well."""
    if isinstance(plain, str):
        yield plain
    elif isinstance(plain, dict):
        for key, value in plain.items():
            yield key
            yield from strings_in(value)
    elif isinstance(plain, list):
        if all(isinstance(value, str) for value in plain):
            yield "".join(plain)
        else:
            for value in plain:
                yield from strings_in(value)
