"""Check the version: ``python .ci/version_check.py v0.1.0``.

The tag, the package, the citation and the changelog must name the same one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def versions(root: Path) -> dict[str, str]:
    """The version that each file names."""
    patterns = {
        "tensormoe/__init__.py": r'^__version__ = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
        # the newest section that has a version
        "CHANGELOG.md": r"^## \[(\d.*?)\]",
    }
    return {
        name: found[1] if (found := re.search(pattern, _read(root / name), re.M)) else "none"
        for name, pattern in patterns.items()
    }


def _read(path: Path) -> str:
    return path.read_text("utf-8")


def main() -> None:
    [tag] = sys.argv[1:]
    if wrong := {name: it for name, it in versions(ROOT).items() if f"v{it}" != tag}:
        sys.exit("\n".join(f"the tag is {tag}, but {name} says {it}" for name, it in wrong.items()))


if __name__ == "__main__":
    main()
