"""The Python blocks of the README and the documentation run as tests, a document in order."""

from __future__ import annotations

from importlib.util import find_spec

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
).pytest()

# there are platforms without CuPy; its package says so when it is imported
collect_ignore_glob = [] if find_spec("cupy") else ["backends/tensormoe_cupy/*"]
