"""The learner's own package: whose each function is, and that classes call it."""

import os
import shutil
import subprocess
import sys
from io import BytesIO

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_output
from PIL import Image

import editions
import milestones
import mine
from course import ROOT
from lecture26.kit.own_package import LEDGER, NOT_BUILT, calls_of, enlarged, read_ledger, work_digest

SAMPLE = ROOT / "tests" / "sample_course"
RIGHT = "return [math.exp(-rate * t) for t in times]"


@pytest.fixture
def course(tmp_path):
    """The sample course, of one exercise, with its learner's copy."""
    root = tmp_path / "course"
    shutil.copytree(SAMPLE, root)
    editions.make_copies(root)
    return root


def copy_of(root, name="01_waves"):
    return nbformat.read(root / "work" / f"{name}.ipynb", as_version=4)


def store(root, notebook, name="01_waves"):
    nbformat.write(notebook, root / "work" / f"{name}.ipynb")


def exercise_cell(notebook, function="decay"):
    """The cell in which a function is to be filled in."""
    (found,) = [
        cell
        for cell in notebook.cells
        if "exercise" in cell.metadata.get("tags", []) and f"def {function}(" in cell.source
    ]
    return found


def fill_in(notebook, body, function="decay"):
    """Put lines in the place of the `...` of an exercise; returns its cell."""
    cell = exercise_cell(notebook, function)
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    cell.source = cell.source.replace(f"    {editions.TO_FILL_IN}", lines)
    return cell


def solved(root, body=RIGHT, *other_cells):
    """Store the copy with the exercise filled in, and other cells at its end."""
    notebook = copy_of(root)
    fill_in(notebook, body)
    notebook.cells += [new_code_cell(source) for source in other_cells]
    store(root, notebook)


def verdict(root, limit=60.0):
    (found,) = mine.build(root, limit)
    return found


def module(root):
    return (root / "build" / "mine" / "lecture26" / "waves.py").read_text()


def assert_course_stays(root, why):
    """The package is the course's as it is, for this reason."""
    found = verdict(root, limit=2.0 if "ended after" in why else 60.0)
    assert found.own is None
    assert why in found.why
    assert module(root) == (root / "lecture26" / "waves.py").read_text()
    ledger = read_ledger(root / "build" / "mine")
    assert ledger["own"] == {} and ledger["course"] == {found.exercise: found.why}


def test_solved_function_takes_the_place_of_the_courses(course):
    solved(course)
    found = verdict(course)
    assert found.own is not None
    assert found.why.startswith("work/01_waves.ipynb, cell ")
    text = module(course)
    assert RIGHT in text and "left = " not in text
    assert "# --- The learner's own decay, from work/01_waves.ipynb, cell 5 ---\ndef decay(" in text
    assert text.count("def decay(") == 1
    others = (course / "lecture26" / "waves.py").read_text()
    below = others[others.index("# Nothing below") :]
    assert text.endswith(below)  # all else is as it was


def test_class_of_the_course_calls_the_learners_function(course):
    solved(course, 'print("mine")\n' + RIGHT)
    assert verdict(course).own is not None
    program = "from lecture26.waves import Wave; print(Wave(1.0, 0.0).envelope([2.0]))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=course / "build" / "mine",
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "mine\n[1.0]\n"


def test_helpers_imports_and_constants_come_along(course):
    solved(
        course,
        "return [power(BASE, -rate * t) for t in times]",
        "from math import log, pow as real_power\nimport statistics",
        "%timeit 1\nBASE = 2.718281828459045",
        "def power(base, exponent):\n    # a comment\n    return real_power(base, exponent)",
        "rate = 'no parameter of the function'\nprint(unheard_of)",
    )
    found = verdict(course)
    assert found.own is not None, found.why
    assert found.why.endswith("with BASE, power, real_power")
    text = module(course)
    assert "from math import pow as real_power\n" in text
    assert "    # a comment\n" in text
    assert (
        "unheard_of" not in text
        and "log" not in text
        and "statistics" not in text
        and "no parameter" not in text
    )


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (editions.TO_FILL_IN, "it is not filled in"),
        ("return [2 * math.exp(-rate * t) for t in times]", "it is wrong"),
        ("while True:\n    pass", "its check has not ended after 2 s"),
        ("raise SystemExit(3)", "its cells raise SystemExit: 3"),
        ("import os\nos._exit(0)", "its check has ended the whole process"),
        ("return [unheard_of]", "its cells raise NameError: name 'unheard_of' is not defined"),
        ("return [1.0", "of its cell is no Python: '[' was never closed"),
    ],
)
def test_other_functions_stay_the_courses(course, body, why):
    solved(course, body)
    assert_course_stays(course, why)


