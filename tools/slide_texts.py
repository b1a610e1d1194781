"""The slides of a chapter, as the metadata `slide` of its cells has them.

A cell with the metadata `slide`, a list of texts, is shown. The first text, `# Title`, begins a slide, and so
does every further one; the others are its parts, which appear one after the other:

    "A sentence."            Markdown, with $mathematics$
    "- an item"              items that follow each other make a list
    "? a question"           to be answered before going on
    "(3.4)"                  the chapter's numbered equation
    "$$a=b$$"                another equation, or one that needs another line break than in the notebook
    "[picture]"              the cell's stored picture; "[picture 2]" its second one
    "[table]"                the first table of the cell's text, or of its stored output
    "[output]"               what the cell printed; "[output 1-3]" some lines of it
    "[code cfg_combine]"     a function, class or Class.method of the chapter, without docstrings and checks
                             of arguments; "[code]" the cell itself; "[code NAME: mixed .. return]" from the
                             line that begins with the one to the line that begins with the other
    "| a | b |\\n|---|---|"   a table of its own
"""

import ast
import html
import re
import struct
import tomllib
from base64 import b64decode
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from course import EQUATION_TAG, Cell, read_cells
from export import SECOND_READING
from slide_code import fitting, formatted, lines_between, segment, short_form

# What fits on a slide and can be read from the last row. The tests in a browser measure the outcome.
MOST_WORDS = {"title": 14, "text": 30, "question": 36, "item": 22}
MOST_WORDS_OF_SLIDE = 85
MOST_ITEMS = 6
WIDE = 1.75  # a picture at least this much wider than high stands above its sentence, another one beside it
PICTURE_WIDTH, PICTURE_HEIGHT = 1168, 460  # pixels that a picture above its sentence may take
CODE_WIDTH, CODE_HEIGHT, LARGEST_CODE = 1120, 480, 28  # pixels; the last is the size of the letters

EQUATION = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
NUMBER = re.compile(r"\((\d+\.\d+)\)")
REFERENCE = re.compile(r"\[(picture|table|output|code)\b *([^\]]*)\]")
TABLE = re.compile(r"(?:^\|.*\|$\n?){3,}", re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")  # of a note: it is read aloud


def maths(content: str, options: dict) -> str:
    """Mathematics as MathJax finds it in a page."""
    left, right = ("\\[", "\\]") if options["display_mode"] else ("\\(", "\\)")
    return f"{left}{html.escape(content)}{right}"


MARKDOWN = (
    MarkdownIt("commonmark", {"html": True})
    .enable("table")
    .use(dollarmath_plugin, double_inline=True, renderer=maths)
)


def inline(text: str) -> str:
    """A line of Markdown as HTML; a formula stays in one line with the comma or bracket that touches it."""
    formula = r'[^\s<>]*<span class="math inline">[^<]*</span>[^\s<]*'
    return re.sub(formula, r'<span class="whole">\g<0></span>', MARKDOWN.renderInline(text))


@dataclass(frozen=True)
class Part:
    """What appears in one step: its kind, its HTML, and the words that it holds in the text of the slide."""

    kind: str  # text, item, question, equation, picture, table, output or code
    html: str
    words: int = 0
    is_wide: bool = False  # of a picture


@dataclass
class Slide:
    """One slide of a deck; `cell` is where it is written."""

    title: str
    section: str
    cell: Cell
    parts: list[Part] = field(default_factory=list)
    notes: str = ""  # Markdown

    def kinds(self) -> list[str]:
        return [part.kind for part in self.parts]


@dataclass(frozen=True)
class Chapter:
    """What the slides of a chapter are made of."""

    source: Path

    @cached_property
    def cells(self) -> list[Cell]:
        return read_cells(self.source)

    @cached_property
    def title(self) -> str:
        return self.cells[0].source.splitlines()[0].removeprefix("# ")

    @cached_property
    def outputs(self) -> dict[int, list[nbformat.NotebookNode]]:
        """The stored outputs of each cell, by its number; of a cell that was changed since then, none."""
        notebook = nbformat.read(self.source.with_suffix(".ipynb"), as_version=4)
        stored: dict[str, list] = {}
        for cell in notebook.cells:
            if cell.cell_type == "code":
                stored.setdefault(cell.source, []).append(cell.outputs)
        code = (cell for cell in self.cells if cell.kind == "code")
        return {cell.number: stored[cell.source].pop(0) for cell in code if stored.get(cell.source)}

    @cached_property
    def equations(self) -> dict[str, str]:
        """The TeX of each numbered equation, without its tag."""
        found = {}
        for cell in self.cells:
            if cell.kind == "markdown":
                for block in EQUATION.findall(cell.source):
                    for number in EQUATION_TAG.findall(block):
                        found[number] = EQUATION_TAG.sub("", block).strip()
        return found

    @cached_property
    def definitions(self) -> dict[str, list[str]]:
        """The code of each function, class and Class.method, a text for each time it is opened."""
        found: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.kind != "code" or re.search(r"^[%!]", cell.source, re.MULTILINE):
                continue
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.ClassDef):
                    for method in node.body:
                        if isinstance(method, ast.FunctionDef):
                            found.setdefault(f"{node.name}.{method.name}", []).append(segment(cell, method))
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    found.setdefault(node.name, []).append(segment(cell, node))
        return found

    @cached_property
    def speaker_notes(self) -> dict[str, str]:
        """What the teaching text of the chapter says on each section, in Markdown, by heading."""
        path = self.source.parents[1] / "teaching" / f"{self.source.stem}.toml"
        if not path.exists():
            return {}
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["sections"]
        return {heading: notes_of(entry) for heading, entry in entries.items()}

    def headings_above(self, cell: Cell) -> list[str]:
        """The headings of the sections in which a cell stands, the inmost last."""
        lines = [
            line
            for other in self.cells[: cell.number]
            if other.kind == "markdown"
            for line in (other.source if other.number < cell.number else first_line(cell)).splitlines()
            if re.match(r"##+ ", line)
        ]
        section = max((n for n, line in enumerate(lines) if line.startswith("## ")), default=len(lines))
        return [line.lstrip("# ").removesuffix(SECOND_READING) for line in lines[section:]]


