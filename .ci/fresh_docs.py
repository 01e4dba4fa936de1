"""Follow README.md and the tutorial in fresh environments: install, run, compare.

    python .ci/fresh_docs.py                  # both
    python .ci/fresh_docs.py README.md

For each page: a clone of the last commit, a new environment, the first ``pip install`` line of the
page, then its Python blocks, in order and away from the checkout. A ``text`` block directly behind
a Python block is what that block prints. The blocks of a page must end within a minute of processor
time, the installation not counted.
"""

from __future__ import annotations

import io
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import venv
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/start/tutorial.md")
LIMIT = 60.0

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n*^```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
INSTALL = re.compile(r"^pip install .*$", re.MULTILINE)


def follow(page: str) -> float:
    """Processor seconds that the blocks of a page take in an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        clone, place = Path(folder, "clone"), Path(folder, "elsewhere")
        place.mkdir()
        run("git", "clone", "--quiet", ROOT, clone, cwd=ROOT)
        line = INSTALL.search((clone / page).read_text("utf-8"))
        if line is None:
            sys.exit(f"{page} has no line that starts with: pip install")
        venv.create(Path(folder, "venv"), with_pip=True)
        python = Path(folder, "venv", "bin", "python")
        print(f"{page}: {line.group()}", flush=True)
        # the constraints choose the build of PyTorch without CUDA, as everywhere in this project
        words = [*shlex.split(line.group(), comments=True)[1:], "-qq", "-c", "constraints.txt"]
        run(python, "-m", "pip", *words, cwd=clone)
        before = processor_time()
        run(python, "-I", Path(__file__).resolve(), "--run", clone / page, cwd=place)
        return processor_time() - before


def run_blocks(page: Path) -> None:
    """Run the blocks of a page in this interpreter, and compare what they print."""
    text = page.read_text("utf-8")
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        code, wanted = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        printed = io.StringIO()
        with redirect_stdout(printed):
            # errors name the line of the page
            exec(compile("\n" * line + code, page.name, "exec"), names)
        if wanted is not None and printed.getvalue().split() != wanted.split():
            sys.exit(f"{page.name}, line {line}: prints\n{printed.getvalue()}\nnot\n{wanted}")


def processor_time() -> float:
    """Seconds of the processes that this one started: those of other programs don't count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(*command: str | Path, cwd: Path) -> None:
    if subprocess.run(command, cwd=cwd, check=False).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


def main() -> None:
    if sys.argv[1:2] == ["--run"]:
        return run_blocks(Path(sys.argv[2]))
    slow = []
    for page in sys.argv[1:] or PAGES:
        seconds = follow(page)
        print(f"{page}: {seconds:.0f} s", flush=True)
        slow += [page] if seconds > LIMIT else []
    if slow:
        sys.exit(f"more than {LIMIT:g} s: {', '.join(slow)}")
    return None


if __name__ == "__main__":
    main()
