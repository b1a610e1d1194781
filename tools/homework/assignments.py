"""What is graded, and where an instructor keeps it.

All of a cohort lies in one folder, homework_out/COHORT/ in the course's, which git ignores:

    assignments.json        what was handed out: the assignments with their items
    course/                 the course as this cohort has it (its variant, the instructor's own exercises):
                            notebooks/ and lecture26/, references and hidden tests among them
    source/NAME/            nbgrader's source: a notebook for each chapter, solutions in it
    release/NAME/           what is handed out; hand_out/NAME.zip is the same folder packed
    instructor/NAME/        never handed out: answers.json (of questions), rubric.md (of paper questions)
    secrets/NAME.seed       the secret seed of the hidden tests, mode 0600, made once and never again
    gradebook.db, nbgrader_config.py, submitted/, autograded/, feedback/   nbgrader's

An item is known by the tags of its cells (`exercise`, `question`), and a question on paper by the line under
its heading. So exercises that are added to a chapter join by themselves.
"""

import dataclasses
import hashlib
import json
import os
import re
import secrets
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

from course import ROOT, Cell, CourseError, module_name, notebook_sources, read_cells

SETTINGS = Path("homework") / "assignments.toml"
OUT = "homework_out"
DEFAULT_COHORT = "default"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
KINDS = ("formula", "algorithm", "question", "paper")
DIFFICULTIES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Item:
    """Something that earns points.

    exercise: its name, such as "ddpm.q_posterior"; that of a paper question is made of its heading.
    function: the function to write, or the variable that a question sets; "" for a paper question.
    points: at most; 0 for one that is not graded.
    grade_id: nbgrader's, of the cell that carries the points; `solution_id` is that of the student's cell.
    kind: one of KINDS; a formula or an algorithm is checked by recordings.
    notebook: the notebook it stands in, such as "01_ddpm".
    title: of its heading, such as "Exercise 1: any step at once".
    """

    exercise: str
    function: str
    points: float
    grade_id: str
    kind: str
    notebook: str
    title: str

    @property
    def solution_id(self) -> str:
        """The grade_id of the cell in which the student writes."""
        return self.grade_id.removesuffix("-points")

    @property
    def recorded(self) -> bool:
        """Whether it is a function, which is checked by recordings."""
        return self.kind in ("formula", "algorithm")


@dataclass(frozen=True)
class Assignment:
    """What is handed out together.

    name: such as "ddpm"; title: in words.
    chapters: modules, such as "unet", of its notebooks, in order.
    notebooks: the same as notebooks, such as "02_unet".
    items: in the order of the notebooks.
    """

    name: str
    title: str
    chapters: tuple[str, ...]
    notebooks: tuple[str, ...]
    items: tuple[Item, ...]

    @property
    def points(self) -> float:
        """All points together."""
        return sum(item.points for item in self.items)


