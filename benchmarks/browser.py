"""The server's page in headless Chromium, by playwright (pip install "ssd-export[test]")."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120.0  # for an image, on a busy machine


def find_browser() -> str | None:
    """The Chromium of this machine."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def open_page(port: int, **look: Any) -> Iterator[Any]:
    """A page of the server on this port. Its policy forbids eval, and so wait_for_function.

    Args: look: viewport, color_scheme and others as playwright's new_context takes them.
    Raises: RuntimeError without a browser.
    """
    from playwright.sync_api import sync_playwright

    browser = find_browser()
    if browser is None:
        raise RuntimeError(f"no browser: install one of {', '.join(NAMES)}")
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        try:
            page = running.new_context(**look).new_page()
            page.set_default_timeout(1e3 * SECONDS)
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_selector("#heads tr", state="attached")
            yield page
        finally:
            running.close()


def generate(page: Any, prompt: str, seed: int, num_images: int = 1) -> int:
    """Fills in the form and waits for the images: milliseconds to the first partial one."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#n", str(num_images))
    page.click("#go")
    wait_for_images(page)
    return int(page.evaluate("document.body.dataset.firstMs"))


def wait_for_images(page: Any) -> None:
    """Waits until nothing is generated any more."""
    page.wait_for_selector("#go:enabled")
