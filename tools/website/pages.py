"""Pages that are made from what the course has: chapters, figures, equations, modules, slides."""

import ast
import base64
import html
import re
from io import BytesIO
from pathlib import Path

from PIL import Image

from course import CourseError, module_name, notebook_sources
from website.sources import ChapterPage

THUMBNAIL = (560, 420)  # pixels
DESCRIBED = re.compile(r"^\| \[(\d\d) [^]]*\]\(notebooks/[^)]*\) \| ([^|]+) \|", re.MULTILINE)
MARKS = re.compile(r"[*`]|\(at a second reading\)")  # of a heading, which a caption does without
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


def chapter_cards(chapters: list[ChapterPage], readme: str, page: str, up: str = "") -> str:
    """Cards with each chapter's first picture, as HTML.

    Args:
        chapters: in the order of the cards.
        readme: the text of the README, which describes them.
        page: where a card leads, such as `notebooks/{name}.html`.
        up: leads from the page with the cards to the site's root.
    """
    described = descriptions(readme)
    cards = []
    for chapter in chapters:
        number, _, title = chapter.title.partition(" ")
        text = described.get(number, "")
        picture = ""
        if chapter.figures:
            alt = html.escape(chapter.figures[0].description)
            picture = f'<img src="{up}gallery/{chapter.name}-1.webp" loading="lazy" alt="{alt}">'
        cards.append(
            f'<li><a href="{up}{page.format(name=chapter.name)}">{picture}<b>{number}</b>'
            f"<strong>{html.escape(title)}</strong>"
            f"<span>{html.escape(text[:1].upper() + text[1:])}</span>"
            f"<small>{contents(chapter)}</small></a></li>"
        )
    return f'<ul class="cards">{"".join(cards)}</ul>'


def contents(chapter: ChapterPage) -> str:
    """How much a chapter has, in words."""
    counts = {
        "equation": len(chapter.equations),
        "exercise": chapter.num_exercises,
        "figure": len(chapter.figures),
    }
    return " · ".join(f"{count} {word}{'s' * (count != 1)}" for word, count in counts.items() if count)


def chapters_page(chapters: list[ChapterPage], readme: str) -> str:
    """The page of all chapters, with their table of contents."""
    entries = "\n".join(chapter.name for chapter in chapters)
    cards = chapter_cards(chapters, readme, "notebooks/{name}.html", up="../")
    return (
        "# Chapters\n\nEach derives its equations, proves every result by a cell that fails if it does not"
        " hold, and builds the method from scratch. [What builds on what](../README.md#what-is-inside).\n\n"
        f"{cards}\n\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"
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
                f' loading="lazy" width="{width}" height="{height}" alt="{alt}">'
                f"<span>{html.escape(MARKS.sub('', figure.section))}</span></a></li>"
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
        "# Equations\n\nEvery numbered equation; its number leads to where it is derived. A tick: a cell"
        " there computes both sides, and fails where they differ.\n"
    ]
    for chapter in chapters:
        if chapter.equations:
            parts.append(f"## {chapter.title}\n")
        for number, tex in chapter.equations.items():
            tick = " ✓" * (number in chapter.proved)
            parts.append(f"[({number}){tick}]{{.number}}\n\n$$\n{tex}\n$$\n")
    return "\n".join(parts)


def slides_page(chapters: list[ChapterPage], readme: str) -> str:
    """The page that leads to the slides."""
    return (
        "---\nhide-toc: true\n---\n\n# Slides\n\nA deck for each chapter, from its equations, figures and"
        " notes. Space goes on, *D* is light or dark, *S* shows what the speaker says, *Esc* shows all"
        f" slides.\n\n{chapter_cards(chapters, readme, 'slides/{name}.html')}\n"
    )


# --- Modules ---


def write_api_pages(root: Path, folder: Path) -> None:
    """A page for each module, and one that lists them, from the docstrings by Sphinx's autodoc."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# API\n\nThe package `lecture26`: one module for each chapter, made from its notebook, and the parts"
        " around them. Each function shows its source.\n"
    ]
    entries = []
    for package, title in PACKAGES.items():
        parts.append(f"## {title}\n")
        for file in modules_of(root, package):
            name = module_path(file, root)
            (folder / f"{name}.md").write_text(module_page(name), encoding="utf-8")
            parts.append(f"[`{name}`]({name}.md)\n: {summary(file)}\n")
            entries.append(f"{name.removeprefix('lecture26.')} <{name}>")
    parts.append("```{toctree}\n:hidden:\n\n" + "\n".join(entries) + "\n```\n")
    (folder / "index.md").write_text("\n".join(parts), encoding="utf-8")


def modules_of(root: Path, package: str) -> list[Path]:
    """The modules of a package that have a page; those of chapters in their order."""
    files = [file for file in sorted((root / package).glob("*.py")) if not file.stem.startswith("__")]
    if package == "lecture26":
        order = [module_name(source) for source in notebook_sources(root)]
        return sorted((file for file in files if file.stem in order), key=lambda file: order.index(file.stem))
    own = root / package / "__init__.py"
    return [own, *files] if defines_something(own) else files


def summary(file: Path) -> str:
    """The first line of a module's docstring."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))).partition("\n")[0]


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
