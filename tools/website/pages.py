"""Pages that are made from what the course has: chapters, figures, equations, results, modules, slides."""

import ast
import base64
import html
import json
import re
from io import BytesIO
from pathlib import Path

from PIL import Image

from course import EQUATION_TAG, CourseError, module_name, notebook_sources
from website.sources import ChapterPage

THUMBNAIL = (560, 420)  # pixels
DESCRIBED = re.compile(r"^\| \[(\d\d) [^]]*\]\(notebooks/[^)]*\) \| ([^|]+) \|", re.MULTILINE)
ABOUT = ("name", "command", "machine", "versions")  # of a stored result: what is no measurement
CUT = 14  # columns of a table of results, at most
PACKAGES = {  # of the API pages, in this order
    "lecture26": "Chapters",
    "lecture26/kit": "The kit",
    "lecture26/checks": "Checks of exercises",
    "lecture26/recipes": "Recipes",
    "lecture26/studies": "Studies",
    "lecture26/commands": "Commands",
}


def descriptions(readme: str) -> dict[str, str]:
    """What each chapter derives and builds, by its number, from the table in the README."""
    found = {number: text.strip() for number, text in DESCRIBED.findall(readme)}
    if not found:
        raise CourseError("README.md: no row of the table of chapters was recognised")
    return found


