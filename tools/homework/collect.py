"""Submissions from a folder: one folder or zip file for each student, in nbgrader's layout or any other.

No link is followed, only plain files of a limited size are read, and nothing is unpacked onto the disk.
"""

import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .assignments import Assignment

MAX_NOTEBOOK = 10 * 2**20  # bytes
MAX_FILES = 2000  # looked at for a student
STUDENT = re.compile(r"[\w@+-][\w @.,+-]*")
IGNORED = {"__MACOSX", ".ipynb_checkpoints", "__pycache__"}


@dataclass(frozen=True)
class Submission:
    """What a student has handed in.

    notebooks: the bytes of each notebook of the assignment, by its name.
    problems: why one of them is not there, by its name.
    timestamp: of nbgrader's timestamp.txt, as it stands there; None without one.
    """

    student: str
    notebooks: dict[str, bytes] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    timestamp: str | None = None


@dataclass(frozen=True)
class Entry:
    """A file: its path below the student's folder, its size, and a function that reads it."""

    path: str
    size: int
    read: Callable[[], bytes]


def students_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """The students who have handed something in, and where it lies, in the order of their names."""
    for path in sorted(folder.iterdir()):
        name = path.stem if path.suffix == ".zip" else path.name
        if not path.name.startswith(".") and path.name not in IGNORED:
            yield name, path


def submission(student: str, place: Path, assignment: Assignment) -> Submission:
    """What a student has handed in; whatever is wrong with it is said in `problems`."""

    def nothing(why: str) -> Submission:
        return Submission(student, problems={name: why for name in assignment.notebooks})

    if not STUDENT.fullmatch(student):
        return nothing("the name of its folder is no name of a student")
    if place.is_symlink():
        return nothing("it is a link, and links are not followed")
    try:
        entries = list(_entries(place))
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        return nothing(f"it cannot be read ({type(error).__name__})")
    notebooks, problems = {}, {}
    for name in assignment.notebooks:
        try:
            notebooks[name] = _read(_one_called(name, entries), MAX_NOTEBOOK)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            problems[name] = str(error) or type(error).__name__
    return Submission(student, notebooks, problems, _timestamp(entries))


def _entries(place: Path) -> Iterator[Entry]:
    """The files of a student, those in zip files included."""
    if place.is_file():
        yield from _in_zip(place)
        return
    todo, seen = [place], 0
    while todo:
        for found in sorted(os.scandir(todo.pop()), key=lambda found: found.name):
            seen += 1
            if seen > MAX_FILES:
                raise OSError("too many files")
            path = Path(found.path)
            if found.name in IGNORED:
                continue
            if found.is_dir(follow_symlinks=False):
                todo.append(path)
            elif found.name.endswith(".zip") and found.is_file(follow_symlinks=False):
                yield from _in_zip(path)
            else:
                size = found.stat(follow_symlinks=False).st_size
                yield Entry(str(path.relative_to(place)), size, lambda path=path: _read_plain(path))


def _in_zip(path: Path) -> Iterator[Entry]:
    if path.stat().st_size > 20 * MAX_NOTEBOOK:
        raise OSError("the zip file is too large")
    archive = zipfile.ZipFile(path)
    for info in archive.infolist()[:MAX_FILES]:
        if not info.is_dir() and IGNORED.isdisjoint(info.filename.split("/")):
            yield Entry(info.filename, info.file_size, lambda info=info: _unpacked(archive, info))


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a file in a zip file, whatever size it claims to have."""
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ValueError("it is a link, and links are not followed")
    with archive.open(info) as file:
        return file.read(MAX_NOTEBOOK + 1)


def _read_plain(path: Path) -> bytes:
    """The bytes of a plain file. Raises ValueError for a link, a pipe or a device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise ValueError("it is a link, and links are not followed") from None
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no plain file")
        return file.read(MAX_NOTEBOOK + 1)


def _one_called(name: str, entries: list[Entry]) -> Entry:
    """The file of a notebook: of its name, or the only one whose name begins like it."""
    notebooks = [entry for entry in entries if entry.path.endswith(".ipynb")]
    exact = [entry for entry in notebooks if Path(entry.path).name == f"{name}.ipynb"]
    alike = [entry for entry in notebooks if Path(entry.path).name.startswith(name)]
    found = exact or alike
    if not found:
        others = ", ".join(sorted(Path(entry.path).name for entry in notebooks)[:5])
        raise ValueError(f"there is no {name}.ipynb" + (f" among {others}" if others else ""))
    if len(found) > 1:
        raise ValueError(f"there are several: {', '.join(sorted(entry.path for entry in found)[:5])}")
    return found[0]


def _read(entry: Entry, most: int) -> bytes:
    content = entry.read() if entry.size <= most else b""
    if max(entry.size, len(content)) > most:
        raise ValueError(f"{Path(entry.path).name} is larger than {most // 2**20} MB")
    return content


def _timestamp(entries: list[Entry]) -> str | None:
    for entry in entries:
        if Path(entry.path).name == "timestamp.txt" and entry.size < 100:
            try:
                return entry.read().decode().strip()
            except (ValueError, OSError):
                return None
    return None
