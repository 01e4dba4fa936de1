"""Pages of the site in headless Chromium."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, sync_playwright

PROBE = Path(__file__).with_name("probe.js").read_text("utf-8")
WIDE, NARROW = 1300, 390


@dataclass(frozen=True)
class Look:
    """A width of the screen in pixels, and a colour scheme."""

    width: int
    scheme: Literal["light", "dark"]

    def __str__(self) -> str:
        return f"{self.width}-{self.scheme}"

    @property
    def palette(self) -> int:
        """Index of the scheme in mkdocs.yml."""
        return ("light", "dark").index(self.scheme)


# the first is what the reader gets, the others come by buttons and by resizing
LOOKS = [Look(width, scheme) for width in (WIDE, NARROW) for scheme in ("dark", "light")]


def find_chromium() -> str | None:
    """Path of a Chromium on this machine; the variable ``CHROMIUM`` comes first."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@contextmanager
def opened(executable: str) -> Iterator[Browser]:
    """A browser of its own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of the site on a free local port."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Failed requests are reported by the browser."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def page_of(browser: Browser) -> Iterator[tuple[Page, list[str]]]:
    """A page for a reader whose system is dark, and what has gone wrong in it so far."""
    context = browser.new_context(color_scheme="dark")
    problems: list[str] = []
    page = context.new_page()
    page.on("console", lambda it: it.type == "error" and problems.append(f"console: {it.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "requestfailed",
        # a request is aborted where the page is left before its icon has come
        lambda it: it.failure != "net::ERR_ABORTED" and problems.append(f"not loaded: {it.url}"),
    )
    try:
        yield page, problems
    finally:
        context.close()


def visit(page: Page, address: str) -> None:
    """Open a page, without the motion that would blur what is measured."""
    page.goto(address, wait_until="load")
    page.add_style_tag(content="* { transition: none !important; animation: none !important }")


def look_at(page: Page, look: Look) -> list[str]:
    """Give the open page a look, and return what is wrong with it then."""
    page.set_viewport_size({"width": look.width, "height": 900})
    # as a click on the button in the header does
    page.evaluate("index => document.getElementById(`__palette_${index}`).click()", look.palette)
    return list(page.evaluate(f"({PROBE})({{ wide: {str(look.width == WIDE).lower()} }})"))


def shoot(page: Page, path: Path, height: int = 3000) -> None:
    """Write a picture of a page, down to a height in pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = page.evaluate("[window.innerWidth, document.documentElement.scrollHeight]")
    clip = {"x": 0, "y": 0, "width": size[0], "height": min(size[1], height)}
    page.screenshot(path=path, full_page=True, clip=clip, quality=80)


def search(page: Page, home: str, query: str, words: tuple[str, ...]) -> list[str]:
    """Search as a reader does: the first page found must contain all the words."""
    visit(page, f"{home}/index.html")
    page.keyboard.press("/")
    # typed, as the page listens to keys
    page.locator(".md-search__input").press_sequentially(query)
    first = page.locator(".md-search-result__link").first
    try:
        first.wait_for(state="attached", timeout=10_000)
    except Exception:
        return [f"search finds nothing for {query!r}"]
    address = str(first.evaluate("link => link.href"))
    visit(page, address)
    text = page.locator(".md-content").inner_text().lower()
    missing = [word for word in words if word not in text]
    found = address.removeprefix(home)
    return [f"{query!r} leads to {found}, without {missing}"] if missing else []
