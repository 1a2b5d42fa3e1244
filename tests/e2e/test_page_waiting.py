"""The page while its machine is measured, and while another program loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import browser as chrome
from tests.server.test_measuring import Measuring, holder

SECONDS = 60_000  # of patience, in ms


@pytest.fixture
def page() -> Iterator[Any]:
    with chrome.chromium() as browser:
        page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        page.set_default_timeout(SECONDS)
        yield page


def test_what_waits_says_for_what(page: Any, tmp_path: Path, tiny_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "tiny.gguf").symlink_to(tiny_path)
    with Measuring(tmp_path, models) as server:
        server.ready()
        page.goto(server.url)
        page.wait_for_selector("#apply:enabled")
        page.click("#measure-start:not([aria-disabled])")
        page.wait_for_selector("#state:has-text('measuring this machine')")
        page.wait_for_selector("#measure-progress:not([hidden])")
        page.click("#apply:not([aria-disabled])")  # its plan is not made yet
        page.wait_for_selector("#load-text:has-text('waiting for the measurement of this machine')")
        page.click("#loaded li:has-text('tiny') button:has-text('Unload')")
        waiting = "freeing memory, waiting for the measurement of this machine"
        page.wait_for_selector(f"#loaded li:has-text('{waiting}')")
        assert not page.locator("#notice .error").count()
        server.over()
        page.wait_for_selector("#load-text:has-text('in use')")
        page.wait_for_selector("#state.ready")

        with holder(tmp_path) as other:
            page.click("#apply:not([aria-disabled])")
            page.wait_for_selector("#load-text:has-text('waiting for another tensortier to finish loading')")
            page.wait_for_selector("#state.waiting")
            assert page.locator("#loaded button:has-text('Stop')").count() == 1
            assert chrome.nameless(page) == []
            other.kill()
        page.wait_for_selector("#state.ready")
        assert server.stop() == 0, "".join(server.log)
