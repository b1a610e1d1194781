"""The live notebooks: nothing typed is lost, everything runs from the middle, and the teaching text fits."""

import builtins
import json
import re
import shutil
import sys

import nbformat
import pytest
from nbformat.v4 import new_output

import core_path
import live
import notebooks
import teaching
from board import board, is_folded
from course import ROOT, Cell, CourseError, notebook_sources
from lecture26.kit.live import is_unwritten, typed_or_finished

SAMPLE = ROOT / "tests" / "sample_course"
SOURCES = notebook_sources(ROOT)
every_chapter = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
SLOWEST_CELL = 20  # seconds on a quiet machine


# --- What was typed, and what is taken otherwise ---


def open_body(x):
    """To be typed."""
    ...


def guarded(x):
    """To be typed, but for what is given."""
    if x < 0:
        raise ValueError(x)
    with open(x) as file:
        file.read()
        ...


def half_typed(x):
    print(x)
    ...


def wrong(x):
    return -x


def test_only_a_body_without_a_line_of_its_own_is_unwritten():
    assert is_unwritten(open_body) and is_unwritten(guarded, given=4)
    assert not is_unwritten(guarded) and not is_unwritten(half_typed) and not is_unwritten(wrong)
    assert not is_unwritten(eval("lambda: ..."))  # no source can be had, so it stays
    assert not is_unwritten(len)


def test_finished_function_is_taken_where_nothing_was_typed_and_nowhere_else(capsys):
    module = "lecture26.ddpm"
    from lecture26.ddpm import q_sample as finished

    def q_sample(x_0, alpha_bar, noise): ...

    assert typed_or_finished(q_sample, module) is finished
    assert capsys.readouterr().out == "q_sample: nothing was typed, so this is the finished function\n"

    def q_sample(x_0, alpha_bar, noise):
        return x_0

    assert typed_or_finished(q_sample, module) is q_sample
    assert "as typed above" in (said := capsys.readouterr().out)
    scope = {}
    exec(said.splitlines()[1].strip(), scope)  # the line that it offers
    assert scope["q_sample"] is finished
    assert typed_or_finished(finished, module) is finished
    assert capsys.readouterr().out == "q_sample: the finished function\n"


# --- A course of one chapter ---


@pytest.fixture
def course(tmp_path, monkeypatch):
    """The sample course, whose chapter has a section that can be left out."""
    root = tmp_path / "course"
    shutil.copytree(SAMPLE, root)
    source = root / "notebooks" / "01_waves.py"
    text = source.read_text()
    for heading, tag in (("1.1", "core"), ("1.2", "core")):
        text = text.replace(
            f"# %% [markdown]\n# ## {heading}", f'# %% [markdown] tags=["{tag}"]\n# ## {heading}'
        )
    source.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(root))
    (root / "lecture26" / "kit").mkdir()
    (root / "lecture26" / "kit" / "__init__.py").write_text("")
    shutil.copy(ROOT / "lecture26" / "kit" / "live.py", root / "lecture26" / "kit")
    return root


def made(root, **options):
    """The live notebook of the sample, freshly made."""
    live.make_live(root, **options)
    return nbformat.read(root / "live" / "01_waves.ipynb", as_version=4)


def texts(path):
    """The texts of a notebook's cells."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells]


def tagged(notebook, tag):
    """The cell with a tag."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell


def test_body_is_left_open_with_a_short_docstring(course):
    cell = tagged(made(course), "typed")
    assert cell.source.startswith(
        "def decay(times: Samples, rate: float) -> Samples:\n"
        '    """How much of a wave is left."""\n    if rate < 0:'
    )
    assert f"    {live.TO_TYPE}\n" in cell.source and "math.exp" not in cell.source


def test_answer_is_folded_and_the_check_comes_last(course):
    notebook = made(course)
    place = notebook.cells.index(tagged(notebook, "typed"))
    answer, finished, check = notebook.cells[place + 1 : place + 4]
    assert answer.source.startswith("<details>") and "math.exp(-rate * t)" in answer.source
    assert finished.source == 'decay = typed_or_finished(decay, "lecture26.waves", given=2)'
    assert 'check("waves.decay", decay)' in check.source
    assert [c.metadata.slideshow.slide_type for c in (answer, finished, check)] == ["-"] * 3


