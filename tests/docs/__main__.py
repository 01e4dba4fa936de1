"""Look at every page of the documentation in a browser: ``python -m tests.docs``.

    python -m tests.docs [--site FOLDER] [--pictures FOLDER] [PAGE …]

Every page is opened from a server and from disk, on a wide and a narrow screen, in light and in
dark colours. The command fails on broken links, public names without a place, errors in the
console, pages wider than the screen, cut signatures, text of poor contrast, and a search that does
not find what is there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tests.docs._links import broken_links
from tests.docs._names import undocumented

ROOT = Path(__file__).resolve().parents[2]
QUERY, WORDS = "entmax backward", ("entmax", "backward")


def main() -> int:
    """Build the site, or take the one that is given, and report what is wrong with it."""
    parser = argparse.ArgumentParser(prog="python -m tests.docs")
    parser.add_argument("--site", type=Path, help="a site that is built already")
    parser.add_argument("--pictures", type=Path, default=ROOT / "out" / "docs-check")
    parser.add_argument("pages", nargs="*", help="pages such as api/torch.html; all by default")
    options = parser.parse_args()
    if find_spec("playwright") is None:
        sys.exit("playwright is missing: pip install -e '.[docs-check]'")
    from tests.docs._browser import find_chromium

    executable = find_chromium()
    if executable is None:
        sys.exit(
            "Chromium is missing. Install it (Debian: apt install chromium; Ubuntu: snap install "
            "chromium), or name a Chrome of yours: CHROMIUM=/path/to/chrome make docs-check"
        )
    site = (options.site or build()).resolve()
    # the rank explorer is no page of the theme: tests.choosing_page uses it
    found = (path.relative_to(site) for path in sorted(site.rglob("*.html")))
    pages = options.pages or [str(path) for path in found if path.parts[0] != "explorer"]
    problems: dict[str, list[str]] = {}
    for problem in (*broken_links(site), *undocumented(ROOT, site)):
        problems[problem] = []
    for problem, view in look(executable, site, pages, options.pictures):
        problems.setdefault(problem, []).append(view)
    for problem, views in problems.items():
        print(problem, f"({', '.join(views)})" if views else "")
    print(f"{len(pages)} pages, {len(problems)} problems; pictures are in {options.pictures}")
    return int(bool(problems))


def build() -> Path:
    """The site, built strictly."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True)
    return ROOT / "site"


def look(
    executable: str, site: Path, pages: list[str], pictures: Path
) -> Iterator[tuple[str, str]]:
    """What is wrong with the pages: a page with a problem, and how it was opened."""
    from tests.docs._browser import LOOKS, look_at, opened, page_of, search, served, shoot, visit

    with opened(executable) as browser, served(site) as address:
        for origin, home in (("http", address), ("disk", site.as_uri())):
            with page_of(browser) as (page, problems):
                for name in pages:
                    if name == "404.html" and origin == "disk":
                        continue  # only a server shows it, and its links start at the root
                    problems.clear()
                    visit(page, f"{home}/{name}")
                    for each in LOOKS:
                        for text in look_at(page, each):
                            yield f"{name}: {text}", f"{origin} {each}"
                        if origin == "http":
                            shoot(page, pictures / str(each) / f"{name.replace('/', '-')}.jpg")
                    yield from ((f"{name}: {text}", origin) for text in problems)
                problems.clear()
                found = search(page, home, QUERY, WORDS)
                yield from ((f"search: {text}", origin) for text in [*found, *problems])


if __name__ == "__main__":
    sys.exit(main())
