"""Python in a process of its own, with this checkout's packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}
"""For processes that are started by hand."""


def run_python(
    *words: object, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python command that has ended, with what it printed, whatever its exit status.

    Args:
        words: what follows ``python``.
        timeout: seconds that it may take.
        environment: variables besides this process's own.
    """
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"], **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
