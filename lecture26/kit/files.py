"""Writing files so that a reader, or a restart, never meets half of one."""

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lecture26.kit.paths import expanded

# what the system says where one may not write, or there is no room
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replace_when_complete(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, and put it in the place of `path` when the block ends well.

    A process killed at any moment leaves either the old file or the new one, whole. A block that
    raises leaves the old one. What killed processes have left beside `path` is removed.

    Args:
        path: the file to write, ~ being the home folder; its folder is made if need be.

    Yields:
        Where to write.
    """
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        # The bytes must be on the disk before the name points at them.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote `path`."""
    import psutil

    for file in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = file.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            file.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError unless a file can be written there; nothing is left behind."""
    path = expanded(path)
    is_new = not path.exists()
    with open(path, "ab"):
        pass
    if is_new:
        path.unlink()
