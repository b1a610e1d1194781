"""The learner's copies: nothing solved, nothing of the learner's lost, and they run solved and unsolved."""

import shutil
import sys
from dataclasses import replace

import nbformat
import pytest
from jupytext.config import find_jupytext_configuration_file
from nbformat.v4 import new_code_cell

import editions
import notebooks
from course import ROOT, Cell, CourseError
from lecture26.kit import solved

SAMPLE = ROOT / "tests" / "sample_course"
SOLUTION_LINES = [
    "    # a(t) = exp(-k t)   (1.1)",
    "    left = [math.exp(-rate * t) for t in times]  # one factor for each time",
    "    return left",
]


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The sample course, without stored notebooks, as a place for a learner's copies."""
    root = tmp_path / "course"
    shutil.copytree(SAMPLE, root)
    monkeypatch.setenv("PYTHONPATH", str(root))  # the notebook imports the sample's own lecture26
    return root


def learners_copy(root):
    """The copy of the sample notebook, freshly made."""
    assert editions.make_copies(root) == ["made work/01_waves.ipynb"]
    return nbformat.read(root / "work" / "01_waves.ipynb", as_version=4)


def position(notebook, tag):
    """The position of the one cell with a tag."""
    (found,) = [i for i, cell in enumerate(notebook.cells) if tag in cell.metadata.get("tags", [])]
    return found


def test_exercise_keeps_all_but_its_solution(course):
    notebook = learners_copy(course)
    exercise = notebook.cells[position(notebook, "exercise")].source
    assert exercise.startswith("def decay(times: Samples, rate: float) -> Samples:\n")
    assert "rate: k, in 1/s, not negative." in exercise
    assert f'got {{rate}}")\n    {editions.TO_FILL_IN}\n\n\n# Nothing below' in exercise


def test_copy_carries_no_slides(course):
    assert any(cell.slide for cell in editions.read_cells(course / "notebooks" / "01_waves.py"))
    assert not any("slide" in cell.metadata for cell in learners_copy(course).cells)


def test_solution_stands_only_in_the_folded_answer(course):
    notebook = learners_copy(course)
    holders = [cell for cell in notebook.cells if any(line.strip() in cell.source for line in SOLUTION_LINES)]
    (answer,) = holders
    code = "\n".join(SOLUTION_LINES)
    assert answer.cell_type == "markdown"
    assert answer.source == f"<details>\n<summary>Answer</summary>\n\n```python\n{code}\n```\n\n</details>"
    assert not any("SOLUTION" in cell.source for cell in notebook.cells)


def test_check_answer_and_finished_function_follow_in_this_order(course):
    notebook = learners_copy(course)
    first = position(notebook, "exercise")
    check, answer, finished = notebook.cells[first + 1 : first + 4]
    assert 'check("waves.decay", decay)' in check.source
    assert answer.source.startswith("<details>")
    assert finished.metadata["tags"] == ["finished"]
    assert finished.source.startswith("from lecture26.waves import decay  # the finished function")


def test_copy_has_no_outputs_and_no_pair(course):
    notebook = learners_copy(course)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert [path.name for path in sorted((course / "work").iterdir())] == ["01_waves.ipynb", "progress.json"]


@pytest.mark.slow
def test_opening_a_copy_does_not_modify_it(course):
    """JupyterLab writes into a notebook what its kernel says of itself; where that is new, it is modified."""
    from jupyter_client.manager import start_new_kernel

    notebook = learners_copy(course)
    manager, client = start_new_kernel(kernel_name=notebook.metadata["kernelspec"]["name"])
    try:
        said = client.kernel_info(reply=True, timeout=1800)["content"]["language_info"]
        spec = manager.kernel_spec
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert notebook.metadata["language_info"] == said
    expected = {"name": "python3", "display_name": spec.display_name, "language": spec.language}
    assert notebook.metadata["kernelspec"] == expected


