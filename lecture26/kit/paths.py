"""Where the course keeps its files."""

import os
from pathlib import Path

OWN_FOLDER = "Let the environment variable LECTURE26_DATA name a folder of your own that can be written to"


def expanded(path: str | os.PathLike) -> Path:
    """A path with ~ replaced by the home folder, and ~NAME by NAME's; FileNotFoundError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no home folder for {os.fspath(path)!r}") from error


def data_dir() -> Path:
    """The data folder: the environment variable LECTURE26_DATA, or `data` beside the package."""
    override = os.environ.get("LECTURE26_DATA")
    return Path(override) if override else Path(__file__).resolve().parents[2] / "data"


def checkpoints_dir() -> Path:
    """The folder of trained weights and their cards."""
    return data_dir() / "checkpoints"


def results_dir() -> Path:
    """The folder of stored long measurements."""
    return data_dir() / "results"


def downloads_dir() -> Path:
    """The folder of downloaded data sets, ignored by git."""
    return data_dir() / "downloads"
