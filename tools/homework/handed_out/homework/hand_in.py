"""Say what of the notebooks will be read and what the visible checks say, and pack the file to be uploaded.

    python hand_in.py

Nothing is executed but the functions that are handed in, with what they need, in a process of its own; a
check is given up after a minute. The notebooks are not changed.
"""

import ast
import json
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Timer

from .own_code import OwnNotebook
from .reading import FOLDER, assignment, code, notebook, solution

TIME_LIMIT = 60.0  # seconds for one check, of which most take less than one
WIDTH = 100


@dataclass(frozen=True)
class Found:
    """What stands in a notebook for an item: where, and what there is to say of it before any check.

    text: the Python to be checked; None where there is nothing to check.
    """

    item: dict
    where: str
    said: str
    text: str | None = None


def main() -> None:
    """The student's dry run."""
    if sys.argv[1:] == ["--check"]:
        check_all()
        return
    names = list(dict.fromkeys(item["notebook"] for item in assignment()["items"]))
    notebooks = {name: notebook(name) for name in names}
    problems = [found.problem for found in notebooks.values() if found.problem]
    if problems:
        sys.exit(
            "\n".join([*problems, "Nothing was packed: every notebook must lie here under its own name."])
        )
    print(f"{assignment()['title']}: what is read, and what the visible checks say\n")
    right = report([find(item, notebooks[item["notebook"]]) for item in assignment()["items"]])
    checked = [item for item in assignment()["items"] if item["kind"] in ("formula", "algorithm")]
    print(
        f"\n{right} of {len(checked)} functions pass the visible checks. The grading tries the same on other "
        "numbers,\nsizes and schedules. What is not saved in an open notebook is not read."
    )
    packed = FOLDER / f"{assignment()['name']}_hand_in.zip"
    pack(packed, names)
    print(
        f"\nPacked: {packed.name}, with {' and '.join(f'{name}.ipynb' for name in names)}. Upload this file."
    )


def find(item: dict, found: OwnNotebook) -> Found:
    """What stands in a notebook for an item."""
    if item["kind"] == "paper":
        return find_text(item)
    if item["kind"] == "question":
        return find_answer(item, found)
    own = solution(item, found)
    if own.problem:
        return Found(item, "", own.problem)
    return Found(item, own.place.partition(", ")[2], "", code(own))


def find_answer(item: dict, found: OwnNotebook) -> Found:
    """The answer to a question: the last value that its name is given."""
    setting = [(cell, s) for cell in found.cells for s in cell.statements if item["function"] in s.bound]
    setting = [(cell, s) for cell, s in setting if isinstance(s.node, ast.Assign)]
    if not setting:
        return Found(item, "", f"no cell sets {item['function']}")
    cell, statement = setting[-1]
    value = ast.unparse(statement.node.value)
    said = "it is not answered" if value == "..." else f"your answer: {value}"
    return Found(item, f"cell {cell.number}", said)


def find_text(item: dict) -> Found:
    """The answer to a question on paper: the text of its cell."""
    cells = json.loads((FOLDER / f"{item['notebook']}.ipynb").read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells, start=1):
        if cell["metadata"].get("nbgrader", {}).get("grade_id") == item["grade_id"]:
            text = "".join(cell["source"]).strip()
            words = 0 if text == assignment()["to_answer"] else len(text.split())
            return Found(
                item, f"cell {number}", f"your answer: {words} words" if words else "it is not answered"
            )
    return Found(item, "", "its cell has been deleted: answer in a fresh copy of the notebook")


def report(found: list[Found]) -> int:
    """Print a line or more for each item; returns how many functions pass."""
    right, verdicts = 0, checked([one for one in found if one.text is not None])
    width = max(len(one.item["exercise"]) for one in found)
    for one in found:
        passed, said = next(verdicts) if one.text is not None else (False, one.said)
        right += passed
        points = f"{one.item['points']:g} p."
        beginning = f"{one.item['exercise']:{width}}  {points:>6}  "
        first, *rest = f"{one.where + ': ' if one.where else ''}{said}".splitlines()
        for line in (beginning + first, *(f"{' ' * len(beginning)}{line}" for line in rest)):
            print(textwrap.fill(line, WIDTH, subsequent_indent=" " * (len(beginning) + 2)), flush=True)
    return right


def checked(found: list[Found]) -> Iterator[tuple[bool, str]]:
    """What the visible check says of each function: whether it passes, and a text."""
    todo = [(one.item["exercise"], one.text) for one in found]
    while todo:
        command = [sys.executable, str(FOLDER / "hand_in.py"), "--check"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            jobs = json.dumps(todo)
            process.stdin.write(jobs)
            process.stdin.close()
            while todo:
                watch = Timer(TIME_LIMIT, process.kill)
                watch.start()
                line = process.stdout.readline()
                watch.cancel()
                todo.pop(0)
                if not line:
                    yield False, f"its check has ended the process, or has not ended after {TIME_LIMIT:g} s."
                    break
                yield tuple(json.loads(line))
            process.kill()


def check_all() -> None:
    """Check the functions that standard input lists, and write a line on each to standard output."""
    import os

    from lecture26.checks.judging import judge
    from lecture26.checks.recording import Recording

    from .own import built
    from .reading import item as item_of

    todo = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # what functions print
    for exercise, text in todo:
        try:
            function = built(item_of(exercise), text)
            result = judge(Recording.load(FOLDER / "checks" / f"{exercise}.safetensors"), function)
            verdict = bool(result), result.message
        except BaseException as error:  # of any kind, since sys.exit in a cell is the student's, too
            verdict = False, f"its cells raise {type(error).__name__}: {error}".partition("\n")[0]
        out.write(json.dumps(verdict) + "\n")
        out.flush()


def pack(file, names: list[str]) -> None:
    """Put the notebooks of these names into an archive."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(FOLDER / f"{name}.ipynb", f"{name}.ipynb")
