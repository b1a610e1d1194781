"""Conditional diffusion and efficient model adaptation: derived, proved and built from scratch in PyTorch.

One module per chapter, made from the chapter's notebook. Import what you need:
`from lecture26.ddpm import Diffusion`.

Where the environment variable LECTURE26_MINE names a folder, such as `build/mine` in the course's, all
modules come from the package that `make mine` has built there, in which functions are the learner's own.
"""

import os


def _modules_folder() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    mine = os.environ.get("LECTURE26_MINE")
    if not mine:
        return here
    folder = os.path.join(os.path.dirname(here), mine, "lecture26")
    if not os.path.isdir(folder):
        raise ImportError(
            f"LECTURE26_MINE is {mine!r}, but there is no {folder}: run `make mine` to build it"
        )
    return folder


__path__ = [_modules_folder()]
