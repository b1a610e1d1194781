"""Build, run and check the notebooks.

- `python tools/notebooks.py build` executes every notebook and stores it with its outputs;
  `python tools/notebooks.py build ddpm` does one of them. It refuses where a stored notebook holds edits that
  its source lacks, since they would be lost.
- `python tools/notebooks.py run` executes them and stores what each took, in data/results/chapters.json.
- `python tools/notebooks.py check` fails where a source, its stored notebook and its module do not agree.

`build` and `run` end with a table of the seconds and the memory that each chapter took.
"""

import argparse
import os
import re
import shutil
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
import psutil
from jupytext.cli import jupytext as jupytext_command
from nbclient.exceptions import DeadKernelError
from nbconvert.preprocessors import CellExecutionError, ClearMetadataPreprocessor, ExecutePreprocessor

import export
from course import (
    OWN_METADATA,
    ROOT,
    CourseError,
    cells_of_notebook,
    check_nothing_is_lost,
    digest,
    edited_sides,
    first_difference,
    notebook_sources,
)
from lecture26.kit.files import replace_when_complete
from lecture26.kit.results import load_results, results_file, save_results

CELL_TIMEOUT = 1800  # seconds; far beyond a minute, since the machine may have other work to do
COSTS = "chapters"  # the stored result that says what each chapter took
WIDGET = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Run:
    """What it took to execute a notebook."""

    name: str
    seconds: float
    slowest_cell: float  # seconds
    peak_memory: int  # bytes, of the kernel and its children


