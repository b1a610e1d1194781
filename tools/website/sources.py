"""What Sphinx is given of the repository: the stored notebooks, never executed, and its pages in Markdown.

They lie in the source folder as they lie in the repository, so that the links between them hold. Where a link
leads to a file that is no page of the site, it leads to the repository if its address is known, else it is
plain text.
"""

import html
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from course import EQUATION_TAG, Cell, notebook_sources, own_metadata
from editions import answer, is_to_solve, learners_copy, to_fill_in, unpaired

SITE = re.compile(r"^\[site\]: (?!https?:).*$", re.MULTILINE)  # where the README's links to the site lead
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    "docs/results.md",
    "docs/instructors.md",
    "docs/students.md",
)
INSTEAD = {"notebooks": "notebooks/index.md", "web/site/publish.md": "publish.md"}
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")
LINKED_PICTURE = re.compile(r"\[(!\[[^\]]*\]\([^)\s]+\))\]\[site\]")  # it would lead from the site to itself
HOLDS = re.compile(r"\((\d+\.\d+)\) holds: (.*)")  # what `verify` prints
EXERCISE = re.compile(r"^#+ Exercise \d", re.MULTILINE)

EMBEDDED = {  # what a chapter's page lets one try: after its first cell
    "03_classifier_guidance": (
        "What the classifier's gradient does to a picture",
        '<guided-strips only="classifier"></guided-strips>',
    ),
    "04_clip_guidance": (
        "What a text's gradient does to a picture",
        '<guided-strips only="clip"></guided-strips>',
    ),
    "05_classifier_free_guidance": (
        "Try it: draw, then move the strength of guidance",
        "<class-playground></class-playground>",
    ),
    "07_latent_diffusion": (
        "Try it: draw what a sentence says, then point at its words",
        "<text-playground></text-playground>",
    ),
}


@dataclass
class Figure:
    """A picture that a chapter shows: its PNG, what is seen, and under which heading."""

    png: str  # base64
    description: str
    section: str


@dataclass
class ChapterPage:
    """A chapter as Sphinx gets it, and what is in it."""

    name: str  # 01_ddpm
    title: str
    notebook: nbformat.NotebookNode
    figures: list[Figure] = field(default_factory=list)
    equations: dict[str, str] = field(default_factory=dict)  # number: TeX, without the number
    proved: set[str] = field(default_factory=set)  # the numbers that a cell has proved
    num_exercises: int = 0

    @property
    def docname(self) -> str:
        return f"notebooks/{self.name}"