def test_work_folder_is_outside_jupytexts_settings():
    """JupyterLab would pair a copy, and write a .py beside it, where a Jupytext setting reaches it."""
    settings = ROOT / "notebooks" / "jupytext.toml"
    assert find_jupytext_configuration_file(str(settings.parent)) == str(settings)
    assert find_jupytext_configuration_file(str(ROOT / "work")) is None


def test_learners_work_is_never_overwritten(course):
    learners_copy(course)
    copy = course / "work" / "01_waves.ipynb"
    copy.write_text("mine")
    (line,) = editions.make_copies(course)
    assert line.startswith("kept work/01_waves.ipynb, which is yours")
    assert copy.read_text() == "mine"


def test_record_of_what_is_solved_is_made_and_kept(course):
    work = course / "work"
    learners_copy(course)
    assert solved.read(work) == {"exercises": {"01_waves": ["waves.decay"]}, "solved": []}
    solved.lay_out(work, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        solved.note_solved("waves.decay")
    editions.make_copies(course)
    assert solved.read(work) == {"exercises": {"01_waves": ["waves.decay"]}, "solved": ["waves.decay"]}


def test_file_that_is_no_record_is_left_alone(course):
    learners_copy(course)
    (course / "work" / "progress.json").write_text("[1, 2]")
    (_, line) = editions.make_copies(course)
    assert line.startswith("nothing will be recorded as solved: ")
    assert (course / "work" / "progress.json").read_text() == "[1, 2]"


QUESTION = """

# %% tags=["question"]
### BEGIN SOLUTION
# exp(-k t) is 1/2 where k t = ln 2
half_life = 0.69
### END SOLUTION

# %%
from lecture26.checks import check_answer

check_answer("waves.half_life", half_life)
"""


@pytest.fixture
def course_with_question(course):
    """The sample course with a question at its end."""
    source = course / "notebooks" / "01_waves.py"
    source.write_text(source.read_text() + QUESTION)
    checks = course / "lecture26" / "checks.py"
    checks.write_text(
        checks.read_text() + "\n\ndef check_answer(name, answer):\n    return answer is not ...\n"
    )
    return course


def test_question_is_left_open_with_its_answer_folded_below_the_check(course_with_question):
    notebook = learners_copy(course_with_question)
    place = position(notebook, "question")
    question, check, answer = notebook.cells[place:]
    assert question.source == f"half_life = {editions.TO_ANSWER}"
    assert check.source.endswith('check_answer("waves.half_life", half_life)')
    assert "<details>" in answer.source and "half_life = 0.69" in answer.source
    record = solved.read(course_with_question / "work")
    assert record["exercises"] == {"01_waves": ["waves.decay", "waves.half_life"]}


@pytest.mark.slow
def test_copy_and_rehearsal_run_with_the_question_open(course_with_question):
    course = course_with_question
    notebook = learners_copy(course)
    notebooks.execute(notebook, "01_waves", course / "work")
    assert notebook.cells[-2].outputs[0].data["text/plain"] == "False"
    shutil.copy(ROOT / "notebooks" / "jupytext.toml", course / "notebooks")
    notebooks.run(course, store=True)
    editions.make_rehearsals(course, course / "build")
    rehearsal = nbformat.read(course / "build" / "01_waves.ipynb", as_version=4)
    notebooks.execute(rehearsal, "01_waves", course / "build")
    answered, left_open, check, _ = rehearsal.cells[-4:]
    assert left_open.source == f"half_life = {editions.TO_ANSWER}"
    assert [cell.outputs[0].data["text/plain"] for cell in (answered, check)] == ["True", "False"]


def test_question_that_is_no_assignment_is_refused(course_with_question):
    source = course_with_question / "notebooks" / "01_waves.py"
    source.write_text(source.read_text().replace("half_life = 0.69", "print(0.69)"))
    with pytest.raises(CourseError, match="the solution of a question is one assignment, name = answer"):
        editions.make_copies(course_with_question)


# --- A new version of the chapter ---


def change_chapter(root, old="A course of one chapter", new="A course of two chapters"):
    """Edit the sample's source, as a newer checkout would have it."""
    source = root / "notebooks" / "01_waves.py"
    text = source.read_text()
    assert text.count(old) == 1
    source.write_text(text.replace(old, new))


def solve(root, *other_cells, body="return [math.exp(-rate * t) for t in times]"):
    """Fill in the exercise of the copy and put other cells at its end; returns the copy's bytes."""
    copy = root / "work" / "01_waves.ipynb"
    notebook = nbformat.read(copy, as_version=4)
    exercise = notebook.cells[position(notebook, "exercise")]
    exercise.source = exercise.source.replace(editions.TO_FILL_IN, body)
    notebook.cells += [new_code_cell(source) for source in other_cells]
    nbformat.write(notebook, copy)
    return copy.read_bytes()


def updated(root):
    """The copy after an update, the lines that the update printed, and the old copies."""
    lines = editions.make_copies(root, update=True)
    old = sorted((root / "work").glob("old/*"))
    return nbformat.read(root / "work" / "01_waves.ipynb", as_version=4), lines, old


def test_update_leaves_a_copy_of_this_version_alone(course):
    learners_copy(course)
    mine = solve(course, "my_note = 1")
    _, lines, old = updated(course)
    assert lines == ["kept work/01_waves.ipynb, which is up to date"]
    assert (course / "work" / "01_waves.ipynb").read_bytes() == mine and not old


def test_update_carries_solutions_into_the_new_version(course):
    learners_copy(course)
    helper = "@functools.cache\ndef decayed(rate, t):\n    return math.exp(-rate * t)"
    body = "return [decayed(rate, t) for t in times]"
    mine = solve(course, "import functools", helper, "scratch = decayed(1.0, 2.0)", body=body)
    change_chapter(course)
    change_chapter(course, "How much of a wave is left.", "How much of a wave there is left.")
    notebook, lines, (old,) = updated(course)
    assert old.read_bytes() == mine
    assert lines == [
        f"updated work/01_waves.ipynb; the old one, with whatever else you wrote, is work/old/{old.name}",
        "  carried over waves.decay",
    ]
    assert "two chapters" in notebook.cells[0].source
    exercise = notebook.cells[position(notebook, "exercise")].source
    assert exercise.startswith(f"import functools\n\n\n{helper}\n\n\ndef decay(times")
    assert '"""How much of a wave there is left.\n' in exercise
    assert f"    {body}\n\n\n# Nothing below" in exercise
    assert not any("scratch" in cell.source for cell in notebook.cells)
    # and from there again, with every old copy kept
    change_chapter(course, "two chapters", "three chapters")
    notebook, lines, old = updated(course)
    assert body in notebook.cells[position(notebook, "exercise")].source
    assert lines[1:] == ["  carried over waves.decay"] and len(old) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "def decay(times: Samples, rate: float)",
            "def decay(rate: float, times: Samples)",
            "waves.decay: its parameters were (times, rate), and are (rate, times) now",
        ),
        (
            '# %% tags=["export", "exercise"]',
            '# %% tags=["export"]',
            "decay, which is no exercise of the chapter any more",
        ),
    ],
)
def test_update_says_what_it_could_not_carry_over(course, old, new, said):
    learners_copy(course)
    mine = solve(course)
    change_chapter(course, old, new)
    _, lines, (kept,) = updated(course)
    assert lines[1:] == [f"  not carried over: {said}"]
    assert kept.read_bytes() == mine


