"""A real Chromium for tests of the page, and what it says of a page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SECONDS = 120_000  # of patience, in ms: against hanging, no claim about speed
END_TOKENS = ("0", "2")  # of SmolLM2 and the tiny model
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-dev-shm-usage",  # a container may have little of it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# roles that a person operates, or that show a value
NAMED_ROLES = (
    *(
        "button",
        "link",
        "textbox",
        "searchbox",
        "combobox",
        "listbox",
        "slider",
        "spinbutton",
        "radio",
        "checkbox",
    ),
    *("progressbar", "gridcell", "dialog", "grid", "image", "img", "log", "DisclosureTriangle"),
)


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's browser under Playwright; skips where there is none."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    sync = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Any, **options: Any) -> Any:
    """A page in a context of its own, without animations; answers in its chat do not end by themselves, so that there
    is time to stop them."""
    context = browser.new_context(
        **{"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **options}
    )
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    endless = {"temperature": 0, "logit_bias": dict.fromkeys(END_TOKENS, -100)}
    page.route(
        "**/v1/chat/completions", lambda route: route.continue_(post_data=asked_with(route, **endless))
    )
    return page


def asked_with(route: Any, **changed: Any) -> str:
    """The body of a request with some members changed."""
    return json.dumps({**route.request.post_data_json, **changed})


def nameless(page: Any) -> list[str]:
    """Controls to which the browser gives no name for assistive programs."""
    session = page.context.new_cdp_session(page)
    found = []
    for node in session.send("Accessibility.getFullAXTree")["nodes"]:
        role = node.get("role", {}).get("value")
        if (
            not node.get("ignored")
            and role in NAMED_ROLES
            and not node.get("name", {}).get("value", "").strip()
        ):
            found.append(f"{role} {node.get('properties')}")
    session.detach()
    return found


# Text whose contrast with what is behind it is below WCAG's AA: 4.5, or 3 where it is large.
FAINT = """
() => {
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const behind = (node) => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      layers.push(color);
      if ((color[3] ?? 1) === 1) break;
    }
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement;
    const shown = node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!text.textContent.trim() || !shown) continue;
    if (node.closest(".hidden, .skip, :disabled, option, svg") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node);
    const back = behind(node);
    const [a, b] = [light(over(numbers(style.color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const told = `${ratio.toFixed(2)} ${node.className || node.tagName}: ${text.textContent.trim().slice(0, 40)}`;
    if (ratio < (large ? 3 : 4.5)) found.push(told);
  }
  return found;
}
"""


def curve_is_there(page: Any) -> None:
    page.wait_for_selector("#slider:not([hidden]):not(.stale)")


def ask(page: Any, text: str, tokens: int) -> None:
    if not page.locator("#max-tokens").is_visible():
        page.click("details.options summary")
    page.fill("#max-tokens", str(tokens))
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")
