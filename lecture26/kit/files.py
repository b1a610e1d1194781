"""Writing files so that a reader, or a restart, never meets half of one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_when_complete(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, and put it in the place of `path` when the block ends well.

    A process killed at any moment leaves either the old file or the new one, whole. A block that
    raises leaves the old one.

    Args:
        path: the file to write; its folder is made if need be.

    Yields:
        Where to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
