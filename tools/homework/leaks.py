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

from .assignments import Assignment, Cohort, folded_answer, is_paper_question

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


def secrets_of(cohort: Cohort, assignment: Assignment) -> list[Secret]:
    """All that an assignment must not hold, but for what the chapters say outside of the answers."""
    own = [cohort.course / "notebooks" / f"{name}.py" for name in assignment.notebooks]
    sources = notebook_sources(cohort.course)
    later = [source for source in sources if source >= min(own)]
    found = [secret for source in later for secret in in_notebook(source)]
    checks = cohort.course / "lecture26" / "checks" / "chapters"
    for source in later:
        file = checks / f"{module_name(source)}.py"
        if file.exists():
            found += in_checks(file)
    found = [secret for secret in found if len(secret.text) >= SHORTEST]
    found.append(Secret(str(cohort.secret_seed(assignment.name)), "the seed of the hidden tests"))
    told = "\n".join(haystack for source in sources for haystack in outside_answers(source))
    return [secret for secret in found if secret.text not in told]


def told_by_chapters(course: Path) -> list[str]:
    """Where a chapter itself tells what one of its exercises computes, as sentences for its author."""
    found = []
    for source in notebook_sources(course):
        told = "\n".join(outside_answers(source))
        secrets = [s for s in in_notebook(source) if len(s.text) >= SHORTEST and s.text in told]
        found += [f"{s.what} stands outside of it, too: {s.text}" for s in secrets]
    return list(dict.fromkeys(found))


def in_notebook(source: Path) -> Iterator[Secret]:
    """The answers of a chapter's exercises and questions, and the rubrics of those on paper."""
    cells = read_cells(source)
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


def outside_answers(source: Path) -> Iterator[str]:
    """The text of a chapter without its answers."""
    for cell in read_cells(source):
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
        if plain and all(isinstance(value, str) for value in plain):
            yield "".join(plain)
        for value in plain:
            yield from strings_in(value)
