"""How a command was called, as cards and results keep it."""

import shlex

from lecture26.kit.paths import expanded
from lecture26.kit.processes import process_state


def invocation(*words: str) -> str:
    """The command line of a call with these `words`, with as many processes as there are now."""
    count = process_state().num_processes
    start = ["python"] if count == 1 else ["torchrun", "--nproc-per-node", str(count)]
    return shlex.join([*start, "-m", "lecture26", *words])


def options(settings: dict) -> list[str]:
    """The words of a command line that give each of some settings, such as "--batch-size", "64"."""
    return [word for key, value in settings.items() for word in ("--" + key.replace("_", "-"), str(value))]


def data_option(data: str) -> str:
    """The value of --data, where it is a folder below ~ as the folder's own path.

    Raises:
        FileNotFoundError: if there is no such home folder.
    """
    return str(expanded(data)) if data.startswith("~") else data
