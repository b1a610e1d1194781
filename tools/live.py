"""Make the notebooks for teaching live in live/: the core path, bodies to be typed, notes for the teacher.

A notebook that exists is the teacher's own and stays as it is; `--reset` makes it anew and keeps the old one
in live/old/. The page of notes beside it is made each time.

With `--rehearse FOLDER` it makes notebooks for `make nbval` there instead, the bodies of one chapter typed;
with `--measure` it runs them, and stores how long their sections take in teaching/measured.json.
"""

import argparse
import ast
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_markdown_cell

import editions
from board import board, is_caption, is_folded, paragraphs
from core_path import Section, needed, sections
from course import OWN_METADATA, ROOT, Cell, CourseError, module_name, notebook_sources, read_cells
from lecture26.kit.files import replace_when_complete
from lecture26.kit.live import has_dots_and
from notebooks import CELL_TIMEOUT, TimedExecutor
from teaching import MEASURED, Notes, Prediction, Session, Teaching, notes_page, plan, read_teaching

TO_TYPE = "...  # to be typed"
IMPORT = "from lecture26.kit.live import typed_or_finished"
LARGER = 'plt.rcParams["figure.dpi"] = 110  # for a projector'
ASKED = "**Before it is run:**"
LEFT_OUT = "# from what is left out here"
TYPED_IN_REHEARSAL = "05_classifier_free_guidance"
# The chapters that `make nbval` runs, one as it is made and one typed; of all a test sees that each name
# is defined before it is used.
REHEARSED = ("01_ddpm", TYPED_IN_REHEARSAL)
RISE = {
    "scroll": True,
    "center": False,
    "transition": "none",
    "slideNumber": "c/t",
    "start_slideshow_at": "selected",
    "auto_select": "code",
}
HOW_TO = """\
**For the teacher** (no part of the presentation)

- Functions marked *to be typed* are typed in front of the class. `typed_or_finished` below each keeps what
  was typed, right or wrong, and takes the finished function where nothing was; the answer is folded between
  them. To give up on what was typed, run the line that it prints, or put `...` back.
- Begin anywhere: click on the first cell there, then *Run → Run All Above Selected Cell*. It stops where a
  proof fails, which is below a body that was typed wrongly.
- Present with [jupyterlab-rise](https://pypi.org/project/jupyterlab-rise/): Alt+R, and Alt+R again to leave.
  Without it: *View → Presentation Mode*, *View → Simple Interface*, and the browser's full screen (F11).
- What to say, where people stumble, what they ask: `{page}`, to print or for a second screen.

{plan}"""
DETAILS = "<details>\n<summary>{}</summary>\n\n{}\n\n</details>"


# --- The cells of a live notebook ---


def live_notebook(source: Path) -> nbformat.NotebookNode:
    """The live notebook of a chapter.

    Raises:
        CourseError: if the teaching text does not fit the chapter, or a stored output is missing.
    """
    cells, teaching, module = read_cells(source), read_teaching(source), module_name(source)
    first, *parts = core_sections(cells)
    stored = {cell.number for part in parts for cell in stored_cells(part, teaching.notes[part.heading])}
    outputs = stored_outputs(source) if stored else {}
    kept = {cell.number for part in (first, *parts) for cell in part.cells} - stored
    missing = needed(cells, kept, module)
    found = opening(source, teaching, first)
    for part in parts:
        notes = teaching.notes[part.heading]
        begin = len(found)
        asked = cell_to_ask_before(part, notes)
        for cell, exercise in editions.with_exercise_above(part.cells):
            if cell is asked:
                found.append(prediction_cell(notes.predict))
            if cell.number in missing:
                found.append(folded(new_code_cell(f"{LEFT_OUT}\n{missing[cell.number]}")))
            if cell.number in stored:
                found += shown_as_stored(cell, outputs)
            else:
                found += cells_for_class(cell, exercise, notes, module)
        found[begin].metadata[OWN_METADATA] = {"notes": as_metadata(notes)}
        found += [end_of_session(*end) for end in teaching.session_ends(part.heading)]
    set_slide_types(found)
    notebook = editions.unpaired(source, found)
    notebook.metadata["rise"] = RISE
    return notebook


