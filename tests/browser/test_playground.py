"""The playground and the laboratory in a browser, from files: they draw, and ask no other host."""

import pytest
from drawing import both, draw, from_files, image_of, set_slider, wait

from web import build_playground


@pytest.fixture(scope="module")
def folder():
    return build_playground().parent


@both
def test_a_red_star_that_the_reader_reads_as_one(open_page, address):
    page = open_page("index.html")
    # a blocked page would not count: the longest wait between two ticks while it draws
    page.evaluate("""() => {
        let last = performance.now(); window.gaps = [];
        setInterval(() => { const now = performance.now(); window.gaps.push(now - last); last = now; }, 20);
    }""")
    assert page.evaluate("globalThis.LECTURE26_WEIGHTS") is None  # loaded when asked for only
    draw(page, "class-playground")
    element = page.locator("class-playground")
    assert element.locator(".verdict").inner_text().startswith("✓")
    assert "red star" in element.locator(".verdict").inner_text()
    first = image_of(page, "class-playground")
    set_slider(page, "class-playground", "w", 4)
    changed = image_of(page, "class-playground")
    assert max(abs(a - b) for a, b in zip(first, changed, strict=True)) > 0.1
    set_slider(page, "class-playground", "w", 1)
    assert image_of(page, "class-playground") == first  # the seed decides
    ticks = page.evaluate("window.gaps.length")
    assert ticks > page.evaluate("document.querySelector('class-playground').steps.length")
    assert element.locator(".shelf figure").count() == 3
    # the scrubber goes back to the noise
    element.locator("input[name=step]").fill("25")
    assert "code t = 999" in element.locator("output[name=step]").inner_text()
    # another shape is another image
    page.evaluate("document.querySelector('class-playground').isDone = false")
    element.get_by_role("radio", name="circle").check()
    wait(page, "class-playground")
    assert "circle" in element.locator(".verdict").inner_text()


@from_files
def test_a_strip_and_a_judged_batch(open_page, address):
    page = open_page("index.html")
    page.locator("class-playground input[name=steps]").fill("10")
    draw(page, "class-playground", "w from −1 to 8")
    tiles = page.locator("class-playground .tile")
    assert [tile.inner_text()[2:] for tile in tiles.all()] == [
        f"w = {w}".replace("-", "−") for w in range(-1, 9)
    ]
    draw(page, "class-playground", "Draw 16, and judge them")
    assert tiles.count() == 16
    right = page.locator("class-playground .tile[data-right=true]").count()
    assert right >= 12
    assert f"{right} of 16" in page.locator("class-playground .results .note").inner_text()


@from_files
def test_a_sentence_a_picture_and_a_part_of_one(open_page, address):
    page = open_page("index.html")
    element = page.locator("text-playground")
    draw(page, "text-playground")
    assert element.locator(".verdict").inner_text().startswith("✓")
    # what the network takes it for is there at each step
    assert (
        page.evaluate("document.querySelector('text-playground').steps.filter(({ images }) => images).length")
        == 25
    )
    # the attention map of a word
    element.get_by_role("button", name="star", exact=True).hover()
    assert "shown" in element.locator(".map").get_attribute("class")
    # the noisy picture again, told something else
    first = image_of(page, "text-playground")
    element.get_by_role("radio", name="from a picture").check()
    element.locator("input[name=prompt]").fill(
        "a large green star to the left of a small blue ring on a dark background"
    )
    draw(page, "text-playground")
    again = image_of(page, "text-playground")
    assert max(abs(a - b) for a, b in zip(first, again, strict=True)) > 0.1
    # a part of it: the other half stays
    element.get_by_role("radio", name="fill in a part").check()
    element.get_by_role("button", name="Take the drawing").click()
    page.evaluate("document.querySelector('text-playground').isDone = false")
    element.get_by_role("button", name="right half").click()
    wait(page, "text-playground")
    filled = image_of(page, "text-playground")
    rows = range(3 * 64)
    assert all(filled[64 * row : 64 * row + 32] == again[64 * row : 64 * row + 32] for row in rows)
    assert filled != again


@from_files
@pytest.mark.parametrize("without", ["WebAssembly.validate = () => false;", "delete globalThis.WebAssembly;"])
def test_it_draws_without_the_kernel_and_says_so(open_page, address, without):
    page = open_page("index.html")
    page.evaluate("(without) => { LECTURE26.worker = without + LECTURE26.worker; }", without)
    page.locator("class-playground input[name=steps]").fill("5")
    draw(page, "class-playground")
    assert "red star" in page.locator("class-playground .verdict").inner_text()
    assert "slower" in page.locator("class-playground .said").inner_text()


@pytest.mark.parametrize("address", ["http"], indirect=True)
def test_weights_that_do_not_come_are_named_and_can_be_asked_for_again(open_page, address):
    page = open_page("index.html")
    page.locator("class-playground input[name=steps]").fill("5")
    page.route("**/weights/reader_shapes32.js", lambda route: route.fulfill(body=""))
    page.locator("class-playground").get_by_role("button", name="Draw", exact=True).click()
    said = page.locator("class-playground .said.error")
    said.wait_for()
    assert "weights/reader_shapes32.js could not be loaded" in said.inner_text()
    page.unroute("**/weights/reader_shapes32.js")
    draw(page, "class-playground")
    assert said.count() == 0


