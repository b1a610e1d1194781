"""Build a cohort's assignments: source notebooks, what is handed out, nbgrader's gradebook."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
from nbgrader.apps.api import NbGraderAPI
from nbgrader.converters import GenerateAssignment
from nbgrader.preprocessors import ClearSolutions

from course import ROOT, Cell, CourseError, read_cells
from lecture26.kit import solved
from own_code import without_magics

from .assignments import Assignment, Cohort, assignments_of, write_assignments
from .course_copy import copy_course
from .leaks import Secret, Secrets, leaks
from .nbgrader_setup import TO_ANSWER, settings, write_settings
from .notebook import Built, source_notebook
from .package import HANDED_OUT, Modules, handed_modules, write_package

COUNTS = {1: "One notebook", 2: "Two notebooks", 3: "Three notebooks"}
SEVERAL = """
A later notebook takes the functions of an earlier one from its file, as you saved it.
"""


class ClearAnswers(ClearSolutions):
    """Takes solutions away; a question keeps its open answer, which stands above the right one."""

    def preprocess_cell(self, cell, resources, cell_index):
        if "question" not in cell.metadata.get("tags", ()):
            return super().preprocess_cell(cell, resources, cell_index)
        stub, self.code_stub = self.code_stub, {"python": ""}
        cell, resources = super().preprocess_cell(cell, resources, cell_index)
        self.code_stub = stub
        cell.source = cell.source.rstrip()
        return cell, resources


def build(cohort: Cohort, root: Path = ROOT, private: Path | None = None) -> list[str]:
    """Build all assignments of a cohort; returns lines on what was made.

    Args:
        cohort: what for.
        root: the course's folder.
        private: the folder of an instructor's own exercises.

    Raises:
        CourseError: if a source is not as it must be, nbgrader refuses, or something would be given away.
    """
    found = assignments_of(cohort.course, copy_course(cohort, root, private))
    write_assignments(cohort, found)
    write_settings(cohort)
    lines = []
    for assignment in found:
        lines += write_source(cohort, assignment, root)
    record(cohort)
    secrets = Secrets(cohort.course)
    for assignment in found:
        seed = Secret(str(cohort.secret_seed(assignment.name)), "the seed of the hidden tests")
        release(cohort, assignment, [*secrets.of(assignment), seed])
        lines.append(
            f"{assignment.name}: {len(assignment.items)} items, {assignment.points:g} points: "
            f"{cohort.hand_out(assignment.name)}"
        )
    return lines + [f"note: {sentence}" for sentence in secrets.told_by_chapters()]


def write_source(cohort: Cohort, assignment: Assignment, root: Path) -> list[str]:
    """Write an assignment's source folder but for its recordings; returns lines on what is left out of it."""
    folder = cohort.source(assignment.name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    modules = Modules(cohort.course, assignment)
    sources = [cohort.course / "notebooks" / f"{name}.py" for name in assignment.notebooks]
    texts = [without_magics(cell.source) for source in sources for cell in read_code(source)]
    handed = handed_modules(modules, texts)
    built = {
        source.stem: source_notebook(source, assignment, lambda node: modules.imported(node) <= handed)
        for source in sources
    }
    for name, made in built.items():
        nbformat.write(made.notebook, folder / f"{name}.ipynb")
    write_package(modules, handed, folder)
    copy_data(root / "data", folder / "data", [made.notebook for made in built.values()])
    write_texts(assignment, folder, root)
    write_instructors(cohort, assignment, list(built.values()))
    return [
        f"{name}: left out is the cell {line!r}" for name, made in built.items() for line in made.left_out
    ]


def read_code(source: Path) -> list[Cell]:
    """The code cells of a notebook's source."""
    return [cell for cell in read_cells(source) if cell.kind == "code"]


def copy_data(data: Path, folder: Path, notebooks: list[nbformat.NotebookNode]) -> None:
    """Copy the checkpoints and results that notebooks name, and the readers, which evaluation needs."""
    code = "\n".join(without_magics(c.source) for n in notebooks for c in n.cells if c.cell_type == "code")
    named = {node.value for node in ast.walk(ast.parse(code)) if is_string(node)}
    files = [data / "README.md"]
    for file in (*data.glob("checkpoints/*.*"), *data.glob("results/*.json")):
        begun = any(
            name.endswith("_") and file.stem.startswith(name) for name in named
        )  # as f"adaptation_{x}"
        if file.stem in named or begun or file.stem.startswith("reader_"):
            files.append(file)
    for file in files:
        copy = folder / file.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def is_string(node: ast.AST) -> bool:
    """Whether a piece of Python is a text as such."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != "_"


def write_texts(assignment: Assignment, folder: Path, root: Path) -> None:
    """Write what else is handed out: the list of items, how to hand in, what must be installed."""
    plain = dataclasses.asdict(assignment) | {"to_answer": TO_ANSWER}
    write_json(folder / "assignment.json", plain)
    names = {
        chapter: [i.exercise for i in assignment.items if i.notebook == chapter]
        for chapter in assignment.notebooks
    }
    solved.lay_out(folder, {chapter: listed for chapter, listed in names.items() if listed})
    for name in ("hand_in.py", "Makefile"):
        shutil.copyfile(HANDED_OUT / name, folder / name)
    shutil.copyfile(root / "LICENSE", folder / "LICENSE")
    several = len(assignment.notebooks) > 1
    readme = (
        (HANDED_OUT / "README.md")
        .read_text(encoding="utf-8")
        .format(
            name=assignment.name,
            title=assignment.title,
            count=COUNTS.get(len(assignment.notebooks), f"{len(assignment.notebooks)} notebooks"),
            points=f"{assignment.points:g}",
            notebooks=", ".join(f"`{name}.ipynb`" for name in assignment.notebooks),
            first=assignment.notebooks[0],
            several=SEVERAL if several else "",
        )
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = sorted([*project["dependencies"], *project["optional-dependencies"]["lab"]])
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")


def write_instructors(cohort: Cohort, assignment: Assignment, built: list[Built]) -> None:
    """Keep answers and rubrics where they are not handed out."""
    folder = cohort.instructor(assignment.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "answers.json", {name: a for made in built for name, a in made.answers.items()})
    rubrics = {name: text for made in built for name, text in made.rubrics.items()}
    write_json(folder / "rubrics.json", rubrics)
    items = {item.exercise: item for item in assignment.items}
    text = "\n\n".join(
        f"## {items[name].notebook}, {items[name].title} ({items[name].points:g} points)\n\n{rubric}"
        for name, rubric in rubrics.items()
    )
    (folder / "rubrics.md").write_text(
        f"# {assignment.title}: questions on paper\n\n{text}\n", encoding="utf-8"
    )


def record(cohort: Cohort) -> None:
    """Record the visible checks, in a process whose lecture26 is the cohort's."""
    environment = {name: value for name, value in os.environ.items() if name != "LECTURE26_MINE"}
    command = [sys.executable, str(Path(__file__).with_name("record.py")), str(cohort.folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise CourseError(f"recording the checks failed:\n{run.stderr.strip()}")


def release(cohort: Cohort, assignment: Assignment, secrets: list[Secret]) -> None:
    """Let nbgrader make what is handed out and fill its gradebook; search it, and pack it."""
    config = settings(cohort)
    config.GenerateAssignment.preprocessors = [
        ClearAnswers if step is ClearSolutions else step
        for step in GenerateAssignment.preprocessors.default()
    ]
    made = NbGraderAPI(config=config).generate_assignment(assignment.name, force=True, create=True)
    if not made["success"]:
        said = [line for line in made["log"].splitlines() if not line.startswith("[INFO]")]
        raise CourseError(f"nbgrader cannot make {assignment.name}:\n" + "\n".join(said))
    folder = cohort.release(assignment.name)
    given_away = leaks(folder, secrets)
    if given_away:
        shutil.rmtree(folder)
        raise CourseError(f"{assignment.name} would give away:\n" + "\n".join(given_away))
    packed = cohort.hand_out(assignment.name)
    packed.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, Path(assignment.name) / file.relative_to(folder))


def write_json(file: Path, plain: object) -> None:
    """Write plain values, to be read by people as well."""
    file.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
