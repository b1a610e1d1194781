"""Make the course's web site in site/, from the stored notebooks, or serve it on this machine.

    python tools/make_site.py
    python tools/make_site.py --repository https://github.com/NAME/lecture26
    python tools/make_site.py --serve
    python tools/make_site.py --picture     docs/playground.png anew; needs the site, and Chromium

The site is plain files with relative links: open site/index.html, or put the folder on any web server.
"""

import argparse
import contextlib
import http.server
import importlib.util
import io
import shutil
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

import npm
import slides
import web
from chromium import chromium
from course import ROOT, CourseError, notebook_sources
from website import pages
from website.sources import chapter_page, write_downloads, write_repository_pages

OWN = ROOT / "web" / "site"  # the settings, and the pages that are written by hand
IS_DRAWN = "document.querySelector('class-playground').isDone"
DRAWING_TIMEOUT = 300_000  # milliseconds
BRANCH = "site"  # of the repository: where .github/workflows/site.yml publishes
NEEDED = ("furo", "myst_nb", "sphinx", "sphinx_copybutton")
CHAPTERS_HERE = "<!-- chapters -->"


def build(root: Path = ROOT, folder: Path | None = None, repository: str | None = None) -> list[str]:
    """Make the site of a course in a folder, root/site if none is given; returns Sphinx's warnings.

    Args:
        root: the course's folder.
        folder: where the site goes; what lay there is replaced.
        repository: the address of the course's repository, to which its files and cloud links lead.

    Raises:
        CourseError: a package that builds the site is missing, or Sphinx has failed.
        npm.NotFetched: MathJax or reveal.js is not in build/npm, and cannot be fetched.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CourseError(
            f"{', '.join(missing)} is not installed: `python -m pip install -e '.[site]'`, in .venv"
        )
    folder = folder or root / "site"
    work = root / "build" / "site"
    source, extra = work / "source", work / "extra"
    shutil.rmtree(work, ignore_errors=True)
    for made in (source / "notebooks", source / "static", extra):
        made.mkdir(parents=True)
    figures = write_sources(root, source, extra, repository)
    add_parts(root, source / "static", extra)
    warnings = run_sphinx(source, extra, work / "html", work / "doctrees", figures)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(work / "html", folder)
    return warnings


def write_sources(root: Path, source: Path, extra: Path, repository: str | None) -> dict[str, list[str]]:
    """Write all pages for Sphinx, and what is copied as it is; returns the figures' descriptions by page."""
    import nbformat

    readme = (root / "README.md").read_text(encoding="utf-8")
    chapters = [chapter_page(path, cloud_address(repository, path.stem)) for path in notebook_sources(root)]
    for chapter in chapters:
        nbformat.write(chapter.notebook, source / f"{chapter.docname}.ipynb")
    write_repository_pages(root, source, repository)
    for page in OWN.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        cards = pages.chapter_cards(chapters, readme, "notebooks/{name}.html")
        (source / page.name).write_text(text.replace(CHAPTERS_HERE, cards), encoding="utf-8")
    made = {
        "notebooks/index.md": pages.chapters_page(chapters, readme),
        "gallery.md": pages.gallery_page(chapters, extra / "gallery"),
        "equations.md": pages.equations_page(chapters),
        "slides.md": pages.slides_page(chapters, readme),
    }
    for name, text in made.items():
        (source / name).write_text(text, encoding="utf-8")
    pages.write_api_pages(root, source / "api")
    write_downloads(root, extra / "downloads", repository)
    shutil.copytree(root / "data" / "results", extra / "downloads" / "results")
    return {chapter.docname: [figure.description for figure in chapter.figures] for chapter in chapters}


def cloud_address(repository: str | None, name: str) -> str | None:
    """Where a chapter's copy opens in Google Colab, which takes notebooks from GitHub alone."""
    parts = urlsplit(repository or "")
    if parts.netloc != "github.com":
        return None
    return f"https://colab.research.google.com/github{parts.path.rstrip('/')}/blob/{BRANCH}/downloads/cloud/{name}.ipynb"


