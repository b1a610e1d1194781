"""Writing files so that a reader, or a restart, never meets half of one."""

import errno
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

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


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content`, plain values, into a JSON file at `path`, whole or not at all."""
    with replace_when_complete(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of processes of this machine that were killed while they wrote `path`."""
    import psutil

    for file in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = file.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            file.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise OSError unless a file can be written at `path`; nothing is left behind."""
    path = expanded(path)
    is_new = not path.exists()
    with open(path, "ab"):
        pass
    if is_new:
        path.unlink()


class InUseError(OSError):
    """What a file stands for is in use by another process."""


@contextmanager
def locked(path: str | os.PathLike, told: str) -> Iterator[None]:
    """Hold the lock on `path`, a file of its own that is gone afterwards; a dead process holds none.

    Args:
        path: of the lock.
        told: the error's message if another process holds it.

    Yields:
        Nothing.

    Raises:
        InUseError: if another process holds it.
        OSError: if the file cannot be made.
    """
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if not _take_lock(file, path):
            raise InUseError(told)
        try:
            yield
        finally:
            with suppress(PermissionError):  # Windows deletes no file that is open
                path.unlink(missing_ok=True)


def _take_lock(file: BinaryIO, path: Path) -> bool:
    """Lock an open file without waiting; whether that succeeded. Where a file system has no locks, it did."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return True
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # whoever had it before may have deleted the file between our opening and our locking it
        return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
