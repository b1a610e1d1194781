"""The course as one cohort has it: a copy with the cohort's changes and the instructor's own exercises.

The copy is what homework is built from and graded by, so that a later change of the course moves no score.
"""

import shutil
from pathlib import Path

from course import CourseError, module_name, notebook_sources
from export import export

from .assignments import SETTINGS, Cohort, load_settings

COPIED = ("pyproject.toml", "notebooks", "lecture26")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.ipynb", ".ipynb_checkpoints")


def copy_course(cohort: Cohort, root: Path, private: Path | None = None) -> dict:
    """Make the cohort's course anew; returns the settings that go with it.

    Args:
        cohort: whose folder gets it.
        root: the course's folder.
        private: a folder with an instructor's own exercises: notebooks/NN_name.py and checks/name.py, written
            like the course's, and assignments.toml, which says where they belong.

    Raises:
        CourseError: if a change finds nothing to change, or the private folder is not as it must be.
    """
    settings = load_settings(root)
    shutil.rmtree(cohort.course, ignore_errors=True)
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, cohort.course / name, ignore=LEFT_OUT)
        else:
            cohort.course.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, cohort.course)
    for change in settings.get("cohorts", {}).get(cohort.name, {}).get("changes", []):
        make_change(cohort.course, change)
    if private is not None:
        add_private(cohort.course, private, settings)
    export(cohort.course)
    return settings


def make_change(course: Path, change: dict[str, str]) -> None:
    """Put the text `new` in the place of `old` in the `file` of a change."""
    file = course / change["file"]
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if change["old"] not in text:
        raise CourseError(f"{SETTINGS.as_posix()}: {change['file']} has no {change['old']!r} to change")
    file.write_text(text.replace(change["old"], change["new"]), encoding="utf-8", newline="\n")


def add_private(course: Path, private: Path, settings: dict) -> None:
    """Add an instructor's own chapters to a course, and enter them into the settings."""
    sources = notebook_sources(private) if private.is_dir() else []
    if not sources:
        raise CourseError(f"PRIVATE must be a folder with notebooks/NN_name.py in it; got {private}")
    taken = {module_name(source) for source in notebook_sources(course)}
    for source in sources:
        name, checks = module_name(source), private / "checks" / f"{module_name(source)}.py"
        if name in taken:
            raise CourseError(f"{source}: the course has a chapter {name} already; choose another name")
        if not checks.is_file():
            raise CourseError(f"{source} needs its checks in {checks}")
        shutil.copy(source, course / "notebooks")
        shutil.copy(checks, course / "lecture26" / "checks" / "chapters")
    own = load_settings(private, Path("assignments.toml"))
    for name, table in own.get("assignments", {}).items():
        known = settings["assignments"].setdefault(name, {"chapters": []})
        known["title"] = table.get("title", known.get("title", name))
        known["chapters"] = [*known["chapters"], *table["chapters"]]
    settings["points"].setdefault("of", {}).update(own.get("points", {}).get("of", {}))
    placed = {chapter for table in settings["assignments"].values() for chapter in table["chapters"]}
    lost = [source.stem for source in sources if not {source.stem, module_name(source)} & placed]
    if lost:
        raise CourseError(
            f"{private / 'assignments.toml'} must say to which assignment {', '.join(lost)} belongs"
        )
