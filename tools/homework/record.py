"""Record the checks of a cohort's assignments: the visible ones, which are handed out.

    python tools/homework/record.py COHORT_FOLDER

It runs in a process of its own, in which lecture26 is the cohort's. `build` starts it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the import of this package and of course.py

from homework.assignments import Cohort


def main() -> None:
    folder = Path(sys.argv[1])
    cohort = Cohort(folder.name, folder)
    cohort.use_course()
    from lecture26 import checks  # the cohort's

    for assignment in cohort.assignments().values():
        place = cohort.source(assignment.name) / "checks"
        place.mkdir(parents=True)
        for item in assignment.items:
            if item.recorded:
                file = place / f"{item.exercise}.safetensors"
                checks.record(item.exercise, cohort.visible_seed(assignment.name)).save(file)
                file.chmod(0o644)  # safetensors writes for the owner alone


if __name__ == "__main__":
    main()
