"""Build the graded assignments of a cohort from the chapters; `make homework` calls it.

What is handed out, and where the rest lies, says tools/homework/assignments.py; what an instructor may change
stands in homework/assignments.toml.
"""

import argparse
import sys
from pathlib import Path

from course import ROOT, CourseError
from homework.assignments import DEFAULT_COHORT, Cohort
from homework.build import build


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the graded assignments of a cohort.")
    parser.add_argument("--cohort", default=DEFAULT_COHORT, help="its name (default: %(default)s)")
    parser.add_argument("--private", type=Path, metavar="FOLDER", help="exercises of your own")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    arguments = parser.parse_args()
    try:
        print(
            "\n".join(build(Cohort.of(arguments.cohort, arguments.root), arguments.root, arguments.private))
        )
    except CourseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
