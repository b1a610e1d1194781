"""The package that an assignment brings along: what its notebooks import, and nothing that comes after.

Chapters before the assignment's come finished. Its own chapters come with the student's functions in place of
the exercises' (`lecture26.homework.own`): networks, trained weights and later notebooks run on what the
student has written. A module that needs a later chapter, or the checks' references, stays at home.
"""

import ast
import re
import shutil
from functools import cached_property
from pathlib import Path

from course import module_name, notebook_sources
from own_code import first_line, statements
from tasks import tasks

from .assignments import Assignment

HERE = Path(__file__).parent
HANDED_OUT = HERE / "handed_out"
PACKAGE = "lecture26"
AT_HOME = re.compile(r"lecture26\.checks\.(chapters|draws|mistakes)\b")
CHECKS = '"""The part of the course\'s checks that judges by recordings; lecture26.homework calls it."""\n'


class Modules:
    """The modules of a course's package, and which of them may go along with an assignment."""

    def __init__(self, course: Path, assignment: Assignment) -> None:
        self.course, self.assignment = course, assignment
        chapters = [module_name(source) for source in notebook_sources(course)]
        first = min(map(chapters.index, assignment.chapters))
        allowed = {*chapters[:first], *assignment.chapters}
        self.later = {f"{PACKAGE}.{name}" for name in chapters if name not in allowed}
        self._may_go: dict[str, bool] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """The file of each module, by the name that it is imported by."""
        found = {}
        for file in sorted((self.course / PACKAGE).rglob("*.py")):
            parts = file.relative_to(self.course).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
        return found

    def may_go(self, name: str) -> bool:
        """Whether a module and all that it imports, in functions too, may be handed out."""
        if name not in self._may_go:
            self._may_go[name] = True  # while what it imports is looked through
            fits = name in self.files and name not in self.later and not AT_HOME.match(name)
            self._may_go[name] = fits and all(map(self.may_go, self.imports(name)))
        return self._may_go[name]

    def imports(self, name: str) -> set[str]:
        """The modules of the course that a module imports, and the packages that it lies in."""
        text = self.files[name].read_text(encoding="utf-8")
        package = name if self.files[name].name == "__init__.py" else name.rpartition(".")[0]
        parents = {".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)} - {
            "lecture26.checks"
        }
        return parents | {
            found for node in ast.walk(ast.parse(text)) for found in self.imported(node, package)
        }

    def imported(self, node: ast.AST, package: str = "") -> set[str]:
        """The modules of the course that an import names; none for any other node."""
        match node:
            case ast.Import(names=names):
                found = {alias.name for alias in names}
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                base = ".".join([*above, *([module] if module else [])])
                found = {f"{base}.{a.name}" if f"{base}.{a.name}" in self.files else base for a in names}
            case _:
                return set()
        return {name for name in found if name.split(".")[0] == PACKAGE}

    def closure(self, names: set[str]) -> set[str]:
        """Modules with all that they import."""
        found, todo = set(), {name for name in names if self.may_go(name)}
        while todo:
            name = todo.pop()
            found.add(name)
            todo |= self.imports(name) - found
        return found


def handed_modules(modules: Modules, texts: list[str]) -> set[str]:
    """The modules that go along with an assignment's notebooks.

    Args:
        modules: of the course.
        texts: the Python of the notebooks.
    """
    wanted = {name for text in texts for node in ast.walk(ast.parse(text)) for name in modules.imported(node)}
    wanted |= {f"{PACKAGE}.{name}" for name in modules.assignment.chapters}
    wanted |= {name for name in modules.files if name.startswith(f"{PACKAGE}.kit")}
    wanted |= {f"{PACKAGE}.checks.judging", f"{PACKAGE}.checks.recording"}
    found = modules.closure(wanted)
    if f"{PACKAGE}.recipes" in found:  # which imports whatever recipes lie beside it
        recipes = {name for name in modules.files if name.startswith(f"{PACKAGE}.recipes.")}
        found |= modules.closure(recipes)
    return found - {f"{PACKAGE}.checks"}


def write_package(modules: Modules, names: set[str], folder: Path) -> None:
    """Write the package of an assignment into a folder."""
    for name in sorted(names):
        file = modules.files[name]
        copy = folder / file.relative_to(modules.course)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if name.removeprefix(f"{PACKAGE}.") in modules.assignment.chapters:
            source = next((modules.course / "notebooks").glob(f"[0-9][0-9]_{file.stem}.py"))
            copy.write_text(without_answers(file, source), encoding="utf-8", newline="\n")
        else:
            shutil.copyfile(file, copy)
    (folder / PACKAGE / "checks" / "__init__.py").write_text(CHECKS, encoding="utf-8")
    shutil.copytree(
        HANDED_OUT / "homework", folder / PACKAGE / "homework", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copyfile(HERE.parent / "own_code.py", folder / PACKAGE / "homework" / "own_code.py")


def without_answers(module: Path, source: Path) -> str:
    """The text of a chapter's module in which the student's functions stand for those of the exercises."""
    text = module.read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = {s.node.name: s.node for s in statements(text) if isinstance(s.node, ast.FunctionDef)}
    exercises = [(task.name, nodes[task.function]) for task in tasks(source)]
    for name, node in sorted(exercises, key=lambda exercise: -exercise[1].lineno):
        docstring = ast.get_docstring(node, clean=False) is not None
        begin = node.body[1 if docstring else 0]
        given = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        given += [f"*{node.args.vararg.arg}"] if node.args.vararg else []
        given += [f"{a.arg}={a.arg}" for a in node.args.kwonlyargs]
        given += [f"**{node.args.kwarg.arg}"] if node.args.kwarg else []
        call = f'    return own("{name}")({", ".join(given)})'
        # comments between the docstring and the first statement belong to the answer
        above = node.body[0].end_lineno if docstring else begin.lineno - 1
        lines[above : node.end_lineno] = [call]
    if not exercises:
        return text
    note = "As this assignment brings it: `own` stands for what the student writes."
    lines = re.sub(r"^Generated from .*$", note, "\n".join(lines), count=1, flags=re.MULTILINE).split("\n")
    imports = [s.node for s in statements(text) if isinstance(s.node, ast.Import | ast.ImportFrom)]
    at = max(node.end_lineno for node in imports) if imports else first_line(ast.parse(text).body[0]) - 1
    lines.insert(at, "from lecture26.homework.own import own")
    return "\n".join(lines) + "\n"
