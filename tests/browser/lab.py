"""A JupyterLab that is driven as a reader drives it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

from course import ROOT

PATIENCE = 600_000  # milliseconds; a kernel takes its time on a busy machine

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


@contextmanager
def jupyterlab(folder):
    """The address of a JupyterLab that serves a folder, and nothing else."""
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


def open_notebook(page, address, name):
    """Open a notebook, and wait until its kernel is ready."""
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}/lab/tree/{name}.ipynb")
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.wait_for_function(
        "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    )


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
    page.locator(".lm-Menu").get_by_text("Run All Above Selected Cell", exact=True).click()


def run_all(page):
    """Click on the menu's entry that runs the whole notebook."""
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.get_by_text("Run All Cells", exact=True).click()


def wait_until_said(page, text, expected):
    """Wait until a cell's outputs hold a text."""
    page.wait_for_function(HAS_SAID, arg=[text, expected])


def is_own(url, page):
    """Whether an address is of the server, or of a picture that is kept in the notebook."""
    return url.startswith((page.url.split("/lab/")[0], page.url.split("/rise/")[0], "attachment:", "ws:"))
