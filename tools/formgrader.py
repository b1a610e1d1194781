"""Open nbgrader's formgrader on a cohort's gradebook, in the browser; `make formgrader` calls it.

What is handed in is read and scored there by hand, beside the scores that are there already.
"""

import argparse
import os
import sys

from course import CourseError
from homework.assignments import DEFAULT_COHORT, Cohort


def main() -> None:
    parser = argparse.ArgumentParser(description="Open nbgrader's formgrader on a cohort's gradebook.")
    parser.add_argument("--cohort", default=DEFAULT_COHORT, help="its name (default: %(default)s)")
    try:
        cohort = Cohort.of(parser.parse_args().cohort)
        cohort.assignments()  # says so where there are none
    except CourseError as error:
        sys.exit(str(error))
    os.chdir(cohort.folder)  # where nbgrader finds its settings
    command = [sys.executable, "-m", "jupyterlab"]
    command += ["--ServerApp.root_dir=.", "--LabApp.default_url=/formgrader"]
    command += ["--ServerApp.jpserver_extensions={'nbgrader.server_extensions.formgrader': True}"]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
