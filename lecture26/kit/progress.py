"""Bars for what takes a while; how the wait is shown is no lecture content."""

import sys
from collections.abc import Iterable
from typing import TextIO

from tqdm import tqdm


def bar_stream() -> TextIO:
    """Where bars are drawn: on stderr, but in a notebook, which shows that in red even when it is empty."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return sys.stdout if shell is not None and hasattr(shell, "kernel") else sys.stderr


def progress_bar(steps: Iterable, label: str) -> tqdm:
    """The `steps`, under a bar with a `label` that comes after two seconds and goes at the end.

    The environment variable TQDM_DISABLE hides it.
    """
    return tqdm(steps, label, delay=2, leave=False, file=bar_stream())
