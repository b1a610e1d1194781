"""The milestones: each chapter has one that can be drawn, and the page of them loses nothing."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

import milestones
import mine
from course import ROOT, CourseError, module_name, notebook_sources, read_cells
from lecture26.__main__ import Milestone, app
from lecture26.commands.milestone import MILESTONES
from lecture26.kit.own_package import NOT_BUILT
from tasks import tasks

SAMPLE = ROOT / "tests" / "sample_course"
CELL = """

# %% tags=["milestone", "nbval-ignore-output"]
show_milestone('draw "a wave"', alt="A wave & its <envelope>.")
"""


def test_every_chapter_with_exercises_ends_with_a_milestone():
    chapters = [source for source in notebook_sources(ROOT) if tasks(source)]
    assert [milestone.chapter for milestone in milestones.milestones(ROOT)] == [s.stem for s in chapters]
    for source in chapters:
        cells = read_cells(source)
        position = next(i for i, cell in enumerate(cells) if "milestone" in cell.tags)
        assert cells[position].tags == ("milestone", "nbval-ignore-output")
        assert cells[position - 1].source.startswith("## Your code runs the model\n")
        assert not any("export" in cell.tags or "exercise" in cell.tags for cell in cells[position:])


@pytest.mark.parametrize("milestone", milestones.milestones(ROOT), ids=lambda milestone: milestone.chapter)
def test_command_of_a_milestone_is_one_of_the_command_line(milestone):
    name, *options = [*shlex.split(milestone.command), "--out", "picture.png"]
    command = get_command(app).commands[name]
    assert str(command.make_context(name, options).params["out"]) == "picture.png"


def test_chapters_of_the_command_are_those_that_are_drawn():
    assert list(MILESTONES) == list(Milestone)
    assert set(MILESTONES) <= {module_name(source) for source in notebook_sources(ROOT)}


# --- The page ---


@pytest.fixture
def course(tmp_path):
    """A course of three chapters with milestones, and a package in which nothing is the learner's."""
    root = tmp_path / "course"
    shutil.copytree(SAMPLE, root)
    text = (root / "notebooks" / "01_waves.py").read_text() + CELL
    for number in ("01", "02", "03"):
        (root / "notebooks" / f"{number}_waves.py").write_text(text)
    (root / "work").mkdir()
    mine.build(root)
    return root


class Command:
    """Stands for the process in which a milestone's command runs; notes when it is called."""

    def __init__(self):
        self.called = 0
        self.fault = {}  # what to raise, by the number of the call

    def __call__(self, words, package, limit):
        self.called += 1
        assert words[:2] == ["draw", "a wave"] and (package / "lecture26" / "waves.py").exists()
        if self.called in self.fault:
            raise self.fault[self.called]
        Image.new("RGB", (4, 2), (0, 0, 40 * self.called)).save(words[words.index("--out") + 1])
        return {"waves.decay": self.called}


@pytest.fixture
def command(monkeypatch):
    command = Command()
    monkeypatch.setattr(milestones, "calls_of", command)
    return command


def page_of(root):
    return (root / "build" / "milestones.html").read_text(encoding="utf-8")


def make_own(root):
    """Let the package say that the function is the learner's; returns its module's path."""
    milestones.write_json(
        root / "build" / "mine" / "lecture26" / "own_functions.json",
        {"own": {"waves.decay": "work/01_waves.ipynb, cell 5"}, "course": {}, "work": ""},
    )
    return root / "build" / "mine" / "lecture26" / "waves.py"


def test_page_shows_pictures_and_whose_functions_drew_them(course, command):
    milestones.draw_all(course)
    page = page_of(course)
    assert page.count('<img src="data:image/png;base64,') == 3
    assert page.count('alt="A wave &amp; its &lt;envelope&gt;."') == 3
    assert page.count(NOT_BUILT) == 3 and "0 of 1 functions are yours" in page
    assert page.count("<li><code>waves.decay</code>: there is no work/0") == 3
    make_own(course)
    milestones.draw_all(course)
    page = page_of(course)
    assert "<p>Functions of yours ran in it: waves.decay (once).</p>" in page
    assert "1 of 1 functions are yours" in page
    assert "work/01_waves.ipynb, cell 5; called 2 times for this picture" in page
    for outside in ("http", "<script", "<link", 'src="/'):
        assert outside not in page  # one file that needs no other


def test_what_is_drawn_of_this_package_is_kept(course, command):
    first = milestones.draw_all(course)
    again = milestones.draw_all(course)
    assert command.called == 3
    assert [drawn.picture for drawn in again.values()] == [drawn.picture for drawn in first.values()]
    (course / "build" / "milestones" / "02_waves.json").write_text("{")  # as if half written
    milestones.draw_all(course)
    assert command.called == 4
    make_own(course).write_text("changed = True")
    milestones.draw_all(course)
    assert command.called == 7


def test_interrupted_run_goes_on(course, command):
    command.fault[2] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        milestones.draw_all(course)
    assert page_of(course).count("<img") == 1
    assert page_of(course).count("It has not been drawn yet.") == 2
    milestones.draw_all(course)
    assert command.called == 4 and page_of(course).count("<img") == 3


def test_failing_milestone_harms_no_other(course, command, monkeypatch, capsys):
    command.fault[2] = RuntimeError("`lecture26 draw` failed: no <room>")
    monkeypatch.setattr(sys, "argv", ["milestones.py", "--root", str(course)])
    with pytest.raises(SystemExit, match="02_waves could not be drawn; the page says why"):
        milestones.main()
    assert "02_waves: It could not be drawn: `lecture26 draw` failed: no <room>" in capsys.readouterr().out
    page = page_of(course)
    assert page.count("<img") == 2 and "failed: no &lt;room&gt;</p>" in page
    milestones.main()
    assert command.called == 4 and page_of(course).count("<img") == 3  # only that one was drawn again


def test_without_a_package_it_says_what_to_do(course):
    shutil.rmtree(course / "build" / "mine")
    with pytest.raises(CourseError, match="`make mine` builds it"):
        milestones.draw_all(course)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", alt=", ", aha=", "a milestone's cell calls show_milestone"),
        ("'draw \"a wave\"'", "draw", "a milestone's cell calls show_milestone"),
        (CELL, CELL + CELL, "a chapter has one milestone; this is the second"),
    ],
)
def test_cell_that_cannot_be_read_is_named(course, old, new, message):
    source: Path = course / "notebooks" / "02_waves.py"
    source.write_text(source.read_text().replace(old, new))
    with pytest.raises(CourseError, match=r"notebooks/02_waves.py:\d+ \(cell \d+\): " + message):
        milestones.milestones(course)
