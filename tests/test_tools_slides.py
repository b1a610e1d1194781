"""The builder of the slides: what a cell's texts become, what is refused, what every chapter keeps to."""

import base64
import hashlib
import io
import re
import shutil
import tarfile
import urllib.error

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import npm
import slides
from course import ROOT, Cell, CourseError, notebook_sources, read_cells
from slide_code import fitting, formatted
from slide_texts import Chapter, Part, Slide, faults_of, read_slides

SAMPLE = ROOT / "tests" / "sample_course"
FEWEST, MOST = 25, 40  # slides of a chapter
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PLAN = """
[sections."1.1 The decay $e^{-kt}$"]
minutes = 3
say = "Let them guess."
stumble = "The sign."
question = "Why e?"
answer = "It is its own derivative."
predict = {question = "Half of it?", answer = "The half-life."}
"""


@pytest.fixture
def course(tmp_path):
    """The sample course with a stored notebook: a line, a table and a picture are its last outputs."""
    root = tmp_path / "course"
    shutil.copytree(SAMPLE, root)
    store(root)
    return root


def store(root):
    """Write a stored notebook with the outputs of the last cell."""
    notebook = new_notebook()
    for cell in read_cells(root / "notebooks" / "01_waves.py"):
        make = new_code_cell if cell.kind == "code" else new_markdown_cell
        notebook.cells.append(make(cell.source))
    notebook.cells[-1].outputs = [
        new_output("stream", text="1.0 Hz\n  damped by 0.5 1/s\n"),
        new_output("display_data", {"text/markdown": "| t | a |\n|---|---|\n| 0 | 1 |"}),
        new_output("display_data", {"image/png": PIXEL}, metadata={"image/png": {"alt": 'A "wave"'}}),
    ]
    nbformat.write(notebook, root / "notebooks" / "01_waves.ipynb")


def write_slide(root, *texts):
    """Give the last cell slide texts; returns the sample's chapter."""
    source = root / "notebooks" / "01_waves.py"
    text, old = source.read_text(), "# %%\nwave = Wave("
    assert old in text
    listed = nbformat.v4.nbjson.json.dumps(list(texts))
    source.write_text(text.replace(old, f"# %% slide={listed}\nwave = Wave("))
    return Chapter(source)


def html_of(root, *texts):
    """The HTML of a slide of the last cell."""
    chapter = write_slide(root, "# A title", *texts)
    return slides.page(chapter, read_slides(chapter)[-1], 9)


def test_a_cell_may_hold_several_slides_in_the_order_of_the_notebook(course):
    read = read_slides(Chapter(course / "notebooks" / "01_waves.py"))
    assert [slide.title for slide in read] == ["Waves die away", "What to remember", "Two of them multiply"]
    assert [slide.kinds() for slide in read] == [["question", "equation"], ["item"], ["code", "text"]]
    assert [slide.section for slide in read] == ["01 · Damped waves"] * 2 + ["1.2 What a **wave** does"]


def test_equation_is_the_notebooks_own_with_its_number_beside_it(course):
    chapter = Chapter(course / "notebooks" / "01_waves.py")
    page = slides.page(chapter, read_slides(chapter)[0], 2)
    assert r"\[e^{-k(s+t)} = e^{-ks} e^{-kt}\]" in page and '<span class="number">(1.1)</span>' in page


def test_own_equation_may_bear_a_number_of_the_chapter(course):
    page = html_of(course, r"$$a<b \tag{1.1}$$")
    assert r"\[a&lt;b\]" in page.replace(" \\]", "\\]") and "(1.1)</span>" in page


def test_first_part_stands_there_and_the_others_come_step_by_step(course):
    page = html_of(course, "One $x_t$.", "- two", "- three", "? Four?")
    whole = '<span class="whole"><span class="math inline">\\(x_t\\)</span>.</span>'
    assert f'<p class="text">One {whole}</p>' in page
    assert '<ul><li class="fragment">two</li><li class="fragment">three</li></ul>' in page
    assert '<p class="question fragment">Four?</p>' in page


def test_code_comes_without_docstring_checks_and_marks(course):
    shown = text_of(html_of(course, "[code decay]"))
    assert shown.startswith(
        "def decay(times: Samples, rate: float) -> Samples:\n    # a(t) = exp(-k t)   (1.1)"
    )
    assert not any(word in shown for word in ("How much", "raise", "SOLUTION"))


def text_of(page):
    """The text of a page's listing."""
    return re.sub("<[^>]+>", "", re.search("(?s)<pre.*?>(.*?)</pre>", page)[1]).replace("&gt;", ">")


