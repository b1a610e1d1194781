"""Chapter 05 taught from its live notebook in JupyterLab, bodies typed, one of them wrongly at first."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import nbformat
import pytest

import live
from course import ROOT, notebook_sources

CHAPTER = "05_classifier_free_guidance"
PATIENCE = 600_000  # milliseconds; a kernel takes its time on a busy machine
FONTS = "https://fonts.googleapis.com/"  # jupyterlab-rise asks for them, and does without
GRADIENT = "return (eps_uncond - eps_cond) / (1 - alpha_bar).sqrt()"
WRONG = "return (1 + w) * eps_uncond - w * eps_cond"
MIXED = "return eps_uncond + (1 + w) * (eps_cond - eps_uncond)"

# The notebook's cells by a text in them, as JupyterLab holds them whether or not they are on the screen.
CELL = "const cell = window.jupyterapp.shell.currentWidget.content.widgets.find(\
 (cell) => cell.model.sharedModel.getSource().includes(text));"
SELECT = f"""(text) => {{
  {CELL}
  const notebook = window.jupyterapp.shell.currentWidget.content;
  notebook.mode = "command";
  notebook.activeCellIndex = notebook.widgets.indexOf(cell);
  notebook.deselectAll();
  return notebook.scrollToItem(notebook.activeCellIndex, "center");
}}"""
SAID = f"""(text) => {{
  {CELL}
  return cell.model.sharedModel.getOutputs().map((output) => JSON.stringify(output)).join();
}}"""
HAS_SAID = f"([text, expected]) => {{ {CELL}\
 return JSON.stringify(cell.model.sharedModel.getOutputs()).includes(expected); }}"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves the live notebook of one chapter, and nothing else."""
    folder = tmp_path_factory.mktemp("live")
    (source,) = notebook_sources(ROOT, [CHAPTER])
    nbformat.write(live.live_notebook(source), folder / f"{CHAPTER}.ipynb")
    (folder / "rise.css").write_text((ROOT / "teaching" / "rise.css").read_text())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {f"JUPYTERLAB_{name}_DIR": str(folder / name) for name in ("SETTINGS", "WORKSPACES")}
    environment = (
        os.environ | settings | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    )
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    options += [f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url="]
    options += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log
    )
    address = f"http://localhost:{port}"
    try:
        wait_for(address, server, folder / "log")
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_for(address, server, log):
    """Wait until the server answers."""
    for _ in range(PATIENCE // 1000):
        try:
            urllib.request.urlopen(f"{address}/api")
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(1)
    raise AssertionError(log.read_text())


@pytest.fixture
def notebook(lab, page):
    """The chapter's notebook, opened in JupyterLab, its kernel ready."""
    page.set_default_timeout(PATIENCE)
    page.goto(f"{lab}/lab/tree/{CHAPTER}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )
    return page


def type_body(page, function, body):
    """Type a body in the place of what stands in the last line of a function's cell."""
    page.evaluate(SELECT, f"def {function}(")
    page.locator(".jp-Cell.jp-mod-active .cm-content").click()
    page.keyboard.press("ControlOrMeta+End")
    page.keyboard.press("Shift+Home")
    page.keyboard.type(body)


def run_all_above(page, text):
    """Click on the menu's entry, the cell with a text being selected."""
    page.evaluate(SELECT, text)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.get_by_text("Run All Above Selected Cell", exact=True).click()


def wait_until_said(page, text, expected):
    """Wait until a cell's outputs hold a text."""
    page.wait_for_function(HAS_SAID, arg=[text, expected])


def test_taught_with_two_bodies_typed_one_wrongly_at_first(notebook):
    page = notebook
    type_body(page, "implicit_gradient", GRADIENT)
    type_body(page, "cfg_combine", WRONG)
    run_all_above(page, "## Two ways to count")
    check = 'check("classifier_free_guidance.cfg_combine"'
    wait_until_said(page, 'verify("5.3"', "AssertionError")  # the proof fails, and there it stops
    assert "holds" in page.evaluate(SAID, 'verify("5.1"')
    assert "as typed above" in page.evaluate(SAID, "typed_or_finished(cfg_combine")
    assert "The mistake is known: swapped halves" in page.evaluate(SAID, check)
    assert page.evaluate(SAID, 'verify("5.4"') == ""

    type_body(page, "cfg_combine", MIXED)
    run_all_above(page, "## What a weight above 0 draws")
    wait_until_said(page, 'verify("5.7"', "holds")
    for text, expected in {
        check: "passed",
        'verify("5.1"': "holds",
        "typed_or_finished(implicit_gradient": "as typed above",
        "typed_or_finished(doubled_pass": "nothing was typed",
        'check("classifier_free_guidance.doubled_pass"': "passed",
    }.items():
        assert expected in page.evaluate(SAID, text), text
    assert page.locator("mjx-merror").count() == 0
    assert [url for url in page.foreign if not is_own(url, page)] == []


def is_own(url, page):
    """Whether an address is of the server, or of a picture that is kept in the notebook."""
    return url.startswith((page.url.split("/lab/")[0], page.url.split("/rise/")[0], "attachment:", "ws:"))


@pytest.mark.skipif(
    find_spec("jupyterlab_rise") is None, reason="needs jupyterlab-rise: pip install -e '.[present]'"
)
def test_presented_slide_by_slide(lab, page):
    """Each slide can be read to its end: what is too long for it scrolls, and nothing is too wide."""
    page.set_default_timeout(PATIENCE)
    page.goto(f"{lab}/rise/{CHAPTER}.ipynb")
    page.wait_for_selector(".reveal .slides section.present .jp-Cell")
    number, seen = page.locator(".slide-number").first, []
    while not seen or number.inner_text() != seen[-1]:
        seen.append(number.inner_text())
        slide = page.evaluate("""() => {
          const slide = [...document.querySelectorAll("section.present")].pop();
          const scrolls = getComputedStyle(slide).overflowY === "scroll";
          return {isWide: slide.scrollWidth > slide.clientWidth + 1, text: slide.innerText.trim(),
            isCut: slide.scrollHeight > innerHeight && !scrolls};
        }""")
        assert slide["text"] and not slide["isWide"] and not slide["isCut"], (seen[-1], slide)
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
    assert len(seen) > 30
    assert [url for url in page.foreign if not is_own(url, page) and not url.startswith(FONTS)] == []
