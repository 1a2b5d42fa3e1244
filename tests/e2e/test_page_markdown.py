"""The page's Markdown: beside markdown-it's, and with what a hostile model would write."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt
from starlette.applications import Starlette
from starlette.routing import Mount

from tensortier.server.pagefiles import PageFiles
from tests.e2e import browser as chrome

SAMPLES = [
    "Hello *there*, **you** and ***both***, `code` and ~~gone~~.",
    "one\ntwo\n\nthree",
    "# Title\n\n## Part\ntext under it\n### Smaller ###",
    "- a\n- b\n  - c\n  - d\n- e",
    "1. one\n2. two\n   - inner\n3. three",
    "3. three\n4. four",
    "* a\n* b with **bold**\n\nafter",
    "> quoted\n> more\n>\n> - item",
    "```python\nprint('<b>')\n\nx = 1 * 2 * 3\n```\nafter",
    "~~~\n```\n~~~",
    "before\n```\nopen until the end",
    "| a | b |\n|---|:-:|\n| 1 | `x` |\n| 2 |",
    "[link](https://example.org/a_b?c=d) and <https://example.org>",
    "snake_case_name and __init__ and 2*3*4 and a * b * c",
    "\\*not emphasis\\* and \\`not code\\`",
    "a `b *c*` d",
    "text\n\n---\n\nmore",
    "5 < 6 & 7 > 2, <script>alert(1)</script>",
    "- [link](mailto:a@b.example) `x`\n\n1. **Bold**: text\n2. **Other**: text",
    "**Note:** use `a|b` here\n- item",
    "ends with **open",
    "x_1_ and _y_ and __z__",
    "Deep:\n- a\n  1. b\n     - c\n- d",
    "## 1. Numbered\n\nText *with* emphasis.\n\n1. First\n\n   ```sh\n   ls -l\n   ```\n2. Second",
]
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x)",
    "[x]( javascript:alert(1))",
    "![x](https://example.org/track.png)",
    "<javascript:alert(1)>",
    "<a href='https://example.org' onclick='alert(1)'>x</a>",
    '```"><script>alert(1)</script>\ncode\n```',
    '[a](https://example.org/"onmouseover="alert(1))',
    "| <svg onload=alert(1)> | b |\n|--|--|\n| <iframe src=//x> | y |",
    "> > > > > > > > > > > > > > > > > > > > > > deep",
]
TAGS = {
    *("p", "br", "hr", "em", "strong", "del", "code", "pre", "a", "ul", "ol", "li", "blockquote", "table"),
    *("thead", "tbody", "tr", "th", "td", "div", "span", "button", "h4", "h5", "h6"),
}
RENDER = """
async (source) => {
  const { render } = await import("./markdown.js");
  const node = document.createElement("div");
  node.append(render(source));
  return node.innerHTML;
}
"""
FUZZ = """
async (seed) => {
  const { render } = await import("./markdown.js");
  const pieces = ["*", "**", "_", "__", "`", "```", "~~~", "~~", "[", "](", ")", "(", "<", ">", "|", "|-|"];
  pieces.push("\\n", "\\n\\n", "- ", "1. ", "# ", "> ", "  ", "    ", "\\\\", "a", "word ", "!", "&amp;", "---");
  pieces.push("https://x.example/", "javascript:", "\\t", "\\u2028", "\\u00e9", "\\ud83d\\ude00");
  let state = seed;
  const random = (n) => (state = (state * 1664525 + 1013904223) >>> 0) % n;
  const tags = new Set();
  const schemes = new Set();
  let slowest = 0;
  // the shortest of some attempts counts: the machine may do something else meanwhile
  const timed = (work) => {
    let best = Infinity;
    for (let attempt = 0; attempt < 5 && best >= 200; attempt += 1) {
      const begun = performance.now();
      work();
      best = Math.min(best, performance.now() - begun);
    }
    slowest = Math.max(slowest, best);
  };
  for (let round = 0; round < 3000; round += 1) {
    let text = "";
    for (let i = random(60); i >= 0; i -= 1) text += pieces[random(pieces.length)];
    let node = null;
    timed(() => {
      node = document.createElement("div");
      node.append(render(text));
    });
    for (const child of node.querySelectorAll("*")) {
      tags.add(child.tagName.toLowerCase());
      if (child.href) schemes.add(new URL(child.href).protocol);
    }
  }
  const units = ["*", "**a ", "[", "[a](", "`", "|a", "> ", "- a\\n", "_a", "<https://", "\\\\", "![", "~~a"];
  for (const unit of [...units, "https://a.b/("]) {
    timed(() => render(unit.repeat(20000 / unit.length)));
  }
  return { tags: [...tags], schemes: [...schemes], slowest };
}
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """The page's files with nothing behind them."""
    import threading

    import uvicorn

    app = Starlette(routes=[Mount("/", PageFiles())])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    with chrome.chromium() as browser:
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            found = browser.new_page()
            found.goto(f"http://127.0.0.1:{port}/icon.svg")
            found.goto(f"http://127.0.0.1:{port}/")
            yield found
        finally:
            server.should_exit = True
            thread.join()


