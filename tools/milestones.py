"""Let the learner's package draw the chapters' milestones, and show them on one page: build/milestones.html.

A milestone is a notebook's cell of that tag, which calls `show_milestone`; its command runs here as it does
there. What was drawn of this package already is kept, in build/milestones, so that a stopped run goes on
where it was. One that fails says why, and the others are drawn. The page is one file that needs no other. It
lies in build/, since it can be made anew at any time; work/ holds what a learner has written.
"""

import argparse
import ast
import base64
import hashlib
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from course import ROOT, Cell, CourseError, notebook_sources, read_cells
from lecture26.kit.files import replace_when_complete, write_json
from lecture26.kit.own_package import calls_of, enlarged, read_ledger, times, whose
from tasks import tasks

PACKAGE = Path("build") / "mine"
FOLDER = Path("build") / "milestones"
PAGE = Path("build") / "milestones.html"
TIME_LIMIT = 600.0  # seconds for one picture, of which most take less than ten
TAG = "milestone"


@dataclass(frozen=True)
class Milestone:
    """What stands at the end of a chapter.

    command: of the command line, which draws it; alt: what is seen; exercises: the chapter's, by name.
    """

    chapter: str
    title: str
    command: str
    alt: str
    exercises: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """What came of a milestone: a PNG and the calls of the chapters' functions; or else why there is none."""

    picture: bytes = b""
    calls: Mapping[str, int] = field(default_factory=dict)
    fault: str = "It has not been drawn yet."


def milestones(root: Path) -> list[Milestone]:
    """The milestones of all chapters that have one, in the course's order.

    Raises:
        CourseError: if a chapter has two, or one whose command cannot be read.
    """
    found = []
    for source in notebook_sources(root):
        cells = read_cells(source)
        tagged = [cell for cell in cells if TAG in cell.tags]
        if len(tagged) > 1:
            raise tagged[1].error(1, "a chapter has one milestone; this is the second")
        for cell in tagged:
            title = cells[0].source.partition("\n")[0].removeprefix("# ")
            command, alt = command_of(cell)
            exercises = tuple(task.name for task in tasks(source))
            found.append(Milestone(source.stem, title, command, alt, exercises))
    return found


def command_of(cell: Cell) -> tuple[str, str]:
    """The command and the alt text that a milestone's cell gives to `show_milestone`."""
    for node in ast.walk(ast.parse(cell.source)):
        match node:
            case ast.Call(
                ast.Name("show_milestone"),
                [ast.Constant(str(command))],
                [ast.keyword("alt", ast.Constant(str(alt)))],
            ):
                return command, alt
    raise cell.error(1, 'a milestone\'s cell calls show_milestone("command and options", alt="...")')


def draw_all(root: Path, limit: float = TIME_LIMIT) -> dict[Milestone, Drawn]:
    """Draw what has not been drawn of the learner's package; the page is written after each.

    Prints a line for each milestone.

    Raises:
        CourseError: if there is no package.
    """
    ledger = read_ledger(root / PACKAGE)
    if not ledger:
        raise CourseError("there is no package of yours: `make mine` builds it")
    package = digest_of(root / PACKAGE)
    drawn = {milestone: kept(root, milestone, package) for milestone in milestones(root)}
    write_page(root, drawn, ledger)
    for milestone, before in drawn.items():
        if before.fault:
            drawn[milestone] = draw(root, milestone, package, limit)
            write_page(root, drawn, ledger)
        told = drawn[milestone].fault or whose(ledger, drawn[milestone].calls)[0]
        print(f"{milestone.chapter}: {told}", flush=True)
    return drawn


def draw(root: Path, milestone: Milestone, package: str, limit: float) -> Drawn:
    """Run a milestone's command, and keep the picture; what fails is told and not kept."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "milestone.png"
        try:
            calls = calls_of([*shlex.split(milestone.command), "--out", str(file)], root / PACKAGE, limit)
            picture = enlarged(file)
        except (RuntimeError, OSError) as error:
            return Drawn(fault=f"It could not be drawn: {error}")
    with replace_when_complete(root / FOLDER / f"{milestone.chapter}.png") as temporary:
        temporary.write_bytes(picture)
    about = {"command": milestone.command, "package": package, "calls": calls}
    write_json(root / FOLDER / f"{milestone.chapter}.json", about)
    return Drawn(picture, calls, "")


def kept(root: Path, milestone: Milestone, package: str) -> Drawn:
    """What was drawn by the same command and package already, if anything."""
    file = root / FOLDER / f"{milestone.chapter}.json"
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["command"] == milestone.command and about["package"] == package:
            return Drawn(file.with_suffix(".png").read_bytes(), about["calls"], "")
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing that is whole: it is drawn anew
    return Drawn()


def digest_of(package: Path) -> str:
    """A text that changes with any module of a package."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package).as_posix()} {len(content)} ".encode() + content)
    return digest.hexdigest()


