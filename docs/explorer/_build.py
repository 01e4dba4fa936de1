"""The rank explorer in the built site: its page, Python for the browser, and the core itself.

A hook of mkdocs. Nothing of what it copies is kept in the repository: Pyodide comes from npm, as
package-lock.json pins it, once, and the core from the tree that the documentation is of.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import distribution
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "tensormoe" / "choosing" / "page"
LOCK = HERE / "package-lock.json"
PYODIDE = HERE / "node_modules" / "pyodide"
PARTS = (
    "pyodide.mjs",
    "pyodide.asm.mjs",
    "pyodide.asm.wasm",
    "pyodide-lock.json",
    "python_stdlib.zip",
)
NOTICE = """\
Pyodide {version}, https://github.com/pyodide/pyodide, under the Mozilla Public License 2.0
(https://www.mozilla.org/MPL/2.0/), unchanged, from https://registry.npmjs.org/pyodide.
It contains CPython, under the PSF License (https://docs.python.org/3/license.html).
"""
# a release must not lack what a reader's build may
REQUIRED = "EXPLORER_REQUIRED"


def on_post_build(config: dict[str, object]) -> None:
    """Called by mkdocs when the pages are written."""
    build(Path(str(config["site_dir"])) / "explorer")


def build(site: Path) -> None:
    """Write the explorer into a folder; without Pyodide, a page that says so."""
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(PAGE, site)
    missing = install()
    if missing is not None:
        if os.environ.get(REQUIRED):
            sys.exit(f"The rank explorer can't be built: {missing}")
        print(
            f"The rank explorer is built without its engine: {missing}",
            file=sys.stderr,
        )
        reason = f"this documentation was built without it ({missing})"
        write_json(site / "engine.json", {"engine": "none", "reason": reason})
        return
    (site / "pyodide").mkdir()
    for name in PARTS:
        shutil.copyfile(PYODIDE / name, site / "pyodide" / name)
    (site / "pyodide" / "NOTICE.txt").write_text(
        NOTICE.format(version=pinned())
    )
    core = core_archive()
    name = f"core-{sha256(core).hexdigest()[:12]}.zip"
    (site / name).write_bytes(core)
    files = [path for path in sorted(site.rglob("*")) if path.is_file()]
    digest = sha256()
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    engine = {
        "engine": "pyodide",
        "core": name,
        "version": digest.hexdigest()[:12],
        "files": [
            "./",
            "engine.json",
            *(path.relative_to(site).as_posix() for path in files),
        ],
    }
    write_json(site / "engine.json", engine)


def install() -> str | None:
    """Have the pinned Pyodide; the reason where there is none."""
    if installed() == pinned():
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "npm is missing. Install it (Debian: apt install npm), and build again."
    command = [
        npm,
        "ci",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--loglevel=error",
    ]
    try:
        done = subprocess.run(
            command, cwd=HERE, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "npm ci took more than five minutes."
    if done.returncode or installed() != pinned():
        said = done.stderr.strip().splitlines() or ["no reason was given"]
        return f"npm ci failed: {said[0]}"
    return None


def pinned() -> str:
    """The version of Pyodide that the lock file names."""
    locked = json.loads(LOCK.read_text("utf-8"))["packages"][
        "node_modules/pyodide"
    ]
    return str(locked["version"])


def installed() -> str | None:
    """The version of Pyodide that is here, whole."""
    if not all((PYODIDE / name).is_file() for name in PARTS):
        return None
    return str(
        json.loads((PYODIDE / "package.json").read_text("utf-8"))["version"]
    )


def core_archive() -> bytes:
    """Sources of tensormoe and opt_einsum in an archive, the same bytes for the same tree."""
    written = BytesIO()
    with ZipFile(written, "w", ZIP_DEFLATED) as archive:
        for name, path in sorted(sources()):
            archive.writestr(
                ZipInfo(name, (2026, 1, 1, 0, 0, 0)),
                path.read_bytes(),
                ZIP_DEFLATED,
            )
    return written.getvalue()


def sources() -> Iterator[tuple[str, Path]]:
    """Files of the archive, by name in it."""
    for path in (ROOT / "tensormoe").rglob("*.py"):
        yield path.relative_to(ROOT).as_posix(), path
    yield "tensormoe/LICENSE", ROOT / "LICENSE"
    for path in distribution("opt_einsum").files or ():
        if (
            path.suffix == ".py"
            and "tests" not in path.parts
            and ".." not in path.parts
        ):
            yield path.as_posix(), Path(str(path.locate()))
        elif path.name.startswith("LICENSE"):
            yield f"opt_einsum/{path.name}", Path(str(path.locate()))


def write_json(path: Path, value: object) -> None:
    """One JSON object in a file."""
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    build(
        Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "site" / "explorer")
    )