class Flat(HTMLParser):
    """Tags and text, without attributes but href, and without white space that does not show."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.keep = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.keep += tag == "pre"
        href = dict(attrs).get("href")
        self.found.append(f"<{tag} {href}>" if href else f"<{tag}>")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        self.keep -= tag == "pre"
        self.found.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        text = data if self.keep else re.sub(r"\s+", " ", data)
        if self.keep or text.strip():
            self.found.append(text.rstrip("\n") if self.keep else text.strip())


def flat(text: str) -> str:
    return "".join(Flat(text).found)


def ours(page: Any, source: str) -> str:
    """The page's HTML in the terms of plain Markdown: its frames of code taken off, its headings moved up."""
    text = page.evaluate(RENDER, source)
    text = re.sub(
        r'<div class="code"><div class="code-head">.*?</div>(<pre.*?</pre>)</div>', r"\1", text, flags=re.S
    )
    text = re.sub(r'<div class="scroll"[^>]*>(<table.*?</table>)</div>', r"\1", text, flags=re.S)
    text = re.sub(r"<(/?)h(\d)>", lambda m: f"<{m[1]}h{int(m[2]) - 3}>", text)
    return flat(text)


def theirs(source: str) -> str:
    reference = MarkdownIt("commonmark", {"breaks": True, "html": False}).enable(["table", "strikethrough"])
    text = reference.render(source).replace("<s>", "<del>").replace("</s>", "</del>")
    # a list with blank lines between its items has paragraphs in them; ours never has for a single one
    return flat(re.sub(r"<li>\s*<p>(.*?)</p>", r"<li>\1", text, flags=re.S))


@pytest.mark.parametrize("source", SAMPLES)
def test_beside_markdown_it(page: Any, source: str) -> None:
    assert ours(page, source) == theirs(source)


@pytest.mark.parametrize("source", HOSTILE)
def test_nothing_that_a_model_writes_becomes_code(page: Any, source: str) -> None:
    text = page.evaluate(RENDER, source)
    assert set(re.findall(r"<([a-z0-9]+)", text)) <= TAGS
    for attributes in re.findall(r"<[a-z0-9]+ ([^>]*)>", text):
        assert not re.search(r"\bon\w+=|style=|src=", re.sub(r'"[^"]*"', '""', attributes)), text
    for target in re.findall(r'href="([^"]*)"', text):
        assert html.unescape(target).startswith(("https://", "http://", "mailto:"))


def test_any_text_is_rendered_soon(page: Any) -> None:
    for seed in (1, 2):
        found = page.evaluate(FUZZ, seed)
        assert set(found["tags"]) <= TAGS
        assert set(found["schemes"]) <= {"https:", "http:", "mailto:"}
        assert found["slowest"] < 1000
