"""The slides as Chromium shows them at 1280 x 720: all fits, can be read, and comes from this host."""

from pathlib import Path

import pytest

import slides
from course import ROOT, notebook_sources
from npm import NotFetched

MEASURE = Path(__file__).with_name("measure.js").read_text()
CHAPTERS = [source.stem for source in notebook_sources(ROOT)]


@pytest.fixture(scope="module")
def decks(browser):
    """The folder of all decks, freshly built."""
    try:
        slides.build(ROOT)
    except NotFetched as missing:
        pytest.skip(str(missing))
    return ROOT / "build" / "slides"


@pytest.fixture
def deck(decks, page):
    """A function that opens a chapter's deck."""

    def opened(chapter, query=""):
        page.goto((decks / f"{chapter}.html").resolve().as_uri() + query)
        page.wait_for_selector(slides.READY)
        return page

    return opened


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_slide_fits_and_can_be_read_in_both_themes(deck, chapter):
    page = deck(chapter, "?theme=light")
    assert page.evaluate(MEASURE) == []
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(MEASURE) == []
    assert page.foreign == [] and page.errors == []


SPOILED = {
    "leaves its place": "content.innerHTML = '<p class=text>' + 'too much text '.repeat(200) + '</p>'",
    "overlap": "content.innerHTML = '<p class=text>One</p><p class=text style=\"margin-top: -60px\">Two</p>'",
    "has 15 px": "content.innerHTML = '<p class=text style=\"font-size: 15px\">Small</p>'",
    "has a contrast of": "content.innerHTML = '<p class=text style=\"color: #bbb\">Faint</p>'",
    "no description": "content.innerHTML = '<img src=\"data:,\">'",
    "a picture is not shown": 'content.innerHTML = \'<img alt="Nothing" src="data:,">\'',
    "equation scaled to 0.5": "content.innerHTML = '<div class=equation data-scale=0.5></div>'",
    "mathematics that MathJax refuses": "content.innerHTML = '<p data-mjx-error=\"?\">Oh</p>'",
}


@pytest.mark.parametrize(("fault", "change"), SPOILED.items(), ids=SPOILED)
def test_the_measuring_finds_what_it_is_for(deck, fault, change):
    page = deck(CHAPTERS[0])
    page.evaluate(f"() => {{ const content = document.querySelectorAll('.content')[1]; {change} }}")
    found = page.evaluate(MEASURE)
    assert found and all(text.startswith("slide 2 ") for text in found)
    assert any(fault in text for text in found)


def test_parts_and_the_rows_of_an_equation_come_step_by_step(deck):
    page = deck("05_classifier_free_guidance")
    steps = "Reveal.getCurrentSlide().querySelectorAll('.fragment.visible').length"
    found = page.evaluate(
        "Reveal.getSlides().findIndex(s => s.querySelector('g.fragment') && s.querySelector('p.fragment'))"
    )
    page.evaluate(f"Reveal.slide({found})")
    number_of_steps = page.evaluate("Reveal.getCurrentSlide().querySelectorAll('.fragment').length")
    for count in range(number_of_steps + 1):
        assert page.evaluate(steps) == count
        assert page.evaluate("Reveal.getIndices().h") == found
        page.keyboard.press("Space")
    assert page.evaluate("Reveal.getIndices().h") == found + 1


def test_speaker_sees_the_notes(deck):
    page = deck(CHAPTERS[1])
    page.evaluate("Reveal.slide(2)")
    with page.expect_popup() as opened:
        page.keyboard.press("s")
    notes = opened.value
    notes.wait_for_function(
        "document.querySelector('.speaker-controls-notes .value').textContent.trim() !== ''"
    )
    notes.close()


def test_pages_on_paper_have_margins(deck):
    page = deck(CHAPTERS[0], "?print-pdf&theme=dark")
    page.emulate_media(media="print")
    boxes = """[...document.querySelectorAll('.pdf-page')].map((sheet) => {
        const outer = sheet.getBoundingClientRect();
        const inner = sheet.querySelector('.slide').getBoundingClientRect();
        const across = [inner.left - outer.left, outer.right - inner.right];
        return Math.min(...across, inner.top - outer.top, outer.bottom - inner.bottom);
    })"""
    margins = page.evaluate(boxes)
    assert len(margins) == page.evaluate("Reveal.getTotalSlides()")
    assert min(margins) > 30
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("getComputedStyle(document.querySelector('p.fragment')).visibility") == "visible"


def test_index_leads_to_every_deck(decks, page):
    page.goto((decks / "index.html").as_uri())
    links = page.evaluate("[...document.querySelectorAll('li a')].map((link) => link.href)")
    assert links == [(decks / f"{chapter}.html").as_uri() for chapter in CHAPTERS]
    assert page.foreign == [] and page.errors == []
