"""Stored measurements: data/results/NAME.json, each with the command and the machine that made it."""

import json
from pathlib import Path

from lecture26.kit.checkpoints import describe_machine, describe_versions
from lecture26.kit.files import write_json
from lecture26.kit.paths import find, names_in, results_dir


def results_file(name: str) -> Path:
    """Where the measurement of that name lies: the own one, the course's, or where it would be made."""
    return find("results", f"{name}.json")[0]


def save_results(name: str, command: str, results: dict) -> dict:
    """Write a measurement, in the place of an older one of that name.

    Args:
        name: the measurement's name.
        command: the command line that makes it.
        results: plain values (JSON).

    Returns:
        What was written: `results` with "name", "command", "machine" and "versions".
    """
    content = {
        "name": name,
        "command": command,
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    content |= results
    write_json(results_dir() / f"{name}.json", content)
    return content


def load_results(name: str) -> dict:
    """A stored measurement, see `save_results`.

    Raises:
        ValueError: if there is none of that name, or its file is damaged.
    """
    file = results_file(name)
    how_to_mend = (
        f"If it is one of the course's, fetch it again with `git checkout -- {file}`. Measurements are made "
        f"anew by `python -m lecture26 measure {name} --replace`, benchmarks by the programs in benchmarks/."
    )
    if not file.is_file():
        known = ", ".join(sorted(names_in("results", ".json"))) or "none"
        raise ValueError(
            f"there are no results {name!r}: {file} is missing (present: {known}). {how_to_mend}"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). {how_to_mend}") from error
