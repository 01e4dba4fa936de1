"""What was used, and how often something waited for the device or copied to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Log:
    """Attributes:
    used: kind (``"function"``, ``"method"``, ``"special"``), name, and keywords of every call.
    waits: names of the calls that read a value.
    uploads: names of the calls that copied from the host.
    """

    used: set[tuple[str, str, frozenset[str]]] = field(default_factory=set)
    waits: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)


LOG = Log()


@contextmanager
def waits() -> Iterator[list[str]]:
    """What waits for the device, or copies to it, inside the block."""
    found: list[str] = []
    before = len(LOG.waits), len(LOG.uploads)
    yield found
    found += LOG.waits[before[0] :] + LOG.uploads[before[1] :]
