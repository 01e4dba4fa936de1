"""The Python blocks of the README and the documentation run as tests, a document in order.

A ``text`` block directly behind a Python block is what that block prints, and is compared; so is
one directly behind a ``console`` block with one ``tensormoe`` command. Other commands do not run.
"""

from __future__ import annotations

import os
import shlex
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser


class _Captured(PythonEvaluator):
    def __call__(self, example: Example) -> None:
        printed = StringIO()
        with redirect_stdout(printed):
            super().__call__(example)
        example.namespace["__printed__"] = (example.region.end, printed.getvalue())


def _command(example: Example) -> None:
    """Run a command whose output is shown, as on a terminal of 80 columns."""
    words = shlex.split(str(example.parsed).replace("\\\n", " "))
    shown = example.document.text[example.region.end :].lstrip("`\n").startswith("text\n")
    if words[:2] != ["$", "tensormoe"] or not shown:
        return
    from tensormoe.cli import main

    printed = StringIO()
    # no profile and no settings of this machine's
    alone = {"COLUMNS": "80", "XDG_CONFIG_HOME": str(Path.cwd())}
    with (
        patch.dict(os.environ, alone),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        main(words[2:])
    example.namespace["__printed__"] = (example.region.end, printed.getvalue())


def _compare(example: Example) -> str | None:
    end, printed = example.namespace.get("__printed__", (0, ""))
    if example.document.text[end : example.region.start].strip("`\n"):
        return None  # prose in between: not what the block prints
    wanted = str(example.parsed)
    if printed.split() == wanted.split():
        return None
    return f"The block above prints\n{printed}\nbut the document says\n{wanted}"


def _setup(namespace: dict[str, Any]) -> None:
    from tensormoe.factorizations import _named

    namespace["__registered__"] = dict(_named._registered)
    # files that a document writes go to a folder of its own
    namespace["__folders__"] = folders = ExitStack()
    folders.enter_context(chdir(folders.enter_context(TemporaryDirectory())))


def _teardown(namespace: dict[str, Any]) -> None:
    # what a document registers is no part of the tests that follow
    from tensormoe.factorizations import _named

    _named._registered.clear()
    _named._registered.update(namespace["__registered__"])
    namespace["__folders__"].close()


pytest_collect_file = Sybil(
    parsers=[
        CodeBlockParser("python", _Captured()),
        CodeBlockParser("console", _command),
        CodeBlockParser("text", _compare),
        SkipParser(),
    ],
    patterns=["README.md", "docs/**/*.md", "docs/*.md"],
    setup=_setup,
    teardown=_teardown,
).pytest()

# not installed everywhere: CuPy, whose package says so at its import, and the driver of a browser
_NEEDED = {
    "backends/tensormoe_cupy/*": "cupy",
    "tests/docs/_browser.py": "playwright",
    "tests/choosing_page/_use.py": "playwright",
    "tests/explorer/_use.py": "playwright",
}
collect_ignore_glob = [path for path, package in _NEEDED.items() if not find_spec(package)]
