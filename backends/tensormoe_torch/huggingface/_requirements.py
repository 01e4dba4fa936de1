"""Check that transformers is installed, and new enough."""

from __future__ import annotations

import re
from importlib.metadata import version

from tensormoe._extras import missing
from tensormoe.errors import MissingDependencyError

_OLDEST = (5, 13)


def lacking() -> MissingDependencyError | None:
    """The error to raise where transformers is missing or too old; None where it is neither."""
    what, extra = "tensormoe_torch.huggingface", "huggingface"
    if absent := missing(what, ("transformers",), extra):
        return absent
    found = version("transformers")
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is not None and tuple(map(int, numbers.groups())) >= _OLDEST:
        return None
    return MissingDependencyError(
        f"{what} needs transformers {'.'.join(map(str, _OLDEST))} or newer; got {found}. Install "
        f"it with: pip install 'tensormoe[{extra}]'."
    )
