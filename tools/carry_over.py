"""Carry what a learner has solved from an old copy of a notebook into a new one, exercise by exercise."""

import ast
from pathlib import Path

import nbformat

from own_code import (
    OwnFunction,
    OwnNotebook,
    Statement,
    broken,
    by_name,
    defines,
    is_unsolved,
    own_cell,
    own_function,
    parameters,
    text_of,
)
from tasks import Task, tasks


def carry_over(old: OwnNotebook, fresh: nbformat.NotebookNode, source: Path) -> list[str]:
    """Put functions and answers of an old copy into a fresh one; returns a line for each of them.

    The lines say what was carried over, and what was not and why; what was open has none.
    """
    of_chapter = tasks(source)
    functions = {task.function for task in of_chapter}
    cells = [cell for cell in fresh.cells if cell.cell_type == "code" and "finished" not in tags_of(cell)]
    statements = {id(cell): own_cell(0, cell.source, tags_of(cell)).statements for cell in cells}
    known = by_name(statement for found in statements.values() for statement in found)
    lines = []
    for task in of_chapter:
        cell = next(c for c in cells if any(defines(s, task.function) for s in statements[id(c)]))
        lines += carry_function(old, cell, task, known, functions)
    answers = given_answers(old)
    for cell in cells:
        if "question" in tags_of(cell):
            lines += carry_answer(answers, cell, statements[id(cell)])
    lines += [
        f"  not carried over: {name}, which is no exercise of the chapter any more"
        for name in gone(old, functions)
    ]
    return lines + [
        f"  not carried over: the answer {name}, which is no question of the chapter any more"
        for name in answers
    ]


def carry_function(
    old: OwnNotebook,
    cell: nbformat.NotebookNode,
    task: Task,
    known: dict[str, Statement],
    functions: set[str],
) -> list[str]:
    """Put one function into its exercise's cell, with what it needs; returns what there is to say of it.

    Args:
        old: the learner's old copy.
        cell: of the new copy, in which the function is to be filled in; it is changed.
        task: the exercise.
        known: what the new copy defines, by name.
        functions: those of all exercises of the chapter.
    """
    own = own_function(old, task.function, known)
    given = known[task.function].node
    if own.problem is not None:
        problems = [*begun(old, task.function, text_of(cell.source, given)), *broken(old, task.function)]
        return [f"  not carried over: {task.name}: {problem}" for problem in problems[-1:]]
    before, now = parameters(own.definition.node), parameters(given)
    if before != now:
        return [f"  not carried over: {task.name}: its parameters were {before}, and are {now} now"]
    text = text_of(cell.source, given)
    whole = [*(statement.text for statement in own.needs), with_docstring_of(own, text)]
    cell.source = cell.source.replace(text, "\n\n\n".join(whole))
    names = [name for name in own.hidden if name not in functions]
    return [f"  carried over {task.name}" + (f"; {', '.join(names)} in it is the chapter's" if names else "")]


def begun(old: OwnNotebook, function: str, given: str) -> list[str]:
    """What to say of a function that is not filled in, if there are lines in it that were not given."""
    own = [text_of(c.source, s.node) for c in old.cells for s in c.statements if defines(s, function)]
    is_begun = any(set(body_lines(text)) - set(body_lines(given)) for text in own)
    return ["it is begun, but its dots still stand"] if is_begun else []


def body_lines(function: str) -> list[str]:
    """The lines of a function below its signature and its docstring, without the space around them."""
    first, *rest = ast.parse(function).body[0].body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    begin = first.end_lineno if is_docstring and rest else first.lineno - 1
    return [line.strip() for line in function.split("\n")[begin:] if line.strip()]


def given_answers(old: OwnNotebook) -> dict[str, str]:
    """The cells of a copy in which a question is answered, by the name of the answer."""
    found = {}
    for cell in old.cells:
        if "question" in cell.tags:
            for statement in cell.statements:
                if not is_open(statement.node):
                    found |= dict.fromkeys(statement.bound, cell.source)
    return found


def carry_answer(
    answers: dict[str, str], cell: nbformat.NotebookNode, statements: tuple[Statement, ...]
) -> list[str]:
    """Put the old copy's answer to a question, with what was noted beside it, into the new cell.

    It is taken out of `answers`. Returns what there is to say.
    """
    names = {name for statement in statements for name in statement.bound}
    carried = [name for name in answers if name in names]
    for name in carried:
        cell.source = answers.pop(name)
    return [f"  carried over the answer {name}" for name in carried]


def is_open(node: ast.stmt) -> bool:
    """Whether a statement is the `name = ...` of a question without an answer."""
    match node:
        case ast.Assign(value=ast.Constant(value)):
            return value is ...
    return False


def with_docstring_of(own: OwnFunction, given: str) -> str:
    """The learner's function with the docstring of the one that is given, where both have one."""
    ours, theirs = (docstring(ast.parse(text).body[0]) for text in (own.definition.text, given))
    if ours is None or theirs is None:
        return own.definition.text
    lines, given_lines = own.definition.text.split("\n"), given.split("\n")
    lines[ours.lineno - 1 : ours.end_lineno] = given_lines[theirs.lineno - 1 : theirs.end_lineno]
    return "\n".join(lines)


def docstring(function: ast.FunctionDef) -> ast.stmt | None:
    """The docstring of a function, if it has one that fills its lines."""
    first, *rest = function.body
    is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    if not is_text or not isinstance(first.value.value, str) or first.lineno == function.lineno:
        return None
    return None if rest and rest[0].lineno == first.end_lineno else first


def gone(old: OwnNotebook, functions: set[str]) -> list[str]:
    """What is filled in in the cells tagged as exercises that define none of these functions."""
    found = []
    for cell in old.cells:
        own = [s.node for s in cell.statements if isinstance(s.node, ast.FunctionDef)]
        if "exercise" in cell.tags and functions.isdisjoint(node.name for node in own):
            found += [node.name for node in own if not is_unsolved(node)]
    return found


def tags_of(cell: nbformat.NotebookNode) -> tuple[str, ...]:
    """The tags of a cell of a notebook."""
    return tuple(cell.metadata.get("tags", ()))