BODIES = {
    "nothing": (None, "True", "[1.000, -0.779, 0.607]"),
    "right": ("    return [math.e ** (-rate * t) for t in times]", "True", "[1.000, -0.779, 0.607]"),
    "wrong": ("    return [2.0 for t in times]", "False", "[2.000, -2.000, 2.000]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("body", BODIES)
def test_notebook_runs_on_what_was_typed(course, body):
    """Typed rightly or wrongly, it stays, check and results show it; not typed, the finished one is taken."""
    notebook = made(course)
    text, passes, result = BODIES[body]
    if text is not None:
        cell = tagged(notebook, "typed")
        cell.source = cell.source.replace(f"    {live.TO_TYPE}", text)
    notebooks.execute(notebook, "01_waves", course / "live")
    place = notebook.cells.index(tagged(notebook, "finished"))
    taken, check = notebook.cells[place : place + 2]
    assert taken.outputs[0].text.startswith(
        "decay: nothing was typed" if text is None else "decay: as typed above"
    )
    assert check.outputs[0].data["text/plain"] == passes
    assert notebook.cells[-1].outputs[-1].data["text/plain"] == result


def test_what_a_teacher_has_is_never_overwritten(course):
    made(course)
    copy = course / "live" / "01_waves.ipynb"
    fresh = texts(copy)
    assert live.make_live(course) == ["kept live/01_waves.ipynb, which is yours"]
    copy.write_text("mine")
    (line,) = live.make_live(course)
    assert line == "kept live/01_waves.ipynb, which is yours; it cannot be read as a notebook"
    assert copy.read_text() == "mine"
    first, second = live.make_live(course, reset=True)
    (old,) = (course / "live" / "old").iterdir()
    assert old.read_text() == "mine" and first == f"the old live/01_waves.ipynb is live/old/{old.name}"
    assert second.startswith("made live/01_waves.ipynb") and texts(copy) == fresh


def test_chapter_that_has_changed_is_told(course):
    made(course)
    source = course / "notebooks" / "01_waves.py"
    source.write_text(source.read_text().replace("What a **wave** does", "What a wave does"))
    (line,) = live.make_live(course)
    assert "the chapter has changed since (`make live-reset NAMES=01_waves` begins anew)" in line


TEXT = """
[sections."1.1 The decay $e^{-kt}$"]
minutes = 10
say = "It decays."
stumble = "The sign."
question = "Why e?"
answer = "It is its own derivative."
[sections."1.1 The decay $e^{-kt}$".predict]
question = "How much is left?"
answer = "A half."
before = "check("
[sections."1.2 What a **wave** does"]
minutes = 30
say = "It swings."
stumble = "The phase."
question = "And sound?"
answer = "Also."
type = ["phases"]
[[sessions.50]]
until = "1.2 What a **wave** does"
seen = "All."
next = "What now?"
"""


def write_text(root, text=TEXT):
    """Put a teaching text into the sample course."""
    (root / "teaching").mkdir(exist_ok=True)
    (root / "teaching" / "01_waves.toml").write_text(text)


def test_notes_go_into_metadata_and_page_and_functions_named_are_to_be_typed(course):
    write_text(course)
    notebook = made(course)
    (heading,) = [cell for cell in notebook.cells if cell.source.startswith("## 1.1")]
    assert heading.metadata.lecture26.notes.say == "It decays."
    (asked,) = [cell for cell in notebook.cells if "How much is left?" in cell.source]
    assert 'check("waves.decay", decay)' in notebook.cells[notebook.cells.index(asked) + 4].source
    typed = [cell.source for cell in notebook.cells if "typed" in cell.metadata.get("tags", [])]
    assert len(typed) == 2
    assert f'"""Angles in radians."""\n    {live.TO_TYPE}\n\n\n# Amplitude and phase multiply.' in typed[1]
    page = re.sub("<[^>]*>", "", (course / "live" / "01_waves_notes.html").read_text())
    for said in (
        "It swings.",
        "The phase.",
        "And sound?",
        "Also.",
        "What now?",
        "math.exp(-rate * t)",
        "phases",
    ):
        assert said in page
    (plan,) = [cell.source for cell in notebook.cells if "For the teacher" in cell.source]
    assert "| 1.1 The decay $e^{-kt}$ | 10 | 0 s | `decay` |" in plan and "end of 1" in plan


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('1.2 What a **wave** does"]', '1.3"]', "core sections and entries differ in .*'1.3'"),
        ("minutes = 30", "minutes = 41", "the session of 50 until .* takes 51 minutes"),
        ('until = "1.2 What a **wave** does"', 'until = "1.1"', "must end with headings in order"),
        ('before = "check("', 'before = "chuck("', "0 code cells hold 'chuck\\('"),
        ('type = ["phases"]', 'type = ["faces"]', "no exported cell defines faces"),
        ('type = ["phases"]', 'stored = ["print(wave)"]', "no stored output|No such file"),
    ],
)
def test_teaching_text_that_does_not_fit_is_refused(course, old, new, message):
    assert TEXT.count(old) == 1
    write_text(course, TEXT.replace(old, new))
    with pytest.raises((CourseError, FileNotFoundError), match=message):
        live.make_live(course)