@dataclass(frozen=True)
class Cohort:
    """A course that is held once, by its name, and the files of its homework."""

    name: str
    folder: Path

    @classmethod
    def of(cls, name: str = DEFAULT_COHORT, root: Path = ROOT) -> "Cohort":
        """The cohort of a name in the course at `root`; CourseError for a name that no folder should have."""
        if not NAME.fullmatch(name):
            raise CourseError(f"COHORT must be made of letters, digits, - and _; got {name!r}")
        return cls(name, root / OUT / name)

    @property
    def course(self) -> Path:
        """The course as this cohort has it: its folder lecture26 holds references and hidden tests."""
        return self.folder / "course"

    @property
    def gradebook(self) -> Path:
        """nbgrader's database."""
        return self.folder / "gradebook.db"

    def source(self, assignment: str) -> Path:
        """nbgrader's folder of an assignment with its solutions."""
        return self.folder / "source" / assignment

    def release(self, assignment: str) -> Path:
        """The folder that is handed out."""
        return self.folder / "release" / assignment

    def hand_out(self, assignment: str) -> Path:
        """The same, as one file."""
        return self.folder / "hand_out" / f"{assignment}.zip"

    def instructor(self, assignment: str) -> Path:
        """What is never handed out: answers and rubrics."""
        return self.folder / "instructor" / assignment

    def visible_seed(self, assignment: str) -> int:
        """The seed of the checks that are handed out. It is no secret: a cohort's name makes it."""
        return int.from_bytes(hashlib.sha256(f"{self.name}/{assignment}".encode()).digest()[:4], "big")

    def secret_seed(self, assignment: str) -> int:
        """The seed of the hidden tests: made when first asked for, and the same ever after."""
        file = self.folder / "secrets" / f"{assignment}.seed"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # created complete and readable by nobody else; where two do so at once, one of them wins
            own = file.with_suffix(f".{os.getpid()}")
            with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(f"{secrets.randbits(62)}\n")
            try:
                os.link(own, file)
            except FileExistsError:
                pass
            own.unlink()
        return int(file.read_text())

    def answers(self, assignment: str) -> dict[str, dict]:
        """Of each question, by its name: "right", its answer, and "within", how far off a number may be."""
        return json.loads((self.instructor(assignment) / "answers.json").read_text(encoding="utf-8"))

    def assignments(self) -> dict[str, Assignment]:
        """What was handed out, by name; CourseError if nothing was."""
        file = self.folder / "assignments.json"
        if not file.exists():
            raise CourseError(
                f"cohort {self.name!r} has no homework yet: run `make homework COHORT={self.name}`"
            )
        found = [_assignment(plain) for plain in json.loads(file.read_text(encoding="utf-8"))]
        return {assignment.name: assignment for assignment in found}

    def assignment(self, name: str) -> Assignment:
        """One of them; CourseError for a name that none has."""
        found = self.assignments()
        if name not in found:
            raise CourseError(f"ASSIGNMENT must be one of {', '.join(found)}; got {name!r}")
        return found[name]

    def use_course(self) -> None:
        """Take lecture26 from this cohort's course in what follows.

        Raises RuntimeError where lecture26 has been imported from elsewhere already.
        """
        sys.path.insert(0, str(self.course))
        loaded = sys.modules.get("lecture26")
        if loaded is not None and self.course not in Path(loaded.__file__).parents:
            raise RuntimeError(f"lecture26 has been imported already, from {loaded.__file__}")


def _assignment(plain: dict) -> Assignment:
    items = tuple(Item(**item) for item in plain["items"])
    return Assignment(
        plain["name"], plain["title"], tuple(plain["chapters"]), tuple(plain["notebooks"]), items
    )


def write_assignments(cohort: Cohort, found: list[Assignment]) -> None:
    """Keep what was handed out."""
    text = json.dumps([dataclasses.asdict(assignment) for assignment in found], indent=1)
    (cohort.folder / "assignments.json").write_text(text + "\n", encoding="utf-8")


