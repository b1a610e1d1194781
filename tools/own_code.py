"""What a learner has written in a copy of a notebook: read from its cells by syntax tree, never executed.

An exercise's function is taken with the helpers, imports and constants that it needs, wherever in the
notebook they stand.
"""

import ast
import copy
import re
import symtable
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat

MAGIC = re.compile(r"^( *)[%!?].*$", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Statement:
    """A statement at the top level of a cell; an import that brings several names is one for each of them.

    bound: the names that it sets; used: the names of the notebook that it reads, in functions' bodies too.
    """

    cell: int
    node: ast.stmt
    text: str
    bound: frozenset[str]
    used: frozenset[str]


@dataclass(frozen=True, eq=False)
class OwnCell:
    """A code cell of a learner's notebook, counted from 1; `problem` says why it has no statements."""

    number: int
    tags: tuple[str, ...]
    source: str
    statements: tuple[Statement, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, eq=False)
class OwnNotebook:
    """A learner's notebook, by its path in the course's folder; `problem` says why it has no cells."""

    path: str
    cells: tuple[OwnCell, ...] = ()
    problem: str | None = None


@dataclass(frozen=True, eq=False)
class OwnFunction:
    """A function that a learner has written; or, where `problem` is there, why there is none.

    definition: its own statement; needs: those of the same notebook that it needs, in their order.
    hidden: the names in them that mean something else in the course's module.
    """

    notebook: str
    definition: Statement | None = None
    needs: tuple[Statement, ...] = ()
    hidden: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def place(self) -> str:
        """Where it comes from, in words."""
        names = sorted({name for statement in self.needs for name in statement.bound})
        return f"{self.notebook}, cell {self.definition.cell}" + (
            f", with {', '.join(names)}" if names else ""
        )


def without_magics(source: str) -> str:
    """A cell's text, with `pass` for each of its magics if it is no Python with them."""
    try:
        ast.parse(source)
    except SyntaxError:
        return MAGIC.sub(r"\1pass", source)
    return source


def own_notebooks(work: Path, source: Path) -> list[OwnNotebook]:
    """The learner's copies of a notebook in a folder, its namesake first.

    Copies whose names begin with the chapter's number count too, such as 01_ddpm-Copy1.ipynb or 01_old.ipynb.
    """
    namesake = work / f"{source.stem}.ipynb"
    others = sorted(set(work.glob(f"{source.stem[:3]}*.ipynb")) - {namesake})
    return [read_own_notebook(path) for path in (namesake, *others)]


def read_own_notebook(file: Path) -> OwnNotebook:
    """The code cells of a learner's notebook, but for those that take the finished functions."""
    path = f"{file.parent.name}/{file.name}"
    if not file.exists():
        return OwnNotebook(path, problem=f"there is no {path}")
    try:
        cells = nbformat.read(file, as_version=4).cells
        texts = [(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ()))) for cell in cells]
    except Exception as error:  # a file that is no notebook makes nbformat stumble in many ways
        return OwnNotebook(path, problem=f"{path} cannot be read as a notebook ({type(error).__name__})")
    found = [
        own_cell(number, source, tags)
        for number, (kind, source, tags) in enumerate(texts, start=1)
        if kind == "code" and "finished" not in tags
    ]
    return OwnNotebook(path, tuple(found))


def own_cell(number: int, source: str, tags: tuple[str, ...]) -> OwnCell:
    """A cell with its statements; one that is no Python has none."""
    try:
        found = tuple(statements(source, number))
    except SyntaxError as error:
        problem = f"line {error.lineno} of its cell is no Python: {error.msg}"
        return OwnCell(number, tags, source, problem=problem)
    return OwnCell(number, tags, source, found)


def statements(source: str, cell: int = 0) -> Iterator[Statement]:
    """The statements at the top level of a piece of Python."""
    source = without_magics(source)
    for node in ast.parse(source).body:
        for part in parts(node):
            text = ast.unparse(part) if part is not node else text_of(source, node)
            yield Statement(cell, part, text, *names_in(text))


def parts(node: ast.stmt) -> list[ast.stmt]:
    """An import cut into one for each name; any other statement as it is."""
    if not isinstance(node, ast.Import | ast.ImportFrom) or len(node.names) == 1:
        return [node]
    found = []
    for alias in node.names:
        found.append(copy.copy(node))
        found[-1].names = [alias]
    return found