def core_sections(cells: list[Cell]) -> list[Section]:
    """What stands before the first section, and the core sections."""
    return [section for section in sections(cells) if section.is_core]


def opening(source: Path, teaching: Teaching, first: Section) -> list[nbformat.NotebookNode]:
    """The title, what the teacher has to know, and in one folded cell all that is imported and set up."""
    title, *others = first.cells
    text = HOW_TO.format(page=f"{source.stem}_notes.html", plan=plan(teaching, bodies(source)))
    setup = "\n\n".join([cell.source for cell in others if cell.kind == "code"] + [IMPORT])
    if "pyplot" in setup:
        setup += f"\n{LARGER}"
    return [*board_cells(title.source), for_teacher(text), folded(new_code_cell(setup))]


def cells_for_class(
    cell: Cell, exercise: Cell | None, notes: Notes, module: str
) -> list[nbformat.NotebookNode]:
    """What a cell of a core section becomes; `exercise` is the one that it checks, if it does."""
    if cell.kind == "markdown":
        return board_cells(cell.source)
    if exercise is not None and "question" in exercise.tags:
        return group(editions.unsolved(exercise, cell, module))
    if exercise is not None:
        return group([*typed_cells(exercise, notes, module), editions.code_cell(cell)])
    if editions.is_to_solve(cell) or cell.source.strip() == "progress()":
        return []  # an exercise comes with its check, and what is solved is no matter for a class
    if names_to_type(cell, notes):
        return group(typed_cells(cell, notes, module))
    found = editions.code_cell(cell)
    if "export" in cell.tags:
        found.source = with_short_docstrings(found.source)
    return [folded(found) if "plt.subplots(" in cell.source else found]


def board_cells(source: str) -> list[nbformat.NotebookNode]:
    """A Markdown cell as the class sees it: a caption stays with the picture above, the rest goes on."""
    text = board(source)
    first, *rest = [*paragraphs(text)] or [""]
    if is_caption(first) and rest:
        return [new_markdown_cell(first), new_markdown_cell("\n\n".join(rest))]
    return [new_markdown_cell(text)] if text else []


def prediction_cell(predict: Prediction) -> nbformat.NotebookNode:
    """A question before its result, the answer folded."""
    answer = DETAILS.format("Answer", predict.answer.strip())
    return new_markdown_cell(f"{ASKED} {predict.question.strip()}\n\n{answer}")


def for_teacher(text: str) -> nbformat.NotebookNode:
    """A Markdown cell that is no part of the presentation."""
    return new_markdown_cell(text, metadata={"slideshow": {"slide_type": "skip"}})


def end_of_session(length: int, number: int, session: Session) -> nbformat.NotebookNode:
    """Where a session ends: what has been seen, and the question it ends with."""
    where = f"*Of sessions of {length} minutes, number {number} ends here.*"
    return for_teacher(f"{where} {session.seen} **{session.next}**")


def as_metadata(notes: Notes) -> dict[str, str | float]:
    """What of the notes goes into the metadata of a section's first cell."""
    names = ("minutes", "say", "stumble", "question", "answer")
    return {name: getattr(notes, name) for name in names}


