"""Grade the submissions of an assignment; `make grade ASSIGNMENT=ddpm SUBMISSIONS=folder` calls it."""

import argparse
import os
import sys
from pathlib import Path

from course import CourseError
from homework.assignments import DEFAULT_COHORT, Cohort


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assignment", help="its name, such as ddpm")
    parser.add_argument("submissions", type=Path, help="a folder with a folder or zip file for each student")
    parser.add_argument("--cohort", default=DEFAULT_COHORT)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many submissions run at once")
    parser.add_argument(
        "--unguarded", action="store_true", help="run students' code even if nothing confines it"
    )
    asked = parser.parse_args()
    try:
        cohort = Cohort.of(asked.cohort)
        assignment = cohort.assignment(asked.assignment)
        if not asked.submissions.is_dir():
            raise CourseError(f"SUBMISSIONS must be a folder; got {asked.submissions}")
        cohort.use_course()
        from homework.grading import grade  # not before it is known whose lecture26 it grades with

        grade(cohort, assignment, asked.submissions, asked.jobs, not asked.unguarded)
    except CourseError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: the same command goes on where it was")
    folder = cohort.folder / "grades"
    print(
        f"{folder / assignment.name}.csv has the scores, {folder / assignment.name} a page for each student"
    )


if __name__ == "__main__":
    main()