STYLE = """\
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --quiet: #5c5c66; --line: #d6d6dc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #17171a; --quiet: #a6a6b0; --line: #3a3a42; }
}
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.25; }
section { border-top: 1px solid var(--line); padding: 0.5rem 0 1.5rem; }
figure { margin: 1rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption p { margin: 0.5rem 0; overflow-wrap: anywhere; }
figcaption p + p, .quiet { color: var(--quiet); overflow-wrap: anywhere; }
progress { width: min(14rem, 40%); height: 0.9rem; vertical-align: middle; accent-color: #0072b2; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
summary { cursor: pointer; }
.fault { border-left: 4px solid #d55e00; padding-left: 0.75rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }"""
DOCUMENT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Your milestones</title>
<style>
{style}
</style>
</head>
<body>
<main>
<h1>Your milestones</h1>
<p>{share}</p>
<p class="quiet">What each chapter's functions reach together, drawn by the package that
<code>make mine</code> has built of your solutions. Only functions that pass their check are in it; where one
is open or wrong, the course's stands in its place. Solved more? Save your notebooks, and call
<code>make milestones</code> again.</p>
{sections}
</main>
</body>
</html>
"""


def write_page(root: Path, drawn: Mapping[Milestone, Drawn], ledger: Mapping) -> None:
    """Write the page of what has been drawn so far, whole."""
    every = [name for milestone in drawn for name in milestone.exercises]
    sections = "\n".join(section(milestone, of_it, ledger) for milestone, of_it in drawn.items())
    page = DOCUMENT.format(style=STYLE, share=share(every, ledger), sections=sections)
    with replace_when_complete(root / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def section(milestone: Milestone, drawn: Drawn, ledger: Mapping) -> str:
    """A chapter's part of the page."""
    called = f"LECTURE26_MINE={PACKAGE.as_posix()} python -m lecture26 {milestone.command}"
    if drawn.fault:
        shown = f'<p class="fault">{escape(drawn.fault)}</p>'
    else:
        source = "data:image/png;base64," + base64.b64encode(drawn.picture).decode()
        caption = "".join(f"<p>{escape(sentence)}</p>" for sentence in whose(ledger, drawn.calls))
        image = f'<img src="{source}" alt="{escape(milestone.alt)}">'
        shown = f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"
    return "\n".join(
        [
            f'<section id="{milestone.chapter}">',
            f"<h2>{escape(milestone.title)}</h2>",
            f"<p>{share(milestone.exercises, ledger)}</p>",
            shown,
            f'<p class="quiet">Drawn by <code>{escape(called)}</code></p>',
            listed("Yours", milestone.exercises, with_calls(ledger["own"], drawn)),
            listed("The course's", milestone.exercises, ledger["course"]),
            "</section>",
        ]
    )


def share(exercises: Iterable[str], ledger: Mapping) -> str:
    """How many of some exercises' functions are the learner's, as a bar and in words."""
    exercises = list(exercises)
    own = sum(name in ledger["own"] for name in exercises)
    told = f"{own} of {len(exercises)} functions are yours"
    return f'<progress max="{len(exercises)}" value="{own}" aria-label="{told}"></progress> {told}.'


def with_calls(places: Mapping[str, str], drawn: Drawn) -> dict[str, str]:
    """Where each of the learner's functions comes from, and how often the picture's command has called it."""
    called = {name: times(drawn.calls[name]) if name in drawn.calls else "never" for name in places}
    return {name: f"{place}; called {called[name]} for this picture" for name, place in places.items()}


def listed(whose: str, exercises: Iterable[str], reasons: Mapping[str, str]) -> str:
    """Those of some exercises whose functions are of one kind, folded, each with what is said of it."""
    rows = [f"<li><code>{name}</code>: {escape(reasons[name])}</li>" for name in exercises if name in reasons]
    if not rows:
        return ""
    return f"<details><summary>{escape(whose)}: {len(rows)}</summary><ul>{''.join(rows)}</ul></details>"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the chapters' milestones with your own functions.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    root = parser.parse_args().root.resolve()
    try:
        drawn = draw_all(root)
    except CourseError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(f"\nstopped: {PAGE.as_posix()} shows what has been drawn; the same command goes on")
    print(f"\nOpen {PAGE.as_posix()} in a browser.")
    failed = [milestone.chapter for milestone, of_it in drawn.items() if of_it.fault]
    if failed:
        sys.exit(f"{', '.join(failed)} could not be drawn; the page says why")


if __name__ == "__main__":
    main()
