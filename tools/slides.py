"""Make the lecture's slides from the notebooks: build/slides/NN_name.html, a deck of reveal.js a chapter.

    python tools/slides.py               every chapter
    python tools/slides.py ddpm unet     some of them
    python tools/slides.py --pdf         on paper as well

What they show stands in the notebooks' cells; `slide_texts.py` says how it is written.
"""

import argparse
import html
import shutil
import sys
from pathlib import Path
from string import Template

from pygments.formatters import HtmlFormatter

import npm
from chromium import chromium
from course import ROOT, CourseError, notebook_sources
from slide_texts import MARKDOWN, Chapter, Part, Slide, inline, read_slides

DECK = Path(__file__).parent / "deck"
FROM_NPM = {
    npm.REVEAL: {
        "dist/reset.css": "reset.css",
        "dist/reveal.css": "reveal.css",
        "dist/reveal.js": "reveal.js",
        "dist/plugin/notes.js": "notes.js",
    },
    npm.MATHJAX: {"es5/tex-svg-full.js": "tex-svg-full.js"},
}

READY = 'body[data-ready="true"]'  # of a deck in a browser: all is set, and can be shown
PRINTING_TIMEOUT = 300_000  # milliseconds


def deck_of(chapter: Chapter, slides: list[Slide]) -> str:
    """The page of a chapter's deck."""
    pages = [title_page(chapter), *(page(chapter, slide, n) for n, slide in enumerate(slides, start=2))]
    template = Template((DECK / "deck.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(chapter.title), slides="\n".join(pages))


def title_page(chapter: Chapter) -> str:
    """The first slide: the chapter's title, and what it begins with as notes."""
    number, _, title = chapter.title.partition(" ")
    title, _, subtitle = title.partition(": ")
    subtitle = subtitle[:1].upper() + subtitle[1:]
    return (
        f'<section class="title" id="title"><div class="slide"><h1>{inline(title)}</h1>'
        f'<div class="content"><p class="text">{inline(subtitle)}</p></div>'
        f"<footer><span>Chapter {number}</span></footer></div></section>"
    )


def page(chapter: Chapter, slide: Slide, number: int) -> str:
    """One slide as HTML: its parts as steps, the notes for the speaker."""
    pictures = [part for part in slide.parts if part.kind == "picture"]
    layout = "" if not pictures else "wide" if pictures[0].is_wide else "beside"
    if layout == "beside":
        words = "".join(steps([part for part in slide.parts if part.kind != "picture"], begun=True))
        content = f'<div class="picture">{pictures[0].html}</div><div class="words">{words}</div>'
    else:
        content = "".join(steps(slide.parts))
    return (
        f'<section class="{layout}"><div class="slide"><h2>{inline(slide.title)}</h2>'
        f'<div class="content">{content}</div>'
        f"<footer><span>{inline(slide.section)}</span><span>{number}</span></footer></div>"
        f'<aside class="notes">{MARKDOWN.render(slide.notes)}</aside></section>'
    )


def steps(parts: list[Part], begun: bool = False) -> list[str]:
    """The HTML of the parts; all but the first are steps, and so are the items of a list."""
    pieces = []
    for number, part in enumerate(parts):
        step = " fragment" if begun or number else ""
        if part.kind == "item":
            is_first, is_last = (
                not 0 <= other < len(parts) or parts[other].kind != "item"
                for other in (number - 1, number + 1)
            )
            item = f'<li class="{step.strip()}">{part.html}</li>'
            pieces.append("<ul>" * is_first + item + "</ul>" * is_last)
        elif part.kind in ("text", "question"):
            pieces.append(f'<p class="{part.kind}{step}">{part.html}</p>')
        else:
            kind = "listing" if part.kind in ("code", "output") else part.kind
            pieces.append(f'<div class="{kind}{step}">{part.html}</div>')
    return pieces


def build(root: Path, names: list[str] | None = None) -> list[str]:
    """Write the decks and what they need into root/build/slides; returns a line for each."""
    folder = root / "build" / "slides"
    assets = folder / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    for package, members in FROM_NPM.items():
        npm.unpack(npm.fetched(package, root / "build" / "npm"), members, assets)
    for name in ("deck.css", "deck.js"):
        shutil.copyfile(DECK / name, assets / name)
    (assets / "code.css").write_text(code_style(), encoding="utf-8")
    lines = []
    for source in notebook_sources(root, names):
        chapter = Chapter(source)
        slides = read_slides(chapter)
        deck = folder / f"{source.stem}.html"
        deck.write_text(deck_of(chapter, slides), encoding="utf-8")
        lines.append(f"made {deck.relative_to(root)}: {len(slides) + 1} slides")
    write_index(root, folder)
    return [*lines, f"open {(folder / 'index.html').relative_to(root)} in a browser"]


def print_decks(root: Path, names: list[str] | None = None) -> list[str]:
    """Print decks that were built into root/build/slides/NN_name.pdf, each slide with all its steps."""
    lines = []
    with chromium() as browser:
        for source in notebook_sources(root, names):
            deck = root / "build" / "slides" / f"{source.stem}.html"
            page = browser.new_page()
            page.goto(f"{deck.resolve().as_uri()}?print-pdf")
            page.wait_for_selector(READY, timeout=PRINTING_TIMEOUT)
            page.pdf(path=deck.with_suffix(".pdf"), prefer_css_page_size=True, print_background=True)
            page.close()
            lines.append(f"printed {deck.with_suffix('.pdf').relative_to(root)}")
    return lines


def code_style() -> str:
    """The colours of code, on light and on dark ground."""
    light, dark = HtmlFormatter(style="default"), HtmlFormatter(style="github-dark")
    styles = [
        light.get_token_style_defs(".listing"),
        dark.get_token_style_defs('[data-theme="dark"] .listing'),
    ]
    return "\n".join(line for style in styles for line in style)


def write_index(root: Path, folder: Path) -> None:
    """A page with a link to each deck that is there."""
    chapters = [Chapter(source) for source in notebook_sources(root)]
    links = [
        f'<li><a href="{chapter.source.stem}.html">{inline(chapter.title)}</a></li>'
        for chapter in chapters
        if (folder / f"{chapter.source.stem}.html").exists()
    ]
    template = Template((DECK / "index.html").read_text(encoding="utf-8"))
    (folder / "index.html").write_text(template.substitute(decks="\n".join(links)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the lecture's slides in build/slides.")
    parser.add_argument("names", nargs="*", help="chapters, e.g. ddpm or 01_ddpm; none means all")
    parser.add_argument("--root", type=Path, default=ROOT, help="the course's folder (default: this one)")
    parser.add_argument("--pdf", action="store_true", help="print them as well; needs Chromium")
    arguments = parser.parse_args()
    try:
        lines = build(arguments.root, arguments.names)
        if arguments.pdf:
            lines += print_decks(arguments.root, arguments.names)
        print("\n".join(lines))
    except CourseError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
