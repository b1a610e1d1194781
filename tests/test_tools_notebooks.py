"""Stored notebooks: built the same every time, and every kind of drift makes the check fail."""

import json
import shutil
import sys

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_notebook, new_output

import export
import notebooks
from course import ROOT, CourseError, cells_of_notebook, cells_of_source, digest, read_cells

SAMPLE = ROOT / "tests" / "sample_course"


@pytest.fixture(scope="module")
def built_course(tmp_path_factory):
    """The sample course after `make package` and `make notebooks`."""
    root = tmp_path_factory.mktemp("built") / "course"
    shutil.copytree(SAMPLE, root)
    for name in ("pyproject.toml", "notebooks/jupytext.toml"):
        shutil.copy(ROOT / name, root / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(root))  # the notebook imports the sample's own lecture26
        export.export(root)
        notebooks.run(root, store=True)
    return root


@pytest.fixture
def course(built_course, tmp_path, monkeypatch):
    """A copy of the built sample course that a test may spoil."""
    root = tmp_path / "course"
    shutil.copytree(built_course, root)
    monkeypatch.setenv("PYTHONPATH", str(root))
    return root


def replace(path, old, new):
    """Replace a text that must be there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_stored(path, change):
    """Change a stored notebook as JupyterLab would write it."""
    notebook = nbformat.read(path, as_version=4)
    change(notebook)
    nbformat.write(notebook, path)


def contents(root):
    """The bytes of every file of a course."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_built_course_passes_and_the_check_changes_nothing(course):
    before = contents(course)
    assert notebooks.check(course) == []
    assert contents(course) == before


