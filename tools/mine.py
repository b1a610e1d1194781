"""Build the learner's own package: the course's, with the functions that the learner has solved in work/.

Each function that stands in work/NN_name.ipynb is checked in a process of its own. What passes takes the
place of the course's function in a copy of the package, build/mine/lecture26; what is open, wrong, endless or
raises stays the course's. A table says which is whose, and why. Nothing in work/ is changed.
"""

import argparse
import builtins
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from course import ROOT, CourseError, module_name, notebook_sources
from lecture26.kit.own_package import LEDGER, work_digest
from own_code import (
    OwnFunction,
    OwnNotebook,
    Statement,
    by_name,
    first_line,
    own_function,
    own_notebooks,
    parameters,
    same,
    statements,
)
from tasks import Task, tasks

TIME_LIMIT = 60.0  # seconds for one check, of which most take less than one
FOLDER = Path("build") / "mine"
HEAD = "# Made by `make mine`. What stands between two lines of dashes is the learner's own.\n"
BEGIN = "# --- The learner's own {}, from {}, cell {} ---"
END = "# --- End of the learner's own {} ---"
USE = """\
`make milestones` lets them draw, chapter by chapter, and shows the pictures on a page.
For all else, let LECTURE26_MINE name the folder:
    LECTURE26_MINE={folder} python -m lecture26 sample --out own.png
    %env LECTURE26_MINE={folder}     (the first cell of a notebook, after a restart of its kernel)"""


@dataclass(frozen=True, eq=False)
class Chapter:
    """The text of a chapter's module in the course's package, and what it defines, by name."""

    name: str
    text: str
    known: dict[str, Statement]

    @classmethod
    def read(cls, root: Path, name: str) -> "Chapter":
        """The module of this name in the course at `root`."""
        text = (root / "lecture26" / f"{name}.py").read_text(encoding="utf-8")
        return cls(name, text, by_name(statements(text)))


@dataclass(frozen=True, eq=False)
class Candidate:
    """An exercise of a chapter, and the learner's function for it if there is one."""

    task: Task
    chapter: Chapter
    own: OwnFunction


@dataclass(frozen=True)
class Verdict:
    """Whose an exercise's function is in the package, and why: `own` is there if it is the learner's."""

    exercise: str
    why: str
    own: OwnFunction | None = None


def build(root: Path, limit: float = TIME_LIMIT) -> list[Verdict]:
    """Build the learner's package in root/build/mine; returns a verdict on each exercise.

    Args:
        root: the course's folder.
        limit: seconds after which a check is given up.

    Raises:
        CourseError: if there are no copies of the notebooks.
    """
    if not (root / "work").is_dir():
        raise CourseError("there is no folder work/ with notebooks of yours: `make lab` makes it")
    digest = work_digest(root / "work")
    verdicts = []
    accepted: dict[Chapter, dict[str, OwnFunction]] = {}
    for candidate, fault in checked_apart(root, candidates(root), limit):
        of_chapter = accepted.setdefault(candidate.chapter, {})
        problem = fault or clash(candidate.own, of_chapter.values())
        if problem is None:
            of_chapter[candidate.task.function] = candidate.own
            verdicts.append(Verdict(candidate.task.name, candidate.own.place, candidate.own))
        else:
            verdicts.append(Verdict(candidate.task.name, problem))
    texts = {chapter.name: with_own_functions(chapter, own) for chapter, own in accepted.items() if own}
    own, course = (
        {verdict.exercise: verdict.why for verdict in verdicts if (verdict.own is not None) is is_own}
        for is_own in (True, False)
    )
    write_package(root, texts, {"own": own, "course": course, "work": digest})
    return verdicts


def candidates(root: Path) -> list[Candidate]:
    """All exercises of the course, each with the learner's function or what keeps it from being taken."""
    found = []
    for source in notebook_sources(root):
        of_notebook = tasks(source)
        if of_notebook:
            chapter = Chapter.read(root, module_name(source))
            notebooks = own_notebooks(root / "work", source)
            found += [Candidate(task, chapter, first_own(notebooks, task, chapter)) for task in of_notebook]
    return found


def first_own(notebooks: list[OwnNotebook], task: Task, chapter: Chapter) -> OwnFunction:
    """The function of the first notebook in which it is filled in, or what the first says of it."""
    if task.function not in chapter.known:
        raise task.cell.error(1, f"lecture26/{chapter.name}.py has no {task.function}: run `make package`")
    choices = [own_function(notebook, task.function, chapter.known) for notebook in notebooks]
    own = next((own for own in choices if own.problem is None), choices[0])
    return own if own.problem else replace(own, problem=obstacle(own, task, chapter))