def test_update_of_a_broken_cell_an_open_exercise_and_a_clash(course):
    learners_copy(course)
    change_chapter(course)
    _, lines, _ = updated(course)
    assert len(lines) == 1  # nothing was solved, so nothing is said
    solve(course, body="return [1.0")
    change_chapter(course, "two chapters", "three chapters")
    _, lines, _ = updated(course)
    assert len(lines) == 2 and lines[1].endswith("of its cell is no Python: '[' was never closed")
    solve(course, "phases = math.exp", body="return [phases(-rate * t) for t in times]")
    change_chapter(course, "three chapters", "four chapters")
    _, lines, _ = updated(course)
    assert lines[1:] == ["  carried over waves.decay; phases in it is the chapter's"]


def test_update_carries_answers_to_questions(course_with_question):
    course = course_with_question
    notebook = learners_copy(course)
    answer = "# ln 2, since exp(-0.69) is a half\nhalf_life = math.log(2)"
    notebook.cells[position(notebook, "question")].source = answer
    nbformat.write(notebook, course / "work" / "01_waves.ipynb")
    change_chapter(course, "# exp(-k t) is", "# At half the amplitude exp(-k t) is")
    notebook, lines, _ = updated(course)
    assert notebook.cells[position(notebook, "question")].source == answer
    assert lines[1:] == ["  carried over the answer half_life"]
    change_chapter(course, "half_life = 0.69", "half_time = 0.69")
    notebook, lines, _ = updated(course)
    assert notebook.cells[position(notebook, "question")].source.startswith("half_time = ...")
    assert lines[1:] == [
        "  not carried over: the answer half_life, which is no question of the chapter any more"
    ]