def test_stored_notebook_holds_outputs_and_no_noise(course):
    stored = (course / "notebooks" / "01_waves.ipynb").read_text()
    notebook = json.loads(stored)
    assert set(notebook["metadata"]) == {"jupytext", "kernelspec", "language_info", "lecture26"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert notebook["cells"][-1]["outputs"][1]["data"]["text/plain"] == ["[1.000, -0.779, 0.607]"]
    assert "execution" not in stored.replace("execution_count", "")


def test_building_again_changes_no_byte(course):
    before = contents(course)
    notebooks.run(course, store=True)
    assert contents(course) == before


def test_cell_ids_survive_an_edit(course):
    path = course / "notebooks" / "01_waves.ipynb"
    before = [cell.id for cell in nbformat.read(path, as_version=4).cells]
    replace(path.with_suffix(".py"), "rate=0.5", "rate=0.25")
    notebooks.run(course, ["waves"], store=True)
    assert [cell.id for cell in nbformat.read(path, as_version=4).cells] == before
    assert "-0.779" not in path.read_text()


def test_slides_stand_in_the_stored_notebook_and_survive_the_way_back(course):
    source = course / "notebooks" / "01_waves.py"
    written = [cell.slide for cell in read_cells(source) if cell.slide]
    assert [slide[0] for slide in written] == ["# Waves die away", "# Two of them multiply"]
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [tuple(cell.metadata.slide) for cell in stored.cells if "slide" in cell.metadata] == written
    assert notebooks.source_of(stored) == source.read_text()


def test_slides_edited_in_the_stored_notebook_alone_are_not_lost(course):
    def edit(notebook):
        notebook.cells[0].metadata.slide[0] = "# Waves stay"

    edit_stored(course / "notebooks" / "01_waves.ipynb", edit)
    with pytest.raises(CourseError, match=r"(?s)the newer of the two.*-# Waves die away\n.*\+# Waves stay"):
        export.export(course)


def test_slides_do_not_touch_the_digest_of_notebooks_without_them(course):
    cells = cells_of_source(course / "notebooks" / "01_waves.py")
    assert [len(cell) for cell in cells].count(4) == 2  # kind, source, tags, slide
    notebook = new_notebook(cells=[new_markdown_cell("A text", metadata={"tags": ["core"]})])
    assert digest(cells_of_notebook(notebook)) == digest([("markdown", "A text", ("core",))])


@pytest.mark.parametrize("slide", ['"# A text"', "[1]"])
def test_slide_that_is_no_list_of_texts(course, slide):
    source = course / "notebooks" / "01_waves.py"
    replace(source, "# %% [markdown]\n# ## 1.2", f"# %% [markdown] slide={slide}\n# ## 1.2")
    with pytest.raises(CourseError, match=r"01_waves.py:\d+ \(cell 8\): `slide` must be a list of texts"):
        read_cells(source)


def test_running_stores_nothing_and_measures(course, capsys):
    before = contents(course)
    (run,) = notebooks.run(course)
    assert contents(course) == before
    assert run.name == "01_waves"
    assert 0 < run.slowest_cell < run.seconds
    assert 1e7 < run.peak_memory < 1e9
    assert "[1/1] 01_waves ..." in capsys.readouterr().out
    assert notebooks.table([run]).splitlines()[1].startswith("01_waves ")


def test_build_lays_out_a_source_written_by_hand(course):
    source = course / "notebooks" / "01_waves.py"
    text = source.read_text()
    replace(source, "# jupyter:\n", "# jupyter:\n#   jupytext:\n#     formats: ipynb,py:percent\n")
    (problem,) = notebooks.check(course)
    assert "01_waves.py is not laid out as Jupytext writes it" in problem
    assert problem.endswith("run `make notebooks NAMES=01_waves`")
    notebooks.run(course, store=True)
    assert source.read_text() == text


def test_failing_notebook_is_named_and_not_stored(course):
    source = course / "notebooks" / "01_waves.py"
    replace(source, "print(wave)", "print(nothing)")
    before = contents(course)
    with pytest.raises(CourseError, match="(?s)01_waves does not run:.*name 'nothing' is not defined"):
        notebooks.run(course, store=True)
    assert contents(course) == before


def test_drift_of_the_source_alone(course):
    replace(course / "notebooks" / "01_waves.py", "print(wave)", "print(wave.rate)")
    (problem,) = notebooks.check(course)
    assert problem.startswith("notebooks/01_waves.ipynb differs from notebooks/01_waves.py")
    assert "-print(wave.rate)" in problem and "+print(wave)" in problem
    assert problem.endswith("run `make notebooks NAMES=01_waves`")


def test_drift_of_prose_alone(course):
    replace(course / "notebooks" / "01_waves.py", "A course of one chapter", "A course of 1 chapter")
    assert len(notebooks.check(course)) == 1


def test_drift_of_the_stored_notebook_alone(course):
    def edit(notebook):
        notebook.cells[-1].source = "print(wave.rate)"

    edit_stored(course / "notebooks" / "01_waves.ipynb", edit)
    (problem,) = notebooks.check(course)
    assert "jupytext --to py:percent notebooks/01_waves.ipynb" in problem


def print_rate(notebook):
    """An edit of the last cell."""
    assert "print(wave)" in notebook.cells[-1].source
    notebook.cells[-1].source = notebook.cells[-1].source.replace("print(wave)", "print(wave.rate)")


@pytest.mark.parametrize("tool", ["build", "export"])
def test_edits_of_the_stored_notebook_alone_are_not_lost(course, tool):
    edit_stored(course / "notebooks" / "01_waves.ipynb", print_rate)
    before = contents(course)
    with pytest.raises(CourseError) as refusal:
        notebooks.run(course, store=True) if tool == "build" else export.export(course)
    message = str(refusal.value)
    assert message.startswith(
        "notebooks/01_waves.ipynb holds edits that notebooks/01_waves.py lacks; it is the newer of the two"
    )
    assert "+print(wave.rate)" in message
    assert "`jupytext --to py:percent notebooks/01_waves.ipynb`" in message
    assert contents(course) == before


def test_edits_of_both_sides_are_said_to_be(course):
    edit_stored(course / "notebooks" / "01_waves.ipynb", print_rate)
    replace(course / "notebooks" / "01_waves.py", "print(wave)", "print(wave, wave)")
    with pytest.raises(CourseError, match="both were edited since they were built"):
        export.export(course)


@pytest.mark.parametrize("kept", [".py", ".ipynb"])
def test_what_the_refusal_advises_mends_it(course, kept):
    from jupytext.cli import jupytext

    stored = course / "notebooks" / "01_waves.ipynb"
    edit_stored(stored, print_rate)
    if kept == ".ipynb":
        jupytext(["--quiet", "--to", "py:percent", str(stored)])
    else:
        jupytext(["--quiet", "--update", "--to", "ipynb", str(stored.with_suffix(".py"))])
    notebooks.run(course, store=True)
    assert ("wave.rate" in stored.read_text()) == (kept == ".ipynb")
    assert notebooks.check(course) == []


def test_edits_of_the_source_alone_are_built(course):
    replace(course / "notebooks" / "01_waves.py", "print(wave)", "print(wave.rate)")
    (problem,) = notebooks.check(course)
    assert "differs from notebooks/01_waves.py; edited since they were built: .py" in problem
    export.export(course)
    notebooks.run(course, store=True)
    assert notebooks.check(course) == []


def test_a_notebook_that_does_not_say_from_what_it_was_built_is_built_from_its_source(course):
    def forget(notebook):
        print_rate(notebook)
        del notebook.metadata["lecture26"]

    edit_stored(course / "notebooks" / "01_waves.ipynb", forget)
    export.export(course)
    notebooks.run(course, store=True)
    assert notebooks.check(course) == []


def test_drift_of_exported_code_concerns_module_and_notebook(course):
    replace(course / "notebooks" / "01_waves.py", "return left", "return list(left)")
    module, stored = notebooks.check(course)
    assert module == "lecture26/waves.py differs from notebooks/01_waves.py: run `make package`"
    assert "01_waves.ipynb differs" in stored


def test_drift_of_the_module_alone(course):
    replace(course / "lecture26" / "waves.py", "return left", "return 2 * left")
    assert notebooks.check(course) == [
        "lecture26/waves.py differs from notebooks/01_waves.py: run `make package`"
    ]


def test_missing_notebook(course):
    (course / "notebooks" / "01_waves.ipynb").unlink()
    assert notebooks.check(course) == [
        "notebooks/01_waves.ipynb is missing: run `make notebooks NAMES=01_waves`"
    ]


FAULTS = {
    "not executed": ({"execution_count": None}, "was not executed in one run from top to bottom"),
    "executed out of order": ({"execution_count": 1}, "was not executed in one run from top to bottom"),
    "error": ({"outputs": [new_output("error", ename="E", evalue="", traceback=[])]}, "ends in an error"),
    "warning": ({"outputs": [new_output("stream", name="stderr", text="Careful\n")]}, "a warning: 'Careful'"),
    "address": ({"outputs": [new_output("stream", text="<object at 0x7f9a126e92d0>")]}, "a memory address"),
    "widget": ({"outputs": [new_output("display_data", {notebooks.WIDGET: {}})]}, "shows a widget"),
}


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS)
def test_stale_or_noisy_output(course, change, message):
    edit_stored(course / "notebooks" / "01_waves.ipynb", lambda notebook: notebook.cells[-1].update(change))
    (problem,) = notebooks.check(course)
    assert problem.startswith("notebooks/01_waves.ipynb: cell 13 ") and message in problem


@pytest.mark.slow
def test_command_line(course, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["notebooks.py", "check", "--root", str(course)])
    with pytest.raises(SystemExit) as passed:
        notebooks.main()
    assert passed.value.code is None
    replace(course / "lecture26" / "waves.py", "return left", "return 2 * left")
    with pytest.raises(SystemExit) as failed:
        notebooks.main()
    assert failed.value.code.endswith("run `make package`")
    monkeypatch.setattr(sys, "argv", ["notebooks.py", "run", "waves", "--root", str(course)])
    notebooks.main()
    assert "peak memory\n01_waves " in capsys.readouterr().out
