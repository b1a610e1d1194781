"""What the tests in a browser share: one Chromium, or a word why there is none."""

import pytest

from chromium import NoChromium, chromium

PATIENCE = (
    300_000  # milliseconds; far beyond what anything takes, since the machine may have other work to do
)


@pytest.fixture(scope="session")
def browser():
    """Chromium, driven by Playwright."""
    try:
        with chromium() as found:
            yield found
    except NoChromium as missing:
        pytest.skip(str(missing))


@pytest.fixture
def page(browser):
    """A page of 1280 x 720 that notes what it asks of other hosts, and what goes wrong in it."""
    opened = browser.new_page(viewport={"width": 1280, "height": 720})
    opened.context.set_default_timeout(PATIENCE)
    opened.foreign, opened.errors = [], []
    opened.on(
        "request", lambda request: opened.foreign.append(request.url) if is_foreign(request.url) else None
    )
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("console", lambda said: opened.errors.append(said.text) if said.type == "error" else None)
    yield opened
    opened.close()


def is_foreign(url):
    """Whether an address is of another host."""
    return not url.startswith(("file:", "data:", "blob:", "about:"))
