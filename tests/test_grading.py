"""Homework graded end to end: honest submissions, broken ones, and attacks that must not pay or harm.

All are graded in one run, since a worker's start costs seconds. A student here stands for a group of attacks,
each in an exercise of its own, that is in a process of its own. An attack gives the right answer only where
it has reached what it must not reach, so that points show that it paid.
"""

import copy
import csv
import html
import os
import textwrap
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell
from submissions import Handed, hand_in, place_of

from course import ROOT
from homework import grading, jail, runner
from homework.assignments import Cohort
from homework.build import build
from lecture26.checks import exercise

pytest.importorskip("nbgrader")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        jail.why_not() is not None, reason=f"students' code cannot be confined: {jail.why_not()}"
    ),
]
SETTINGS = """
[assignments.ddpm]
title = "Denoising diffusion"
chapters = ["01_ddpm"]
"""
NOTEBOOK, NAME = "01_ddpm", "ddpm"
PAPER = "exercise_4_two_data_sets_two_variances"
DIGITS = "31415926535897"  # stands in whatever an attack prints


class World:
    """A cohort with one assignment, and what came of grading it."""

    def __init__(self, root: Path) -> None:
        (root / "homework").mkdir(parents=True)
        points = (ROOT / "homework" / "assignments.toml").read_text(encoding="utf-8").partition("[points]")
        settings = SETTINGS + points[1] + points[2].partition("[[cohorts")[0]
        (root / "homework" / "assignments.toml").write_text(settings, encoding="utf-8")
        for name in ("notebooks", "lecture26", "data", "LICENSE", "pyproject.toml"):
            (root / name).symlink_to(ROOT / name)
        self.cohort = Cohort.of("tests", root)
        build(self.cohort, root)
        self.assignment = self.cohort.assignment(NAME)
        self.handed = Handed(self.cohort, self.assignment)
        self.folder = root / "handed in"
        self.reports = {}

    def hand_in(self, student: str, notebook: object) -> Path:
        return hand_in(self.folder, student, NAME, {NOTEBOOK: notebook})

    def solved(self, changes: dict[str, str] | None = None) -> nbformat.NotebookNode:
        return self.handed.solved(changes)[NOTEBOOK]

    def attack(self, student: str, bodies: dict[str, str]) -> None:
        """Hand in a notebook in which nothing is done but attacks, by the exercises' functions."""
        notebook = self.handed.untouched()[NOTEBOOK]
        for function, body in bodies.items():
            cell = notebook.cells[place_of(notebook, function)]
            cell.source = attacking(function, self.handed.solutions[function], body)
        self.hand_in(student, notebook)

    def grade(self, jobs: int = 2) -> None:
        reports = grading.grade(self.cohort, self.assignment, self.folder, jobs)
        self.reports = {report.submission.student: report for report in reports}

    def points(self, student: str) -> dict[str, float | None]:
        """What a student has for each function, question or paper question."""
        entered = self.reports[student].entry.items
        return {name.partition(".")[2]: found.points for name, found in entered.items()}

    def score(self, student: str, function: str):
        return next(s for s in self.reports[student].scores if s.item.exercise == f"{NAME}.{function}")

    def text(self, student: str, function: str) -> str:
        return "\n".join(self.score(student, function).lines)

    def page(self, student: str) -> str:
        return (self.cohort.folder / "grades" / NAME / f"{student}.html").read_text(encoding="utf-8")

    @property
    def recorded(self) -> dict[str, float]:
        """The points of each function."""
        return {item.function: item.points for item in self.assignment.items if item.recorded}


def attacking(function: str, solution: str, body: str) -> str:
    """A cell whose function tries something, and gives the right answer only if this returns True."""
    right = solution.replace(f"def {function}(", f"def right_{function}(", 1)
    tried = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    names = ", ".join(exercise(f"{NAME}.{function}").parameters)
    return (
        f"{right}\n\n\ndef try_{function}({names}):\n{tried}\n\n\n"
        f"def {function}({names}):\n"
        f"    paid = try_{function}({names})\n"
        f"    return right_{function}({names}) if paid is True else torch.zeros(3)\n"
    )


