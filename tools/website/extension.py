"""What Sphinx is taught of the course: numbered equations, proofs, chapters by number, what figures show."""

import html
import re

from docutils import nodes
from PIL import Image
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

from course import EQUATION_TAG
from website.sources import HOLDS

NUMBER = re.compile(r"\((\d{1,2}\.\d{1,2})\)")
CHAPTERS = r"\b[Cc]hapters?\s+\d\d\b(?:(?:,|,? and|,? or| to)\s+\d\d\b)*"  # "chapters 03 and 04"
MENTION = re.compile(rf"{NUMBER.pattern}|({CHAPTERS})")
PASSED = re.compile(r"'?[\w.]+: (?:passed|right)\b.*", re.DOTALL)  # what `check` and `check_answer` say
PLACEHOLDER = "course-equation"
log = logging.getLogger(__name__)


class Equations(SphinxTransform):
    """A numbered equation is an anchor; its number in the text is a link to it, from any page."""

    default_priority = 700

    def apply(self) -> None:
        places = equations_of(self.env)
        for block in list(self.document.findall(nodes.math_block)):
            found = EQUATION_TAG.search(block.astext())
            if found:
                places[found[1]] = self.env.docname
                block.replace_self(numbered_equation(block.astext(), found[1]))
        for text in list(self.document.findall(nodes.Text)):
            if MENTION.search(text.astext()) and is_prose(text):
                text.parent.replace(text, with_links(text.astext(), self.env))


def equations_of(env) -> dict[str, str]:
    """The page of each numbered equation; kept with the environment."""
    if not hasattr(env, "course_equations"):
        env.course_equations = {}
    return env.course_equations


def anchor(number: str) -> str:
    """The anchor of an equation."""
    return f"eq-{number.replace('.', '-')}"


def numbered_equation(tex: str, number: str) -> nodes.Node:
    """An equation for MathJax; Sphinx itself would put its lines into `split`, where no tag is allowed."""
    tex = EQUATION_TAG.sub(lambda _: rf"\tag{{{number}}}", tex)
    math = f'<div class="math notranslate nohighlight">\\[{html.escape(tex)}\\]</div>'
    return nodes.container("", nodes.raw("", math, format="html"), ids=[anchor(number)], classes=["equation"])


def is_prose(text: nodes.Text) -> bool:
    """Whether a text is read as such: neither code, mathematics, a heading nor a link already."""
    others = (
        nodes.literal,
        nodes.literal_block,
        nodes.math,
        nodes.raw,
        nodes.title,
        nodes.reference,
        addnodes.pending_xref,
    )
    node = text.parent
    while node is not None:
        if isinstance(node, others):
            return False
        node = node.parent
    return True


def with_links(text: str, env) -> list[nodes.Node]:
    """A text in which the numbers of equations and chapters are links."""
    pieces, end = [], 0
    for found in MENTION.finditer(text):
        pieces.append(nodes.Text(text[end : found.start()]))
        pieces += [equation_link(found[1], env.docname)] if found[1] else chapter_links(found[2], env)
        end = found.end()
    return [piece for piece in [*pieces, nodes.Text(text[end:])] if piece.astext()]


def equation_link(number: str, docname: str) -> nodes.Node:
    """A link to an equation, whose page is known once all pages are read."""
    link = addnodes.pending_xref(
        "", refdomain="", reftype=PLACEHOLDER, reftarget=number, refdoc=docname, refexplicit=True
    )
    link += nodes.inline("", f"({number})")
    return link


def chapter_links(text: str, env) -> list[nodes.Node]:
    """Chapters by their numbers: the whole of "chapter 03" is a link, of "chapters 03 and 04" each number."""
    numbers = re.split(r"(\d\d)", text)
    if len(numbers) == 3:
        return [chapter_link(numbers[1], text, env)]
    return [chapter_link(piece, piece, env) if piece.isdigit() else nodes.Text(piece) for piece in numbers]


def chapter_link(number: str, text: str, env) -> nodes.Node:
    """A link to a chapter; plain text on its own page, and where there is no such chapter."""
    for docname in env.found_docs:
        if docname.startswith(f"notebooks/{number}_") and docname != env.docname:
            link = addnodes.pending_xref(
                "",
                refdomain="std",
                reftype="doc",
                reftarget=f"/{docname}",
                refdoc=env.docname,
                refexplicit=True,
            )
            link += nodes.inline("", text)
            return link
    return nodes.Text(text)


def resolve(app: Sphinx, env, node: addnodes.pending_xref, content: nodes.Element) -> nodes.Node | None:
    """The link to an equation. A number that no equation has stays text: it may be some other number."""
    if node.get("reftype") != PLACEHOLDER:
        return None
    number = node["reftarget"]
    docname = equations_of(env).get(number)
    if docname is None:
        if number.split(".")[0] in {known.split(".")[0] for known in equations_of(env)}:
            log.warning("no equation is numbered (%s)", number, location=node)
        return content
    link = nodes.reference("", "", content, internal=True, classes=["eqref"])
    link["refuri"] = f"{app.builder.get_relative_uri(node['refdoc'], docname)}#{anchor(number)}"
    return link