@from_files
def test_guided_strips_begin_with_a_star_that_guidance_makes_one(open_page, address):
    page = open_page("index.html")
    page.wait_for_selector("guided-strips img")
    for kind in ("classifier", "clip"):
        figures = page.locator(f"guided-strips [data-kind={kind}] figure").all()
        right = [figure.get_attribute("data-right") for figure in figures]
        assert right[0] == "false" and right.count("true") > len(right) / 2, kind


@from_files
def test_words_are_offered_and_unknown_ones_named(open_page, address):
    page = open_page("index.html")
    element = page.locator("text-playground")
    field = element.locator("input[name=prompt]")
    field.fill("a large re")
    assert element.get_by_role("option").all_inner_texts() == ["red"]
    field.press("ArrowDown")
    field.press("Enter")
    assert field.input_value() == "a large red "
    assert "star" in element.get_by_role("option").all_inner_texts()
    field.fill("a large red dog")
    field.press("Enter")
    page.wait_for_function("document.querySelector('text-playground .said').textContent.includes('dog')")


@from_files
def test_a_sentence_is_put_together_by_thumb(open_page, address):
    page = open_page("index.html", has_touch=True, viewport={"width": 390, "height": 800})
    field = page.locator("text-playground input[name=prompt]")
    field.fill("")
    for word in "a green heart on a light background".split():
        field.tap()
        page.locator("text-playground").get_by_role("option", name=word, exact=True).tap()
    assert field.input_value().strip() == "a green heart on a light background"
    assert page.evaluate("globalThis.LECTURE26_WEIGHTS") is None  # no tap went through to what lies below


@from_files
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "laboratory.html"])
def test_pages_fit_and_can_be_named(open_page, address, name, width, scheme):
    page = open_page(name, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    nameless = page.evaluate("""() => [...document.querySelectorAll('input, button, select, canvas, img')]
        .filter((e) => !e.closest('[aria-hidden]') && !e.getAttribute('aria-label') && !e.alt
            && !e.labels?.length && !e.textContent.trim() && !e.closest('button'))
        .map((e) => e.outerHTML)""")
    assert nameless == []


@from_files
def test_the_laboratory_moves_and_answers(open_page, address):
    page = open_page("laboratory.html")
    element = "document.querySelector('guidance-laboratory')"
    ready = f"{element}.stale.size === 0"
    page.wait_for_function(ready)
    assert page.evaluate(f"{element}.isPlaying")
    spread = page.locator("[data-way=free] [data-fact=spread]").inner_text()
    page.locator("input[name=w]").fill("6")
    page.wait_for_function(f"{ready} && {element}.w === 6")
    assert page.locator("[data-way=free] [data-fact=spread]").inner_text() != spread
    # a component moves by key and by hand
    handle = page.locator(".handle").first
    handle.press("ArrowRight")
    assert page.evaluate(f"{element}.components[0].x") == pytest.approx(-0.6)
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"])
    page.mouse.up()
    assert page.evaluate(f"{element}.components[0].x") > -0.5


@from_files
def test_in_the_laboratory_no_square_waits_while_a_slider_moves(open_page, address):
    page = open_page("laboratory.html")
    element = "document.querySelector('guidance-laboratory')"
    page.wait_for_function(f"{element}.stale.size === 0")
    waiting = page.evaluate("""async () => {
        const laboratory = document.querySelector('guidance-laboratory');
        const before = laboratory.panels.map((panel) => panel.paths);
        for (let frame = 0; frame < 8; frame++) {
            laboratory.prepare();
            await new Promise(requestAnimationFrame);
        }
        return laboratory.panels.filter((panel, n) => panel.paths === before[n]).length;
    }""")
    assert waiting == 0


@from_files
def test_the_laboratory_by_thumb_and_in_the_dark(open_page, address):
    page = open_page(
        "laboratory.html", has_touch=True, viewport={"width": 390, "height": 800}, color_scheme="light"
    )
    element = "document.querySelector('guidance-laboratory')"
    page.wait_for_function(f"{element}.stale.size === 0")
    handle = page.locator(".handle").first
    handle.scroll_into_view_if_needed()
    box, scrolled = handle.bounding_box(), page.evaluate("scrollY")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)
    for kind, down in (("touchStart", 0), ("touchMove", 15), ("touchMove", 30)):
        points = [{"x": x, "y": y + down}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function(f"{element}.components[0].y < -0.6")
    assert page.evaluate("scrollY") == scrolled
    # the small plots change their colours, too
    picture = "document.querySelector('[data-way=free] .marginal').toDataURL()"
    page.wait_for_function(f"{element}.stale.size === 0")
    light = page.evaluate(picture)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{picture} !== {light!r}")


@from_files
def test_the_laboratory_stands_still_where_motion_is_not_wanted(open_page, address):
    page = open_page("laboratory.html", reduced_motion="reduce")
    element = "document.querySelector('guidance-laboratory')"
    page.wait_for_function(f"{element}.stale.size === 0")
    assert page.evaluate(f"{element}.isPlaying") is False
    assert page.evaluate(f"{element}.time") == 0