def obstacle(own: OwnFunction, task: Task, chapter: Chapter) -> str | None:
    """Why a function cannot take the place of the course's, whatever it computes; None if it can."""
    ours, theirs = parameters(chapter.known[task.function].node), parameters(own.definition.node)
    if ours != theirs:
        return f"its parameters are {theirs}, the course's {ours}"
    for name in sorted(name for statement in own.needs for name in statement.bound):
        if name in chapter.known:
            return f"with what it needs comes {name}, too, which is a name of the course's: set it elsewhere"
        if hasattr(builtins, name):
            return f"it needs your {name}, which is a name of Python's own: choose another"
    return None


def clash(own: OwnFunction, accepted: Iterable[OwnFunction]) -> str | None:
    """Why a function cannot stand in one module with others of the learner's; None if it can."""
    taken = by_name(statement for other in accepted for statement in other.needs)
    for statement in own.needs:
        for name in sorted(statement.bound & taken.keys()):
            if not same(taken[name], statement):
                return f"its {name} is another than that of an exercise above: choose another name"
    return None


def checked_apart(root: Path, found: list[Candidate], limit: float) -> list[tuple[Candidate, str | None]]:
    """Each exercise with what is wrong with the learner's function, or None; nothing runs in this process."""
    to_check = [candidate for candidate in found if candidate.own.problem is None]
    jobs = [job(candidate) for candidate in to_check]
    command = [sys.executable, Path(__file__).with_name("check_apart.py"), str(root), str(limit)]
    answer = "[]"
    if jobs:  # where nothing is filled in, nothing needs torch
        answer = subprocess.run(
            command, input=json.dumps(jobs), stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    faults = dict(zip(to_check, json.loads(answer), strict=True))
    return [
        (candidate, candidate.own.problem or about(candidate, faults[candidate], found))
        for candidate in found
    ]


def job(candidate: Candidate) -> dict[str, str]:
    """What is to be checked: the course's module with this one function of the learner's."""
    task = candidate.task
    text = with_own_functions(candidate.chapter, {task.function: candidate.own})
    return {"name": task.name, "function": task.function, "text": text}


def about(candidate: Candidate, fault: str | None, found: list[Candidate]) -> str | None:
    """What is wrong with a function, and which names in it mean another thing than in the notebook."""
    # exercises call each other, and each is checked with the course's others
    exercises = {other.task.function for other in found if other.chapter is candidate.chapter}
    hidden = [name for name in candidate.own.hidden if name not in exercises]
    if fault is None or not hidden:
        return fault
    return f"{fault.rstrip('.')}. {', '.join(hidden)} in it is the course's: choose another name for your own"


def with_own_functions(chapter: Chapter, own: dict[str, OwnFunction]) -> str:
    """The text of a chapter's module with the learner's functions, by name, in the place of the course's."""
    lines = chapter.text.splitlines()
    nodes = {name: chapter.known[name].node for name in own}
    written: set[str] = set()
    blocks = {}
    for name in sorted(
        own, key=lambda name: nodes[name].lineno
    ):  # a shared helper stands above its first user
        texts = [s.text for s in own[name].needs if s.text not in written]
        written.update(texts)
        begin = BEGIN.format(name, own[name].notebook, own[name].definition.cell)
        blocks[name] = [
            begin,
            *"\n\n\n".join([*texts, own[name].definition.text]).split("\n"),
            END.format(name),
        ]
    for name in sorted(own, key=lambda name: -nodes[name].lineno):  # from below, so that line numbers hold
        lines[first_line(nodes[name]) - 1 : nodes[name].end_lineno] = blocks[name]
    return HEAD + "\n".join(lines) + "\n"


def write_package(root: Path, texts: dict[str, str], ledger: dict) -> None:
    """Put a copy of the course's package into root/build/mine, with these texts of modules and its ledger."""
    new = root / FOLDER.with_suffix(".part")
    shutil.rmtree(new, ignore_errors=True)
    package = new / "lecture26"
    shutil.copytree(root / "lecture26", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8", newline="\n")
    (package / LEDGER).write_text(json.dumps(ledger, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    new.rename(root / FOLDER)


def table(verdicts: list[Verdict]) -> str:
    """A line for each exercise: its name, whose function is taken, and from where or why."""
    width = max(len(verdict.exercise) for verdict in verdicts)
    rows = []
    for verdict in verdicts:
        whose = "yours" if verdict.own else "the course's"
        beginning = f"{verdict.exercise:{width}}  {whose:12}  "
        rows += textwrap.wrap(
            verdict.why, 120, initial_indent=beginning, subsequent_indent=" " * len(beginning)
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the package with your own functions from work/.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    root = parser.parse_args().root.resolve()
    try:
        verdicts = build(root)
    except CourseError as error:
        sys.exit(str(error))
    own = sum(verdict.own is not None for verdict in verdicts)
    print(table(verdicts))
    print(
        f"\n{FOLDER.as_posix()}: {own} of {len(verdicts)} functions are yours.\n"
        + USE.format(folder=FOLDER.as_posix())
    )


if __name__ == "__main__":
    main()
