"""Chapter 05 taught from its live notebook in JupyterLab, bodies typed, one of them wrongly at first."""

from importlib.util import find_spec

import nbformat
import pytest
from lab import PATIENCE, SAID, is_own, jupyterlab, open_notebook, run_all_above, type_body, wait_until_said

import live
from course import ROOT, notebook_sources

CHAPTER = "05_classifier_free_guidance"
FONTS = "https://fonts.googleapis.com/"  # jupyterlab-rise asks for them, and does without
GRADIENT = "return (eps_uncond - eps_cond) / (1 - alpha_bar).sqrt()"
WRONG = "return (1 + w) * eps_uncond - w * eps_cond"
MIXED = "return eps_uncond + (1 + w) * (eps_cond - eps_uncond)"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that serves the live notebook of one chapter, and nothing else."""
    folder = tmp_path_factory.mktemp("live")
    (source,) = notebook_sources(ROOT, [CHAPTER])
    nbformat.write(live.live_notebook(source), folder / f"{CHAPTER}.ipynb")
    (folder / "rise.css").write_text((ROOT / "teaching" / "rise.css").read_text())
    with jupyterlab(folder) as address:
        yield address


def test_taught_with_two_bodies_typed_one_wrongly_at_first(lab, page):
    open_notebook(page, lab, CHAPTER)
    type_body(page, "implicit_gradient", GRADIENT)
    type_body(page, "cfg_combine", WRONG)
    run_all_above(page, "## Two ways to count")
    check = 'check("classifier_free_guidance.cfg_combine"'
    wait_until_said(page, 'verify("5.3"', "AssertionError")  # the proof fails, and there it stops
    assert "holds" in page.evaluate(SAID, 'verify("5.1"')
    assert "as typed above" in page.evaluate(SAID, "typed_or_finished(cfg_combine")
    assert "The mistake is known: swapped halves" in page.evaluate(SAID, check)
    assert page.evaluate(SAID, 'verify("5.4"') == ""

    type_body(page, "cfg_combine", MIXED)
    run_all_above(page, "## What a weight above 0 draws")
    wait_until_said(page, 'verify("5.7"', "holds")
    for text, expected in {
        check: "passed",
        'verify("5.1"': "holds",
        "typed_or_finished(implicit_gradient": "as typed above",
        "typed_or_finished(doubled_pass": "nothing was typed",
        'check("classifier_free_guidance.doubled_pass"': "passed",
    }.items():
        assert expected in page.evaluate(SAID, text), text
    assert page.locator("mjx-merror").count() == 0
    assert [url for url in page.foreign if not is_own(url, page)] == []


@pytest.mark.skipif(
    find_spec("jupyterlab_rise") is None, reason="needs jupyterlab-rise: pip install -e '.[present]'"
)
def test_presented_slide_by_slide(lab, page):
    """Each slide can be read to its end: what is too long for it scrolls, and nothing is too wide."""
    page.set_default_timeout(PATIENCE)
    page.goto(f"{lab}/rise/{CHAPTER}.ipynb")
    page.wait_for_selector(".reveal .slides section.present .jp-Cell")
    number, seen = page.locator(".slide-number").first, []
    while not seen or number.inner_text() != seen[-1]:
        seen.append(number.inner_text())
        slide = page.evaluate("""() => {
          const slide = [...document.querySelectorAll("section.present")].pop();
          const scrolls = getComputedStyle(slide).overflowY === "scroll";
          return {isWide: slide.scrollWidth > slide.clientWidth + 1, text: slide.innerText.trim(),
            isCut: slide.scrollHeight > innerHeight && !scrolls};
        }""")
        assert slide["text"] and not slide["isWide"] and not slide["isCut"], (seen[-1], slide)
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
    assert len(seen) > 30
    assert [url for url in page.foreign if not is_own(url, page) and not url.startswith(FONTS)] == []
