"""The Python blocks of the README and the documentation run as tests, a document in order."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


def _setup(namespace: dict[str, Any]) -> None:
    from tensormoe.factorizations import _named

    namespace["__registered__"] = dict(_named._registered)


def _teardown(namespace: dict[str, Any]) -> None:
    # what a document registers is no part of the tests that follow
    from tensormoe.factorizations import _named

    _named._registered.clear()
    _named._registered.update(namespace["__registered__"])


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "docs/*/*.md"],
    setup=_setup,
    teardown=_teardown,
).pytest()

# there are platforms without CuPy; its package says so when it is imported
collect_ignore_glob = [] if find_spec("cupy") else ["backends/tensormoe_cupy/*"]
