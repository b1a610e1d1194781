"""Make the package's chapters from the notebooks: cells tagged `export` become lecture26/name.py.

Imports are hoisted, the markers around solutions dropped, each section's heading becomes a comment, and the
bodies of a class that is reopened with `class Name(Name):` are merged into one. Texts are cut by line, never
printed anew from a syntax tree, so every comment stays as it was written. Ruff then removes unused imports,
sorts the others and formats.

    python tools/export.py               every chapter
    python tools/export.py ddpm unet     some of them
    python tools/export.py --check       write nothing; fail where a module differs from its notebook
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from course import (
    ROOT,
    SECOND_READING,
    SOLUTION_MARKERS,
    Cell,
    CourseError,
    check_nothing_is_lost,
    module_name,
    notebook_sources,
    read_cells,
)

GENERATED = "Generated from notebooks/{}, which derives and checks it: edit there, then run `make package`."
NUMBERING = re.compile(r"^(chapter\s+)?\d+(\.\d+)*[\s.:)·–—-]+", re.IGNORECASE)
MENDS = {
    "F821": "; forgot to tag a cell `export`, or is it defined only further down?",
    "F811": "; a name is defined twice in exported cells",
}


@dataclass
class Line:
    """A line of the module and the place in the notebook it came from (None: the exporter's own)."""

    text: str
    cell: Cell | None = None
    number: int = 0


@dataclass
class Block:
    """A top-level statement with the comments above it; `parts` are the later bodies of a reopened class."""

    lines: list[Line]
    section: str = ""
    parts: list["Block"] = field(default_factory=list)


def export_notebook(source: Path, root: Path) -> str | None:
    """The text of the module that a notebook makes, or None if it has no cell tagged `export`."""
    cells = read_cells(source)
    exported = [cell for cell in cells if "export" in cell.tags]
    if not exported:
        return None
    imports, blocks = collect(cells)
    module_lines = [Line(text) for text in docstring(source, cells).splitlines()]
    for block in used_imports(imports, blocks):
        module_lines += block.lines
    module_lines += [Line(""), *body_lines(blocks)]
    return polish(module_lines, root, f"lecture26/{module_name(source)}.py")


def collect(cells: list[Cell]) -> tuple[list[Block], list[Block]]:
    """The import statements of the exported cells, and the other statements with reopened classes merged."""
    imports, blocks, classes = [], [], {}
    title = section = next((heading for cell in cells for heading in headings(cell)), "")
    for cell in cells:
        if headings(cell):
            section = headings(cell)[-1]
        elif "export" in cell.tags:
            for statement, lines in statements(cell):
                block = Block(lines, section if section != title else "")
                if isinstance(statement, ast.Import | ast.ImportFrom):
                    imports.append(block)
                elif isinstance(statement, ast.ClassDef) and is_reopened(statement):
                    if statement.name not in classes:
                        message = f"class {statement.name} is reopened, but no exported cell above opens it"
                        raise cell.error(statement.lineno, message)
                    block.lines = reopened_body(cell, statement, lines)
                    classes[statement.name].parts.append(block)
                else:
                    blocks.append(block)
                    if isinstance(statement, ast.ClassDef):
                        classes[statement.name] = block
    return imports, blocks


def statements(cell: Cell) -> Iterator[tuple[ast.stmt | None, list[Line]]]:
    """Cut a cell into its top-level statements, each with the lines since the end of the one before it.

    Comments after the last statement come last, with None for a statement.
    """
    texts = cell.source.splitlines()
    lines = [Line(text, cell, number) for number, text in enumerate(texts, start=1)]
    previous_end = 0
    for statement in parse(cell).body:
        if statement.lineno <= previous_end:
            raise cell.error(statement.lineno, "give each statement a line of its own in an exported cell")
        end = statement.end_lineno
        for number in range(end, len(texts)):  # indented comments below a block still belong to it
            if texts[number].startswith(" "):
                end = number + 1
            elif texts[number]:
                break
        yield statement, trimmed(lines[previous_end:end])
        previous_end = end
    if any(text.strip() for text in texts[previous_end:]):
        yield None, trimmed(lines[previous_end:])


def parse(cell: Cell) -> ast.Module:
    """The syntax tree of an exported cell; a magic or any other text that is not Python is an error."""
    try:
        return ast.parse(cell.source)
    except SyntaxError as error:
        text = (error.text or "").strip()
        if text.startswith(("%", "!")):
            raise cell.error(error.lineno, f"{text!r} is a magic: an exported cell is plain Python") from None
        raise cell.error(error.lineno or 1, f"not valid Python: {error.msg}") from None


def trimmed(lines: list[Line]) -> list[Line]:
    """The lines without the marks around solutions, from the first that is not blank."""
    lines = [line for line in lines if line.text.strip() not in SOLUTION_MARKERS]
    while lines and not lines[0].text.strip():
        lines = lines[1:]
    return lines


def is_reopened(statement: ast.ClassDef) -> bool:
    """Whether this is `class Name(Name):`, the plain Python way to add methods to a class."""
    return any(isinstance(base, ast.Name) and base.id == statement.name for base in statement.bases)


def reopened_body(cell: Cell, statement: ast.ClassDef, lines: list[Line]) -> list[Line]:
    """The body of a reopened class, with the comments above its first line moved inside."""
    if statement.decorator_list or len(statement.bases) > 1 or statement.keywords:
        message = f"reopen a class by a bare `class {statement.name}({statement.name}):`"
        raise cell.error(statement.lineno, message + "; bases and decorators go where it is opened")
    if ast.get_docstring(statement) is not None:
        message = f"class {statement.name} is reopened here: its docstring goes where it is opened"
        raise cell.error(statement.body[0].lineno, message)
    if statement.body[0].lineno == statement.lineno:
        raise cell.error(statement.lineno, f"the body of class {statement.name} goes on lines of its own")
    above = [line for line in lines if line.number < statement.lineno]
    body = trimmed([line for line in lines if line.number > statement.lineno])
    return [Line(f"    {line.text}".rstrip(), line.cell, line.number) for line in above] + body


def headings(cell: Cell) -> list[str]:
    """The headings of sections in a Markdown cell, as plain text; those of exercises do not count."""
    if cell.kind != "markdown":
        return []
    text = re.sub(r"^```.*?^```", "", cell.source, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#{1,3}\s+(.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[$`*]", "", heading.removesuffix(SECOND_READING)).strip() for heading in found]


def docstring(source: Path, cells: list[Cell]) -> str:
    """The module's docstring: the notebook's title without its number, and where the module comes from."""
    titles = [heading for cell in cells for heading in headings(cell)]
    if not titles:
        raise CourseError(f"notebooks/{source.name}: no Markdown heading to take the module's title from")
    title = NUMBERING.sub("", titles[0]).rstrip(".")
    generated = textwrap.fill(GENERATED.format(source.name), 110)
    return f'"""{title}.\n\n{generated}\n"""\n'


def used_imports(imports: list[Block], blocks: list[Block]) -> Iterator[Block]:
    """The imports that the exported code mentions; the others go with the comments above them."""
    text = "\n".join(line.text for line in body_lines(blocks))
    for block in imports:
        statement = ast.parse("\n".join(line.text for line in block.lines)).body[0]
        names = [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
        if any(re.search(rf"\b{re.escape(name)}\b", text) for name in names):
            yield block


def body_lines(blocks: list[Block]) -> list[Line]:
    """The module below its imports: statements under their section's heading, each class with its parts."""
    lines, section = [], ""
    for block in blocks:
        if block.section != section:
            section = block.section
            lines += [Line(""), Line(""), Line(f"# --- {section} ---"), Line("")]
        elif lines and not follows(block.lines[0], lines[-1]):
            lines.append(Line(""))
        lines += block.lines
        part_section = section
        for part in block.parts:
            if part.section != part_section:
                part_section = part.section
                lines += [Line(""), Line(f"    # --- {part_section} ---")]
            lines += [Line(""), *part.lines]
    return lines


def follows(line: Line, previous: Line) -> bool:
    """Whether a line stands right below another in the notebook."""
    return line.cell is previous.cell and line.number == previous.number + 1


def polish(lines: list[Line], root: Path, filename: str) -> str:
    """Let ruff refuse what is undefined or defined twice, drop unused imports, sort the rest and format."""
    text = "\n".join(line.text for line in lines) + "\n"
    report = ruff(["check", "--select=F", "--ignore=F401", "--output-format=json"], text, root, filename)
    for finding in json.loads(report):
        line = lines[finding["location"]["row"] - 1]
        message = f"{finding['message']} ({finding['code']}{MENDS.get(finding['code'], '')})"
        raise line.cell.error(line.number, message) if line.cell else CourseError(f"{filename}: {message}")
    text = ruff(["check", "--fix", "--select=I,F", "--quiet"], text, root, filename)
    return ruff(["format"], text, root, filename)


def ruff(arguments: list[str], text: str, root: Path, filename: str) -> str:
    """What ruff makes of a text, by the settings of the course's pyproject.toml."""
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", filename, "-"]
    outcome = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", cwd=root)
    if outcome.returncode > 1:  # 1 means findings
        raise CourseError(f"{filename}: ruff failed: {outcome.stderr.strip()}")
    return outcome.stdout


def export(root: Path, names: list[str] | None = None) -> list[Path]:
    """Write the modules of all notebooks, or of some; returns those that changed.

    None is written if a stored notebook holds edits that its source lacks.
    """
    changed = []
    sources = notebook_sources(root, names)
    for source in sources:
        check_nothing_is_lost(source)
    for source in sources:
        text = export_notebook(source, root)
        module = root / "lecture26" / f"{module_name(source)}.py"
        if text is not None and (not module.exists() or module.read_text(encoding="utf-8") != text):
            module.write_text(text, encoding="utf-8", newline="\n")
            changed.append(module)
    return changed


def check(root: Path, names: list[str] | None = None) -> list[str]:
    """What is wrong with the modules, one sentence each with the command that mends it; writes nothing."""
    problems, made = [], set()
    for source in notebook_sources(root, names):
        text = export_notebook(source, root)
        if text is None:
            continue
        module = root / "lecture26" / f"{module_name(source)}.py"
        made.add(module)
        if not module.exists() or module.read_text(encoding="utf-8") != text:
            state = "differs from" if module.exists() else "is missing; it is made from"
            problems.append(f"lecture26/{module.name} {state} notebooks/{source.name}: run `make package`")
    if not names:
        for module in sorted((root / "lecture26").glob("*.py")):
            generated = "\nGenerated from notebooks/" in module.read_text(encoding="utf-8")
            if generated and module not in made:
                problems.append(f"lecture26/{module.name} is generated, but no notebook makes it: remove it")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="chapters, e.g. ddpm or 01_ddpm; none means all")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a module is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            problems = check(arguments.root, arguments.names)
            sys.exit("\n".join(problems) or None)
        for module in export(arguments.root, arguments.names):
            print(f"wrote lecture26/{module.name}")
    except CourseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