def test_cell_that_is_not_run_shows_its_stored_output():
    picture = new_output("display_data", {"image/png": "aGk=\n"}, metadata={"image/png": {"alt": "A"}})
    text = new_output("stream", text="loss 1\n")
    cell = Cell("notebooks/01_waves.py", 1, 1, "code", "train()", ())
    (shown,) = live.shown_as_stored(cell, {"train()": [text, picture]})
    assert shown.cell_type == "markdown" and "```text\nloss 1\n```" in shown.source
    assert "![A](attachment:output0.png)" in shown.source and "train()" in shown.source
    assert shown["attachments"] == {"output0.png": {"image/png": "aGk="}}
    assert live.shown_as_stored(cell, {"train()": []}) == []
    with pytest.raises(CourseError, match="run `make notebooks`"):
        live.shown_as_stored(cell, {})


def test_command_line(course, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["live.py", "waves", "--root", str(course)])
    live.main()
    assert capsys.readouterr().out == "made live/01_waves.ipynb, and live/01_waves_notes.html to print\n"
    monkeypatch.setattr(sys, "argv", ["live.py", "nome", "--root", str(course)])
    with pytest.raises(SystemExit, match="there are: 01_waves"):
        live.main()


@pytest.mark.slow
def test_measured_seconds_are_stored(course, monkeypatch, capsys):
    write_text(course)
    monkeypatch.setattr(sys, "argv", ["live.py", "--measure", "--root", str(course)])
    live.main()
    chapter = json.loads((course / "teaching" / "measured.json").read_text())["chapters"]["01_waves"]
    assert set(chapter["seconds"]) == {"", "1.1 The decay $e^{-kt}$", "1.2 What a **wave** does"}
    assert chapter["slowest_cell"] <= sum(chapter["seconds"].values()) + 0.2


# --- What a class sees ---


def test_long_paragraphs_are_folded_and_what_is_for_the_board_stays():
    long = ("This is said and not shown. " * 10).strip()
    lists, code = f"- a\n- b\n\n- {long}", f"```python\n\n{long}\n```"
    text = f"## A\n\n{long}\n\n{long}\n\n$$x = 1$$\n\n{lists}\n\n*{long}*\n\n{code}\n\nShort."
    fold = f"<details>\n<summary>in words</summary>\n\n{long}\n\n{long}\n\n</details>"
    shown = board(text)
    assert shown.startswith(f"## A\n\n{fold}\n\n$$x = 1$$\n\n- a\n- b\n\n<details>")
    assert shown.count("<details>") == 2 and shown.endswith("\n```\n\nShort.")


def test_task_and_summary_stay_links_and_references_go():
    long = ("Much. " * 60).strip()
    assert board(f"#### Exercise 1: a\n\n{long}").endswith(long)
    assert board(f"## Summary\n\n{long}").endswith(long)
    assert board("[Previous: 00](00.ipynb)\n\n## References\n\n- A") == ""


# --- What the core path needs of what is left out ---


def code(number, source, *tags):
    return Cell("notebooks/01_waves.py", number, 1, "code", source, tags)


def test_sections_and_which_of_them_are_core():
    def heading(number, text, *tags):
        return Cell("notebooks/01_waves.py", number, 1, "markdown", text, tags)

    cells = [
        heading(1, "# 01 Waves"),
        heading(2, "## One", "core"),
        code(3, "a = 1"),
        heading(4, "### Part *(at a second reading)*", "optional"),
        heading(5, "### Not tagged, and so of the same kind"),
        heading(6, "## Your code", "core"),
        code(7, "run()", "milestone"),
    ]
    found = [(s.heading, s.is_core, [cell.number for cell in s.cells]) for s in core_path.sections(cells)]
    assert found == [
        ("", True, [1]),
        ("One", True, [2, 3]),
        ("Part", False, [4, 5]),
        ("Your code", False, [6, 7]),
    ]


