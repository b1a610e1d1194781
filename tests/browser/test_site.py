"""The web site in a browser: it is whole, asks no other host, and everybody can read it."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from drawing import both, draw, from_files, image_of, set_slider

import make_site
import npm
from course import EQUATION_TAG, ROOT, notebook_sources

CHAPTERS = [f"notebooks/{source.stem}.html" for source in notebook_sources(ROOT)]
KINDS = [  # a page of each kind
    "index.html",
    "playground.html",
    "gallery.html",
    "equations.html",
    "glossary.html",
    "docs/results.html",
    "slides.html",
    "publish.html",
    "README.html",
    "docs/instructors.html",
    "notebooks/index.html",
    "notebooks/01_ddpm.html",
    "notebooks/05_classifier_free_guidance.html",
    "notebooks/07_latent_diffusion.html",
    "api/index.html",
    "api/lecture26.ddpm.html",
    "_modules/lecture26/ddpm.html",
    "search.html?q=rescaling",
]
# until the page has set its formulas, and made those that are wide reachable by the keyboard
TYPESET = """async () => {
    if (!globalThis.MathJax) return;
    await MathJax.startup.promise;
    if (!document.querySelector('mjx-lazy')) return;
    await new Promise((resolve) => addEventListener('formulas-set', resolve, { once: true }));
}"""
OPEN_ALL = "document.querySelectorAll('article details').forEach((details) => (details.open = true))"
# what a screen reader or a keyboard needs, by the rules of WCAG 2.1, levels A and AA
AXE = """async () => {
    const standards = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'];
    const page = { include: [document], exclude: ['mjx-container'] }; // formulas have thousands of parts
    const found = await axe.run(page, { preload: false, runOnly: standards, resultTypes: ['violations'] });
    return found.violations
        .filter(({ impact }) => ['serious', 'critical'].includes(impact))
        .map(({ id, nodes }) => [id, ...nodes.slice(0, 3).map((node) => node.html.slice(0, 200))].join(' '));
}"""
FOCUS = """() => {
    const found = document.activeElement;
    if (found === document.body || found === document.documentElement) return null;
    const marks = [found, found.nextElementSibling, found.parentElement].filter(Boolean);
    const isMarked = marks.some((mark) => {
        const { outlineStyle, outlineWidth } = getComputedStyle(mark);
        return outlineStyle !== 'none' && parseFloat(outlineWidth) >= 2;
    });
    return { what: found.outerHTML.slice(0, 120), isMarked };
}"""

PAPER = 673  # pixels: the width of A4 within its margins
CUT_OFF = """() => {
    const edge = document.documentElement.clientWidth + 1;
    const shown = document.querySelectorAll('article :is(pre, table, img, mjx-container > svg)');
    const wide = [...shown].filter((box) => box.getBoundingClientRect().right > edge);
    return wide.map((box) => box.outerHTML.slice(0, 200));
}"""


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The site, freshly built, and what Sphinx had to say."""
    folder = tmp_path_factory.mktemp("built") / "site"
    try:
        return folder, make_site.build(folder=folder)
    except npm.NotFetched as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def folder(made):
    return made[0]


@pytest.fixture(scope="session")
def axe(tmp_path_factory):
    """axe-core as a file."""
    folder = tmp_path_factory.mktemp("axe")
    npm.unpack(npm.fetched(npm.AXE, ROOT / "build" / "npm"), {"axe.min.js": "axe.min.js"}, folder)
    return folder / "axe.min.js"


