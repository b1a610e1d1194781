"""The record of solved exercises: one file beside a learner's notebooks, made by `make lab`.

It holds the names of all exercises, chapter by chapter, and of those that were solved. Where there is no such
file, in notebooks/ for instance, nothing is recorded.
"""

import json
import textwrap
from pathlib import Path

from lecture26.kit.files import replace_when_complete

FILE_NAME = "progress.json"
FORMAT = "lecture26.progress 1"
WIDTH = 90  # columns of text, which fit into a cell's output in JupyterLab
NO_RECORD = (
    "No record of solved exercises lies beside this notebook. `make lab` puts copies of the chapters into "
    "work/, and keeps the record there."
)


def lay_out(folder: Path, exercises: dict[str, list[str]]) -> None:
    """Make a folder's record, or bring it up to date: the names of the exercises of each chapter, in a dict.

    What is solved stays solved. A file of this name that is no record is left alone and raises ValueError.
    """
    solved = read(folder)["solved"] if (folder / FILE_NAME).exists() else []
    _write(folder, {"format": FORMAT, "exercises": exercises, "solved": solved})


def read(folder: Path) -> dict:
    """The record of a folder, a dict with "exercises" and "solved".

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is no record.
    """
    path = folder / FILE_NAME
    text = path.read_text(encoding="utf-8")
    try:
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        return {"exercises": dict(record["exercises"]), "solved": list(record["solved"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of solved exercises ({error}): remove or rename it") from error


def note_solved(name: str) -> None:
    """Enter the name of an exercise into the record in the current folder, a notebook's own, if there is one.

    A record that cannot be read or written does not matter here: the table of `print_progress` says so.
    """
    folder = Path.cwd()
    try:
        record = read(folder)
        if name not in record["solved"]:
            _write(folder, {"format": FORMAT, **record, "solved": sorted([*record["solved"], name])})
    except (OSError, ValueError):
        pass


def print_progress() -> None:
    """Print a line for each chapter: how many of its exercises are solved, and which are open."""
    try:
        record = read(Path.cwd())
    except FileNotFoundError:
        print(textwrap.fill(NO_RECORD, WIDTH))
        return
    except ValueError as error:
        print(textwrap.fill(str(error), WIDTH))
        return
    width = max([len("chapter"), *map(len, record["exercises"])]) + 2
    print(f"{'chapter':{width}}{'solved':10}open")
    for chapter, names in record["exercises"].items():
        left = [name.partition(".")[2] for name in names if name not in record["solved"]]
        count = f"{len(names) - len(left)} of {len(names)}"
        head = f"{chapter:{width}}{count:10}"
        print(textwrap.fill(head + ", ".join(left), WIDTH, subsequent_indent=" " * len(head)).rstrip())


def _write(folder: Path, record: dict) -> None:
    with replace_when_complete(folder / FILE_NAME) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
