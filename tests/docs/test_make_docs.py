"""The recipe of `make docs` fails where the documentation has a warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SITE = "site_name: a site\nvalidation: {links: {not_found: warn}}\n"


def build(folder: Path, page: str) -> subprocess.CompletedProcess[str]:
    """`make docs`, as the Makefile says it, on a site of one page."""
    (folder / "docs").mkdir()
    (folder / "docs" / "index.md").write_text(page)
    (folder / "mkdocs.yml").write_text(SITE)
    shutil.copy(ROOT / "Makefile", folder)
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(
        # the environment exists already, and is not rebuilt
        ["make", "-o", f"{sys.prefix}/.ready-dev", f"VENV={sys.prefix}", "docs"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(not Path(sys.prefix, "bin", "mkdocs").exists(), reason="needs mkdocs")
@pytest.mark.parametrize(
    ("page", "sound"), [("Nothing is wrong.", True), ("[A page](missing.md).", False)]
)
def test_warnings_fail(tmp_path: Path, page: str, sound: bool) -> None:
    done = build(tmp_path, page)
    assert (done.returncode == 0) == sound, done.stdout + done.stderr
    # what is wrong is shown, and nothing else
    assert ("missing.md" in done.stdout) != sound
    assert "INFO" not in done.stdout
