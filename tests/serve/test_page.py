"""The page in headless Chromium: images grow, the keyboard is enough, axe-core finds nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.browser import NAMES, find_browser, generate, open_page, wait_for_images
from benchmarks.server_process import ServerProcess, pixels_of
from ssd_export.model.find import DEMO_CHECKPOINT
from tests.runtime.checkpoints import bundle

pytest.importorskip("fastapi", reason="needs the extra [serve]: pip install ssd-export[serve]")
pytest.importorskip("playwright", reason="needs playwright: pip install ssd-export[test]")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright",
    reason="needs axe-playwright-python: pip install ssd-export[test]",
)
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason=f"needs a browser: {' or '.join(NAMES)}"
)

PROMPT = "a red circle on white"
PHONE = {"width": 360, "height": 740}
IMAGES = "#gallery img"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("page") / "server.log"
    with ServerProcess(bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1), log, "--threads", "1") as running:
        yield running


@pytest.fixture
def page(server: ServerProcess) -> Iterator[Any]:
    problems: list[str] = []
    with open_page(server.port) as opened:
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("request", lambda asked: problems.extend(foreign(asked.url, server.port)))
        yield opened
    assert not problems


def foreign(url: str, port: int) -> list[str]:
    is_ours = url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))
    return [] if is_ours else [f"asks {url}"]


def shown(page: Any, place: int = 0) -> np.ndarray:
    source = page.locator(IMAGES).nth(place).get_attribute("src")
    return pixels_of(source.partition(",")[2])


def test_images_grow_row_by_row_and_are_those_of_their_seed(
    page: Any, server: ServerProcess
) -> None:
    page.fill("#seed", "7")
    page.click("#go")
    page.wait_for_selector("#gallery progress")
    page.wait_for_selector("#gallery progress:not([value='0'])")
    assert (shown(page)[-1] == 235).all(), "the last pixels are still to come"
    wait_for_images(page)
    body = {"prompt": PROMPT, "seed": 7}
    answer = server.ask("POST", "/v1/images/generations", body)[2]
    assert (shown(page) == pixels_of(json.loads(answer)["data"][0]["b64_json"])).all()
    assert "1 image in" in page.inner_text("#status") and page.inner_text("#error") == ""
    page.wait_for_selector("#cache:has-text('tokens were evicted')")


def test_the_gallery_keeps_its_images_and_gives_their_seed_back(page: Any) -> None:
    generate(page, "a blue ring on sand", 3, num_images=2)
    generate(page, PROMPT, 8)
    assert page.locator(IMAGES).count() == 3
    page.locator("#gallery button").nth(1).click()
    assert page.input_value("#seed") == "3"
    assert page.input_value("#prompt") == "a blue ring on sand"


def test_the_keyboard_is_enough(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("a green square on white")
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached[:5] == ["negative", "seed", "n", "cfg", "go"]
    page.focus("#go")
    page.keyboard.press("Enter")
    page.wait_for_selector(IMAGES)
    wait_for_images(page)
    assert page.locator(IMAGES).get_attribute("alt") == "a green square on white, seed 0, image 0"


def test_stop_and_errors_are_said(page: Any) -> None:
    page.click("#go")
    page.wait_for_selector("#stop:enabled")
    page.click("#stop")
    wait_for_images(page)
    assert page.inner_text("#error") == "Stopped." and page.locator(IMAGES).count() == 0
    page.fill("#prompt", "word " * 500)
    page.click("#go")
    wait_for_images(page)
    assert "tokens long" in page.inner_text("#error") and page.locator(IMAGES).count() == 0
    page.fill("#prompt", PROMPT)
    page.fill("#negative", "a blue ring on sand")
    page.click("#go")
    wait_for_images(page)
    assert "does nothing at cfg_scale 1" in page.inner_text("#error")


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    path, log = bundle(DEMO_CHECKPOINT, "ssd-auto", 0.1), tmp_path / "log"
    with ServerProcess(path, log, "--threads", "1", SSD_EXPORT_KEY="secret") as server:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.port}/")
            page.wait_for_selector("#key")
            page.fill("#key", "secret")
            page.keyboard.press("Tab")
            page.wait_for_selector("#heads tr", state="attached")
            generate(page, PROMPT, 1)
            assert page.locator(IMAGES).count() == 1
            browser.close()


def test_axe_core_finds_nothing_and_nothing_is_cut_off(server: ServerProcess) -> None:
    with open_page(server.port) as page:
        generate(page, PROMPT, 1)
        for viewport in (PHONE, {"width": 1280, "height": 900}):
            page.set_viewport_size(viewport)
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                found = axe.Axe().run(page).response["violations"]
                assert [(one["id"], one["impact"]) for one in found] == [], (viewport, scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