def folded(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A code cell whose code is not seen until one clicks on it."""
    cell.metadata["jupyter"] = {"source_hidden": True}
    return cell


def group(cells: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Cells that stay on one slide."""
    first, *rest = cells
    for cell in rest:
        cell.metadata["slideshow"] = {"slide_type": "-"}
    return [first, *rest]


def set_slide_types(cells: list[nbformat.NotebookNode]) -> None:
    """Which cell begins a slide in RISE.

    A section does, prose does, and code does that comes after code or after a prediction, so that this is on
    the screen alone; captions and what is folded do not.
    """
    goes_on = False  # whether code goes on the slide of what stands above it
    for cell in cells:
        is_result = cell.cell_type == "code" or "stored" in cell.metadata.get("tags", [])
        is_aside = not is_result and (is_caption(cell.source) or is_folded(cell.source))
        is_question = cell.source.startswith(ASKED)
        if "slideshow" in cell.metadata:
            kind = cell.metadata["slideshow"]["slide_type"]
        elif is_result or is_question:
            kind = "-" if goes_on else "subslide"
        elif is_aside:
            kind = "-"
        else:
            kind = "slide" if cell.source.startswith(("# ", "## ")) else "subslide"
        cell.metadata["slideshow"] = {"slide_type": kind}
        if kind != "skip":
            goes_on = not (is_result or is_aside or is_question) or cell.source.startswith(LEFT_OUT)


# --- Bodies to be typed ---


def names_to_type(cell: Cell, notes: Notes) -> list[str]:
    """The functions of a cell whose bodies are to be typed: exercises, and those that the notes add."""
    if cell.kind != "code" or "export" not in cell.tags:
        return []
    names = [node.name for node in ast.parse(cell.source).body if isinstance(node, ast.FunctionDef)]
    return [name for name in names if "exercise" in cell.tags or name in notes.type]


def bodies(source: Path) -> dict[str, dict[str, str]]:
    """By heading, the functions whose bodies are to be typed, each with its body."""
    teaching = read_teaching(source)
    found: dict[str, dict[str, str]] = {heading: {} for heading in teaching.notes}
    for section in core_sections(read_cells(source))[1:]:
        notes = teaching.notes[section.heading]
        for cell in section.cells:
            found[section.heading] |= {name: body_of(cell, name) for name in names_to_type(cell, notes)}
        if unknown := set(notes.type) - found[section.heading].keys():
            raise CourseError(f"section {section.heading!r}: no exported cell defines {', '.join(unknown)}")
    return found


def typed_cells(cell: Cell, notes: Notes, module: str) -> list[nbformat.NotebookNode]:
    """A cell with bodies to be typed, the answer folded, and what takes the finished function otherwise."""
    names = names_to_type(cell, notes)
    template = to_be_typed(cell, names)
    answer = "\n\n\n".join(body_of(cell, name) for name in names)
    lines = []
    for name in names:
        given = given_statements(lines_of(template, name))
        rest = f", given={given}" if given else ""
        lines.append(f'{name} = typed_or_finished({name}, "lecture26.{module}"{rest})')
    return [
        new_code_cell(template, metadata={"tags": ["typed"]}),
        new_markdown_cell(DETAILS.format("Answer", f"```python\n{answer}\n```")),
        new_code_cell("\n".join(lines), metadata={"tags": ["finished"]}),
    ]


def to_be_typed(cell: Cell, names: list[str]) -> str:
    """A cell's text with dots for the bodies of some functions, and docstrings in short form."""
    if "exercise" in cell.tags:
        source = editions.SOLUTION.sub(rf"\1{TO_TYPE}\n", cell.source).rstrip()
        return with_short_docstrings(source)
    source = cell.source
    for name in names:
        lines, node = source.splitlines(), function_node(source, name)
        lines[line_of_body(node) - 1 : node.end_lineno] = [f"    {TO_TYPE}"]
        source = "\n".join(lines)
    return with_short_docstrings(source)


def with_short_docstrings(source: str) -> str:
    """Code in which each docstring is cut to its first paragraph."""
    lines = source.splitlines()
    kinds = ast.FunctionDef | ast.ClassDef
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, kinds) and ast.get_docstring(n)]
    for node in sorted(nodes, key=lambda node: -node.lineno):
        text = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
        docstring = node.body[0]
        short = textwrap.fill(f'"""{text}"""', 100, break_long_words=False)
        lines[docstring.lineno - 1 : docstring.end_lineno] = textwrap.indent(
            short, " " * docstring.col_offset
        ).splitlines()
    return "\n".join(lines)


def function_node(source: str, name: str) -> ast.FunctionDef:
    """The definition of a function at the top level of a cell."""
    (node,) = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == name]
    return node


def line_of_body(node: ast.FunctionDef) -> int:
    """The first line of a function's body, below its docstring."""
    first = node.body[0]
    return first.end_lineno + 1 if ast.get_docstring(node) is not None else first.lineno


def lines_of(source: str, name: str) -> str:
    """The text of a function at the top level of a cell, without decorators."""
    node = function_node(source, name)
    return "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])


def given_statements(template: str) -> int:
    """How many statements a function with an open body holds, docstring and dots aside."""
    return next(given for given in range(1000) if has_dots_and(template, given))


