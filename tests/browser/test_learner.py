"""Chapter 01's copy for a learner in JupyterLab: it runs, names a mistake, is saved, and no more."""

import hashlib

import nbformat
import pytest
from lab import SAID, is_own, jupyterlab, open_notebook, run_all, type_body, wait_until_said

from course import ROOT, notebook_sources
from editions import learners_copy

CHAPTER = "01_ddpm"
WRONG = "return alpha_bar * x_0 + (1 - alpha_bar) * noise"  # variances where standard deviations belong
CHECK = 'check("ddpm.q_sample"'
LAST = "progress()"


@pytest.fixture
def folder(tmp_path):
    (source,) = notebook_sources(ROOT, [CHAPTER])
    nbformat.write(learners_copy(source), tmp_path / f"{CHAPTER}.ipynb")
    return tmp_path


def state_of_the_course():
    """What tells whether a file of the course has changed."""
    files = [file for name in ("notebooks", "lecture26", "data") for file in sorted((ROOT / name).rglob("*"))]
    kept = [file for file in files if file.is_file() and "__pycache__" not in file.parts]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


def test_a_learner_runs_the_chapter_gets_a_hint_and_saves(folder, page):
    before = state_of_the_course()
    with jupyterlab(folder) as address:
        open_notebook(page, address, CHAPTER)
        type_body(page, "q_sample", WRONG)
        run_all(page)
        wait_until_said(page, LAST, "output_type")
        assert "The mistake is known" in page.evaluate(SAID, CHECK)
        assert "not filled in yet" in page.evaluate(SAID, 'check("ddpm.posterior_mean"')
        assert "holds" in page.evaluate(SAID, 'verify("1.6"')  # by the finished function
        page.keyboard.press("ControlOrMeta+s")
        page.wait_for_function("window.jupyterapp.shell.currentWidget.context.model.dirty === false")
        assert page.locator("mjx-merror").count() == 0
        assert [url for url in page.foreign if not is_own(url, page)] == []
    saved = nbformat.read(folder / f"{CHAPTER}.ipynb", as_version=4)
    errors = [
        output.evalue
        for cell in saved.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert errors == []
    assert WRONG in next(cell.source for cell in saved.cells if "def q_sample(" in cell.source)
    assert state_of_the_course() == before
