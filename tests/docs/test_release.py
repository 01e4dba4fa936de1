"""The check that a release starts with."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_versions_are_read_from_each_file(tmp_path: Path) -> None:
    versions = runpy.run_path(str(ROOT / ".ci" / "version_check.py"))["versions"]
    found = versions(ROOT)
    assert found["tensormoe/__init__.py"] == found["CITATION.cff"] != "none"
    (tmp_path / "tensormoe").mkdir()
    (tmp_path / "tensormoe" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.1.0\n")
    (tmp_path / "CHANGELOG.md").write_text(
        "## [Unreleased]\n\n## [1.2.0] - 2030-01-01\n\n## [1.1.0]\n"
    )
    assert list(versions(tmp_path).values()) == ["1.2.0", "1.1.0", "1.2.0"]
