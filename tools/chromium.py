"""A Chromium that is driven by Playwright: it prints the slides, and shows what is tested in a browser."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from course import CourseError

if TYPE_CHECKING:
    from playwright.sync_api import Browser


class NoChromium(CourseError):
    """Playwright or Chromium is missing; the message says how to get it."""


NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator["Browser"]:
    """The Chromium that is installed, or Playwright's own; raises NoChromium where there is none."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise NoChromium(
            "Playwright is not installed: `python -m pip install -e '.[browser]'`, in .venv"
        ) from None
    installed = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed)
        except Error as error:
            raise NoChromium(
                "no Chromium was found: install the package `chromium` of your system, or call"
                f" `python -m playwright install chromium`\n  {error.message.splitlines()[0]}"
            ) from None
        try:
            yield browser
        finally:
            browser.close()