def chapter_page(source: Path, cloud: str | None) -> ChapterPage:
    """A chapter from its stored notebook: exercises to fill in, answers and drawing code folded.

    Args:
        source: the notebook's source; what stands beside it, with its outputs, is read.
        cloud: the address at which its copy opens in the cloud; None where the repository has no address.
    """
    stored = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    title = re.match(r"# (.+)", stored.cells[0].source)[1]
    page = ChapterPage(source.stem, title, stored)
    section, cells, has_code = "", [], False
    for number, cell in enumerate(stored.cells, start=1):
        if cell.cell_type == "markdown":
            section = ([section] + re.findall(r"^## (.+)$", cell.source, re.MULTILINE))[-1]
            page.equations |= numbered_equations(cell.source)
            page.num_exercises += len(EXERCISE.findall(cell.source))
            cells.append(cell)
            continue
        page.proved |= {
            number for output in cell.outputs for number, _ in HOLDS.findall(output.get("text", ""))
        }
        page.figures += [
            Figure(output.data["image/png"], output.metadata.get("image/png", {}).get("alt", ""), section)
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        own = Cell(f"notebooks/{source.name}", number, 1, "code", cell.source, *own_metadata(cell))
        if is_to_solve(own):
            cell.source = to_fill_in(own)
            cells += [cell, new_markdown_cell(answer(own))]
            continue
        if "draw" in own.tags:
            fold(cell, "the code that draws this")
        elif not has_code:  # a chapter begins with its imports
            fold(cell, "the imports")
        has_code = True
        cells.append(cell)
    cells[0].source = re.sub(r"\n", lambda _: f"\n\n{links(source.stem, cloud)}\n", cells[0].source, count=1)
    if source.stem in EMBEDDED:
        heading, element = EMBEDDED[source.stem]
        cells.insert(1, new_markdown_cell(f"**{heading}**\n\n<div>{element}</div>"))
    stored.cells = cells
    return page


def numbered_equations(markdown: str) -> dict[str, str]:
    """The TeX of a cell's equations, without its number, by their numbers."""
    blocks = re.findall(r"\$\$(.+?)\$\$", markdown, re.DOTALL)
    return {
        number: EQUATION_TAG.sub("", tex).strip() for tex in blocks for number in EQUATION_TAG.findall(tex)
    }


def fold(cell: nbformat.NotebookNode, what: str) -> None:
    """Let a cell's code be shown on a click."""
    cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    cell.metadata["mystnb"] = {"code_prompt_show": f"Show {what}", "code_prompt_hide": f"Hide {what}"}


def links(name: str, cloud: str | None) -> str:
    """Under a chapter's title: the notebook to download, in the cloud, and its slides."""
    targets = {
        "Download the notebook": f"../downloads/{name}.ipynb",
        "with exercises to fill in": f"../downloads/exercises/{name}.ipynb",
        "Open in the cloud": cloud or "../publish.html#open-in-the-cloud",
        "Slides": f"../slides/{name}.html",
    }
    items = ""
    for text, target in targets.items():
        attribute = " download" * target.startswith("../downloads/")
        items += f'<li><a href="{html.escape(target)}"{attribute}>{text}</a></li>'
    return f'<ul class="chapter-links">{items}</ul>\n'


def write_repository_pages(root: Path, folder: Path, repository: str | None) -> None:
    """Copy the repository's pages and pictures, with links that hold in the site."""
    for name in PAGES:
        text = (root / name).read_text(encoding="utf-8")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(with_site_links(text, name, repository), encoding="utf-8")
    for picture in (root / "docs").glob("*.png"):
        shutil.copyfile(picture, folder / "docs" / picture.name)


def with_site_links(text: str, page: str, repository: str | None) -> str:
    """A Markdown text whose links to files that are no pages lead to the repository, or are plain text."""

    def link(found: re.Match) -> str:
        mark, words, target = found[1], " ".join(found[2].split()), found[3]
        path, _, fragment = target.partition("#")
        whole = normal(PurePosixPath(page).parent / path)
        if whole in INSTEAD:
            depth = len(PurePosixPath(page).parts) - 1
            return f"[{words}]({'../' * depth}{INSTEAD[whole]})"
        if mark or whole in PAGES or re.fullmatch(r"notebooks/\d\d_\w+\.ipynb", whole):
            return f"{mark}[{words}]({target})"
        return f"[{words}]({repository}/blob/HEAD/{whole})" if repository else words

    text = LINKED_PICTURE.sub(r"\1", text)
    return LINK.sub(link, SITE.sub("[site]: publish.md", text))


def normal(path: PurePosixPath) -> str:
    """A path without `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def write_downloads(root: Path, folder: Path, repository: str | None) -> None:
    """The notebooks as files: with outputs, with exercises to fill in, and what opens in the cloud."""
    for kind in ("", "exercises", "cloud"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for source in notebook_sources(root):
        shutil.copyfile(source.with_suffix(".ipynb"), folder / f"{source.stem}.ipynb")
        nbformat.write(learners_copy(source), folder / "exercises" / f"{source.stem}.ipynb")
        if repository:
            nbformat.write(cloud_copy(source, repository), folder / "cloud" / f"{source.stem}.ipynb")


def cloud_copy(source: Path, repository: str) -> nbformat.NotebookNode:
    """The learner's copy, with a first cell that brings the course to the machine it runs on."""
    fetch = new_code_cell(
        "# Brings the course to this machine; it takes a minute or two. Run it once, before all others.\n"
        f"!git clone --quiet --depth 1 {repository} lecture26\n"
        "%pip install --quiet --editable 'lecture26[clip,lab]'\n"
        "import sys\n\n"
        'sys.path.insert(0, "lecture26")'
    )
    return unpaired(source, [fetch, *learners_copy(source).cells])