class PeakMemory(threading.Thread):
    """The most bytes that the processes below this one held together, looked at ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self._done = threading.Event()

    def run(self):
        while not self._done.wait(0.1):
            self.peak = max(self.peak, sum(map(resident_memory, psutil.Process().children(recursive=True))))

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self.join()


def resident_memory(process: psutil.Process) -> int:
    """The bytes of memory that a process holds; none if it has just ended."""
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


class TimedExecutor(ExecutePreprocessor):
    """Executes a notebook and remembers how many seconds its slowest cell took."""

    slowest_cell = 0.0

    def preprocess_cell(self, cell, resources, index):
        begin = time.perf_counter()
        outcome = super().preprocess_cell(cell, resources, index)
        self.slowest_cell = max(self.slowest_cell, time.perf_counter() - begin)
        return outcome


def execute(notebook: nbformat.NotebookNode, name: str, folder: Path) -> Run:
    """Execute a notebook in place, in a folder; an error in a cell is raised as a CourseError."""
    os.environ["TQDM_DISABLE"] = "1"  # progress bars would leave widget state in the outputs
    executor = TimedExecutor(
        timeout=CELL_TIMEOUT,
        startup_timeout=CELL_TIMEOUT,
        iopub_timeout=CELL_TIMEOUT,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
    )
    begin = time.perf_counter()
    try:
        with PeakMemory() as memory:
            executor.preprocess(notebook, {"metadata": {"path": str(folder)}})
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        raise CourseError(f"{name} does not run:\n{error}") from None
    return Run(name, time.perf_counter() - begin, executor.slowest_cell, memory.peak)


def run(root: Path, names: list[str] | None = None, store: bool = False) -> list[Run]:
    """Execute all notebooks, or some, with a line for each; with `store`, keep them with their outputs."""
    sources = notebook_sources(root, names)
    if store:
        for source in sources:
            check_nothing_is_lost(source)
    runs = []
    for number, source in enumerate(sources, start=1):
        print(f"[{number}/{len(sources)}] {source.stem} ...", end=" ", flush=True)
        notebook = nbformat.reads(updated(source), as_version=4)
        runs.append(execute(notebook, source.stem, source.parent))
        print(f"{runs[-1].seconds:.0f} s")
        if store:
            store_notebook(notebook, source)
    return runs


def updated(source: Path) -> str:
    """A notebook's source with the outputs stored so far, as `jupytext --update` would leave it.

    It works on copies: nothing in the checkout changes.
    """
    with TemporaryDirectory() as folder:
        for path in (source, source.with_suffix(".ipynb"), source.with_name("jupytext.toml")):
            if path.exists():
                shutil.copy(path, folder)
        copy = Path(folder, source.name)
        jupytext_command(["--quiet", "--to", "ipynb", "--update", str(copy)])
        return copy.with_suffix(".ipynb").read_text(encoding="utf-8")


def source_of(notebook: nbformat.NotebookNode) -> str:
    """The source that Jupytext writes for a notebook."""
    return jupytext.writes(notebook, fmt="py:percent")


def store_notebook(notebook: nbformat.NotebookNode, source: Path) -> None:
    """Write an executed notebook without the metadata that differ from run to run, and its source in step."""
    clear = ClearMetadataPreprocessor(
        enabled=True,
        preserve_cell_metadata_mask={"tags", "points", "slide", "lines_to_next_cell"},
        preserve_nb_metadata_mask={"jupytext", "kernelspec", ("language_info", "name")},
    )
    notebook, _ = clear.preprocess(notebook, {})
    notebook.metadata[OWN_METADATA] = {"built_from": digest(cells_of_notebook(notebook))}
    with replace_when_complete(source.with_suffix(".ipynb")) as temporary:
        nbformat.write(notebook, temporary)
    text = source_of(notebook)
    if source.read_text(encoding="utf-8") != text:  # only the header and blank lines between cells can differ
        source.write_text(text, encoding="utf-8", newline="\n")


def table(runs: list[Run]) -> str:
    """Seconds and peak memory of each chapter as a text table."""
    width = max(len(run.name) for run in runs)
    lines = [f"{'chapter':{width}}  seconds  slowest cell  peak memory"]
    for run in runs:
        memory = f"{run.peak_memory / 1e9:.2f} GB"
        lines.append(f"{run.name:{width}}  {run.seconds:7.0f}  {run.slowest_cell:10.1f} s  {memory:>11}")
    return "\n".join(lines)


def keep(runs: list[Run]) -> None:
    """Store what each chapter took; what chapters took that were not run now stays."""
    known = load_results(COSTS)["chapters"] if results_file(COSTS).exists() else {}
    taken = {run.name: {key: value for key, value in asdict(run).items() if key != "name"} for run in runs}
    save_results(COSTS, "make course", {"chapters": dict(sorted((known | taken).items()))})


def check(root: Path) -> list[str]:
    """Where modules, sources and stored notebooks disagree, each with the command that mends it."""
    problems = export.check(root)
    for source in notebook_sources(root):
        problems += [f"{problem}: run `make notebooks NAMES={source.stem}`" for problem in drift(source)]
    return problems


def drift(source: Path) -> list[str]:
    """How a stored notebook differs from its source, in either direction, and what its outputs lack."""
    stored = source.with_suffix(".ipynb")
    if not stored.exists():
        return [f"notebooks/{stored.name} is missing"]
    source_text, stored_text = source.read_text(encoding="utf-8"), stored.read_text(encoding="utf-8")
    notebook = nbformat.reads(stored_text, as_version=4)
    problems = [f"notebooks/{stored.name}: {fault}" for fault in output_faults(notebook)]
    text_back = source_of(notebook)
    if updated(source) != stored_text:
        edited = edited_sides(source, notebook)
        newer = f"; edited since they were built: {', '.join(sorted(edited))}" if edited else ""
        problems.append(
            f"notebooks/{stored.name} differs from notebooks/{source.name}{newer}"
            f"{first_difference(source_text, text_back)}"
            f"  to keep the .ipynb's text, first run `jupytext --to py:percent notebooks/{stored.name}`\n"
            "  to bring the two together"
        )
    elif text_back != source_text:
        problems.append(
            f"notebooks/{source.name} is not laid out as Jupytext writes it"
            f"{first_difference(source_text, text_back)}"
            "  to lay it out"
        )
    return problems


def output_faults(notebook: nbformat.NotebookNode) -> list[str]:
    """What shows that a notebook was not stored after one clean run, or that the next run will differ."""
    faults, executed = [], 0
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        executed += 1
        if cell.execution_count != executed:
            return [*faults, f"cell {number} was not executed in one run from top to bottom"]
        for output in cell.outputs:
            data = output.get("data", {})
            text = output.get("text", "") + data.get("text/plain", "")
            if output.output_type == "error":
                faults.append(f"cell {number} ends in an error")
            elif output.get("name") == "stderr":
                faults.append(f"cell {number} prints a warning: {text.strip().splitlines()[0]!r}")
            elif WIDGET in data:
                faults.append(f"cell {number} shows a widget, whose state is not stored")
            elif re.search(r"\b0x[0-9a-f]{6,}", text):
                faults.append(f"cell {number} shows a memory address, which changes with every run: {text!r}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description="Build, run or check the notebooks.")
    parser.add_argument("action", choices=["build", "run", "check"])
    parser.add_argument("names", nargs="*", help="chapters, e.g. ddpm or 01_ddpm; none means all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    arguments = parser.parse_args()
    try:
        if arguments.action == "check":
            problems = check(arguments.root)
            sys.exit("\n".join(problems) or None)
        runs = run(arguments.root, arguments.names, store=arguments.action == "build")
        print(table(runs))
        if arguments.action == "run" and arguments.root == ROOT:
            keep(runs)
    except CourseError as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
