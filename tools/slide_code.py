"""Code as a slide shows it: without what is not the point, in lines that fit."""

import ast
import re
import subprocess
import sys
import textwrap

from course import SOLUTION_MARKERS, Cell

MOST_LINES, MOST_COLUMNS = 15, 84
LINE_AND_COMMENT = re.compile(r"( *)(.*\S)  (# [^'\"]*)$")


def segment(cell: Cell, node: ast.stmt) -> str:
    """The lines of a definition, decorators included, from the left edge."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("\n".join(cell.source.splitlines()[first - 1 : node.end_lineno]))


def fitting(lines: list[str], cell: Cell) -> str:
    """The lines, if they fit on a slide."""
    widest = max(lines, key=len)
    if len(lines) > MOST_LINES:
        raise cell.error(
            0, f"{len(lines)} lines of code or output, more than {MOST_LINES}: show some of them"
        )
    if len(widest) > MOST_COLUMNS:
        raise cell.error(0, f"a line is longer than {MOST_COLUMNS} characters: {widest!r}")
    return "\n".join(lines)


def short_form(text: str) -> str:
    """Code without docstrings, checks of arguments and marks of solutions."""
    lines = text.splitlines()
    dropped = {number for number, line in enumerate(lines, start=1) if line.strip() in SOLUTION_MARKERS}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            dropped |= lines_of(node.body[0])
        if isinstance(node, ast.If) and not node.orelse and all(isinstance(n, ast.Raise) for n in node.body):
            dropped |= lines_of(node)
    kept = [line for number, line in enumerate(lines, start=1) if number not in dropped]
    return re.sub(r":\n\n+", ":\n", re.sub(r"\n{2,}", "\n\n", "\n".join(kept))).strip("\n")


def lines_of(node: ast.stmt) -> set[int]:
    """The numbers of a statement's lines."""
    return set(range(node.lineno, node.end_lineno + 1))


def lines_between(text: str, first: str, last: str, cell: Cell) -> str:
    """The lines from the first that begins with `first` to the next that begins with `last`."""
    lines = text.splitlines()
    begin = next((n for n, line in enumerate(lines) if line.strip().startswith(first)), None)
    if begin is None:
        raise cell.error(0, f"no line of the code begins with {first!r}")
    end = next((n for n in range(begin, len(lines)) if lines[n].strip().startswith(last)), None)
    if end is None:
        raise cell.error(0, f"no line after {first!r} begins with {last!r}")
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def formatted(text: str) -> str:
    """Code in lines that fit on a slide; unbroken where it is a part of a statement.

    What makes a line too long is often its comment, which then stands above it.
    """
    text = "\n".join(
        LINE_AND_COMMENT.sub(r"\1\3\n\1\2", line) if len(line) > MOST_COLUMNS else line
        for line in text.splitlines()
    )
    command = [sys.executable, "-m", "ruff", "format", f"--line-length={MOST_COLUMNS}", "-"]
    ruff = subprocess.run(command, input=text, capture_output=True, text=True)
    return ruff.stdout if ruff.returncode == 0 else text