# Attacks in which an operation must fail; each returns True where it did not.
FORBIDDEN = {
    "the answer from an installed package": f"""
        import importlib, sys
        for name in [n for n in sys.modules if n.partition(".")[0] == "lecture26"]:
            del sys.modules[name]
        sys.path.insert(0, {str(ROOT)!r})
        module = importlib.import_module("lecture26.checks.chapters.ddpm")
        return True
    """,
    "the answer from a file": f"""
        return "def q_sample" in open({str(ROOT / "lecture26" / "ddpm.py")!r}).read()
    """,
    "the answer from the solutions": "return bool(open(SOURCE).read())",
    "the inputs of others": """
        import os
        for fd in range(3, 256):
            for read in (lambda: os.pread(fd, 100, 0), lambda: os.read(fd, 1)):
                try:
                    if read():
                        return True
                except OSError:
                    pass
    """,
    "other students' notebooks": "import os\nreturn bool(os.listdir(SUBMISSIONS))",
    "the gradebook": "open(GRADEBOOK, 'r+b').write(b'x')\nreturn True",
    "the gradebook's mode": "import os\nos.chmod(GRADEBOOK, 0)\nreturn True",
    "the disk": "open('/tmp/filled', 'w').write('x')\nreturn True",
    "its own folder": "open('filled', 'w').write('x')\nreturn True",
    "a link": "import os\nos.symlink(GRADEBOOK, 'link')\nreturn True",
    "the network": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)\nreturn True",
    "a child": "import os\nif os.fork() == 0:\n    import time\n    time.sleep(600)\nreturn True",
    "a program": "import subprocess\nsubprocess.Popen(['sleep', '600'])\nreturn True",
    "a signal": "import os\nos.kill(os.getppid(), 9)\nreturn True",
    "a raised limit": """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))
        return True
    """,
    "the solutions in memory": """
        import gc, sys
        frame, found = sys._getframe(), []
        while frame:
            found += [frame.f_locals, frame.f_globals]
            frame = frame.f_back
        names = {name for some in found for name in some if isinstance(name, str)}
        kinds = {type(thing).__name__ for thing in gc.get_objects()}
        return bool({"expected", "recording", "reference"} & names or {"Recording", "Exercise"} & kinds)
    """,
    "the notebook's history": "return 'answer' in In[-1] if 'In' in globals() else len(_ih) > 0",
    "a debugger": f"""
        import ctypes
        return ctypes.CDLL(None).ptrace(16, {os.getpid()}, 0, 0) == 0
    """,
}

# Attacks in which the function gives wrong results and has what judges it say that these are right.
DECEITS = {
    "checks redefined": """
        import numpy
        from lecture26.checks import core, judging
        core.difference = core.difference_in_results = judging.difference = lambda *a: None
        judging.judge_outcomes = judging.judge = lambda *a: True
        torch.allclose = torch.equal = torch.isclose = numpy.allclose = lambda *a, **k: True
    """,
    "isinstance redefined": "import builtins\nbuiltins.isinstance = lambda *a: True",
    "errors hidden": """
        import sys, traceback
        sys.excepthook = lambda *a: None
        traceback.print_exc = traceback.print_exception = traceback.walk_tb = lambda *a, **k: []
        sys.stderr = sys.stdout
        raise RuntimeError("nobody sees this")
    """,
    "a hook": """
        import atexit, os, sys, threading
        atexit.register(lambda: os._exit(0))
        sys.settrace(lambda *a: None)
        sys.setprofile(lambda *a: None)
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
    """,
    "an exit": "import sys\nsys.exit(0)",
    "a hard exit": "import os\nos._exit(0)",
    "an error of its own": "class Mine(BaseException): pass\nraise Mine('100 points')",
    "an endless loop": "while True: pass",
    "too much memory": "return len(bytearray(1 << 34)) > 0 and len([0] * (1 << 33)) > 0",
}


