"""Build the learner's own package: the course's, with the functions that the learner has solved in work/.

Each function that stands in work/NN_name.ipynb is checked in a process of its own. What passes takes the
place of the course's function in a copy of the package, build/mine/lecture26; what is open, wrong, endless or
raises stays the course's. A table says which is whose, and why. Nothing in work/ is changed.
"""

import argparse
import builtins
import json
import linecache
import multiprocessing
import os
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from course import ROOT, CourseError, module_name, notebook_sources
from own_code import (
    OwnFunction,
    OwnNotebook,
    Statement,
    Task,
    by_name,
    first_line,
    own_function,
    own_notebooks,
    parameters,
    same,
    statements,
    tasks,
)

TIME_LIMIT = 60.0  # seconds for one check, of which most take less than one
FOLDER = Path("build") / "mine"
LEDGER = "own_functions.json"  # lecture26.kit.own_package reads it
HEAD = "# Made by `make mine`. What stands between two lines of dashes is the learner's own.\n"
BEGIN = "# --- The learner's own {}, from {}, cell {} ---"
END = "# --- End of the learner's own {} ---"
USE = """\
To draw with them, let LECTURE26_MINE name the folder:
    LECTURE26_MINE={folder} python -m lecture26 sample --out own.png
    %env LECTURE26_MINE={folder}     (the first cell of a notebook, after a restart of its kernel)"""


@dataclass(frozen=True)
class Chapter:
    """The text of a chapter's module in the course's package at `root`, and what it defines, by name."""

    root: Path
    name: str
    text: str
    known: dict[str, Statement]

    @classmethod
    def read(cls, root: Path, name: str) -> "Chapter":
        """The module of this name."""
        text = (root / "lecture26" / f"{name}.py").read_text(encoding="utf-8")
        return cls(root, name, text, by_name(statements(text)))


@dataclass(frozen=True)
class Verdict:
    """Whose an exercise's function is in the package: the learner's, if `own` is there; and why."""

    task: Task
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
    verdicts, texts = [], {}
    for source in notebook_sources(root):
        found = tasks(source)
        if found:
            chapter = Chapter.read(root, module_name(source))
            of_chapter = judge_chapter(chapter, found, own_notebooks(root / "work", source), limit)
            verdicts += of_chapter
            own = {verdict.task.function: verdict.own for verdict in of_chapter if verdict.own}
            if own:
                texts[chapter.name] = with_own_functions(chapter, own)
    ledger = {verdict.task.name: verdict.own.place for verdict in verdicts if verdict.own}
    write_package(root, texts, ledger)
    return verdicts


def judge_chapter(
    chapter: Chapter, found: list[Task], notebooks: list[OwnNotebook], limit: float
) -> list[Verdict]:
    """The verdicts on the exercises of a chapter."""
    accepted: dict[str, OwnFunction] = {}
    verdicts = []
    for task in found:
        if task.function not in chapter.known:
            raise task.cell.error(
                1, f"lecture26/{chapter.name}.py has no {task.function}: run `make package`"
            )
        own = first_filled_in(notebooks, task, chapter)
        problem = own.problem or obstacle(own, task, chapter, accepted.values())
        if problem is None:
            text = with_own_functions(chapter, {task.function: own})
            problem = check_apart(chapter, task, text, limit)
            # exercises call each other, and each is checked with the course's others
            hidden = [name for name in own.hidden if name not in {other.function for other in found}]
            if problem and hidden:
                problem += f"; {', '.join(hidden)} in it is the course's: call your own by another name"
        if problem is None:
            accepted[task.function] = own
        verdicts.append(Verdict(task, problem) if problem else Verdict(task, own.place, own))
    return verdicts


def first_filled_in(notebooks: list[OwnNotebook], task: Task, chapter: Chapter) -> OwnFunction:
    """The function from the first notebook in which it is filled in, or what the first says of it."""
    choices = [own_function(notebook, task.function, chapter.known) for notebook in notebooks]
    return next((own for own in choices if own.problem is None), choices[0])


def obstacle(own: OwnFunction, task: Task, chapter: Chapter, accepted: Iterable[OwnFunction]) -> str | None:
    """Why a function cannot take the place of the course's, whatever it computes; None if it can."""
    ours, theirs = parameters(chapter.known[task.function].node), parameters(own.definition.node)
    if ours != theirs:
        return f"its parameters are {theirs}, the course's {ours}"
    taken = by_name(statement for other in accepted for statement in other.needs)
    for statement in own.needs:
        for name in sorted(statement.bound):
            if name in chapter.known:
                return f"what it needs also sets {name}, which the course's chapter uses"
            if hasattr(builtins, name):
                return f"it needs your own {name}, which is a name of Python's: call it otherwise"
            if name in taken and not same(taken[name], statement):
                return f"it needs another {name} than an exercise above: call one of the two otherwise"
    return None


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


def check_apart(chapter: Chapter, task: Task, text: str, limit: float) -> str | None:
    """Check a function of a module's text in a process of its own: what is wrong with it, or None."""
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=report_check, args=(chapter.root, chapter.name, task, text, theirs), daemon=True
    )
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(limit) else f"its check has not ended after {limit:g} s"
    except EOFError:
        return "its check has ended the whole process"
    finally:
        process.kill()
        process.join()


def processes() -> multiprocessing.context.BaseContext:
    """How processes are begun: where the system can, by forks of one that has imported torch."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "torch"])
    return context


def report_check(root: Path, module: str, task: Task, text: str, report: Connection) -> None:
    """Send what is wrong with a function of a module's text, or None; the course's own is the reference."""
    os.environ.pop("LECTURE26_MINE", None)
    sys.path.insert(0, str(root))
    silence()
    try:
        report.send(fault(module, task, text))
    except BaseException as error:  # of any kind: sys.exit, too, is the learner's
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        report.send(f"its cells raise {what}")


def silence() -> None:
    """Send all that this process prints nowhere."""
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)


def fault(module: str, task: Task, text: str) -> str | None:
    """What the check finds wrong with a function of a module's text; None if it passes."""
    candidate = types.ModuleType(f"own_{module}")
    sys.modules[candidate.__name__] = candidate  # dataclasses look their module up
    filename = f"<{candidate.__name__}>"
    linecache.cache[filename] = (
        len(text),
        None,
        text.splitlines(keepends=True),
        filename,
    )  # to quote its lines
    exec(compile(text, filename, "exec"), candidate.__dict__)
    from lecture26.checks import check

    result = check(task.name, getattr(candidate, task.function))
    if result:
        return None
    message = getattr(result, "message", "").splitlines()
    mistake = getattr(result, "misconception", None)
    return f"it is wrong: {mistake}" if mistake else " ".join(["it is wrong.", *message[1:2]])


def write_package(root: Path, texts: dict[str, str], ledger: dict[str, str]) -> None:
    """Put a copy of the course's package with these texts of modules into root/build/mine."""
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
    width = max(len(verdict.task.name) for verdict in verdicts)
    rows = []
    for verdict in verdicts:
        whose = "yours" if verdict.own else "the course's"
        beginning = f"{verdict.task.name:{width}}  {whose:12}  "
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
        f"\n{FOLDER.as_posix()}: {own} of {len(verdicts)} functions are yours. "
        + USE.format(folder=FOLDER.as_posix())
    )


if __name__ == "__main__":
    main()
