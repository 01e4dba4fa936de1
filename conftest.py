"""The Python blocks of the README and the documentation run as tests, a document in order.

A ``text`` block directly behind a Python block is what that block prints, and is compared.
"""

from __future__ import annotations

from contextlib import ExitStack, chdir, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from tempfile import TemporaryDirectory
from typing import Any

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser


class _Captured(PythonEvaluator):
    def __call__(self, example: Example) -> None:
        printed = StringIO()
        with redirect_stdout(printed):
            super().__call__(example)
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
    "tests/explorer/_use.py": "playwright",
}
collect_ignore_glob = [path for path, package in _NEEDED.items() if not find_spec(package)]