def chapter_cards(chapters: list[ChapterPage], readme: str, up: str) -> str:
    """Cards that lead to the chapters, as HTML; `up` leads from the page to the site's root."""
    described = descriptions(readme)
    cards = []
    for chapter in chapters:
        number, _, title = chapter.title.partition(" ")
        text = described.get(number, "")
        cards.append(
            f'<li><a href="{up}{chapter.docname}.html"><b>{number}</b><strong>{html.escape(title)}</strong>'
            f"<span>{html.escape(text[:1].upper() + text[1:])}</span></a></li>"
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def chapters_page(chapters: list[ChapterPage], readme: str) -> str:
    """The page of all chapters, with their table of contents."""
    entries = "\n".join(chapter.name for chapter in chapters)
    return (
        "# Chapters\n\nEach derives its equations, proves every result by a cell that fails if it does not"
        " hold, and builds the method from scratch. [What builds on what](../README.md#what-is-inside).\n\n"
        f"{chapter_cards(chapters, readme, '../')}\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"
    )


def gallery_page(chapters: list[ChapterPage], folder: Path) -> str:
    """All figures on one page, each a link to where it stands; writes the small pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["---\nhide-toc: true\n---\n"]
    parts.append("# Gallery\n\nEvery picture of the course; a click leads to where it stands.\n")
    for chapter in chapters:
        items = []
        for number, figure in enumerate(chapter.figures, start=1):
            name = f"{chapter.name}-{number}.webp"
            width, height = write_thumbnail(figure.png, folder / name)
            alt = html.escape(figure.description)
            items.append(
                f'<li><a href="{chapter.docname}.html#figure-{number}"><img src="gallery/{name}"'
                f' loading="lazy" width="{width}" height="{height}" alt="{alt}"></a></li>'
            )
        if items:
            parts.append(f'## {chapter.title}\n\n<ul class="gallery">{"".join(items)}</ul>\n')
    return "\n".join(parts)


def write_thumbnail(png: str, path: Path) -> tuple[int, int]:
    """A picture small, on white; returns its width and height."""
    with Image.open(BytesIO(base64.b64decode(png))) as picture:
        small = picture.convert("RGBA")
    small.thumbnail(THUMBNAIL)
    ground = Image.new("RGB", small.size, "white")
    ground.paste(small, mask=small.getchannel("A"))
    ground.save(path, "WEBP", quality=82)
    return small.size


def equations_page(chapters: list[ChapterPage]) -> str:
    """All numbered equations, chapter by chapter."""
    parts = [
        "# Equations\n\nEvery numbered equation; its number leads to where it is derived. Results are proved"
        " there by a cell that computes both sides.\n"
    ]
    for chapter in chapters:
        blocks = []
        for cell in chapter.notebook.cells:
            if cell.cell_type == "markdown":
                for tex in re.findall(r"\$\$(.+?)\$\$", cell.source, re.DOTALL):
                    blocks += [(number, tex) for number in EQUATION_TAG.findall(tex)]
        if blocks:
            parts.append(f"## {chapter.title}\n")
            parts += [
                f"({number})\n\n$$\n{EQUATION_TAG.sub('', tex).strip()}\n$$\n" for number, tex in blocks
            ]
    return "\n".join(parts)


def slides_page(chapters: list[ChapterPage]) -> str:
    """The page that leads to the slides."""
    items = "\n".join(
        f'<li><a href="slides/{chapter.name}.html">{html.escape(chapter.title)}</a></li>'
        for chapter in chapters
    )
    return (
        "# Slides\n\nA deck for each chapter, from its equations, figures and notes. Space goes on, *D* is"
        " light or dark, *S* shows what the speaker says, *Esc* shows all slides.\n\n"
        f'<ul class="decks">\n{items}\n</ul>\n'
    )


# --- Results ---


def results_page(root: Path) -> str:
    """What was measured, by which command and on which machine; and the checkpoints."""
    parts = [
        "# Results\n\nWhat takes longer than a cell of a notebook is measured by a command, stored with its"
        " numbers, and plotted by the chapters. Numbers are rounded to three digits; the files have all"
        " of them.\n",
        "## Checkpoints\n",
        table(["name", "data", "steps", "minutes", "machine", "measured"], checkpoint_rows(root)),
        "## Measurements\n",
    ]
    for file in sorted((root / "data" / "results").glob("*.json")):
        parts.append(result_section(json.loads(file.read_text(encoding="utf-8")), file.name))
    return "\n".join(parts)


def checkpoint_rows(root: Path) -> list[list[str]]:
    """A row for each checkpoint, from its card."""
    rows = []
    for file in sorted((root / "data" / "checkpoints").glob("*.json")):
        card = json.loads(file.read_text(encoding="utf-8"))
        measured = ", ".join(
            f"{name.replace('_', ' ')} {rounded(value)}" for name, value in card["metrics"].items()
        )
        minutes = f"{card['seconds'] / 60:.0f}"
        rows.append(
            [f"`{card['name']}`", card["data"], str(card["steps"]), minutes, machine_of(card), measured]
        )
    return rows


def machine_of(stored: dict) -> str:
    """The processor or accelerator that something was measured on."""
    machine = stored.get("machine") or {}
    return str(machine.get("accelerator") or machine.get("processor") or "")


def result_section(result: dict, file: str) -> str:
    """One stored result: its command, its machine, its numbers folded, and the file."""
    columns, rows = result_rows(result)
    return (
        f"### {result['name'].replace('_', ' ')}\n\n`{result['command']}`\n\n"
        f'On {machine_of(result)}. <a href="downloads/results/{file}" download>All numbers, as JSON</a>\n\n'
        f"<details>\n<summary>Numbers</summary>\n\n{table(columns, rows)}\n</details>\n"
    )


def result_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """A stored result as a table: of its runs where it has some, else of all its numbers."""
    runs = next((value for value in result.values() if is_list_of_runs(value)), None)
    if runs is None:
        rest = {
            name: value
            for name, value in result.items()
            if name not in ("name", "command", "machine", "versions")
        }
        return ["what", "measured"], [[path, text] for path, text in flattened(rest)]
    found = [dict(flattened(run)) for run in runs]
    names = list(dict.fromkeys(name for run in found for name in run))
    varying = [name for name in names if len({run.get(name) for run in found}) > 1][:CUT]
    return [name.replace("_", " ") for name in varying], [
        [run.get(name, "") for name in varying] for run in found
    ]


def is_list_of_runs(value) -> bool:
    """Whether a value is a list of records."""
    return isinstance(value, list) and bool(value) and all(isinstance(run, dict) for run in value)


def flattened(value: dict, path: str = "") -> list[tuple[str, str]]:
    """The values of nested records, each with the names that lead to it; a median with its range is one."""
    found = []
    for name, inner in value.items():
        where = f"{path}, {name}" if path else str(name)
        if isinstance(inner, dict) and {"median", "min", "max"} <= inner.keys():
            text = f"{rounded(inner['median'])} ({rounded(inner['min'])} to {rounded(inner['max'])})"
            found.append((where, text))
        elif isinstance(inner, dict):
            found += flattened(inner, where)
        elif isinstance(inner, list):
            found.append((where, ", ".join(map(rounded, inner[:6])) + (", …" if len(inner) > 6 else "")))
        else:
            found.append((where, rounded(inner)))
    return found


def rounded(value) -> str:
    """A number to three digits; anything else as a text."""
    if isinstance(value, list):
        return "–".join(map(rounded, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value).replace("|", "/")
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1):
        return f"{int(value)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


# --- Modules ---


def write_api_pages(root: Path, folder: Path) -> None:
    """A page for each module, and one that lists them, from the docstrings by Sphinx's autodoc."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# API\n\nThe package `lecture26`: one module for each chapter, made from its notebook, and the parts"
        " around them. Each function shows its source.\n"
    ]
    for package, title in PACKAGES.items():
        names = modules_of(root, package)
        for name in names:
            (folder / f"{name}.md").write_text(module_page(name), encoding="utf-8")
        entries = "\n".join(names)
        parts.append(f"```{{toctree}}\n:caption: {title}\n:maxdepth: 1\n\n{entries}\n```\n")
    (folder / "index.md").write_text("\n".join(parts), encoding="utf-8")


def modules_of(root: Path, package: str) -> list[str]:
    """The modules of a package, by the names by which they are imported; those of chapters in their order."""
    files = [file for file in sorted((root / package).glob("*.py")) if not file.stem.startswith("__")]
    if package == "lecture26":
        order = [module_name(source) for source in notebook_sources(root)]
        files = sorted(
            (file for file in files if file.stem in order), key=lambda file: order.index(file.stem)
        )
    elif defines_something(root / package / "__init__.py"):
        files.insert(0, root / package / "__init__.py")
    return [module_path(file, root) for file in files]


def defines_something(file: Path) -> bool:
    """Whether a package's `__init__` has functions or classes of its own, besides what it imports."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body)


def module_path(file: Path, root: Path) -> str:
    """The name by which a module is imported."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_page(name: str) -> str:
    """The page of a module."""
    return (
        f"# `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :member-order: bysource\n"
        "   :ignore-module-all:\n   :show-inheritance:\n```\n"
    )