def test_lines_of_a_function_and_of_the_cell_itself(course):
    assert text_of(html_of(course, "[code decay: left .. return]")).splitlines() == [
        "left = [math.exp(-rate * t) for t in times]  # one factor for each time",
        "return left",
    ]


def test_comment_that_makes_a_line_too_long_stands_above_it():
    line = "    weights = scores.softmax(dim=-1)  # (B, heads, N, M), one row for each of N places"
    assert formatted(f"def f():\n{line}\n").splitlines()[1:] == [
        "    # (B, heads, N, M), one row for each of N places",
        "    weights = scores.softmax(dim=-1)",
    ]


def test_methods_are_named_by_their_class(course):
    assert text_of(html_of(course, "[code Wave.__call__: pairs .. pairs]")).startswith("pairs = zip(")


def test_code_of_the_cell(course):
    assert "print(wave)" in text_of(html_of(course, "[code]"))


def test_output_and_table_are_the_stored_ones(course):
    page = html_of(course, "[output 2-2]", "[table]")
    assert text_of(page) == "  damped by 0.5 1/s"
    assert "<th>t</th>" in page and "<td>1</td>" in page


def test_own_table(course):
    assert "\\(w\\)</span></td>" in html_of(course, "| a |\n|---|\n| $w$ |")


def test_picture_has_its_description_and_stands_beside_its_sentence_unless_it_is_wide(course):
    page = html_of(course, "[picture]", "One sentence.")
    assert f'<img alt="A &quot;wave&quot;" style="height: 460px" src="data:image/png;base64,{PIXEL}">' in page
    assert '<section class="beside">' in page and '<p class="text fragment">One sentence.</p>' in page


REFUSED = {
    "no title": (["A text"], "the first text of `slide` must be '# Title'; got 'A text'"),
    "equation": (["# T", "(1.9)"], r"the chapter has no equation (1.9)"),
    "own number": (["# T", r"$$a \tag{1.9}$$"], "the chapter has no equation (1.9)"),
    "function": (["# T", "[code grow]"], "the chapter defines no 'grow'"),
    "first line": (["# T", "[code decay: nothing .. return]"], "no line of the code begins with 'nothing'"),
    "last line": (["# T", "[code decay: left .. nothing]"], "no line after 'left' begins with 'nothing'"),
    "picture": (
        ["# T", "[picture 2]", "One."],
        "no picture 2 is stored: run `make notebooks NAMES=01_waves`",
    ),
    "reference": (["# T", "[film]"], "'[film]' is none of [picture], [table], [output] and [code]"),
    "long title": (["# " + "word " * 15, "One."], "the title has more than 14 words"),
    "long text": (["# T", "word " * 31], "a text has 31 words, more than 30"),
    "long item": (["# T", "- " + "word " * 23], "an item has 23 words, more than 22"),
    "long slide": (["# T", *["word " * 29] * 3], "it has 87 words, more than 85"),
    "long list": (["# T", *["- word"] * 7], "the list has more than 6 items"),
    "no sentence": (["# T", "[picture]"], "a picture needs one sentence; got 0"),
    "two sentences": (["# T", "[picture]", "One.", "Two."], "a picture needs one sentence; got 2"),
    "empty": (["# T"], "it has nothing but a title"),
}


