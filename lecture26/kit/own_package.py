"""What `make mine` has built of a learner's solutions, for cells that show own code at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lecture26

NOT_BUILT = (
    "This ran on the finished course: `make mine` builds a package with the functions that you have solved."
)


def own_package_dir() -> Path:
    """The folder in which `make mine` builds the learner's package, whether or not it is there."""
    return Path(lecture26.__file__).resolve().parents[1] / "build" / "mine"


def own_functions() -> list[str]:
    """The exercises, such as "ddpm.q_sample", whose functions in that package are the learner's."""
    ledger = own_package_dir() / "lecture26" / "own_functions.json"
    return list(json.loads(ledger.read_text(encoding="utf-8"))) if ledger.exists() else []


def run_on_own_package(*words: str) -> str:
    """Run a command of the course on the learner's package, or on the course's where there is none.

    It runs in a process of its own, whatever this one has imported.

    Args:
        words: the command and its options, such as "sample", "--count", "9", "--out", "own.png".

    Returns:
        Which functions in it are the learner's, as a sentence.

    Raises:
        RuntimeError: if the command fails; it says what the command said.
    """
    own = own_functions()
    environment = {**os.environ, "LECTURE26_MINE": str(own_package_dir()) if own else ""}
    command = [sys.executable, "-m", "lecture26", *words]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"`{' '.join(['lecture26', *words])}` failed: {run.stderr.strip()}")
    return f"This ran on functions of yours: {', '.join(own)}." if own else NOT_BUILT