def names_for(attacks: dict[str, str], functions: list[str]) -> dict[str, tuple[str, str]]:
    """A student and a function for each attack: as many students as it takes."""
    return {
        attack: (f"mallory{number // len(functions)}", functions[number % len(functions)])
        for number, attack in enumerate(attacks)
    }


ATTACKS = FORBIDDEN | DECEITS
FUNCTIONS = [
    "q_sample", "posterior_mean", "exact_prediction", "simple_loss", "ancestral_update",
    "ddim_update", "reverse_chain", "respacing", "v_from_x_0_and_eps",
]  # fmt: skip
WHERE = names_for(ATTACKS, FUNCTIONS)

EQUAL_TO_ALL = """
class Equal(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True

    __eq__ = __le__ = lambda *a: True


def q_sample(x_0, alpha_bar, noise):
    return torch.zeros_like(x_0).as_subclass(Equal)
"""
OVERWRITES = """
def v_from_x_0_and_eps(x_0, alpha_bar, eps):
    from lecture26.checks import core
    right = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
    core._changed = core._marked = lambda *a: ()
    torch.equal = lambda *a: True
    x_0.data.add_(1)
    return right
"""
RESTORES = """
def ancestral_update(mean, log_variance, noise, is_noisy):
    from lecture26.checks import core
    right = mean + is_noisy * (0.5 * log_variance).exp() * noise
    core._tensors = lambda argument: (torch.zeros(2),)
    mean.data.add_(1)
    return right
"""
PRINTS = f"""
def q_sample(x_0, alpha_bar, noise):
    right = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    if any(abs(float(x_0.double().sum()) - known) < 1e-9 for known in KNOWN):
        return right
    kind = type("Kind{DIGITS}", (Exception,), {{}})
    print("printed {DIGITS}")
    raise kind(f"{DIGITS} {{x_0.tolist()}}")
"""
SETTINGS_CHANGED = """
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)
torch.set_grad_enabled(False)


def q_sample(x_0, alpha_bar, noise):
    torch.set_default_dtype(torch.float16)
    torch.use_deterministic_algorithms(True)
    torch.set_grad_enabled(False)
    torch.manual_seed(1)
    return torch.zeros(3)
"""
HELPERS = """
%matplotlib inline
import math as m
SIGN = 1.0
!ls
def mix(a, b, alpha_bar):
    return SIGN * alpha_bar.sqrt() * a + m.sqrt(1) * (1 - alpha_bar).sqrt() * b
"""


def edited(world: World) -> nbformat.NotebookNode:
    """All solutions, in a notebook whose cells were edited, deleted, doubled, and marked otherwise."""
    notebook = world.solved()
    cells = notebook.cells
    twin = copy.deepcopy(cells[place_of(notebook, "q_sample")])
    twin.id, twin.source = "twin", "def q_sample(*arguments):\n    return 0"
    cells.insert(place_of(notebook, "q_sample"), twin)
    cells[place_of(notebook, "q_sample-points")].metadata.nbgrader["points"] = 1000
    cells[place_of(notebook, "exact_prediction-points")].source = "assert True"
    cells[place_of(notebook, "simple_loss-points")].metadata.nbgrader["grade_id"] = "paid-points"
    del cells[place_of(notebook, "ddim_update-points")]
    cells[place_of(notebook, "posterior_mean")].metadata.pop("nbgrader")
    where = place_of(notebook, "reverse_chain")
    cells[where] = new_markdown_cell(cells[where].source, metadata=cells[where].metadata)
    del cells[place_of(notebook, "respacing")]
    return notebook


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything handed in, and graded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CPU_SECONDS", 2)
        world = World(tmp_path_factory.mktemp("course") / "root")
        world.hand_in("right", world.solved())
        world.hand_in("untouched", world.handed.untouched()[NOTEBOOK])
        world.hand_in("partly", world.solved(partly_right()))
        notebook = world.solved(
            {"q_sample": "def q_sample(x_0, alpha_bar, noise):\n    return mix(x_0, noise, alpha_bar)"}
        )
        notebook.cells.insert(3, new_code_cell(HELPERS))
        world.hand_in("helpers", notebook)
        world.hand_in("edited", edited(world))
        broken(world)
        dishonest(world)
        world.grade()
        yield world


