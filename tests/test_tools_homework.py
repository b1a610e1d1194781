"""Graded homework: what is handed out holds no answers, fails untouched, passes solved, and joins by tags."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile

import nbformat
import pytest

from course import ROOT, CourseError
from homework.assignments import Cohort, assignments_of, load_settings
from homework.build import build
from homework.leaks import SHORTEST, Secret, Secrets, leaks, squeezed
from homework.package import Modules

PRIVATE = ROOT / "homework" / "private_example"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def cohorts(tmp_path_factory):
    """Two cohorts, built once: one as the course is, one with changes and an instructor's own exercises."""
    root = tmp_path_factory.mktemp("instructor")
    plain, example = (Cohort.of(name, root) for name in ("plain", "example"))
    build(plain, ROOT)
    build(example, ROOT, PRIVATE)
    return plain, example


@pytest.fixture
def hand_out(cohorts, tmp_path):
    """Unpacks an assignment's file in a fresh folder, as a student does."""

    def unpack(name, cohort=cohorts[0]):
        with zipfile.ZipFile(cohort.hand_out(name)) as archive:
            archive.extractall(tmp_path)
        return tmp_path / name

    return unpack


def run(folder, *arguments, **options):
    """Run Python in a folder, without a path to the course's checkout."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LECTURE26_MINE")}
    programs = os.path.dirname(sys.executable)
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, **options)


def read(file):
    return nbformat.read(file, as_version=4)


def cell_of(notebook, grade_id):
    """The cell of a notebook with this grade_id."""
    return next(c for c in notebook.cells if c.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def solve(folder, cohort, assignment, functions=None):
    """Put the reference solutions, or those of some functions, into the notebooks of an assignment."""
    for name in cohort.assignment(assignment).notebooks:
        mine, right = read(folder / f"{name}.ipynb"), read(cohort.source(assignment) / f"{name}.ipynb")
        for cell in mine.cells:
            marks = cell.metadata.get("nbgrader", {})
            if marks.get("solution") and (functions is None or marks["grade_id"] in functions):
                cell.source = cell_of(right, marks["grade_id"]).source
        nbformat.write(mine, folder / f"{name}.ipynb")


def only_what_is_checked(file):
    """Cut a notebook down to imports, exported cells, exercises and checks, which run in seconds."""
    notebook = read(file)
    kept = []
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "nbgrader" in cell.metadata or "export" in tags or "lecture26.homework" in cell.source:
            kept.append(cell)
    notebook.cells = kept
    nbformat.write(notebook, file)


# --- What is graded ---


def test_every_exercise_and_question_is_an_item():
    """By its tag, from whichever chapter: a new one joins by itself."""
    items = [item for found in assignments_of(ROOT, load_settings()) for item in found.items]
    tagged = {"exercise": 0, "question": 0}
    for source in (ROOT / "notebooks").glob("0[1-9]_*.py"):
        for line in source.read_text().splitlines():
            for tag in tagged:
                tagged[tag] += line.startswith("# %%") and f'"{tag}"' in line
    assert sum(item.recorded for item in items) == tagged["exercise"] > 50
    assert sum(item.kind == "question" for item in items) == tagged["question"] >= 3
    assert all(item.points > 0 for item in items)
    assert len({(item.notebook, item.grade_id) for item in items}) == len(items)


def test_points_of_single_exercises():
    settings = load_settings()
    settings["points"]["of"] = {"ddpm.q_sample": 0, "unet.self_attention": 7.5}
    points = {i.exercise: i.points for found in assignments_of(ROOT, settings) for i in found.items}
    assert points["ddpm.q_sample"] == 0 and points["unet.self_attention"] == 7.5
    settings["points"]["of"] = {"ddpm.q_smaple": 1}
    with pytest.raises(CourseError, match="ddpm.q_smaple, which no assignment has"):
        assignments_of(ROOT, settings)


def test_secret_seed_is_made_once_for_its_owner_alone(tmp_path):
    cohort = Cohort.of("autumn", tmp_path)
    seeds = {name: cohort.secret_seed(name) for name in ("ddpm", "guidance")}
    assert seeds == {name: cohort.secret_seed(name) for name in seeds}
    assert len(set(seeds.values())) == 2
    file = cohort.folder / "secrets" / "ddpm.seed"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(CourseError, match="letters, digits"):
        Cohort.of("../other", tmp_path)


# --- What is handed out ---


def test_nothing_is_given_away(cohorts):
    """Answers, wrong answers, seeds: in no notebook, metadata, recording, package or archive."""
    for cohort in cohorts:
        secrets = Secrets(cohort.course)
        for name, assignment in cohort.assignments().items():
            hidden = secrets.of(assignment)
            assert len(hidden) > 20
            hidden.append(Secret(str(cohort.secret_seed(name)), "the seed"))
            assert not leaks(cohort.release(name), hidden)
            with zipfile.ZipFile(cohort.hand_out(name)) as archive:
                assert not [
                    n for n in archive.namelist() if re.search("seed|chapters|mistakes|pyc|answers", n)
                ]


PLACES = {
    "text.md": lambda code: f"so it is\n{code}",
    "module.py": lambda code: f'def f():\n    """Say it.\n\n    {code}\n    """\n',
    "again.py": lambda code: f"def f():\n    return ({code.replace(' ', '  ')})  # as it is\n",
    "notebook.ipynb": lambda code: json.dumps({"cells": [], "metadata": {"note": code}}),
    "output.ipynb": lambda code: json.dumps({"cells": [{"outputs": [{"text": [code[:20], code[20:]]}]}]}),
}


@pytest.mark.parametrize("place", PLACES)
def test_search_finds_what_is_hidden(cohorts, tmp_path, place):
    (tmp_path / place).write_text(PLACES[place]("alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise"))
    secrets = Secrets(cohorts[0].course).of(cohorts[0].assignment("ddpm"))
    (found,) = {leak.partition(":")[0] for leak in leaks(tmp_path, secrets)}
    assert found == f"{place} holds an answer in notebooks/01_ddpm.py, cell 23" or "01_ddpm.py" in found


def test_search_refuses_compiled_files_and_opens_archives(tmp_path):
    (tmp_path / "a.pyc").write_bytes(b"\0")
    secret = "x" * SHORTEST
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("c.txt", secret)
    found = leaks(tmp_path, [Secret(squeezed(secret), "a word")])
    assert [leak.split()[0] for leak in found] == ["a.pyc", "b.zip"]


def test_package_holds_what_comes_before_and_no_more(cohorts):
    cohort = cohorts[0]
    every = {"ddpm", "unet", "vae", "classifier_guidance", "clip_guidance", "classifier_free_guidance"}
    every |= {"latent_diffusion", "visual_prompt_tuning"}
    there = {
        name: {f.stem for f in (cohort.release(name) / "lecture26").glob("*.py")} & every
        for name in cohort.assignments()
    }
    assert there["ddpm"] == {"ddpm", "unet"}
    assert there["guidance"] == every - {"vae", "latent_diffusion", "visual_prompt_tuning"}
    assert there["latent_diffusion"] == every - {"visual_prompt_tuning"}
    finished = (cohort.release("guidance") / "lecture26" / "ddpm.py").read_text()
    assert finished == (cohort.course / "lecture26" / "ddpm.py").read_text()
    own = (cohort.release("ddpm") / "lecture26" / "ddpm.py").read_text()
    assert 'return own("ddpm.q_sample")(x_0, alpha_bar, noise)' in own
    modules = Modules(cohort.course, cohort.assignment("ddpm"))
    assert not modules.may_go("lecture26.recipes.vae") and not modules.may_go("lecture26.checks.mistakes")


def test_few_cells_are_left_out(cohorts):
    """A cell is left out only if what it imports cannot go along; a note stands in its place."""
    for name, assignment in cohorts[0].assignments().items():
        for notebook in assignment.notebooks:
            cells = read(cohorts[0].release(name) / f"{notebook}.ipynb").cells
            notes = [cell.source for cell in cells if cell.source.startswith("> *Left out here")]
            assert len(notes) <= 1, notes


def test_answers_on_paper_and_of_questions_stay_with_the_instructor(cohorts):
    cohort = cohorts[0]
    notebook = read(cohort.release("ddpm") / "01_ddpm.ipynb")
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "<summary>Answer" not in text and "1 point." not in text
    paper = next(item for item in cohort.assignment("ddpm").items if item.kind == "paper")
    assert cell_of(notebook, paper.grade_id).source == "*Your answer, in the place of this line.*"
    assert ": 1 point." in (cohort.instructor("ddpm") / "rubrics.md").read_text()
    assert (
        cell_of(notebook, "signal_kept").source == "signal_kept = ...  # your answer in the place of the dots"
    )
    assert cohort.answers("ddpm")["ddpm.signal_kept"] == {"right": 0.37, "within": 0.05}


# --- What nbgrader says ---


@pytest.mark.parametrize("solved", [False, True])
def test_nbgrader_validates_solutions_and_nothing_else(cohorts, hand_out, solved):
    folder = hand_out("ddpm")
    if solved:
        solve(folder, cohorts[0], "ddpm")
    only_what_is_checked(folder / "01_ddpm.ipynb")
    said = run(folder, "-m", "nbgrader", "validate", "01_ddpm.ipynb").stdout
    items = [item for item in cohorts[0].assignment("ddpm").items if item.notebook == "01_ddpm"]
    if solved:
        assert "Success! Your notebook passes all the tests." in said
    else:
        failed = int(re.search(r"VALIDATION FAILED ON (\d+)", said)[1])
        assert failed == len(items)  # the answer on paper, too, is missing
        assert "ddpm.q_sample: not filled in yet." in said


# --- What a student does ---


def test_hand_in_reports_and_packs(cohorts, hand_out):
    """With a right function, one that needs a helper, a wrong one, an endless one, and the rest open."""
    folder = hand_out("ddpm")
    solve(folder, cohorts[0], "ddpm", {"q_sample", "signal_kept"})
    file = folder / "01_ddpm.ipynb"
    notebook = read(file)
    helper = nbformat.v4.new_code_cell("def noise_part(kept, noise):\n    return (1 - kept).sqrt() * noise")
    notebook.cells.insert(3, helper)
    cell = cell_of(notebook, "q_sample")
    cell.source = cell.source.replace("(1 - alpha_bar).sqrt() * noise", "noise_part(alpha_bar, noise)")
    cell = cell_of(notebook, "posterior_mean")
    cell.source = cell.source.replace("raise NotImplementedError", "return x_0")
    cell = cell_of(notebook, "ancestral_update")
    cell.source = cell.source.replace("raise NotImplementedError", "import os; os._exit(0)")
    nbformat.write(notebook, file)
    outcome = run(folder, "hand_in.py")
    assert outcome.returncode == 0, outcome.stderr
    lines = {
        line.split()[0]: line for line in outcome.stdout.splitlines() if line.startswith(("ddpm.", "unet."))
    }
    assert "with noise_part" in lines["ddpm.q_sample"] and "passed" in lines["ddpm.q_sample"]
    assert "not right yet" in lines["ddpm.posterior_mean"]
    assert "has ended the process" in lines["ddpm.ancestral_update"]
    assert "it is not filled in" in lines["unet.attention"]
    assert "your answer: 0.37" in lines["ddpm.signal_kept"]
    assert "1 of 17 functions pass" in outcome.stdout
    with zipfile.ZipFile(folder / "ddpm_hand_in.zip") as archive:
        assert archive.namelist() == ["01_ddpm.ipynb", "02_unet.ipynb"]


def test_make_hand_in_and_missing_notebook(hand_out):
    folder = hand_out("prompt_tuning")
    (folder / "08_visual_prompt_tuning.ipynb").rename(folder / "mine.ipynb")
    outcome = run(folder, "hand_in.py")
    assert outcome.returncode == 1 and "every notebook must lie here under its own name" in outcome.stderr
    if shutil.which("make"):
        made = subprocess.run(
            ["make", "hand-in", f"PYTHON={sys.executable}"], cwd=folder, capture_output=True, text=True
        )
        assert made.returncode and "every notebook must lie here" in made.stderr


def test_package_runs_on_the_students_functions(cohorts, hand_out):
    """Chapter 02's part of the package takes chapter 01's functions from the notebook, as it was saved."""
    folder = hand_out("ddpm")
    code = """
