"""The page's files: nothing from elsewhere, nothing inline, and all that they name is there."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from tensortier.server.pagefiles import FOLDER, PageFiles

FILES = sorted(path for path in FOLDER.iterdir())
HOST = re.compile(r"""["'(](?:https?:)?//[a-z0-9]""", re.IGNORECASE)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page() -> TestClient:
    return TestClient(Starlette(routes=[Mount("/", PageFiles())]))


@pytest.fixture(scope="module")
def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed((FOLDER / "index.html").read_text())
    return parser.tags


def test_no_other_host_is_named() -> None:
    for path in FILES:
        for line in path.read_text().splitlines():
            if "http://www.w3.org/" not in line:
                assert not HOST.search(line), f"{path.name}: {line}"


def test_nothing_is_inline(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    for tag, attributes in tags:
        assert tag != "style" and "style" not in attributes
        assert tag != "script" or attributes.get("src")
        assert not [name for name in attributes if name.startswith("on")]


def test_no_text_is_ever_read_as_html() -> None:
    for path in FOLDER.glob("*.js"):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "eval("):
            assert word not in path.read_text(), f"{path.name} uses {word}"


def test_labels_belong_to_controls(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = {a["for"] for tag, a in tags if tag == "label" and "for" in a}
    assert labelled <= set(ids)
    for tag, attributes in tags:
        if tag in ("input", "select", "textarea") and attributes.get("type") != "radio":
            assert attributes["id"] in labelled, attributes
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name) is None or attributes[name] in ids


def test_elements_that_the_code_names_are_there(tags: list[tuple[str, dict[str, str | None]]]) -> None:
    ids = {a["id"] for _, a in tags if "id" in a}
    for path in FOLDER.glob("*.js"):
        for name in re.findall(r"\$\(\"([^\"]+)\"\)", path.read_text()):
            assert name in ids, f"{path.name}: {name}"


def test_modules_that_are_imported_are_served(page: TestClient) -> None:
    for path in FOLDER.glob("*.js"):
        for name in re.findall(r"from \"\./([^\"]+)\"", path.read_text()):
            answer = page.get(f"/{name}")
            assert answer.status_code == 200 and "javascript" in answer.headers["content-type"]


def test_headers(page: TestClient) -> None:
    answer = page.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = dict(p.strip().split(" ", 1) for p in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = page.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize(
    "path", ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/app.py", "/nothing.js", "//etc/passwd"]
)
def test_nothing_else_is_served(page: TestClient, path: str) -> None:
    assert page.get(path).status_code == 404


PALETTES = re.findall(r":root \{(.*?)\}", (FOLDER / "style.css").read_text(), re.DOTALL)


def ratio(one: str, other: str) -> float:
    """WCAG 2's contrast of two colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", PALETTES, ids=["light", "dark"])
def test_colours_can_be_told_from_what_is_behind_them(palette: str) -> None:
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", palette))
    words = ["text", "muted", "accent", "error", "good", "warn"]
    places = [name for name in colors if re.fullmatch(r"gpu\d|ram|drive|control", name)]
    assert len(places) == 7
    for behind in ("panel", "bg", "sunken"):
        for name in words:
            assert ratio(colors[name], colors[behind]) >= 4.5, (name, behind)
        for name in places:
            assert ratio(colors[name], colors[behind]) >= 3, (name, behind)
    assert ratio(colors["on-accent"], colors["accent"]) >= 4.5


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FILES) < 120_000