class Page(HTMLParser):
    """What a page links to, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors, self.images = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        if tag == "img":
            self.images.append(attributes)


@pytest.fixture(scope="session")
def pages(folder):
    """All pages but the slides, which have tests of their own."""
    files = [file for file in sorted(folder.rglob("*.html")) if "slides" not in file.parts]
    return {file: Page(file.read_text(encoding="utf-8")) for file in files}


# --- What is there, from the files ---


def test_sphinx_has_no_complaint(made):
    assert made[1] == []


def test_every_link_leads_somewhere_and_all_are_relative(folder, pages):
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            is_absolute = link.startswith("/")
            anchors = pages[target].anchors if target in pages else None
            is_there = target.exists() and (
                not parts.fragment or anchors is None or unquote(parts.fragment) in anchors
            )
            if is_absolute or not is_there:
                broken.append(f"{file.relative_to(folder)}: {link}")
    assert broken == []


def test_every_picture_is_described(pages):
    for file, page in pages.items():
        for image in page.images:
            assert image.get("alt", "").strip(), f"{file.name}: {image}"
            assert not re.search(r"\.(png|webp|svg)$|^_images", image["alt"]), f"{file.name}: {image}"
            assert re.search(r"\.(png|webp|svg)$|^data:", image["src"]), f"{file.name}: {image}"


@pytest.mark.parametrize("source", notebook_sources(ROOT), ids=lambda source: source.stem)
def test_a_chapter_is_there_with_all_that_it_has(folder, source):
    """Equations as anchors, proofs as boxes, answers and drawing code folded."""
    text = (folder / "notebooks" / f"{source.stem}.html").read_text(encoding="utf-8")
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    numbers = EQUATION_TAG.findall(prose)
    assert re.findall(r'id="eq-(\d+-\d+)"', text) == [number.replace(".", "-") for number in numbers]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = "\n".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert text.count("holds: both sides agree") == len(
        re.findall(r"^\(\d+\.\d+\) holds: both", said, re.MULTILINE)
    )
    tags = [tag for cell in code for tag in cell.metadata.get("tags", [])]
    assert text.count("<summary>Answer</summary>") >= tags.count("exercise") + tags.count("question")
    assert "BEGIN SOLUTION" not in text
    assert text.count("Show the code that draws this") == tags.count("draw")
    for link in ("downloads/", "downloads/exercises/"):
        assert f'href="../{link}{source.stem}.ipynb"' in text
        assert (folder / link / f"{source.stem}.ipynb").exists()


def test_equations_and_chapters_are_linked_from_one_chapter_to_another(folder):
    text = (folder / "notebooks/05_classifier_free_guidance.html").read_text(encoding="utf-8")
    assert re.search(r'href="01_ddpm.html#eq-1-18"', text)
    assert re.search(r'href="03_classifier_guidance.html"><span class="doc">[Cc]hapter 03', text)


def test_an_instructor_s_own_exercises_are_not_on_the_site(folder):
    example = next((ROOT / "homework" / "private_example" / "notebooks").glob("*.py"))
    names = re.findall(r"^def (\w+)", example.read_text(encoding="utf-8"), re.MULTILINE)
    assert names
    for file in [*folder.rglob("*.html"), *folder.rglob("*.ipynb"), folder / "searchindex.js"]:
        text = file.read_text(encoding="utf-8")
        assert not any(re.search(rf"\b{name}\b", text) for name in names), file.name


# --- What is shown ---


def names_of_pages(folder):
    """The addresses of all pages but of the listings of code, of which the search has one."""
    files = sorted(folder.rglob("*.html"))
    names = [file.relative_to(folder).as_posix() for file in files]
    return [name for name in names if not name.startswith(("_modules", "slides/"))]


def test_every_page_loads_from_files_and_every_formula_is_set(folder, page):
    for name in names_of_pages(folder):
        page.goto(f"{folder.as_uri()}/{name}")
        page.evaluate(TYPESET)
        assert page.locator("[data-mjx-error], mjx-merror").count() == 0, name
        waiting = page.evaluate("document.querySelectorAll('.math:not(:has(mjx-container))').length")
        assert waiting == 0, name
        assert page.errors == [] and page.foreign == [], name


@from_files
@pytest.mark.parametrize("width", [390, 768, 1024, 1280, 1440])
def test_no_page_is_wider_than_the_screen(open_page, address, width):
    page = open_page("index.html", viewport={"width": width, "height": 900})
    for name in dict.fromkeys([*KINDS, *CHAPTERS]):
        page.goto(f"{address}/{name}")
        page.evaluate(TYPESET)
        page.evaluate(OPEN_ALL)
        excess = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert excess <= 0, name


@from_files
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", KINDS)
def test_axe_finds_nothing_serious(open_page, address, axe, name, scheme):
    page = open_page(
        name, viewport={"width": 1280, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page.evaluate(TYPESET)
    page.evaluate(OPEN_ALL)
    page.wait_for_function("document.readyState === 'complete'")
    page.add_script_tag(path=axe)
    assert page.evaluate(AXE) == []


@from_files
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "playground.html", CHAPTERS[5]])
def test_the_keyboard_s_place_is_seen(open_page, address, name, scheme):
    page = open_page(name, viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        if focus := page.evaluate(FOCUS):
            seen.append(focus)
    assert len({focus["what"] for focus in seen}) > 25
    assert [focus["what"] for focus in seen if not focus["isMarked"]] == []


@pytest.mark.parametrize("address", ["http"], indirect=True)
def test_a_link_into_a_chapter_leads_there_although_formulas_and_pictures_come_later(open_page, address):
    page = open_page(f"{CHAPTERS[5]}#eq-5-9", viewport={"width": 1280, "height": 900})
    page.wait_for_function("document.querySelector('mjx-container') && !document.querySelector('mjx-lazy')")
    place = page.locator("#eq-5-9").bounding_box()
    assert 0 <= place["y"] <= 300
    assert page.locator("article img:not([width][height])").count() == 0


@both
def test_the_search_finds_what_is_to_be_read_first(open_page, address):
    page = open_page("search.html?q=guidance")  # which many functions have in their names
    page.wait_for_selector("#search-results li a")
    assert "Classifier guidance: steering" in page.locator("#search-results li a").first.inner_text()


@from_files
def test_light_dark_and_paper(open_page, address):
    page = open_page(CHAPTERS[5], color_scheme="light", viewport={"width": 1280, "height": 900})
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.locator(".theme-toggle:visible").first.click()
    page.wait_for_function(f"{ground} !== {light!r}")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".sidebar-drawer").is_hidden() and page.locator("class-playground").is_hidden()
    assert page.locator("article details:not([open])").count() == 0
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


@from_files
@pytest.mark.parametrize("name", [CHAPTERS[3], "docs/results.html"])
def test_all_of_a_page_is_on_paper(open_page, address, name):
    """Nobody has scrolled, so that the formulas were set by themselves; and nothing is cut off."""
    page = open_page(name, color_scheme="dark", viewport={"width": PAPER, "height": 900})
    page.wait_for_function("document.querySelector('mjx-container') && !document.querySelector('mjx-lazy')")
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(CUT_OFF) == []
    assert page.locator("article details.hide > summary").filter(visible=True).count() == 0
    outlined = page.locator("mjx-container [stroke-width='0']")  # printers make these bold
    assert outlined.evaluate_all("(all) => all.every((drawn) => getComputedStyle(drawn).stroke === 'none')")
    assert page.evaluate("getComputedStyle(document.querySelector('article')).color") == "rgb(0, 0, 0)"


@both
def test_the_landing_page_s_laboratory_is_alive(open_page, address):
    page = open_page("index.html")
    element = "document.querySelector('guidance-laboratory')"
    page.wait_for_function(f"{element}.stale?.size === 0")
    assert page.evaluate(f"{element}.isPlaying")
    time = page.evaluate(f"{element}.time")
    page.wait_for_function(f"{element}.time !== {time}")
    assert page.evaluate("globalThis.LECTURE26_WEIGHTS") is None


@both
def test_chapter_05_draws_a_red_star_and_its_slider_changes_it(open_page, address):
    page = open_page(CHAPTERS[5])
    assert page.evaluate("globalThis.LECTURE26_WEIGHTS") is None  # loaded when asked for only
    draw(page, "class-playground")
    verdict = page.locator("class-playground .verdict").inner_text()
    assert verdict.startswith("✓") and "red star" in verdict
    first = image_of(page, "class-playground")
    set_slider(page, "class-playground", "w", 4)
    assert image_of(page, "class-playground") != first


@from_files
def test_chapter_07_draws_a_sentence(open_page, address):
    page = open_page("notebooks/07_latent_diffusion.html")
    page.locator("text-playground input[name=steps]").fill("10")
    draw(page, "text-playground")
    page.locator("text-playground").get_by_role("button", name="star", exact=True).hover()
    assert "shown" in page.locator("text-playground .map").get_attribute("class")


@from_files
@pytest.mark.parametrize(
    ("chapter", "shown"), [("03_classifier_guidance", "Classifier"), ("04_clip_guidance", "CLIP")]
)
def test_chapters_03_and_04_show_their_strip(open_page, address, chapter, shown):
    page = open_page(f"notebooks/{chapter}.html")
    page.wait_for_selector("guided-strips img")
    assert page.locator("guided-strips h3").all_inner_texts() == [f"{shown} guidance"]


def test_a_chapter_without_a_part_of_the_playground_loads_none(folder):
    text = (folder / "notebooks/08_visual_prompt_tuning.html").read_text(encoding="utf-8")
    assert "playground.js" not in text and "laboratory.js" not in text