import torch
from lecture26.ddpm import Diffusion, linear_betas
diffusion = Diffusion(linear_betas(50))
x = torch.ones(2, 3)
print(diffusion.q_sample(x, torch.tensor([0, 49]), x).shape)
"""
    open_yet = run(folder, "-c", code)
    assert (
        "this needs q_sample (Exercise 1: any step at once, in 01_ddpm), which is not solved"
        in open_yet.stderr
    )
    solve(folder, cohorts[0], "ddpm", {"q_sample"})
    assert run(folder, "-c", code).stdout == "torch.Size([2, 3])\n"
    file = folder / "01_ddpm.ipynb"
    file.write_text(file.read_text().replace("(1 - alpha_bar).sqrt() * noise", "noise"))
    assert "which does not pass its check" in run(folder, "-c", code).stderr


# --- Variants and own exercises ---


def test_variants_differ_and_own_exercises_join(cohorts):
    plain, example = cohorts
    for name in plain.assignments():
        recordings = [
            {file.name: file.read_bytes() for file in (cohort.release(name) / "checks").iterdir()}
            for cohort in cohorts
        ]
        both = recordings[0].keys() & recordings[1].keys()
        assert both and not [file for file in both if recordings[0][file] == recordings[1][file]]
    question = "ddpm.signal_kept"
    assert [c.answers("ddpm")[question]["right"] for c in cohorts] == [0.37, 0.61]
    own = [item for item in example.assignment("guidance").items if item.notebook == "51_guidance_schedule"]
    assert [(item.exercise, item.kind, item.points) for item in own] == [
        ("guidance_schedule.mixed_by_schedule", "algorithm", 4),
        ("guidance_schedule.noisy_part", "question", 1),
        ("guidance_schedule.exercise_3_why_late", "paper", 2),
    ]
    assert not (plain.release("guidance") / "51_guidance_schedule.ipynb").exists()


def test_reference_passes_the_variants_checks(cohorts, hand_out):
    """The instructor's own exercises and the cohort's numbers included."""
    folder = hand_out("guidance", cohorts[1])
    solve(folder, cohorts[1], "guidance")
    outcome = run(folder, "hand_in.py")
    items = cohorts[1].assignment("guidance").items
    count = sum(item.kind in ("formula", "algorithm") for item in items)
    assert f"{count} of {count} functions pass" in outcome.stdout, outcome.stdout


def test_change_that_finds_nothing_and_own_exercises_without_a_place(tmp_path):
    from homework.course_copy import copy_course, make_change

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01_ddpm.py").write_text("one")
    with pytest.raises(CourseError, match="01_ddpm.py has no 'two' to change"):
        make_change(tmp_path, {"file": "notebooks/01_ddpm.py", "old": "two", "new": "three"})
    with pytest.raises(CourseError, match="PRIVATE must be a folder"):
        copy_course(Cohort.of("x", tmp_path), ROOT, tmp_path / "nowhere")
    own = shutil.copytree(PRIVATE, tmp_path / "own")
    (own / "assignments.toml").write_text("")
    with pytest.raises(CourseError, match="to which assignment 51_guidance_schedule belongs"):
        copy_course(Cohort.of("x", tmp_path), ROOT, own)