def add_parts(root: Path, static: Path, extra: Path) -> None:
    """Add style, MathJax, the playground and the slides."""
    shutil.copytree(OWN / "static", static, dirs_exist_ok=True)
    mathjax = npm.fetched(npm.MATHJAX, root / "build" / "npm")
    (static / "mathjax").mkdir()
    (static / "mathjax" / "ui").mkdir()
    npm.unpack(
        mathjax,
        {"es5/tex-svg-full.js": "tex-svg-full.js", "es5/ui/lazy.js": "ui/lazy.js"},
        static / "mathjax",
    )
    web.build_playground()
    shutil.copytree(
        web.BUILD, static / "play", ignore=shutil.ignore_patterns("*.html", "*.json", "*.wasm", "page.css")
    )
    slides.build(root)
    shutil.copytree(root / "build" / "slides", extra / "slides", ignore=shutil.ignore_patterns("*.pdf"))


def run_sphinx(source: Path, extra: Path, folder: Path, doctrees: Path, figures: dict) -> list[str]:
    """Let Sphinx make the site; returns its warnings."""
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.console import nocolor

    settings = {
        "course_figures": figures,
        "html_extra_path": [str(extra)],
        "html_static_path": [str(source / "static")],
        "templates_path": [str(OWN / "templates")],
        "html_favicon": str(OWN / "static" / "icon.svg"),
        "html_search_scorer": str(OWN / "scorer.js"),
    }
    nocolor()
    warnings = io.StringIO()
    try:
        app = Sphinx(
            str(source), str(OWN), str(folder), str(doctrees), "html", settings, status=None, warning=warnings
        )
        app.build()
    except SphinxError as error:
        raise CourseError(f"Sphinx has failed: {error}") from error
    for left in (folder / "objects.inv", folder / ".buildinfo"):
        left.unlink(missing_ok=True)
    (folder / ".nojekyll").touch()  # else GitHub's pages leave out folders that begin with _
    return warnings.getvalue().splitlines()


def take_picture(folder: Path, file: Path) -> None:
    """Let the playground draw, and keep what is seen of it for the README."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1120, "height": 1400}, color_scheme="light")
        page.goto((folder / "playground.html").as_uri())
        element = page.locator("class-playground")
        for button in ("Draw", "w from \u22121 to 8"):
            element.get_by_role("button", name=button, exact=True).click()
            page.wait_for_function(IS_DRAWN, timeout=DRAWING_TIMEOUT)
        page.evaluate("document.querySelector('class-playground .shelf').hidden = true")
        taken = Image.open(io.BytesIO(element.screenshot()))
    taken.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE).save(file, optimize=True)


def serve(folder: Path, port: int) -> None:
    """Serve the site on this machine until it is interrupted."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"the site is at http://127.0.0.1:{server.server_port}/ until Ctrl-C is pressed", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the course's web site in site/.")
    parser.add_argument(
        "--repository", default="", help="the repository's address, such as https://github.com/NAME/lecture26"
    )
    parser.add_argument("--serve", action="store_true", help="serve the site that is there, on this machine")
    parser.add_argument("--picture", action="store_true", help="take the README's picture anew")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    folder = ROOT / "site"
    if (arguments.serve or arguments.picture) and not (folder / "index.html").exists():
        sys.exit("there is no site yet: run `make site`")
    if arguments.serve:
        return serve(folder, arguments.port)
    try:
        if arguments.picture:
            return take_picture(folder, ROOT / "docs" / "playground.png")
        warnings = build(repository=arguments.repository.rstrip("/") or None)
    except CourseError as error:
        sys.exit(str(error))
    print("\n".join([*warnings, "site: open site/index.html in a browser, or run `make site-serve`"]))


if __name__ == "__main__":
    main()
