"""Whether transformers is there, and new enough."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from tensormoe.errors import MissingDependencyError

__all__ = ["require"]

_OLDEST = (5, 13)


def require() -> None:
    """Refuse a transformers without what this package builds on.

    Raises:
        MissingDependencyError: none is installed, or one that is too old.
    """
    needed = f"transformers {'.'.join(map(str, _OLDEST))} or newer"
    remedy = "Install it with: pip install 'tensormoe[huggingface]'."
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise MissingDependencyError(
            f"tensormoe_torch.huggingface needs {needed}, which is not installed. {remedy}"
        ) from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) < _OLDEST:
        raise MissingDependencyError(
            f"tensormoe_torch.huggingface needs {needed}; got {found}. {remedy}"
        )
