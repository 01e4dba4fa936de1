"""Whether transformers is there, and new enough."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

__all__ = ["lacking"]

_OLDEST = (5, 13)


def lacking() -> str | None:
    """Why there is no transformers with what this package builds on; None if there is one."""
    needed = f"transformers {'.'.join(map(str, _OLDEST))} or newer"
    remedy = "Install it with: pip install 'tensormoe[huggingface]'."
    try:
        found = version("transformers")
    except PackageNotFoundError:
        return f"tensormoe_torch.huggingface needs {needed}, which is not installed. {remedy}"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < _OLDEST:
        return f"tensormoe_torch.huggingface needs {needed}; got {found}. {remedy}"
    return None
