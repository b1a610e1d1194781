"""What `make mine` has built of a learner's solutions, for cells that show own code at work."""

import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import lecture26

LEDGER = "own_functions.json"  # in the learner's package: whose each exercise's function is
NOT_BUILT = (
    "This ran on the finished course. To run it on functions of your own, save your notebooks and call "
    "`make mine` in a terminal: it builds a package with those that you have solved."
)
OUT_OF_DATE = "Since that package was built you have changed notebooks in work/: `make mine` builds it anew."
PICTURE_WIDTH = 480  # pixels, at least: the images of small models are enlarged
TEXT_WIDTH = 110  # columns


def course_dir() -> Path:
    """The course's folder, in which work/ and build/ are."""
    return Path(lecture26.__file__).resolve().parents[1]


def own_package_dir() -> Path:
    """The folder in which `make mine` builds the learner's package, whether or not it is there."""
    return course_dir() / "build" / "mine"


def read_ledger(package: Path) -> dict:
    """What `make mine` has written down of the package in a folder.

    Returns:
        "own": for each exercise, such as "ddpm.q_sample", whose function is the learner's, where it comes
        from; "course": for each of the others, why it is the course's; "work": the `work_digest` of what it
        was built from. Empty if nothing has been built.
    """
    ledger = package / "lecture26" / LEDGER
    return json.loads(ledger.read_text(encoding="utf-8")) if ledger.exists() else {}


def own_functions() -> list[str]:
    """The exercises, such as "ddpm.q_sample", whose functions in that package are the learner's."""
    return list(read_ledger(own_package_dir()).get("own", {}))


def run_on_own_package(*words: str) -> str:
    """Run a command of the course on the learner's package, or on the course's where there is none.

    It runs in a process of its own, whatever this one has imported.

    Args:
        words: the command and its options, such as "sample", "--count", "9", "--out", "own.png".

    Returns:
        Which of the learner's functions were called in it, as a sentence or two.

    Raises:
        RuntimeError: if the command fails; it says what the command said.
    """
    package = own_package_dir()
    ledger = read_ledger(package)
    if not ledger.get("own"):
        calls_of(words, None)
        return NOT_BUILT
    told = " ".join(whose(ledger, calls_of(words, package)))
    is_old = ledger["work"] != work_digest(course_dir() / "work")
    return f"{told} {OUT_OF_DATE}" if is_old else told


def calls_of(words: Iterable[str], package: Path | None, limit: float | None = None) -> dict[str, int]:
    """Run a command of the course in a process of its own, and count the calls of the chapters' functions.

    Args:
        words: the command and its options.
        package: a folder in which `make mine` has built a package; None runs the course's own.
        limit: seconds after which it is given up; None waits.

    Returns:
        How often each function was called, such as {"ddpm.q_sample": 3}.

    Raises:
        RuntimeError: if the command fails or is given up; it says what the command said.
    """
    called = " ".join(["lecture26", *words])
    environment = {
        **os.environ,
        "LECTURE26_MINE": "" if package is None else str(package),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(course_dir()), os.environ.get("PYTHONPATH")])),
    }
    with TemporaryDirectory() as folder:
        counts = Path(folder) / "calls.json"
        command = [sys.executable, "-m", "lecture26.kit.calls", str(counts), *words]
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"`{called}` has not ended after {limit:g} s") from None
        if run.returncode != 0:
            raise RuntimeError(f"`{called}` failed: {run.stderr.strip()}")
        return json.loads(counts.read_text(encoding="utf-8"))


def whose(ledger: Mapping, calls: Mapping[str, int]) -> list[str]:
    """Whose functions a command has called, in words.

    Args:
        ledger: as `read_ledger` gives it.
        calls: as `calls_of` gives them.

    Returns:
        A sentence on the learner's functions, and one on the course's if any were called for an exercise.
    """
    if not ledger.get("own"):
        return [NOT_BUILT]
    own = [f"{name} ({times(calls[name])})" for name in ledger["own"] if name in calls]
    others = [name for name in ledger["course"] if name in calls]
    told = [
        f"Functions of yours ran in it: {', '.join(own)}." if own else "None of your functions ran in it."
    ]
    return told + [f"The course's ran for these exercises: {', '.join(others)}."] if others else told


def times(count: int) -> str:
    """A `count` of calls in words."""
    return "once" if count == 1 else f"{count:,} times"


def work_digest(work: Path) -> str:
    """A text that changes with the code in the notebooks of a folder `work`, and not with their outputs."""
    digest = hashlib.sha256()
    for file in sorted(work.glob("*.ipynb")):
        content = file.read_bytes()
        try:
            cells = json.loads(content)["cells"]
            content = json.dumps([c["source"] for c in cells if c["cell_type"] == "code"]).encode()
        except (ValueError, KeyError, TypeError):
            pass  # no notebook: its bytes stand for it
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def show_milestone(command: str, alt: str) -> None:
    """Draw a picture with the learner's package, show it in a notebook, and print whose functions ran.

    Args:
        command: of the command line, one that draws, with its options but for `--out`; such as
            "sample --model ddpm_shapes32 --count 16".
        alt: what is seen in the picture, for readers who do not see it.

    Raises:
        RuntimeError: if the command fails; it says what the command said.
    """
    from IPython.display import Image, display

    with TemporaryDirectory() as folder:
        file = Path(folder) / "milestone.png"
        told = run_on_own_package(*shlex.split(command), "--out", str(file))
        display(Image(enlarged(file), alt=alt))
    print(textwrap.fill(told, TEXT_WIDTH))


def enlarged(file: Path) -> bytes:
    """A picture file as PNG, whose pixels are squares of so many that it is at least PICTURE_WIDTH wide."""
    from PIL import Image

    with Image.open(file) as picture:
        factor = -(-PICTURE_WIDTH // picture.width)
        large = picture.convert("RGB").resize(
            (factor * picture.width, factor * picture.height), Image.Resampling.NEAREST
        )
    stored = io.BytesIO()
    large.save(stored, "png", optimize=True)
    return stored.getvalue()