def test_update_tells_of_what_was_begun_and_leaves_other_notebooks_alone(course):
    learners_copy(course)
    mine = solve(course, body=f"# the exponential first\n    {editions.TO_FILL_IN}")
    other = course / "work" / "notes.ipynb"
    other.write_bytes(mine)
    change_chapter(course)
    _, lines, (kept,) = updated(course)
    assert lines[1:] == [
        "  not carried over: waves.decay: it is begun, but its dots still stand",
        "kept work/notes.ipynb as it is: no chapter has that name",
    ]
    assert kept.read_bytes() == other.read_bytes() == mine


def test_update_keeps_what_it_cannot_read_and_makes_what_is_missing(course):
    copy = course / "work" / "01_waves.ipynb"
    copy.parent.mkdir()
    copy.write_text("mine")
    (line,) = editions.make_copies(course, update=True)
    assert line.startswith("kept work/01_waves.ipynb: work/01_waves.ipynb cannot be read as a notebook")
    assert copy.read_text() == "mine"
    copy.unlink()
    assert editions.make_copies(course, update=True) == ["made work/01_waves.ipynb"]


@pytest.mark.slow
def test_copy_runs_unsolved(course):
    notebook = learners_copy(course)
    notebooks.execute(notebook, "01_waves", course / "work")
    exercise = position(notebook, "exercise")
    assert notebook.cells[exercise + 1].outputs[0].data["text/plain"] == "False"
    assert notebook.cells[-1].outputs[-1].data["text/plain"] == "[1.000, -0.779, 0.607]"


@pytest.mark.slow
def test_copy_runs_solved(course):
    notebook = learners_copy(course)
    exercise = notebook.cells[position(notebook, "exercise")]
    exercise.source = exercise.source.replace(f"    {editions.TO_FILL_IN}", "\n".join(SOLUTION_LINES))
    notebooks.execute(notebook, "01_waves", course / "work")
    assert notebook.cells[position(notebook, "exercise") + 1].outputs[0].data["text/plain"] == "True"
    assert notebook.cells[-1].outputs[-1].data["text/plain"] == "[1.000, -0.779, 0.607]"


def cell(number, source, *tags, kind="code"):
    return Cell("notebooks/01_waves.py", number, 1, kind, source, tags)


def test_sections_run_once_more_from_the_last_one_on():
    cells = [
        cell(1, "import math"),
        cell(2, "## One", "core", kind="markdown"),
        cell(3, "a = 1"),
        cell(4, "### Part *(at a second reading)*", "optional", kind="markdown"),
        cell(5, "b = 1"),
        cell(6, "## Two *(at a second reading)*", "optional", kind="markdown"),
        cell(7, "c = 1"),
        cell(8, "show_milestone()", "milestone"),  # in a process of its own, where nothing can break
    ]
    assert [again.source for again in editions.once_more(cells)] == ["c = 1", "a = 1", "b = 1"]
    assert editions.once_more([replace(each, tags=()) for each in cells]) == []


