"""How docstrings become Markdown: examples as blocks of code, roles as names.

In a terminal and in an editor a docstring reads best with bare ``>>>`` examples
and roles such as ``:class:`Name```; Markdown would take the first for
quotations and show the second as they stand.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(
    r":(?:attr|class|data|exc|func|meth|mod):`(?:~(?:\w+\.)*)?([^`]+)`"
)
_EXAMPLES = re.compile(r"^Examples?:$", re.MULTILINE)


class MarkdownDocstrings(griffe.Extension):
    """Rewrites each docstring collected, before its sections are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(text: str) -> str:
    r"""The docstring with roles as code and examples fenced.

    Sections headed ``Example:`` or ``Examples:`` are left to the parser of
    docstrings, which knows the second of these names.

    >>> to_markdown("See :class:`a.b.C`.\n\n>>> 1 + 1\n2")
    'See `a.b.C`.\n\n```pycon\n>>> 1 + 1\n2\n```'
    >>> to_markdown("Sums.\n\nExample:\n    >>> 1 + 1\n    2")
    'Sums.\n\nExamples:\n    >>> 1 + 1\n    2'
    """
    text = _EXAMPLES.sub("Examples:", _ROLE.sub(r"`\1`", text))
    result, in_examples = [], False
    for paragraph in re.split(r"\n\s*\n", text):
        header = _EXAMPLES.match(paragraph)
        in_examples = bool(header) or (
            in_examples and paragraph.startswith("    ")
        )
        result.append(paragraph if in_examples else _fenced(paragraph))
    return "\n\n".join(result)


def _fenced(paragraph: str) -> str:
    lines = paragraph.split("\n")
    starts = [
        place
        for place, line in enumerate(lines)
        if line.lstrip().startswith(">>> ")
    ]
    if not starts:
        return paragraph
    before, example = lines[: starts[0]], lines[starts[0] :]
    indent = example[0][: len(example[0]) - len(example[0].lstrip())]
    gap = [""] if before else []
    return "\n".join(
        [*before, *gap, f"{indent}```pycon", *example, f"{indent}```"]
    )
