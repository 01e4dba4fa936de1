"""The arguments that functions and methods of the installed CuPy take."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Python's own for Python's functions; compiled ones say it in their documentation."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        text = function.__doc__ or ""
    # an elementwise function that says nothing of arguments takes so many arrays
    return _documented(text) if "(" in text.partition("\n")[0] else _elementwise(function)


def _documented(text: str) -> inspect.Signature:
    """From the first line of ``add``, or of a method.

    >>> _documented("f(x, /, out=None, \\\\*, dtype=None)\\n\\nAdds.")
    <Signature (x, /, out=None, *, dtype=None)>
    """
    first = text.strip().partition("\n\n")[0].replace("\n", " ").replace("\\*", "*")
    arguments = first[first.index("(") + 1 : first.rindex(")")]
    made: Callable[..., Any] = eval(f"lambda {arguments}: None", {})
    return inspect.signature(made)


def _elementwise(function: Any) -> inspect.Signature:
    names = [f"x{place}" for place in range(function.nin)]
    made: Callable[..., Any] = eval(f"lambda {', '.join(names)}, /, out=None, *, dtype=None: None")
    return inspect.signature(made)