def body_of(cell: Cell, name: str) -> str:
    """The body of a function that is to be typed, as it stands in the chapter, without what is given."""
    if "exercise" in cell.tags:
        return "\n".join(found.group(2) for found in editions.SOLUTION.finditer(cell.source)).rstrip()
    node = function_node(cell.source, name)
    return "\n".join(cell.source.splitlines()[line_of_body(node) - 1 : node.end_lineno])


# --- Cells that the teaching text names ---


def the_cell_with(text: str, section: Section) -> Cell:
    """The one code cell of a section that holds a text."""
    found = [cell for cell in section.cells if cell.kind == "code" and text in cell.source]
    if len(found) != 1:
        raise CourseError(
            f"section {section.heading!r}: {len(found)} code cells hold {text!r}; it must be one"
        )
    return found[0]


def cell_to_ask_before(section: Section, notes: Notes) -> Cell | None:
    """The cell before which a section's prediction is asked: the one it names, else the first that shows."""
    if notes.predict is None:
        return None
    if notes.predict.before:
        return the_cell_with(notes.predict.before, section)
    shows = re.compile(r"\b(show\w*|print)\(")
    showing = [cell for cell in section.cells if cell.kind == "code" and shows.search(cell.source)]
    if not showing:
        raise CourseError(f"section {section.heading!r}: nothing is shown that could be predicted")
    return showing[0]


def stored_cells(section: Section, notes: Notes) -> list[Cell]:
    """The cells of a section that are not run, but show their stored outputs."""
    return [the_cell_with(text, section) for text in notes.stored]


def stored_outputs(source: Path) -> dict[str, list[nbformat.NotebookNode]]:
    """The outputs of the stored notebook, by the text of the cell."""
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    return {cell.source: cell.outputs for cell in stored.cells if cell.cell_type == "code"}


def shown_as_stored(cell: Cell, outputs: dict) -> list[nbformat.NotebookNode]:
    """A cell that is not run: its stored outputs, its code folded below; nothing if it shows nothing."""
    if cell.source not in outputs:
        raise cell.error(1, "it has no stored output: run `make notebooks`")
    parts, attachments = [], {}
    for output in outputs[cell.source]:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"output{len(attachments)}.png"
            alt = output.metadata.get("image/png", {}).get("alt", "the stored output")
            attachments[name] = {"image/png": data["image/png"].replace("\n", "")}
            parts.append(f"![{alt}](attachment:{name})")
        elif "text/markdown" in data:
            parts.append(data["text/markdown"])
        else:
            parts.append(f"```text\n{(output.get('text') or data.get('text/plain', '')).rstrip()}\n```")
    if not parts:
        return []
    code = DETAILS.format("Stored: not run here. The code", f"```python\n{cell.source}\n```")
    markdown = new_markdown_cell("\n\n".join([*parts, code]), metadata={"tags": ["stored"]})
    if attachments:
        markdown["attachments"] = attachments
    return [markdown]


# --- The files ---


def make_live(root: Path, names: list[str] | None = None, reset: bool = False) -> list[str]:
    """Put the live notebooks that are not there yet into root/live, and their notes; returns lines on each.

    `reset`: make those that are there anew, and keep the old ones in live/old.
    """
    folder = root / "live"
    folder.mkdir(exist_ok=True)
    if (style := root / "teaching" / "rise.css").exists():
        shutil.copyfile(style, folder / "rise.css")
    lines = []
    for source in notebook_sources(root, names):
        copy, fresh = folder / f"{source.stem}.ipynb", live_notebook(source)
        page = folder / f"{source.stem}_notes.html"
        title = read_cells(source)[0].source.splitlines()[0].lstrip("# ")
        text = notes_page(title, read_teaching(source), bodies(source))
        page.write_text(text, encoding="utf-8", newline="\n")
        if copy.exists() and not reset:
            lines.append(f"kept live/{copy.name}, which is yours{is_older(copy, fresh)}")
            continue
        if copy.exists():
            lines.append(f"the old live/{copy.name} is live/old/{editions.put_aside(copy).name}")
        with replace_when_complete(copy) as temporary:
            nbformat.write(fresh, temporary)
        lines.append(f"made live/{copy.name}, and live/{page.name} to print")
    return lines


