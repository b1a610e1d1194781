"""What the tests of pages that draw have in common."""

import functools
import http.server
import threading
from contextlib import contextmanager

import pytest

A_DRAWING, A_CLICK = 300_000, 60_000  # milliseconds; a busy machine is slow


@contextmanager
def served(folder):
    """The address at which a folder is served on this machine."""
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def both(test):
    return pytest.mark.parametrize("address", ["file", "http"], indirect=True)(test)


def from_files(test):
    return pytest.mark.parametrize("address", ["file"], indirect=True)(test)


def draw(page, element, action="Draw"):
    """Click a button of an element, and wait until the drawing is done."""
    page.locator(element).get_by_role("button", name=action, exact=True).click()
    wait(page, element)


def wait(page, element):
    page.wait_for_function(f"document.querySelector('{element}').isDone", timeout=A_DRAWING)


def set_slider(page, element, name, value):
    """Move a slider as a user does, which draws anew, and wait until that is done."""
    page.evaluate(f"document.querySelector('{element}').isDone = false")
    page.locator(f"{element} input[name={name}]").fill(str(value))
    wait(page, element)


def image_of(page, element):
    return page.evaluate(f"Array.from(document.querySelector('{element}').result.image)")