def first_line(cell: Cell) -> str:
    """The first line of a cell's text."""
    return cell.source.partition("\n")[0]


def notes_of(entry: dict) -> str:
    """What a speaker wants to see of a section's entry in the teaching text."""
    asked = entry.get("predict", {})
    lines = [
        entry["say"],
        f"**Ask:** {asked['question']} *{asked['answer']}*" if asked else "",
        f"**Where people stumble:** {entry['stumble']}",
        f"**The question that always comes:** {entry['question']} *{entry['answer']}*",
    ]
    return "\n\n".join(filter(None, lines))


def read_slides(chapter: Chapter) -> list[Slide]:
    """The slides of a chapter; raises CourseError where one cannot be made or is too full."""
    slides = []
    prose, is_told = [], False  # what the notebook says up to here, and whether a slide's notes have it
    for cell in chapter.cells:
        if cell.kind == "markdown":
            prose, is_told = ([] if is_told else prose) + [cell.source], False
        if cell.slide and not cell.slide[0].startswith("# "):
            raise cell.error(0, f"the first text of `slide` must be '# Title'; got {cell.slide[0]!r}")
        for text in cell.slide:
            if text.startswith("# "):
                headings = chapter.headings_above(cell)
                planned = [chapter.speaker_notes[each] for each in headings if each in chapter.speaker_notes]
                notes = LINK.sub(r"\1", planned[-1] if planned else "\n\n".join(prose))
                section = headings[0] if headings else chapter.title
                slides.append(Slide(text.removeprefix("# "), section, cell, notes=notes))
                is_told = True
            else:
                slides[-1].parts.append(part_of(text, cell, chapter))
    for slide in slides:
        if faults := faults_of(slide):
            raise slide.cell.error(0, f"slide {slide.title!r}: {'; '.join(faults)}")
    return slides


def faults_of(slide: Slide) -> list[str]:
    """What makes a slide too full, or leaves a picture without its sentence."""
    kinds = slide.kinds()
    faults = []
    if number_of_words(slide.title) > MOST_WORDS["title"]:
        faults.append(f"the title has more than {MOST_WORDS['title']} words")
    for part in slide.parts:
        if part.words > MOST_WORDS.get(part.kind, part.words):
            article = "an" if part.kind == "item" else "a"
            faults.append(f"{article} {part.kind} has {part.words} words, more than {MOST_WORDS[part.kind]}")
    if (words := sum(part.words for part in slide.parts)) > MOST_WORDS_OF_SLIDE:
        faults.append(f"it has {words} words, more than {MOST_WORDS_OF_SLIDE}")
    if kinds.count("item") > MOST_ITEMS:
        faults.append(f"the list has more than {MOST_ITEMS} items")
    if "picture" in kinds and kinds.count("text") != 1:
        faults.append(f"a picture needs one sentence; got {kinds.count('text')}")
    if not kinds:
        faults.append("it has nothing but a title")
    return faults


def number_of_words(text: str) -> int:
    """The words of a text, a formula counted as one."""
    return len(re.sub(r"\$[^$]*\$", "x", text).split())