def test_syntax_error_in_another_cell_does_no_harm(course):
    solved(course, RIGHT, "this is no Python")
    assert verdict(course).own is not None


def test_deleted_cell(course):
    notebook = copy_of(course)
    notebook.cells.remove(exercise_cell(notebook))
    store(course, notebook)
    assert_course_stays(course, "no cell of work/01_waves.ipynb defines it")


def test_function_in_an_untagged_cell_is_found_by_its_name(course):
    notebook = copy_of(course)
    fill_in(notebook, RIGHT).metadata.pop("tags")
    store(course, notebook)
    assert verdict(course).own is not None


def test_last_of_two_tagged_cells_counts_that_is_filled_in(course):
    notebook = copy_of(course)
    empty = exercise_cell(notebook).source
    tags = {"tags": ["exercise"]}
    for body in ("return 'the first try'", RIGHT, editions.TO_FILL_IN):
        source = empty.replace(editions.TO_FILL_IN, body)
        notebook.cells.append(new_code_cell(source, metadata=tags))
    notebook.cells.append(new_code_cell(empty.replace(editions.TO_FILL_IN, "return 'untagged'")))
    store(course, notebook)
    assert RIGHT in verdict(course).own.definition.text


def test_helper_with_a_name_of_the_course(course):
    """In the package that name is the course's; the learner is told when the function fails for it."""
    solved(course, "return [phases(-rate * t) for t in times]", "def phases(x):\n    return math.exp(x)")
    assert_course_stays(course, "phases in it is the course's: choose another name for your own")


def test_helper_with_a_name_of_python(course):
    solved(course, "return [pow(-rate * t) for t in times]", "def pow(x):\n    return math.exp(x)")
    assert_course_stays(course, "it needs your pow, which is a name of Python's own")


def test_other_parameters_are_refused(course):
    solved(course)
    notebook = copy_of(course)
    cell = exercise_cell(notebook)
    cell.source = cell.source.replace("rate: float)", "rate: float = 1.0)")
    store(course, notebook)
    assert_course_stays(course, "its parameters are (times, rate=1.0), the course's (times, rate)")


def test_a_file_that_is_no_notebook(course):
    (course / "work" / "01_waves.ipynb").write_text("[]")
    assert_course_stays(course, "work/01_waves.ipynb cannot be read as a notebook")
    (course / "work" / "01_waves.ipynb").unlink()
    assert_course_stays(course, "there is no work/01_waves.ipynb")


def test_copy_by_another_name_counts_where_its_namesake_is_open(course):
    solved(course)
    (course / "work" / "01_waves.ipynb").rename(course / "work" / "01_waves-old.ipynb")
    assert verdict(course).why.startswith("work/01_waves-old.ipynb")
    editions.make_copies(course)
    assert verdict(course).why.startswith("work/01_waves-old.ipynb")
    solved(course)
    assert verdict(course).why.startswith("work/01_waves.ipynb")


def test_work_is_left_alone_and_the_package_is_made_anew(course):
    solved(course)
    before = {file: file.read_bytes() for file in (course / "work").iterdir()}
    mine.build(course)
    (course / "build" / "mine" / "lecture26" / "left_over.py").write_text("")
    mine.build(course)
    assert {file: file.read_bytes() for file in (course / "work").iterdir()} == before
    assert not (course / "build" / "mine" / "lecture26" / "left_over.py").exists()
    assert [path.name for path in (course / "build").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("body", "is_own"),
    [
        (f"{RIGHT}\n{editions.TO_FILL_IN}", True),  # typed above the dots
        (f"with open(__file__):\n    {editions.TO_FILL_IN}", False),
        (f"try:\n    {RIGHT}\nexcept KeyError:\n    ...", True),
    ],
)
def test_dots_that_stand_for_the_solution_are_told_from_others(course, body, is_own):
    solved(course, body)
    found = verdict(course)
    assert (found.own is not None) == is_own
    assert is_own or found.why == "it is not filled in"