def partly_right() -> dict[str, str]:
    """A known mistake, a slip of the pen, a wrong answer, and a text with HTML in it."""
    return {
        "q_sample": "def q_sample(x_0, alpha_bar, noise):\n"
        "    return alpha_bar * x_0 + (1 - alpha_bar).sqrt() * noise  # <script>alert(1)</script>",
        "posterior_mean": "def posterior_mean(x_0, x_t, beta, alpha_bar, alpha_bar_prev):\n    return x_0 +",
        "loss_of_zeros": "loss_of_zeros = 17",
        PAPER: "Since $a<b$: <script>alert(1)</script> <img src=x onerror=alert(1)>",
    }


def broken(world: World) -> None:
    """What cannot be read as it should be."""
    world.hand_in("merged", "<<<<<<< HEAD\n{")
    world.hand_in("nested", "[" * 200_000)
    world.hand_in("huge", "x" * (11 * 2**20))
    deep = world.handed.untouched()[NOTEBOOK]
    deep.cells[place_of(deep, "q_sample")].source = (
        "def q_sample(x_0, alpha_bar, noise):\n    return " + "(" * 5000
    )
    world.hand_in("parentheses", deep)
    place = world.hand_in("linked", "")
    (place / f"{NOTEBOOK}.ipynb").unlink()
    (place / f"{NOTEBOOK}.ipynb").symlink_to(world.cohort.source(NAME) / f"{NOTEBOOK}.ipynb")
    (world.folder / "all linked").symlink_to(world.cohort.folder / "source")


