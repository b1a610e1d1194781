"""nbgrader as this course uses it: its settings for a cohort, and its programs where it looks for them."""

import os
import sys
from pathlib import Path

from traitlets.config import Config

from .assignments import Cohort

TO_FILL_IN = "raise NotImplementedError  # your code instead of this line"
TO_ANSWER = "*Your answer, in the place of this line.*"
CONFIG_FILE = '''\
"""nbgrader's settings for this cohort, made by `make homework`."""

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "{cohort}"
c.ClearSolutions.code_stub = {{"python": "{code}"}}
c.ClearSolutions.text_stub = "{text}"
'''


def settings(cohort: Cohort) -> Config:
    """What nbgrader's Python classes are given."""
    # nbgrader starts `alembic`, which lies beside the Python of a virtual environment that need not be active
    programs = str(Path(sys.executable).parent)
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, [programs, os.environ.get("PATH")]))
    config = Config()
    config.CourseDirectory.root = str(cohort.folder)
    config.CourseDirectory.course_id = cohort.name
    config.ClearSolutions.code_stub = {"python": TO_FILL_IN}
    config.ClearSolutions.text_stub = TO_ANSWER
    return config


def write_settings(cohort: Cohort) -> None:
    """Write the same into the cohort's folder, for nbgrader's commands and formgrader."""
    text = CONFIG_FILE.format(cohort=cohort.name, code=TO_FILL_IN, text=TO_ANSWER)
    (cohort.folder / "nbgrader_config.py").write_text(text, encoding="utf-8")