def test_what_has_changed_since_is_known_by_the_code_alone(course):
    solved(course)
    before = work_digest(course / "work")
    notebook = copy_of(course)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    code.outputs = [new_output("stream", text="printed")]
    code.execution_count = 7
    store(course, notebook)
    assert work_digest(course / "work") == before
    (course / "work" / "01_notes.ipynb").write_text("no notebook")
    with_notes = work_digest(course / "work")
    code.source += "\n"
    store(course, notebook)
    assert len({before, with_notes, work_digest(course / "work")}) == 3


def test_command_line(course, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--root", str(course)])
    mine.main()
    assert capsys.readouterr().out.startswith(
        "waves.decay  the course's  it is not filled in\n\nbuild/mine: 0 of 1 "
    )
    shutil.rmtree(course / "work")
    with pytest.raises(SystemExit, match="`make lab` makes it"):
        mine.main()


# --- The course itself ---


BODIES = {
    "q_sample": "return signal(alpha_bar) * x_0 + signal(1 - alpha_bar) * noise",
    "posterior_mean": "return x_0",
    "ancestral_update": """\
is_noisy = (t > 0).reshape(-1, *[1] * (mean.ndim - 1))
return mean + is_noisy * signal(log_variance.exp()) * noise""",
    "v_from_x_0_and_eps": "return signal(alpha_bar) * eps - signal(1 - alpha_bar) * x_0",
    "ddim_update": """\
import sys
print("my own step", file=sys.stderr)
sigma = eta * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev))
rest = (1 - alpha_bar_prev - sigma**2).clamp(min=0)
return alpha_bar_prev.sqrt() * x_0 + rest.sqrt() * eps + sigma * noise""",
}
CELLS = [
    "from torch import sqrt as root_of",
    "def signal(alpha_bar):\n    return root_of(alpha_bar)",
]


@pytest.fixture(scope="module")
def own_package(tmp_path_factory):
    """A copy of the course with chapter 01, its exercises solved as above, and the verdicts on them."""
    root = tmp_path_factory.mktemp("own") / "course"
    shutil.copytree(ROOT / "lecture26", root / "lecture26", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "01_ddpm.py", root / "notebooks")
    editions.make_copies(root)
    notebook = copy_of(root, "01_ddpm")
    for function, body in BODIES.items():
        fill_in(notebook, body, function)
    last = exercise_cell(notebook, "v_from_x_0_and_eps")
    last.source = "def signal(x):\n    return x**0.5\n\n\n" + last.source
    notebook.cells[2:2] = [new_code_cell(source) for source in CELLS]
    store(root, notebook, "01_ddpm")
    return root, {found.exercise: found for found in mine.build(root)}


def run_python(root, program, **environment):
    """What a program prints to both streams, in a process that imports the course in `root`."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


@pytest.mark.slow
def test_verdicts_on_the_course(own_package):
    _, verdicts = own_package
    own = {name for name, found in verdicts.items() if found.own}
    assert own == {"ddpm.q_sample", "ddpm.ancestral_update", "ddpm.ddim_update"}
    assert verdicts["ddpm.q_sample"].why.endswith("with root_of, signal")
    assert verdicts["ddpm.posterior_mean"].why.startswith("it is wrong")
    last = verdicts["ddpm.v_from_x_0_and_eps"].why
    assert last == "its signal is another than that of an exercise above: choose another name"
    others = set(verdicts) - {f"ddpm.{function}" for function in BODIES}
    assert others and {verdicts[name].why for name in others} == {"it is not filled in"}


DRAW = """
import torch
from lecture26 import ddpm
from lecture26.kit.paths import shipped_data_dir
mixture = ddpm.GaussianMixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3])
diffusion = ddpm.Diffusion(ddpm.linear_betas(100)).respace(5)
denoiser = ddpm.exact_denoiser(mixture, diffusion)
for step in ddpm.ddim_step, ddpm.ddpm_step:
    x_T = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    print(ddpm.sample(diffusion, denoiser, (4, 2), step, generator, x_T, progress=False).numpy().round(6))