@pytest.mark.parametrize(
    ("cells", "kept", "expected"),
    [
        ([code(1, "a = 1"), code(2, "print(a)")], {2}, {2: "a = 1"}),
        ([code(1, "a = 1\nb = 2"), code(2, "c = a"), code(3, "print(c)")], {3}, {3: "a = 1\nc = a"}),
        (
            [code(1, "def f():\n    return 1", "export"), code(2, "f()")],
            {2},
            {2: "from lecture26.waves import f"},
        ),
        ([code(1, "a = 1"), code(2, "a = 2"), code(3, "print(a)")], {1, 3}, {3: "a = 2"}),
        ([code(1, "a = 1"), code(2, "for a in b:\n    print(a)")], {2}, {}),
        ([code(1, "t = 1"), code(2, "for a in b:\n    t = a\n    print(t)")], {2}, {}),
        ([code(1, "t = 1"), code(2, "for a in b:\n    t = t + a")], {2}, {2: "t = 1"}),
        (
            [code(1, "def f():\n    return g()"), code(2, "g = len", "export")],
            {1},
            {1: "from lecture26.waves import g"},
        ),
        (
            [code(1, "class A: ...", "export"), code(2, "class A(A):\n    b = 1", "export"), code(3, "A()")],
            {1, 3},
            {3: "class A(A):\n    b = 1"},
        ),
    ],
    ids=[
        "plain",
        "chain",
        "exported",
        "last above",
        "target",
        "set in the loop",
        "read first",
        "below",
        "class goes on",
    ],
)
def test_what_is_needed(cells, kept, expected):
    assert core_path.needed(cells, kept, "waves") == expected


def test_undefined_names_are_found():
    known = set(vars(builtins))
    assert core_path.undefined_names(["def f():\n    return a", "a = 1\nf()"], known) == []
    assert core_path.undefined_names(["print(a)", "a = 1"], known) == ["a"]
    assert core_path.undefined_names(["def f():\n    return b"], known) == ["b"]


# --- The course's own chapters ---


@every_chapter
def test_every_name_is_defined_before_it_is_used(source):
    """What nbval sees of one chapter, this sees of all: also that sections left out leave no gap."""
    cells = live.live_notebook(source).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    assert core_path.undefined_names(sources, {*vars(builtins), "__name__"}) == []


@every_chapter
def test_bodies_stand_only_in_folded_answers(source):
    notebook = live.live_notebook(source)
    shown = "\n".join(cell.source for cell in notebook.cells if not cell.source.startswith("<details>"))
    for functions in live.bodies(source).values():
        for body in functions.values():
            assert body.strip() not in shown
    live.type_bodies(notebook, source)
    assert live.TO_TYPE not in "\n".join(cell.source for cell in notebook.cells)


@every_chapter
def test_teaching_text_is_whole(source):
    text = teaching.read_teaching(source)
    assert sorted(text.sessions) == list(teaching.LENGTHS)
    for heading, notes in text.notes.items():
        assert notes.minutes > 0, heading
        assert all([notes.say, notes.stumble, notes.question, notes.answer]), heading
    for length, sessions in text.sessions.items():
        assert all(session.seen and session.next for session in sessions), length


@every_chapter
def test_seconds_are_those_of_this_chapter_and_no_cell_is_slow(source):
    chapter = teaching.measured(ROOT / "teaching").get(source.stem, {"seconds": {}, "slowest_cell": 0})
    assert set(chapter["seconds"]) == {"", *teaching.read_teaching(source).notes}, (
        "run tools/live.py --measure"
    )
    assert chapter["slowest_cell"] <= SLOWEST_CELL


@every_chapter
def test_each_slide_begins_with_what_is_seen(source):
    cells = live.live_notebook(source).cells
    for cell in cells:
        if cell.metadata.slideshow.slide_type in ("slide", "subslide"):
            assert not is_folded(cell.source)
    assert all(
        cell.metadata.slideshow.slide_type == "slide" for cell in cells if cell.source.startswith("## ")
    )


def test_two_chapters_are_rehearsed_one_of_them_with_its_bodies_typed(tmp_path):
    lines = live.make_rehearsals(ROOT, tmp_path)
    assert lines == [f"made {tmp_path}/live_{name}.ipynb" for name in live.REHEARSED]
    untouched, typed = (nbformat.read(path, as_version=4).cells for path in sorted(tmp_path.iterdir()))
    assert any(live.TO_TYPE in cell.source for cell in untouched)
    cells = typed
    assert all("nbval-ignore-output" in c.metadata.tags for c in cells if c.cell_type == "code")
    assert (
        sum("return (1 + w) * eps_cond - w * eps_uncond" in c.source for c in cells if c.cell_type == "code")
        == 1
    )
