"""Pages that are made from what the course has: chapters, figures, equations, modules, slides."""

import ast
import base64
import html
import re
from io import BytesIO
from pathlib import Path

from PIL import Image

from course import EQUATION_TAG, CourseError, module_name, notebook_sources
from website.sources import ChapterPage

THUMBNAIL = (560, 420)  # pixels
DESCRIBED = re.compile(r"^\| \[(\d\d) [^]]*\]\(notebooks/[^)]*\) \| ([^|]+) \|", re.MULTILINE)
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