class Verdicts(SphinxTransform):
    """The lines of `verify` become boxes that link to their equations; what a check says, a box as well."""

    default_priority = 710

    def apply(self) -> None:
        for block in list(self.document.findall(nodes.literal_block)):
            if "output" not in block.get("classes", []):
                continue
            if PASSED.fullmatch(block.astext()):
                said = nodes.paragraph("", block.astext().strip("'"))
                # not by replace_self, which would keep the classes of an output
                block.parent.replace(block, nodes.container("", said, classes=["passed"]))
            elif any(map(HOLDS.fullmatch, block.astext().splitlines())):
                block.parent.replace(block, list(self.parts(block)))

    def parts(self, block: nodes.literal_block):
        """An output cut into boxes, of lines that state a proof, and the lines between them."""
        groups: list[tuple[bool, list[str]]] = []
        for line in block.astext().rstrip("\n").split("\n"):
            is_proof = bool(HOLDS.fullmatch(line))
            if not groups or groups[-1][0] != is_proof:
                groups.append((is_proof, []))
            groups[-1][1].append(line)
        for is_proof, lines in groups:
            if is_proof:
                box = nodes.container(classes=["proved"])
                for line in lines:
                    number, rest = HOLDS.fullmatch(line).groups()
                    link = equation_link(number, self.env.docname)
                    box += nodes.paragraph("", "", link, nodes.Text(f" holds: {rest}"))
                yield box
            else:
                rest = block.deepcopy()
                rest.children = [nodes.Text("\n".join(lines))]
                rest.rawsource = rest.astext()
                yield rest


class Figures(SphinxTransform):
    """A figure's description is its alt text, and its number in the page its anchor.

    The descriptions are those that `website.sources` has noted: myst-nb takes none from an output.
    """

    default_priority = 720

    def apply(self) -> None:
        descriptions = self.config.course_figures.get(self.env.docname, [])
        shown = [image for image in self.document.findall(nodes.image) if is_output(image)]
        if len(shown) != len(descriptions):
            log.warning(
                "%d figures, and %d descriptions", len(shown), len(descriptions), location=self.env.docname
            )
        for number, (image, description) in enumerate(zip(shown, descriptions, strict=False), start=1):
            image["alt"] = description
            image["ids"].append(f"figure-{number}")


def is_output(image: nodes.image) -> bool:
    """Whether a picture is the output of a cell."""
    node = image.parent
    while node is not None:
        if "cell_output" in node.get("classes", []):
            return True
        node = node.parent
    return False


def merge(app: Sphinx, env, docnames, other) -> None:
    """Take in what a process that read some of the pages has found."""
    equations_of(env).update(equations_of(other))


def forget(app: Sphinx, env, docname: str) -> None:
    """Drop the equations of a page that is read anew."""
    found = equations_of(env)
    for number in [number for number, page in found.items() if page == docname]:
        del found[number]


INTERACTIVE = re.compile(r"<(guidance-laboratory|class-playground|text-playground|guided-strips)\b")


def add_elements(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Give a page with one of our interactive elements what these need, and no other page."""
    found = set(INTERACTIVE.findall(context.get("body", "")))
    if not found:
        return
    app.add_css_file("play/interactive.css")
    if "guidance-laboratory" in found:
        app.add_css_file("play/laboratory.css")
        app.add_js_file("play/laboratory.js", loading_method="defer")
    if found - {"guidance-laboratory"}:
        app.add_css_file("play/playground.css")
        app.add_js_file("play/playground.js", loading_method="defer")


REPAIRED = {  # HTML of furo and of myst-nb that a screen reader stumbles over
    'class="caption" role="heading"': 'class="caption" role="heading" aria-level="2"',
    '<summary aria-label="Toggle hidden content">': "<summary>",
}


IMAGE = re.compile(r'<img (?P<rest>[^>]*?src="[^"]*_images/(?P<name>[^"/]+\.png)")')


def add_sizes(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Tell how large each picture is, so that nothing moves when it comes."""
    files = {name: app.srcdir / path for path, name in app.builder.images.items()}

    def sized(found: re.Match) -> str:
        with Image.open(files[found["name"]]) as picture:
            width, height = picture.size
        return f'<img width="{width}" height="{height}" {found["rest"]}'

    context["body"] = IMAGE.sub(sized, context.get("body", ""))


def repair(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Mend what other packages have written into a page."""
    for part in ("body", "furo_navigation_tree"):
        for wrong, right in REPAIRED.items():
            context[part] = context.get(part, "").replace(wrong, right)


def plain_docstring(app: Sphinx, what: str, name: str, item, options, lines: list[str]) -> None:
    """Our docstrings are plain text with `code` in it: no sign of it means anything to reStructuredText."""
    for number, line in enumerate(lines):
        codes = re.split(r"(`[^`]*`)", line)
        codes[::2] = [re.sub(r"([*|\\]|_(?=\W|$))", r"\\\1", text) for text in codes[::2]]
        codes[1::2] = [f"`{text}`" for text in codes[1::2]]
        lines[number] = "".join(codes)


def setup(app: Sphinx) -> dict:
    """Register all of it."""
    app.add_config_value("course_figures", {}, "env", types=dict)
    for transform in (Equations, Verdicts, Figures):
        app.add_transform(transform)
    app.connect("missing-reference", resolve)
    app.connect("env-merge-info", merge)
    app.connect("env-purge-doc", forget)
    app.connect("html-page-context", add_elements)
    app.connect("html-page-context", add_sizes)
    app.connect("html-page-context", repair, priority=900)  # when furo has made its navigation
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
