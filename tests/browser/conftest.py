"""What the tests in a browser share: one Chromium, or a word why there is none."""

import pytest
from drawing import A_CLICK, served

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


@pytest.fixture
def address(folder, request):
    """Where the pages of the module's fixture `folder` are: as files, or served on this machine."""
    if request.param == "file":
        yield folder.as_uri()
        return
    with served(folder) as address:
        yield address


@pytest.fixture
def open_page(browser, address):
    """Opens a page; at the end there must have been no error and no request to another host."""
    contexts, errors, requests = [], [], []

    def open_page(name, **context):
        contexts.append(browser.new_context(**context))
        page = contexts[-1].new_page()
        page.set_default_timeout(A_CLICK)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{address}/{name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