@pytest.mark.parametrize(("texts", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_shown_is_refused_by_cell_and_line(course, texts, message):
    chapter = write_slide(course, *texts)
    line = chapter.source.read_text().splitlines().index("wave = Wave(frequency=1.0, rate=0.5)")
    with pytest.raises(CourseError) as refusal:
        read_slides(chapter)
    assert str(refusal.value).startswith(f"notebooks/01_waves.py:{line} (cell 13): ")
    assert message in str(refusal.value)


def test_code_that_is_too_long_or_too_wide_is_refused():
    cell = Cell("notebooks/01_waves.py", 1, 1, "code", "", ())
    with pytest.raises(CourseError, match="16 lines of code or output, more than 15"):
        fitting(["x = 1"] * 16, cell)
    with pytest.raises(CourseError, match="a line is longer than 84 characters"):
        fitting(["x" * 85], cell)


def test_outputs_of_a_cell_that_was_changed_are_not_shown(course):
    source = course / "notebooks" / "01_waves.py"
    source.write_text(source.read_text().replace("print(wave)", "print(wave.rate)"))
    with pytest.raises(CourseError, match="no such output is stored"):
        read_slides(write_slide(course, "# T", "[output]"))


def test_notes_are_the_teaching_text_of_the_section_or_else_the_prose(course):
    source = course / "notebooks" / "01_waves.py"
    texts = '# %% slide=["# T", "One."] tags=["export", "exercise"]\ndef decay'
    source.write_text(source.read_text().replace('# %% tags=["export", "exercise"]\ndef decay', texts))
    prose = {slide.title: slide.notes for slide in read_slides(Chapter(source))}
    assert "A course of one chapter" in prose["Waves die away"]
    assert prose["What to remember"] == prose["Waves die away"]
    assert prose["T"].startswith("## 1.1") and "A course of one chapter" not in prose["T"]
    plan = course / "teaching" / "01_waves.toml"
    plan.parent.mkdir()
    plan.write_text(PLAN)
    planned = {slide.title: slide.notes for slide in read_slides(Chapter(source))}
    assert planned["Waves die away"] == prose["Waves die away"]
    assert planned["T"].startswith("Let them guess.\n\n**Ask:** Half of it? *The half-life.*\n\n")
    assert "**Where people stumble:** The sign." in planned["T"] and "Why e?" in planned["T"]


@pytest.fixture
def built(course, monkeypatch):
    """The sample's slides, without what comes from npm."""
    monkeypatch.setattr(npm, "fetched", lambda package, cache: cache / package.archive)
    monkeypatch.setattr(npm, "unpack", lambda archive, members, folder: None)
    lines = slides.build(course)
    assert lines == ["made build/slides/01_waves.html: 4 slides", "open build/slides/index.html in a browser"]
    return course / "build" / "slides"


def test_what_is_built_asks_no_other_host(built):
    files = [file for file in built.rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"01_waves.html", "index.html", "deck.css", "deck.js", "code.css"}
    for file in files:
        assert not re.search(r"//\w|@import", re.sub(r"^\s*//.*", "", file.read_text(), flags=re.MULTILINE))


def test_index_names_the_decks_that_are_there(built):
    assert '<li><a href="01_waves.html">01 · Damped waves</a></li>' in (built / "index.html").read_text()


def package_of(content):
    """A package with an archive of one file, and the archive's bytes."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("package/dist/a.js")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(packed.getvalue()).digest()).decode()
    return npm.Package("some", "1.2.3", digest), packed.getvalue()


def test_package_is_fetched_once_and_held_against_its_hash(tmp_path, monkeypatch):
    package, content = package_of(b"let a;")
    asked = []

    def answer(address, timeout):
        asked.append(address)
        return io.BytesIO(content)

    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setattr(npm.urllib.request, "urlopen", answer)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://mirror.example/npm/")
    archive = npm.fetched(package, tmp_path / "cache")
    assert npm.fetched(package, tmp_path / "cache") == archive
    assert asked == ["https://mirror.example/npm/some/-/some-1.2.3.tgz"]
    npm.unpack(archive, {"dist/a.js": "b.js"}, tmp_path)
    assert (tmp_path / "b.js").read_bytes() == b"let a;"
    archive.write_bytes(b"spoiled")
    npm.fetched(package, tmp_path / "cache")
    assert archive.read_bytes() == content and len(asked) == 2


def test_package_with_another_hash_is_refused(tmp_path, monkeypatch):
    package, _ = package_of(b"let a;")
    _, other = package_of(b"let b;")
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setattr(npm.urllib.request, "urlopen", lambda *arguments, **options: io.BytesIO(other))
    with pytest.raises(CourseError, match="some-1.2.3.tgz as fetched is not the pinned one"):
        npm.fetched(package, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_so(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise urllib.error.URLError("no route")

    package, _ = package_of(b"let a;")
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    monkeypatch.setattr(npm.urllib.request, "urlopen", fail)
    with pytest.raises(
        npm.NotFetched, match="(?s)some 1.2.3 could not be fetched.*needs a network.*no route"
    ):
        npm.fetched(package, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", notebook_sources(ROOT), ids=lambda source: source.stem)
def test_every_chapter_has_its_slides(source):
    """Reading them holds each slide to `faults_of`: short texts, and for each picture a sentence."""
    chapter = Chapter(source)
    read = read_slides(chapter)
    assert FEWEST <= len(read) + 1 <= MOST  # with the title
    kinds = [kind for slide in read for kind in slide.kinds()]
    assert all(kinds.count(kind) >= 3 for kind in ("picture", "question"))
    assert kinds.count("code") <= len(read) / 3
    assert len({slide.title for slide in read}) == len(read)
    assert all(slide.notes for slide in read)
    assert not re.search(r'(?:src|href)="(?!data:|assets/)', slides.deck_of(chapter, read))


def test_a_slide_without_faults():
    cell = Cell("notebooks/01_waves.py", 1, 1, "code", "", ())
    parts = [Part("picture", ""), Part("text", "", words=3)]
    assert faults_of(Slide("A title", "", cell, parts)) == []