def test_a_cell_that_only_draws_is_folded():
    folded, open_ = (editions.code_cell(cell(1, "show(figure)", *tags)) for tags in (("draw",), ()))
    assert folded.metadata == {"tags": ["draw"], "jupyter": {"source_hidden": True}}
    assert open_.metadata == {}


@pytest.mark.slow
def test_one_rehearsal_runs_the_notebook_and_the_copy(course):
    shutil.copy(ROOT / "notebooks" / "jupytext.toml", course / "notebooks")
    notebooks.run(course, store=True)
    stored = nbformat.read(course / "notebooks" / "01_waves.ipynb", as_version=4).cells
    copied = learners_copy(course).cells
    folder = course / "build" / "rehearsals"
    assert editions.make_rehearsals(course, folder) == [f"made {folder}/01_waves.ipynb"]
    notebook = nbformat.read(folder / "01_waves.ipynb", as_version=4)

    # the stored notebook with its outputs, and in it the copy's cells from the exercise to the finished one
    solved = next(i for i, cell in enumerate(stored) if "exercise" in cell.metadata.get("tags", []))
    split = solved + 2  # behind the solved exercise and its check
    assert notebook.cells[:split] + notebook.cells[split + 4 :] == stored
    inserted = [cell.source for cell in notebook.cells[split : split + 4]]
    assert inserted == [cell.source for cell in copied[solved : solved + 4]]
    assert copied[solved + 3].metadata["tags"] == ["finished"]

    expected = [output.get("data") for cell in stored for output in cell.get("outputs", [])]
    notebooks.execute(notebook, "01_waves", folder)
    ignored = notebook.cells.pop(split + 1)  # the check of what is not solved
    assert ignored.metadata["tags"] == ["nbval-ignore-output"]
    assert ignored.outputs[0].data["text/plain"] == "False"
    assert [output.get("data") for cell in notebook.cells for output in cell.get("outputs", [])] == expected


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('check("waves.decay", decay)', "decay([1.0], 0.0)", r"\(cell 6\): the cell right after an exercise"),
        ("### BEGIN SOLUTION", "### START SOLUTION", r"\(cell 5\): an exercise marks its solution"),
    ],
)
def test_mistake_is_named_with_its_place(course, old, new, message):
    source = course / "notebooks" / "01_waves.py"
    source.write_text(source.read_text().replace(old, new))
    with pytest.raises(CourseError, match=message):
        editions.make_copies(course)
    assert not (course / "work" / "01_waves.ipynb").exists()


def test_exercise_at_the_end_is_refused(course):
    source = course / "notebooks" / "01_waves.py"
    text = source.read_text()
    source.write_text(text[: text.index("# Nothing below depends")])
    with pytest.raises(CourseError, match="no cell follows that calls this exercise's check"):
        editions.make_copies(course)


def test_command_line(course, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["editions.py", "waves", "--root", str(course)])
    editions.main()
    assert capsys.readouterr().out == "made work/01_waves.ipynb\n"
    notebooks.run(course, store=True)
    monkeypatch.setattr(
        sys, "argv", ["editions.py", "--root", str(course), "--rehearse", str(course / "new")]
    )
    editions.main()
    assert capsys.readouterr().out.endswith(f"made {course}/new/01_waves.ipynb\n")
    monkeypatch.setattr(sys, "argv", ["editions.py", "--update", "--root", str(course)])
    editions.main()
    assert capsys.readouterr().out == "kept work/01_waves.ipynb, which is up to date\n"
    monkeypatch.setattr(sys, "argv", ["editions.py", "nome", "--root", str(course)])
    with pytest.raises(SystemExit, match="there are: 01_waves"):
        editions.main()
