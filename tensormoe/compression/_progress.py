"""Progress of a compression, for a callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from tensormoe.decomposition._watch import Callback, Progress


@dataclass(frozen=True)
class CompressionProgress:
    """Progress of a compression.

    Args:
        stage: ``"experts"``, which are decomposed first, or ``"files"``, which are written then.
        name: of the group or the file that is next, or at work; ``""`` when the stage is over. On a
            cluster, where many are at work, of the group that is done.
        done: how much of the stage is done: entries of experts, or bytes of tensors.
        total: how much there is.
        search: of the group, after each of its sweeps; else None. Always None on a cluster.
    """

    stage: str
    name: str
    done: int
    total: int
    search: Progress | None = None


CompressionCallback: TypeAlias = Callable[[CompressionProgress], "bool | None"]
"""Called around every group and file, every few megabytes that are written, and after every sweep,
where True ends the search for that group. Of an output that was whole before, nothing is told."""


class Teller:
    """Report progress to the callback."""

    def __init__(self, callback: CompressionCallback | None) -> None:
        self._callback = callback

    def __call__(self, stage: str, name: str, done: int, total: int) -> None:
        if self._callback is not None:
            self._callback(CompressionProgress(stage, name, done, total))

    def searching(self, name: str, done: int, total: int) -> Callback | None:
        """For the sweeps of a group."""
        callback = self._callback
        if callback is None:
            return None

        def told(search: Progress) -> bool | None:
            named = replace(search, name=name)
            return callback(CompressionProgress("experts", name, done, total, named))

        return told
