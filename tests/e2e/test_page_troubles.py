"""The page when something goes wrong, or is done twice: reloads, a server that ends, no model, and what comes before a
download."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tensortier import hardware
from tests import calibrations
from tests.e2e import browser as chrome
from tests.e2e.browser import ask, asked_with, curve_is_there
from tests.hub_server import Hub
from tests.server.process import ServerProcess

REPO, FILE = "someone/Small-GGUF", "Small-F16.gguf"
NAME = '<img src=x onerror="document.title=1">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chrome.chromium() as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrations.measured(tmp_path_factory.mktemp("home"), hardware.probe())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / f"{NAME}.gguf").symlink_to(tiny_path)
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        running.put(REPO, FILE, tiny_path.read_bytes())
        yield running


@pytest.fixture(scope="module")
def server(home: Path, models: Path, hub: Hub) -> Iterator[ServerProcess]:
    more = {"HF_ENDPOINT": hub.url}
    with ServerProcess("smollm2", "--threads", "1", home=home, models=models, more=more) as running:
        yield running.ready()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    made = chrome.new_page(browser)
    yield made
    made.context.close()


def test_how_fast_a_file_would_be_is_told_before_it_is_downloaded(
    page: Any, server: ServerProcess, hub: Hub
) -> None:
    page.goto(server.url)
    curve_is_there(page)
    page.click("#find")
    page.fill("#search", "small")
    page.press("#search", "Enter")
    page.click("#found summary")
    hub.clear_log()
    page.click("#found button:has-text('How fast here?')")
    page.wait_for_selector(".forecast:has-text('tokens/s')")
    told = page.text_content(".forecast")
    assert told.startswith("Fits: it takes") and "tokens of context" in told
    assert hub.sent() < 7e6 and not page.locator(".download").count()
    assert not chrome.nameless(page) and not page.evaluate(chrome.FAINT)
    hub.faults(status=403)
    page.reload()
    page.click("#find")
    page.fill("#search", "small")
    page.press("#search", "Enter")
    page.click("#found summary")
    # the header is kept by commit: another file is none that is known
    page.route("**/api/forecast", lambda r: r.continue_(post_data=asked_with(r, revision="0" * 40)))
    page.click("#found button:has-text('How fast here?')")
    page.wait_for_selector(".forecast.error:has-text('access denied')")
    hub.faults()


def test_a_chat_outlives_a_reload_and_models_are_unloaded(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    curve_is_there(page)
    page.wait_for_selector(".pill.ready")
    ask(page, "Say hello.", 5)
    page.wait_for_selector(".message.assistant .message-foot:has-text('5 tokens')")
    first = page.text_content(".message.assistant .message-body")
    ask(page, "Tell me a very long story.", 2000)
    page.wait_for_selector(".message.assistant.running p")
    page.reload()
    page.wait_for_selector(".message >> nth=3")
    assert page.text_content(".message.assistant .message-body >> nth=0") == first
    assert page.text_content(".message.assistant .message-foot >> nth=1").endswith("stopped") or (
        "stopped ·" in page.text_content(".message.assistant .message-foot >> nth=1")
    )
    assert page.input_value("#max-tokens") == "2000"
    server.quiet()  # nobody computes on for a page that is gone
    page.click("#chat-clear")
    page.reload()
    curve_is_there(page)
    assert page.locator(".message").count() == 0

    # two models: each has its name and its button
    page.select_option("#model", NAME)
    page.wait_for_function("n => document.querySelector('#map .map-row').children.length < 10", arg=0)
    curve_is_there(page)
    page.click("#apply")
    page.wait_for_selector("#load-text:has-text('this plan is in use')")
    page.wait_for_selector("#loaded li >> nth=1")
    names = page.locator("#loaded b").all_text_contents()
    assert sorted(names) == sorted(["smollm2", NAME]) and page.title() != "1"
    page.wait_for_selector("#live div:has-text('tokens/s')")
    assert page.locator("#live div:has-text('tokens/s')").count() == 1, "the head is about one of them"
    page.click("#loaded li:has-text('smollm2') button")
    page.wait_for_function("() => document.querySelectorAll('#loaded li').length === 1")
    assert [m["name"] for m in server.stats()["models"]] == [NAME]


def test_a_server_that_ends_and_comes_back(page: Any, home: Path, models: Path) -> None:
    with socket.socket() as kept:  # so that nobody else gets the port between the two servers
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        arguments = ["smollm2", "--threads", "1", "--context", "4096", "--port", str(kept.getsockname()[1])]
        it_ends_and_comes_back(page, lambda: ServerProcess(*arguments, home=home, models=models))


def it_ends_and_comes_back(page: Any, start: Callable[[], ServerProcess]) -> None:
    first = start()
    try:
        page.goto(first.url)
        curve_is_there(page)
        page.wait_for_selector(".pill.ready")
        page.fill("#budget", "12")
        with page.expect_download():
            page.click("#save-plan")  # now the server knows a plan for this position
        ask(page, "Tell me a very long story.", 2000)
        page.wait_for_selector(".message.assistant.running p")
    finally:
        first.process.kill()
        first.wait()
    page.wait_for_selector(".message.assistant .error:has-text('The connection to the server ended')")
    page.wait_for_selector(".pill.failed")
    assert page.locator("#live").is_hidden() and page.locator("#loaded").is_hidden()
    page.click("#apply")
    page.wait_for_selector("#notice .error:has-text('does not answer')")
    with start() as second:
        page.wait_for_selector(".pill.ready")
        page.wait_for_function("() => !document.querySelector('#notice .error')")
        page.click("#apply")  # by a plan that this server never made
        page.wait_for_selector("#load-text:has-text('this plan is in use')")
        assert second.stop() == 0


def test_a_plan_that_was_forgotten_is_made_again(page: Any, server: ServerProcess) -> None:
    page.goto(server.url)
    curve_is_there(page)
    page.click("#elsewhere")
    page.wait_for_selector("#export-text:has-text('llama-server -m')")
    asked = []

    def forgetful(route: Any) -> None:
        asked.append(route.request.url)
        error = {"error": {"message": "this plan is not known any more: make it again"}}
        route.fulfill(status=400, json=error) if len(asked) == 1 else route.continue_()

    page.route("**/api/export/**", forgetful)
    page.select_option("#target", "koboldcpp")
    page.wait_for_selector("#export-text:has-text('koboldcpp --model')")
    assert len(asked) == 2


def test_without_a_model_it_says_what_to_do(page: Any, server: ServerProcess) -> None:
    page.route("**/api/models", lambda r: r.fulfill(json={"models": [], "served": None, "downloads": True}))
    page.route(
        "**/api/events",
        lambda r: r.fulfill(content_type="text/event-stream", body='event: state\ndata: {"models":[]}\n\n'),
    )
    page.goto(server.url)
    page.wait_for_selector("#model option:has-text('No model on this machine yet')", state="attached")
    ask(page, "Hello?", 5)
    page.wait_for_selector("#chat-problem:has-text('There is no model to talk to yet')")
    assert page.input_value("#chat-input") == "Hello?" and page.locator(".message").count() == 0


def test_what_went_wrong_in_measuring_stays_to_be_read(page: Any, server: ServerProcess) -> None:
    told = [{"fraction": 0.5, "warnings": []}, {"fraction": None, "warnings": ["measuring failed: no drive"]}]
    body = "".join(f"event: measuring\ndata: {json.dumps(one)}\n\n" for one in told)
    page.route("**/api/events", lambda r: r.fulfill(content_type="text/event-stream", body=body))
    page.goto(server.url)
    page.wait_for_selector("#notice .error:has-text('measuring failed: no drive')")
    curve_is_there(page)
    with page.expect_response("**/api/slider"):
        page.select_option("#workload", "agent")
    curve_is_there(page)
    assert page.locator("#notice .error:has-text('measuring failed: no drive')").count() == 1


def test_the_focus_is_never_lost(page: Any, server: ServerProcess) -> None:
    """Who works by keyboard is not thrown back to the top when the button that was pressed goes or rests."""

    def press(selector: str) -> None:
        page.focus(selector)
        page.keyboard.press("Enter")

    def focused() -> str:
        return page.evaluate("document.activeElement.id || document.activeElement.textContent")

    page.goto(server.url)
    curve_is_there(page)
    page.select_option("#model", "smollm2")  # which takes its time to answer
    curve_is_there(page)
    press("#apply")
    page.wait_for_selector("#load-text:has-text('this plan is in use')")
    assert focused() == "apply"
    page.fill("#chat-input", "Tell me a very long story.")
    press("#send")
    page.wait_for_selector(".message.assistant.running")
    assert focused() == "chat-input"
    press("#stop")
    page.wait_for_selector(".message.assistant .message-foot:has-text('stopped')")
    assert focused() == "chat-input"
    press(".message.assistant .message-foot button:has-text('Regenerate')")
    assert focused() == "stop"
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .message-foot:has-text('stopped')")
    press(".message.user .message-foot button")
    page.keyboard.press("Escape")
    assert focused() == "Edit"
    server.quiet()
    count = page.locator("#loaded li").count()
    press("#loaded li button")
    page.wait_for_function("n => document.querySelectorAll('#loaded li').length < n", arg=count)
    assert focused() == "model"
