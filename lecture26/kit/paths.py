"""Where the course keeps its files."""

import os
from pathlib import Path

import lecture26

OWN_FOLDER = "Let the environment variable LECTURE26_DATA name a folder of your own that can be written to"


def expanded(path: str | os.PathLike) -> Path:
    """A path with ~ replaced by the home folder, and ~NAME by NAME's; FileNotFoundError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"there is no home folder for {os.fspath(path)!r}") from error


def shipped_data_dir() -> Path:
    """The data folder that came with the course, beside the package; perhaps it cannot be written to."""
    # the course's own package even where LECTURE26_MINE says that its modules are taken from elsewhere
    return Path(lecture26.__file__).resolve().parents[1] / "data"


def data_dir() -> Path:
    """The data folder that is written to: the environment variable LECTURE26_DATA, or the shipped one."""
    override = os.environ.get("LECTURE26_DATA")
    return expanded(override) if override else shipped_data_dir()


def data_dirs() -> tuple[Path, ...]:
    """The data folders that are read, the own one first, then the shipped one."""
    return tuple(dict.fromkeys((data_dir(), shipped_data_dir())))


def find(folder: str, *names: str) -> tuple[Path, ...]:
    """Where some files of a data folder lie that belong together.

    Args:
        folder: inside the data folder, such as "checkpoints".
        names: the files' names in it, or folders'.

    Returns:
        Their paths, in the first of `data_dirs` that has them all, else in the own one, as if to be made.
    """
    for place in data_dirs():
        files = tuple(place / folder / name for name in names)
        if all(file.exists() for file in files):
            return files
    return tuple(data_dir() / folder / name for name in names)


def names_in(folder: str, suffix: str) -> set[str]:
    """The names, without suffix, of the files of a `suffix` in a `folder` of any of `data_dirs`."""
    return {file.stem for place in data_dirs() for file in (place / folder).glob(f"*{suffix}")}


def checkpoints_dir() -> Path:
    """The folder of trained weights and their cards."""
    return data_dir() / "checkpoints"


def results_dir() -> Path:
    """The folder of stored long measurements."""
    return data_dir() / "results"


def downloads_dir() -> Path:
    """The folder of downloaded data sets, ignored by git."""
    return data_dir() / "downloads"
