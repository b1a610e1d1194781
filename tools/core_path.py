"""The core path through a chapter: its core sections, and what these need of the sections left out.

What is needed is found by names, as `tools/own_code.py` reads them from the syntax tree: an exported function
or class is imported from the finished package; of any other cell the statements that set the name are kept.
"""

import ast
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from course import SECOND_READING, Cell
from own_code import Statement, names_in, statements


@dataclass(frozen=True, eq=False)
class Section:
    """A section of a chapter: its heading as plain text ("" before the first), and its cells."""

    heading: str
    is_core: bool
    cells: tuple[Cell, ...]


def sections(cells: Iterable[Cell]) -> list[Section]:
    """The sections of a chapter in their order, parts with a tag of their own among them.

    One that holds a milestone is for a learner's own package, and no part of the core path.
    """
    found: list[tuple[str, bool, list[Cell]]] = [("", True, [])]
    for cell in cells:
        tags = {"core", "optional"} & set(cell.tags)
        if cell.kind == "markdown" and tags:
            found.append((heading_of(cell), tags == {"core"}, []))
        found[-1][2].append(cell)
    return [
        Section(heading, is_core and not any("milestone" in cell.tags for cell in own), tuple(own))
        for heading, is_core, own in found
    ]


def heading_of(cell: Cell) -> str:
    """The text of the heading that a cell begins with, without its marks."""
    return re.sub(r"^#+\s*", "", cell.source.splitlines()[0]).removesuffix(SECOND_READING).strip()


@dataclass(frozen=True, eq=False)
class Placed:
    """A statement at its place among all statements of a chapter."""

    position: int
    cell: Cell
    statement: Statement

    @property
    def reopens(self) -> str | None:
        """The class that a `class Name(Name):` goes on with."""
        match self.statement.node:
            case ast.ClassDef(name=name, bases=[ast.Name(base)]) if name == base:
                return name
        return None

    @property
    def is_from_the_package(self) -> bool:
        """Whether the finished package has what this sets: it is no import and no class that goes on."""
        is_import = isinstance(self.statement.node, ast.Import | ast.ImportFrom)
        return "export" in self.cell.tags and not is_import and self.reopens is None


def needed(cells: list[Cell], kept: Collection[int], module: str) -> dict[int, str]:
    """What the cells that are kept need of the others.

    Args:
        cells: all cells of a chapter.
        kept: the numbers of those that are kept.
        module: the chapter's module in the finished package.

    Returns:
        Code, by the number of the kept code cell before which it must run.
    """
    found = [(cell, s) for cell in cells if cell.kind == "code" for s in statements(cell.source, cell.number)]
    placed = [Placed(position, *each) for position, each in enumerate(found)]
    readers = [each for each in placed if each.cell.number in kept]
    classes = {name for each in readers for name in each.statement.bound}
    taken = {each for each in placed if each.reopens in classes and each.cell.number not in kept}
    readers += taken
    while readers:
        reader = readers.pop()
        for name in names_read(reader.statement):
            source = where_set(name, reader, placed)
            if source is not None and source.cell.number not in kept and source not in taken:
                taken.add(source)
                if not source.is_from_the_package:
                    readers.append(source)
    places = [cell.number for cell in cells if cell.kind == "code" and cell.number in kept]
    groups: dict[int, list[Placed]] = {}
    for each in sorted(taken, key=lambda each: each.position):
        after = [number for number in places if number > each.cell.number]
        groups.setdefault((after or places[-1:])[0], []).append(each)
    return {place: code_of(group, module) for place, group in groups.items()}


def code_of(group: list[Placed], module: str) -> str:
    """Imports of what the finished package has, then the other statements as they stand in the chapter."""
    names = dict.fromkeys(
        n for each in group if each.is_from_the_package for n in sorted(each.statement.bound)
    )
    imports = [f"from lecture26.{module} import {', '.join(names)}"] if names else []
    return "\n".join(imports + [each.statement.text for each in group if not each.is_from_the_package])


def where_set(name: str, reader: Placed, placed: list[Placed]) -> Placed | None:
    """The statement that sets a name for a reader: the last above; else, if it can wait, the first below."""
    setting = [each for each in placed if name in each.statement.bound and each is not reader]
    above = [each for each in setting if each.position < reader.position]
    if above:
        return above[-1]
    return setting[0] if setting and name not in names_read_at_once(reader.statement) else None


def names_read(statement: Statement) -> frozenset[str]:
    """The names that a statement has from others: all that it reads before it sets them itself."""
    if isinstance(statement.node, ast.FunctionDef | ast.ClassDef):
        return statement.used
    return statement.used & read_before_set([statement.node], set())


def read_before_set(nodes: list[ast.stmt], so_far: set[str]) -> set[str]:
    """The names that statements read in a run from top to bottom before they set them; `so_far` grows."""
    read: set[str] = set()
    for node in nodes:
        bodies = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        bodies += [handler.body for handler in getattr(node, "handlers", [])]
        inside = {id(inner) for body in bodies for part in body for inner in ast.walk(part)}
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and id(n) not in inside]
        read |= {n.id for n in names if isinstance(n.ctx, ast.Load)} - so_far
        if isinstance(node, ast.AugAssign):
            read |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)} - so_far
        so_far |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            so_far.add(node.name)
            read |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - so_far
        else:
            for body in bodies:
                read |= read_before_set(body, so_far)
    return read


def names_read_at_once(statement: Statement) -> frozenset[str]:
    """The names that must be there when a statement runs: not those in the bodies of functions."""
    match statement.node:
        case ast.FunctionDef(args=arguments, decorator_list=decorators):
            parts = [*arguments.defaults, *filter(None, arguments.kw_defaults), *decorators]
        case ast.ClassDef(bases=bases, decorator_list=decorators):
            parts = [*bases, *decorators]
        case _:
            return names_read(statement)
    return frozenset().union(*(names_in(ast.unparse(part))[1] for part in parts))


def undefined_names(sources: Iterable[str], known: Collection[str]) -> list[str]:
    """The names that code reads and nothing above it sets; for the bodies of functions, nothing anywhere.

    Args:
        sources: the code cells of a notebook, in their order.
        known: names that are there from the start, such as Python's own.
    """
    found = [statement for source in sources for statement in statements(source)]
    anywhere = set(known).union(*(statement.bound for statement in found))
    so_far, missing = set(known), []
    for statement in found:
        at_once = names_read_at_once(statement)
        missing += sorted(at_once - so_far - statement.bound) + sorted(statement.used - at_once - anywhere)
        so_far |= statement.bound
    return missing