def is_older(copy: Path, fresh: nbformat.NotebookNode) -> str:
    """What is to be said of a notebook that was made from another version of its chapter."""
    try:
        before = nbformat.read(copy, as_version=4).metadata.get(OWN_METADATA, {})
    except Exception:  # a file that is no notebook makes nbformat stumble in many ways
        return "; it cannot be read as a notebook"
    if before == fresh.metadata[OWN_METADATA]:
        return ""
    return f"; the chapter has changed since (`make live-reset NAMES={copy.stem}` begins anew)"


def make_rehearsals(root: Path, folder: Path, names: list[str] | None = None) -> list[str]:
    """Put live notebooks into a folder for nbval, which must run, whatever their outputs; a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for source in notebook_sources(root, names):
        if source.stem in REHEARSED:
            notebook = live_notebook(source)
            if source.stem == TYPED_IN_REHEARSAL:
                type_bodies(notebook, source)
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.metadata["tags"] = [*cell.metadata.get("tags", []), "nbval-ignore-output"]
            nbformat.write(notebook, folder / f"live_{source.stem}.ipynb")
            lines.append(f"made {folder}/live_{source.stem}.ipynb")
    return lines


def type_bodies(notebook: nbformat.NotebookNode, source: Path) -> None:
    """Type all bodies of a live notebook, as they stand in the chapter."""
    for functions in bodies(source).values():
        for name, body in functions.items():
            (cell,) = [
                cell
                for cell in notebook.cells
                if "typed" in cell.metadata.get("tags", []) and f"def {name}(" in cell.source
            ]
            cell.source = re.sub(
                rf"^ *{re.escape(TO_TYPE)}$", lambda _, body=body: body, cell.source, flags=re.M
            )


# --- How long the code runs ---


class SectionTimer(TimedExecutor):
    """Executes a live notebook and adds up what each section costs, in seconds of the kernel's CPU time.

    With one thread that is what it takes on a quiet machine, however busy this one is.
    """

    def __init__(self):
        super().__init__(timeout=CELL_TIMEOUT, startup_timeout=CELL_TIMEOUT, iopub_timeout=CELL_TIMEOUT)
        self.seconds, self.slowest, self.heading = {}, 0.0, ""

    def preprocess_cell(self, cell, resources, index):
        begin = cpu_seconds_of_children()
        if OWN_METADATA in cell.metadata:
            self.heading = cell.source.splitlines()[0].lstrip("# ")
        outcome = super().preprocess_cell(cell, resources, index)
        passed = cpu_seconds_of_children() - begin
        self.seconds[self.heading] = self.seconds.get(self.heading, 0.0) + passed
        self.slowest = max(self.slowest, passed)
        return outcome


def cpu_seconds_of_children() -> float:
    """The CPU time that the processes below this one have used so far."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(each.user + each.system for each in times)


def measure(root: Path, names: list[str] | None = None) -> None:
    """Run the live notebooks, store what their sections cost, and print a line on each."""
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    path = root / "teaching" / MEASURED
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"chapters": {}}
    (root / "live").mkdir(exist_ok=True)
    for source in notebook_sources(root, names):
        timer = SectionTimer()
        timer.preprocess(live_notebook(source), {"metadata": {"path": str(root / "live")}})
        stored["chapters"][source.stem] = {
            "seconds": {heading: round(seconds, 1) for heading, seconds in timer.seconds.items()},
            "slowest_cell": round(timer.slowest, 1),
        }
        stored |= {"command": "python tools/live.py --measure", "what": "CPU seconds, one thread"}
        text = json.dumps(stored, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8", newline="\n")
        total = sum(timer.seconds.values())
        print(f"{source.stem}: {total:.0f} s, the slowest cell {timer.slowest:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="chapters, e.g. ddpm or 01_ddpm; none means all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    parser.add_argument("--reset", action="store_true", help="make them anew; the old ones go to live/old")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="make those for nbval in this folder")
    parser.add_argument("--measure", action="store_true", help="run them, and store the seconds")
    arguments = parser.parse_args()
    try:
        if arguments.measure:
            measure(arguments.root, arguments.names)
        elif arguments.rehearse:
            print("\n".join(make_rehearsals(arguments.root, arguments.rehearse, arguments.names)))
        else:
            print("\n".join(make_live(arguments.root, arguments.names, arguments.reset)))
    except CourseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
