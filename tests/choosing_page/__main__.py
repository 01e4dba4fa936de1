"""Use the rank explorer in a browser: ``python -m tests.choosing_page``.

    python -m tests.choosing_page [--pictures FOLDER] [--engine server|pyodide]

The page is used with both engines, the local server and Python in the browser. The command fails
on errors in the console, pages wider than the screen, text of poor contrast, fields without names,
ranks that are not those of ``tensormoe rank``, a link that opens another state, code that does not
run, anything that is typed and run, impossible values without a message beside their field, and a
page that needs a network once it is loaded. It prints how long the page takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "docs" / "explorer" / "_build.py"
ENGINES = ("server", "pyodide")


def main() -> int:
    """Serve the page by both engines, use it, and report what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.choosing_page")
    parser.add_argument("--pictures", type=Path, default=ROOT / "out" / "rank-explorer-check")
    parser.add_argument("--engine", choices=ENGINES, action="append")
    options = parser.parse_args()
    if find_spec("playwright") is None:
        sys.exit("playwright is missing: pip install -e '.[docs-check]'")
    from tests.choosing_page._use import check
    from tests.docs._browser import find_chromium, opened

    executable = find_chromium()
    if executable is None:
        sys.exit("Chromium is missing. See: python -m tests.docs")
    problems = []
    with opened(executable) as browser:
        for engine in options.engine or ENGINES:
            with served_by(engine) as address:
                for problem in check(browser, address, engine, options.pictures / engine):
                    problems.append(problem)
                    print(f"{engine}: {problem}", flush=True)
    print(f"{len(problems)} problems; pictures are in {options.pictures}")
    return int(bool(problems))


@contextmanager
def served_by(engine: str) -> Iterator[str]:
    """The address of the page with an engine."""
    if engine == "server":
        from tensormoe.cli._server import ChoosingServer

        with ChoosingServer(0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.url
            server.shutdown()
        return
    from tests.docs._browser import served

    with tempfile.TemporaryDirectory() as folder:
        built(Path(folder) / "explorer")
        with served(Path(folder)) as address:
            yield f"{address}/explorer/"


def built(site: Path) -> None:
    """The page as the documentation has it."""
    spec = spec_from_file_location("explorer_build", BUILD)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = module.install()
    if missing is not None:
        sys.exit(missing)
    module.build(site)


if __name__ == "__main__":
    sys.exit(main())