def part_of(text: str, cell: Cell, chapter: Chapter) -> Part:
    """The part of a slide that a text of a cell's metadata stands for."""
    if number := NUMBER.fullmatch(text):
        if number[1] not in chapter.equations:
            raise cell.error(0, f"the chapter has no equation {text}")
        return equation(chapter.equations[number[1]], text)
    if reference := REFERENCE.fullmatch(text):
        return REFERENCES[reference[1]](reference[2], cell, chapter)
    if own := EQUATION.fullmatch(text):
        tag = EQUATION_TAG.search(text)
        if tag and tag[1] not in chapter.equations:
            raise cell.error(0, f"the chapter has no equation ({tag[1]})")
        return equation(EQUATION_TAG.sub("", own[1]), f"({tag[1]})" if tag else "")
    if text.startswith("|"):
        return Part("table", MARKDOWN.render(text))
    if text.startswith("["):
        raise cell.error(0, f"{text!r} is none of [picture], [table], [output] and [code]")
    for mark, kind in (("- ", "item"), ("? ", "question"), ("", "text")):
        if text.startswith(mark):
            words = text.removeprefix(mark)
            return Part(kind, inline(words), number_of_words(words))


def equation(tex: str, number: str) -> Part:
    """An equation, with its number at the right."""
    number = f'<span class="number">{number}</span>' if number else ""
    return Part("equation", f'<div class="formula">\\[{html.escape(tex)}\\]</div>{number}')


def picture(which: str, cell: Cell, chapter: Chapter) -> Part:
    """A stored picture of the cell."""
    outputs = chapter.outputs.get(cell.number, [])
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    index = int(which or 1) - 1
    if index >= len(pictures):
        raise cell.error(
            0, f"no picture {index + 1} is stored: run `make notebooks NAMES={chapter.source.stem}`"
        )
    png = pictures[index].data["image/png"].strip().replace("\n", "")
    alt = html.escape(pictures[index].metadata.get("image/png", {}).get("alt", ""))
    width, height = struct.unpack(">II", b64decode(png)[16:24])
    is_wide = width >= WIDE * height
    room = min(PICTURE_HEIGHT, PICTURE_WIDTH * height // width) if is_wide else PICTURE_HEIGHT
    image = f'<img alt="{alt}" style="height: {room}px" src="data:image/png;base64,{png}">'
    return Part("picture", image, is_wide=is_wide)


def table(_: str, cell: Cell, chapter: Chapter) -> Part:
    """The first table of the cell's text, or of its stored output."""
    texts = [cell.source] if cell.kind == "markdown" else []
    texts += [
        output.get("data", {}).get("text/markdown", "") for output in chapter.outputs.get(cell.number, [])
    ]
    tables = [found[0] for text in texts if (found := TABLE.search(text))]
    if not tables:
        raise cell.error(0, "neither the cell's text nor its stored output has a table")
    return Part("table", MARKDOWN.render(tables[0]))


def output(lines: str, cell: Cell, chapter: Chapter) -> Part:
    """What the cell printed, or lines `first-last` of it."""
    printed = "".join(each.get("text", "") for each in chapter.outputs.get(cell.number, [])).splitlines()
    if lines:
        first, last = map(int, lines.split("-"))
        printed = printed[first - 1 : last]
    if not printed:
        raise cell.error(0, f"no such output is stored: run `make notebooks NAMES={chapter.source.stem}`")
    return listing("output", html.escape(fitting(printed, cell)), printed)


def code(what: str, cell: Cell, chapter: Chapter) -> Part:
    """A definition of the chapter, the cell, or some lines of either."""
    name, _, lines = what.partition(":")
    name = name.strip()
    if name and name not in chapter.definitions:
        raise cell.error(0, f"the chapter defines no {name!r}")
    text = short_form("\n\n".join(chapter.definitions[name]) if name else cell.source)
    if lines:
        text = lines_between(text, *(mark.strip() for mark in lines.split("..")), cell)
    lines = formatted(text).splitlines()
    return listing("code", highlight(fitting(lines, cell), PythonLexer(), HtmlFormatter(nowrap=True)), lines)


def listing(kind: str, marked_up: str, lines: list[str]) -> Part:
    """Code or output in letters as large as there is room for."""
    by_width = CODE_WIDTH / (0.602 * max(map(len, lines)))  # a letter's width in parts of its size
    by_height = CODE_HEIGHT / (1.36 * len(lines))
    size = int(min(LARGEST_CODE, by_width, by_height))
    return Part(kind, f'<pre style="font-size: {size}px">{marked_up}</pre>')


REFERENCES = {"picture": picture, "table": table, "output": output, "code": code}