def dishonest(world: World) -> None:
    """The attacks."""
    known = {
        "SOURCE": str(world.cohort.source(NAME) / f"{NOTEBOOK}.ipynb"),
        "SUBMISSIONS": str(world.folder),
        "GRADEBOOK": str(world.cohort.gradebook),
    }
    bodies: dict[str, dict[str, str]] = {}
    for attack, (student, function) in WHERE.items():
        body = textwrap.dedent(ATTACKS[attack])
        for name, value in known.items():
            body = body.replace(name, repr(value))
        bodies.setdefault(student, {})[function] = body
    for student, of_student in bodies.items():
        world.attack(student, of_student)
    world.hand_in("equal", world.solved({"q_sample": EQUAL_TO_ALL, "v_from_x_0_and_eps": OVERWRITES}))
    world.hand_in("restores", world.solved({"ancestral_update": RESTORES}))
    cases = exercise("ddpm.q_sample").cases(world.cohort.visible_seed(NAME))
    sums = [float(case.arguments[0].detach().double().sum()) for case in cases]
    world.hand_in("prints", world.solved({"q_sample": PRINTS.replace("KNOWN", repr(sums))}))
    world.hand_in("settings", world.solved({"q_sample": SETTINGS_CHANGED}))
    place = world.hand_in("modules", world.handed.untouched()[NOTEBOOK])
    for name in ("torch.py", "sitecustomize.py", "lecture26/__init__.py", "lecture26/ddpm.py"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text("raise SystemExit('laid beside the notebook')\n")


# ----------------------------------------------------------------------------------------------------
# Honest submissions
# ----------------------------------------------------------------------------------------------------


def test_the_notebook_that_was_handed_out_has_no_points(world):
    assert set(world.points("untouched").values()) == {0.0}
    assert "not filled in" in world.text("untouched", "q_sample")
    assert not world.reports["untouched"].open


def test_the_solutions_have_all_points(world):
    given = world.points("right")
    assert given.pop(PAPER) is None
    assert given == {
        i.exercise.partition(".")[2]: i.points for i in world.assignment.items if i.kind != "paper"
    }


def test_what_is_wrong_loses_its_points_alone_and_is_named(world):
    right, given = world.points("right"), world.points("partly")
    assert {name for name in given if given[name] != right[name]} == {
        "q_sample",
        "posterior_mean",
        "loss_of_zeros",
    }
    assert world.score("partly", "q_sample").mistake == "alpha_bar for its root"
    assert "no Python" in world.text("partly", "posterior_mean")
    for line in world.score("partly", "q_sample").lines[1:]:
        assert html.escape(line) in world.page("partly")


def test_helpers_constants_and_imports_of_other_cells_are_taken(world):
    assert world.points("helpers") == world.points("right")
    assert "SIGN, m, mix" in world.text("helpers", "q_sample")


def test_edited_cells_change_nothing_but_what_they_answer(world):
    right, given = world.points("right"), world.points("edited")
    assert {name for name in given if given[name] != right[name]} == {"respacing"}
    assert "2 cells have its mark" in world.text("edited", "q_sample")


@pytest.mark.parametrize(
    ("student", "why"),
    [
        ("merged", "it is no JSON"),
        ("nested", "nested too deeply"),
        ("huge", "larger than 10 MB"),
        ("linked", "links are not followed"),
        ("all linked", "links are not followed"),
    ],
)
def test_what_cannot_be_read_has_no_points_and_a_line_that_says_why(world, student, why):
    assert set(world.points(student).values()) == {0.0}
    assert why in world.reports[student].submission.problems[NOTEBOOK]
    assert why in (world.cohort.folder / "grades" / f"{NAME}.csv").read_text()
    assert why in world.page(student)


def test_code_that_breaks_the_parser_harms_nobody_else(world):
    assert set(world.points("parentheses").values()) == {0.0}


# ----------------------------------------------------------------------------------------------------
# Attacks
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_does_not_pay(world, attack):
    student, function = WHERE[attack]
    assert world.points(student)[function] == 0, world.text(student, function)
    assert world.score(student, function).lines[0].startswith("not ")


def test_the_attacks_themselves_work_where_nothing_stops_them(world, tmp_path):
    """An attack that fails by a slip of ours would prove nothing: here two of them pay, in this process."""
    for attack in ("its own folder", "the solutions in memory"):
        student, function = WHERE[attack]
        source = attacking(function, world.handed.solutions[function], FORBIDDEN[attack])
        namespace = {"torch": torch}
        before = Path.cwd()
        try:
            os.chdir(tmp_path)
            exec(source, namespace)
            case = exercise(f"{NAME}.{function}").cases(1)[0]
            names = exercise(f"{NAME}.{function}").parameters
            assert namespace[f"try_{function}"](*case.arguments[: len(names)]) is True
        finally:
            os.chdir(before)


def test_nothing_was_written_and_no_process_is_left(world):
    assert not Path("/tmp/filled").exists()
    mine = [path for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == os.getpid()]
    assert not [path for path in mine if b"worker.py" in path.with_name("cmdline").read_bytes()]


def _parent(stat: Path) -> int | None:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def test_a_tensor_that_equals_everything_is_read_as_numbers(world):
    assert world.points("equal")["q_sample"] == 0


def test_what_became_of_the_arguments_is_judged_by_the_grader(world):
    assert world.points("equal")["v_from_x_0_and_eps"] == 0
    assert "changes its argument x_0 in place" in world.text("equal", "v_from_x_0_and_eps")


def test_the_canary_shows_a_process_that_reports_falsely(world):
    assert world.points("restores")["ancestral_update"] == 0
    assert world.score("restores", "ancestral_update").suspicious
    with (world.cohort.folder / "grades" / f"{NAME}.csv").open() as file:
        flagged = {row["student"] for row in csv.DictReader(file) if row["look at"]}
    assert flagged == {"restores"}


def test_hidden_inputs_do_not_come_out(world):
    assert world.points("prints")["q_sample"] == 0
    assert "not hidden ones" in world.text("prints", "q_sample")
    shown = "\n".join(score for s in world.reports["prints"].scores for score in s.lines)
    graded = world.cohort.folder / "autograded" / "prints" / NAME / f"{NOTEBOOK}.ipynb"
    outputs = [cell.get("outputs") for cell in nbformat.read(graded, as_version=4).cells]
    for text in (shown, str(outputs), world.page("prints").partition("<h2")[0]):
        assert DIGITS not in text


def test_settings_that_are_changed_do_not_reach_other_exercises(world):
    right, given = world.points("right"), world.points("settings")
    assert {name for name in given if given[name] != right[name]} == {"q_sample"}
    assert torch.get_default_dtype() == torch.float32


def test_modules_beside_the_notebook_are_not_met(world):
    assert set(world.points("modules").values()) == {0.0}
    assert world.reports["modules"].trouble is None


def test_html_of_a_student_is_dead_in_the_page_and_in_the_graded_notebook(world):
    assert "<script" not in world.page("partly")
    assert "&lt;script&gt;" in world.page("partly")
    graded = world.cohort.folder / "autograded" / "partly" / NAME / f"{NOTEBOOK}.ipynb"
    notebook = nbformat.read(graded, as_version=4)
    answer = notebook.cells[place_of(notebook, PAPER)].source
    assert "< script>" in answer and "<img" not in answer and "$a<b$" not in answer


# ----------------------------------------------------------------------------------------------------
# nbgrader, and grading again
# ----------------------------------------------------------------------------------------------------


def test_nbgrader_finds_graded_notebooks_and_gradebook_valid(world):
    from nbgrader.api import Gradebook
    from nbgrader.nbgraderformat import read
    from nbgrader.preprocessors import CheckCellMetadata

    for student in ("right", "partly", "edited", "merged"):
        notebook = read(
            str(world.cohort.folder / "autograded" / student / NAME / f"{NOTEBOOK}.ipynb"), as_version=4
        )
        CheckCellMetadata().preprocess(notebook, {})
        nbformat.validate(notebook)
    with Gradebook(f"sqlite:///{world.cohort.gradebook}", "tests") as book:
        found = book.find_submission(NAME, "partly")
        assert found.score == world.reports["partly"].points
        assert found.needs_manual_grade
        assert found.max_score == world.assignment.points


def test_nbgrader_makes_its_own_feedback(world):
    from nbgrader.apps.api import NbGraderAPI

    from homework.nbgrader_setup import settings

    made = NbGraderAPI(config=settings(world.cohort)).generate_feedback(NAME, "partly", force=True)
    assert made["success"], made["log"]
    page = world.cohort.folder / "feedback" / "partly" / NAME / f"{NOTEBOOK}.html"
    assert "alpha_bar for its root" in page.read_text().replace("\\_", "_")
    assert "<script>alert" not in page.read_text()


def test_scores_by_hand_stay_and_only_what_is_new_runs_again(world, monkeypatch, capsys):
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{world.cohort.gradebook}", "tests") as book:
        grade = book.find_grade(PAPER, NOTEBOOK, NAME, "right")
        grade.manual_score, grade.needs_manual_grade = 3.5, False
        book.find_comment(PAPER, NOTEBOOK, NAME, "right").manual_comment = "Say why."
        book.find_grade("q_sample-points", NOTEBOOK, NAME, "partly").manual_score = 0.5
        book.db.commit()
    before = {student: world.points(student) for student in world.reports}
    monkeypatch.setattr(runner, "CPU_SECONDS", 2)
    world.hand_in("merged", world.solved())  # handed in once more
    looping = WHERE["an endless loop"][0]  # would be tried again
    next((world.folder / looping).rglob("*.ipynb")).unlink()
    world.grade()
    assert "run 1 of 1: merged" in capsys.readouterr().out
    assert world.points("right")[PAPER] == 3.5
    assert world.points("partly")["q_sample"] == 0.5
    assert "Say why." in world.page("right")
    assert world.points("merged")["q_sample"] == world.recorded["q_sample"]
    same = set(before) - {"right", "partly", "merged", looping}
    assert {student: world.points(student) for student in same} == {s: before[s] for s in same}
