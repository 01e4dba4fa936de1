"""Links of the built site, read from its files."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """Collects where a page can be entered, and what it points to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {values.get("id") or "", values.get("name") or ""}
        if href := values.get("href"):
            (self.targets if tag == "a" else self.loaded).append(href)
        if source := values.get("src"):
            self.loaded.append(source)


def broken_links(site: Path) -> Iterator[str]:
    """Every link to a file or an anchor that the site lacks, and everything loaded from a network.

    Links to other sites are not followed.
    """
    site = site.resolve()
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site)
        for address in page.loaded:
            if urlsplit(address).netloc:
                yield f"{name}: loads {address} from a network"
        for address in page.targets + page.loaded:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            # a leading slash is the root of the site, as in the page for missing pages
            folder = site if parts.path.startswith("/") else path.parent
            target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                # a server would find the page, a file manager would list the folder
                if not parts.path.startswith("/"):
                    yield f"{name}: {address} is a folder"
            elif not target.is_file():
                yield f"{name}: {address} does not exist"
            elif target in pages and unquote(parts.fragment) not in {"", *pages[target].anchors}:
                yield f"{name}: {address} has no such anchor"
