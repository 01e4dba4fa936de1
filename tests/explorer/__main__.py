"""Use the explorer of experts in a browser: ``python -m tests.explorer``.

    python -m tests.explorer [--pictures FOLDER]

Pages are opened from disk, wide and narrow, in light and dark colours. The command fails on errors
in the console, pages wider than the screen, text of poor contrast, anything that a hostile name
runs, a preview that differs from NumPy's, a list that keys do not move in, and a page of 4,096
experts that is large or slow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from tests.explorer._pages import HOSTILE, LEVELS, LINEAR, MANY, write_pages

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Write the pages, use them, and report what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.explorer")
    parser.add_argument("--pictures", type=Path, default=ROOT / "out" / "explorer-check")
    options = parser.parse_args()
    if find_spec("playwright") is None:
        sys.exit("playwright is missing: pip install -e '.[docs-check]'")
    from tests.docs._browser import find_chromium

    executable = find_chromium()
    if executable is None:
        sys.exit("Chromium is missing. See: python -m tests.docs")
    with tempfile.TemporaryDirectory() as folder:
        pages = write_pages(Path(folder))
        problems = list(check(executable, pages, options.pictures))
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems; pictures are in {options.pictures}")
    return int(bool(problems))


def check(executable: str, pages: dict[str, Path], pictures: Path) -> Iterator[str]:
    """Problems of the pages."""
    from tests.docs._browser import opened
    from tests.explorer._use import by_keys, edits, grids, hostile, in_notebook, looks, speed

    with opened(executable) as browser:
        for name, path in pages.items():
            if name != MANY:
                yield from (f"{name}: {each}" for each in looks(browser, path, pictures / name))
        yield from (f"{LINEAR}: {each}" for each in edits(browser, pages[LINEAR]))
        yield from (f"{LINEAR}: {each}" for each in by_keys(browser, pages[LINEAR]))
        yield from (f"{LEVELS}: {each}" for each in grids(browser, pages[LEVELS]))
        yield from (f"notebook: {each}" for each in in_notebook(browser, pages[LINEAR].parent))
        yield from (f"{HOSTILE}: {each}" for each in hostile(browser, pages[HOSTILE]))
        yield from (f"{MANY}: {each}" for each in speed(browser, pages[MANY], pictures / MANY))


if __name__ == "__main__":
    sys.exit(main())
