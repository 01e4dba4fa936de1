"""What the tests of the command line share: ways to call it, and what a picture must be."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tensormoe.cli import main
from tests._python import run_python

LAYER = ("64", "64", "16")


def run(
    *words: str, code: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command, or ``code``, in a process of its own that turns warnings into errors."""
    start = ["-m", "tensormoe.cli"] if code is None else ["-c", code]
    return run_python("-W", "error", *start, *words, **environment)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command prints with --json; an error besides if nothing fits a budget."""
    code = main([*words, "--json"])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    found = json.loads(captured.out)
    nothing = words[0] == "rank" and found["best"] is None
    assert code == (2 if nothing else 0)
    assert captured.err.startswith("error: no factorization fits") == nothing
    return found


def check_not_blank(path: Path, least: int = 300) -> None:
    """A picture with something on it, and nothing cut off by its edges."""
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) >= least
    ink = (pixels[..., :3] < 0.95).any(axis=-1)
    assert 0.003 < ink.mean() < 0.6
    edges = (ink[0], ink[-1], ink[:, 0], ink[:, -1])
    assert not any(edge.any() for edge in edges)
