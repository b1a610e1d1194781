"""Run a command of the course, and count how often each function of a chapter was called in it.

    python -m lecture26.kit.calls FILE COMMAND [OPTION ...]

Python's own profiler watches, and nothing in the package is changed. FILE gets the counts as JSON, also where
the command fails; the exit status is the command's.
"""

import cProfile
import json
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

import lecture26


def main() -> None:
    """Run the words behind FILE as `python -m lecture26` would."""
    file, *words = sys.argv[1:]
    sys.argv[1:] = words
    profile = cProfile.Profile(builtins=False)
    profile.enable()
    try:
        runpy.run_module("lecture26", run_name="__main__", alter_sys=True)
    finally:
        profile.disable()
        Path(file).write_text(json.dumps(counts(profile.getstats())), encoding="utf-8")


def counts(entries: Iterable) -> dict[str, int]:
    """The calls of the functions at the top level of the chapters' modules, such as {"ddpm.q_sample": 3}.

    entries: what `cProfile.Profile.getstats` returns.
    """
    modules = Path(lecture26.__path__[0])
    found = {}
    for entry in entries:
        if isinstance(entry.code, str):  # a function that is not written in Python
            continue
        file, name = Path(entry.code.co_filename), entry.code.co_qualname
        if file.parent == modules and name.isidentifier():
            found[f"{file.stem}.{name}"] = entry.callcount
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