print(shipped_data_dir())
"""


@pytest.mark.slow
def test_sampling_runs_the_learners_functions_and_draws_the_same(own_package):
    root, _ = own_package
    course_samples, nothing = run_python(root, DRAW, LECTURE26_MINE="")
    assert "my own step" not in nothing
    for folder in ("build/mine", str(root / "build" / "mine")):
        samples, printed = run_python(root, DRAW, LECTURE26_MINE=folder)
        assert printed.count("my own step") == 5
        assert samples == course_samples  # the data folder too is the course's


@pytest.mark.slow
def test_command_line_draws_with_the_learners_functions(own_package):
    root, verdicts = own_package
    own = [name for name, found in verdicts.items() if found.own]
    program = """
import runpy, sys
from lecture26.kit.own_package import own_functions, run_on_own_package
print(own_functions())
words = ["sample", "--model", "ddpm_shapes32", "--count", "1", "--steps", "2", "--out"]
print(run_on_own_package(*words, "first.png"))
try:
    run_on_own_package("checkpoints", "nome")
except RuntimeError as error:
    print(error)
sys.argv[1:] = [*words, "second.png"]
runpy.run_module("lecture26", run_name="__main__")
"""
    shipped = {"LECTURE26_DATA": str(ROOT / "data")}
    said, printed = run_python(root, program, LECTURE26_MINE="build/mine", **shipped)
    assert said.splitlines()[0] == str(own)
    # of the three functions of the learner's this command calls one, and as often as that says of itself
    assert printed.count("my own step") == 2
    whose = (
        "Functions of yours ran in it: ddpm.ddim_update (2 times). "
        "The course's ran for these exercises: ddpm.reverse_chain, ddpm.respacing."
    )
    assert said.splitlines()[1] == whose
    assert said.splitlines()[2].startswith("`lecture26 checkpoints nome` failed: error: ")
    assert (root / "first.png").read_bytes() == (root / "second.png").read_bytes()
    # without a package of one's own, the same command runs on the course
    ledger = root / "build" / "mine" / "lecture26" / LEDGER
    ledger.rename(root / "ledger.json")
    try:
        said, printed = run_python(root, program, LECTURE26_MINE="", **shipped)
    finally:
        (root / "ledger.json").rename(ledger)
    assert said.splitlines()[:2] == ["[]", NOT_BUILT]
    assert "my own step" not in printed


@pytest.mark.slow
def test_milestone_of_a_chapter_is_drawn_by_the_learners_functions(own_package):
    root, _ = own_package
    ((milestone, drawn),) = milestones.draw_all(root).items()
    assert milestone.chapter == "01_ddpm" and drawn.fault == ""
    assert drawn.calls.keys() >= set(milestone.exercises)  # it calls all of the chapter's exercises
    page = (root / milestones.PAGE).read_text(encoding="utf-8")
    own = "ddpm.q_sample (1,500 times), ddpm.ancestral_update (200 times), ddpm.ddim_update (50 times)"
    assert f"<p>Functions of yours ran in it: {own}.</p>" in page
    assert "3 of 10 functions are yours" in page
    assert "<li><code>ddpm.posterior_mean</code>: it is wrong" in page
    # the learner's functions compute what the course's do, so that the picture is the same but for rounding
    file = root / "course.png"
    calls_of(["milestone", "ddpm", "--out", str(file)], None)
    pictures = [Image.open(BytesIO(picture)) for picture in (drawn.picture, enlarged(file))]
    one, other = (np.asarray(picture, dtype=float) for picture in pictures)
    assert np.abs(one - other).mean() < 2 < np.abs(one - 255).mean()


@pytest.mark.slow
def test_checks_pass_on_the_package(own_package):
    root, verdicts = own_package
    own = [name for name, found in verdicts.items() if found.own]
    program = f"""
import importlib.util, sys
from lecture26.checks import check
spec = importlib.util.spec_from_file_location("built", "build/mine/lecture26/ddpm.py")
built = importlib.util.module_from_spec(spec)
spec.loader.exec_module(built)
for name in {own}:
    print(bool(check(name, getattr(built, name.partition(".")[2]))))
"""
    assert run_python(root, program, LECTURE26_MINE="")[0].split() == ["True"] * len(own)


def test_switch_without_a_package_says_what_to_do(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lecture26"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LECTURE26_MINE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "ImportError" in run.stderr and "run `make mine` to build it" in run.stderr