def load_settings(root: Path = ROOT, file: Path = SETTINGS) -> dict:
    """The instructor's settings; CourseError where there is no such file, or it is no TOML."""
    try:
        return tomllib.loads((root / file).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CourseError(f"{root / file}: {error}") from error


# --- Items, from the notebooks' tags ---

HEADING = re.compile(r"^(?:#### |\*\*)((?:Exercise|Question) \d+)(?:: (.+)|\.\*\*)", re.MULTILINE)
KIND = re.compile(
    r"^\*(formula|algorithm|question on paper|question|on paper)\b(?:, (easy|medium|hard))?",
    re.MULTILINE | re.IGNORECASE,
)
CHECK = re.compile(r"\bcheck(?:_answer)?\(\s*[\"']([^\"']+)[\"'],\s*(\w+)")
RUBRIC_LINE = re.compile(r"^- .*: (\d+(?:\.\d+)?) points?\.?$", re.MULTILINE)


@dataclass(frozen=True)
class Announcement:
    """What the Markdown above an exercise says of it."""

    title: str = ""
    kind: str = "formula"
    difficulty: str = "medium"


def announced(text: str) -> Announcement | None:
    """What a Markdown text says of the last exercise that it announces; None if it announces none."""
    headings = list(HEADING.finditer(text))
    if not headings:
        return None
    heading = headings[-1]
    title = f"{heading[1]}: {heading[2]}" if heading[2] else heading[1]
    line = KIND.search(text, heading.end())
    if line is None:
        return Announcement(title)
    kind = "paper" if "paper" in line[1].lower() else line[1].lower()
    return Announcement(title, kind, line[2] or "medium")


def items_of(source: Path, points: dict) -> list[Item]:
    """The items of a notebook's source, in order.

    Args:
        source: notebooks/NN_name.py.
        points: the settings' table of points.
    """
    chapter, found, said = module_name(source), [], Announcement()
    cells = read_cells(source)
    for cell, check in zip(cells, [*cells[1:], None], strict=True):
        if cell.kind == "markdown":
            said = announced(cell.source) or said
            if is_paper_question(cell):
                name = f"{chapter}.{slug(said.title)}"
                worth = points["of"].get(name, rubric_points(cells, cell) or points["paper"][said.difficulty])
                found.append(Item(name, "", worth, slug(said.title), "paper", source.stem, said.title))
        elif "exercise" in cell.tags or "question" in cell.tags:
            call = CHECK.search(check.source) if check else None
            if call is None:
                raise cell.error(1, "the cell right after an exercise calls its check")
            kind = "question" if "question" in cell.tags else said.kind
            worth = points["of"].get(call[1], points[kind][said.difficulty])
            grade_id = f"{call[1].partition('.')[2]}-points"
            found.append(Item(call[1], call[2], worth, grade_id, kind, source.stem, said.title))
            said = Announcement()
    return found


def is_paper_question(cell: Cell) -> bool:
    """Whether a Markdown cell asks a question that is answered on paper."""
    said = announced(cell.source) if cell.kind == "markdown" else None
    return said is not None and said.kind == "paper"


def rubric_points(cells: list[Cell], question: Cell) -> float:
    """How many points the answer of a paper question lists; 0 if it lists none."""
    return sum(float(found[1]) for found in RUBRIC_LINE.finditer(folded_answer(cells, question)))


def folded_answer(cells: list[Cell], question: Cell) -> str:
    """The folded answer of a paper question: in its own cell, or in a later one before the next exercise."""
    for cell in cells[question.number - 1 :]:
        if cell is not question and cell.kind == "markdown" and announced(cell.source):
            break
        answer = re.search(r"<details>\n(.*?)</details>", cell.source, re.DOTALL)
        if cell.kind == "markdown" and answer:
            return re.sub(r"<summary>.*?</summary>\n*", "", answer[1]).strip()
    raise question.error(1, "a question on paper has its answer in <details> below it")


def slug(title: str) -> str:
    """A title as a name: "Exercise 4: two data sets" gives "exercise_4_two_data_sets"."""
    return re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_")


def assignments_of(course: Path, settings: dict) -> list[Assignment]:
    """The assignments of a course as its settings divide it.

    Args:
        course: a folder with notebooks/.
        settings: as `load_settings` gives them.

    Raises:
        CourseError: for a chapter that there is not, or points for an exercise that no assignment has.
    """
    points = settings["points"] | {"of": settings["points"].get("of", {})}
    found = []
    for name, table in settings["assignments"].items():
        sources = [notebook_sources(course, [chapter])[0] for chapter in table["chapters"]]
        items = tuple(item for source in sources for item in items_of(source, points))
        found.append(
            Assignment(
                name,
                table.get("title", name),
                tuple(map(module_name, sources)),
                tuple(source.stem for source in sources),
                items,
            )
        )
    known = {item.exercise for assignment in found for item in assignment.items}
    unknown = points["of"].keys() - known
    if unknown:
        raise CourseError(
            f"{SETTINGS.as_posix()} gives points to {', '.join(sorted(unknown))}, which no assignment has"
        )
    return found