def text_of(source: str, node: ast.stmt) -> str:
    """The source of a statement, a function's with its decorators and the comment behind its last line."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return "\n".join(source.split("\n")[first_line(node) - 1 : node.end_lineno])
    return ast.get_source_segment(source, node)


def first_line(node: ast.stmt) -> int:
    """The line at which a definition begins, its decorators included."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])


def names_in(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a statement sets at the top level, and the global names that it reads.

    The compiler's own table of names tells these from parameters and local variables of the same name.
    """
    top = symtable.symtable(text, "<cell>", "exec")
    bound = {
        symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()
    }
    used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    inner = top.get_children()
    while inner:
        table = inner.pop()
        used |= {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
        inner += table.get_children()
    return frozenset(bound), frozenset(used)


def own_function(notebook: OwnNotebook, function: str, known: Mapping[str, Statement]) -> OwnFunction:
    """The last definition of a function that is filled in, with what it needs from its notebook.

    One in a cell that is tagged as an exercise comes before any other.

    Args:
        notebook: the learner's.
        function: its name.
        known: what is not to be taken from the notebook, since it is there already, by name.
    """
    if notebook.problem:
        return OwnFunction(notebook.path, problem=notebook.problem)
    cells = notebook.cells
    defining = [(cell, s) for cell in cells for s in cell.statements if defines(s, function)]
    filled = [(cell, s) for cell, s in defining if not is_unsolved(s.node)]
    if not filled:
        missing = "it is not filled in" if defining else f"no cell of {notebook.path} defines it"
        return OwnFunction(notebook.path, problem=[missing, *broken(notebook, function)][-1])
    cell, definition = max(filled, key=lambda found: ("exercise" in found[0].tags, found[0].number))
    # Of the statements that set a name, the one that the function meets when the notebook runs from top to
    # bottom: the last in its own cell or above. Only what is not there comes from below.
    position = cells.index(cell)
    in_turn = (*reversed(cells[position + 1 :]), *cells[: position + 1])
    where = by_name(s for other in in_turn for s in other.statements)
    needs: set[Statement] = set()
    read = set(definition.used)
    while new := {where[name] for name in read - known.keys() - {function} if name in where} - needs:
        needs |= new
        read = read.union(*(statement.used for statement in new))
    # what stands in the chapter's other exported cells is the course's there, too
    own = by_name(s for c in cells if "export" not in c.tags or "exercise" in c.tags for s in c.statements)
    hidden = [n for n in sorted(read & own.keys() & known.keys() - {function}) if not same(own[n], known[n])]
    in_order = sorted(needs, key=lambda s: (s.cell, s.node.lineno))
    return OwnFunction(notebook.path, definition, tuple(in_order), tuple(hidden))


def broken(notebook: OwnNotebook, function: str) -> list[str]:
    """What is wrong with the cells that seem to define a function, but are no Python."""
    return [cell.problem for cell in notebook.cells if cell.problem and f"def {function}(" in cell.source]


def by_name(found: Iterable[Statement]) -> dict[str, Statement]:
    """The last of some statements that sets each name."""
    return {name: statement for statement in found for name in statement.bound}


def defines(statement: Statement, function: str) -> bool:
    """Whether a statement is the definition of this function."""
    return isinstance(statement.node, ast.FunctionDef) and statement.node.name == function


def is_unsolved(node: ast.FunctionDef | ast.With) -> bool:
    """Whether a function still runs into what stands for its solution, perhaps inside a `with`.

    That is `...` in the learner's copies, and `raise NotImplementedError` in homework.
    """
    for statement in node.body:
        match statement:
            case ast.Return():
                return False
            case ast.With() if is_unsolved(statement):
                return True
            case ast.Expr(ast.Constant(value)) if value is ...:
                return True
            case ast.Raise(ast.Name("NotImplementedError") | ast.Call(ast.Name("NotImplementedError"))):
                return True
    return False


def same(one: Statement, other: Statement) -> bool:
    """Whether two statements set a name to the same thing, as far as their texts tell."""
    return meaning(one.node) == meaning(other.node)


def meaning(node: ast.stmt) -> str:
    """A statement without its layout; `from a import b as c` is the same as `import a.b as c`."""
    match node:
        case ast.ImportFrom(module=module, names=[ast.alias(name)], level=0):
            return f"import {module}.{name}"
        case ast.Import(names=[ast.alias(name, as_name)]):
            return f"import {name if as_name else name.partition('.')[0]}"
    return ast.dump(node)


def parameters(node: ast.FunctionDef) -> str:
    """The parameters of a function with their defaults, without annotations."""
    arguments = ast.parse(f"def f({ast.unparse(node.args)}): ...").body[0].args  # a copy
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(arguments)})"
