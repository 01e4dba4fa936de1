"""The part of a compression on a cluster that runs on a worker: one group.

The worker reads the experts from the files of the model by itself, and writes the file of their
factors to an inbox, a folder of a random name in the output folder. It exists as long as the
process that called waits: a worker that does not find it is on another file system, or is not
wanted any more, and has nowhere to write to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

from tensormoe import __version__
from tensormoe.compression._calibrated import check_same_calibration
from tensormoe.compression._groups import Group
from tensormoe.compression._measure import GroupReport
from tensormoe.compression._settings import Compression
from tensormoe.compression._shards import open_shards
from tensormoe.compression._stack import compress_stack
from tensormoe.decomposition._watch import Callback, Progress
from tensormoe.errors import CheckpointError, ClusterError, TensormoeError, located

SHARED = (
    "The model, a calibration and the output must be on a file system that all workers share with "
    "the process that calls, under the same paths."
)

# seconds between two looks at the inbox
_LOOKS = 2.0


@dataclass(frozen=True)
class Task:
    """A group, as a worker is sent it.

    Args:
        version: of tensormoe in the process that called.
        inbox: folder that the file of factors goes to.
        file: its name.
        shards: path and identity of the files with the group's keys.
        calibration: identity of the calibration's file; empty without one.
        group: the experts.
        settings: of the compression.
        budget: entries that the factors may take, if that is what is given.
    """

    version: str
    inbox: str
    file: str
    shards: tuple[tuple[str, Mapping[str, Any]], ...]
    calibration: Mapping[str, Any]
    group: Group
    settings: Compression
    budget: int | None


def compress_task(task: Task) -> GroupReport:
    """Decompose a group, on a worker.

    Raises:
        ClusterError: the worker has another version of tensormoe.
        CheckpointError: the worker sees another model, calibration or output folder than who sent
            the task.
        TensormoeError: a group that can't be done.
    """
    from distributed import get_worker

    worker = get_worker().address
    check_version(task.version, __version__, worker)
    try:
        _check_inbox(task.inbox)
        try:
            model = open_shards(task.shards)
            check_same_calibration(task.settings, task.calibration)
        except CheckpointError as error:
            raise CheckpointError(f"{error} {SHARED}") from None
        path = os.path.join(task.inbox, task.file)
        wanted = _while_wanted(task.inbox)
        return compress_stack(model, task.group, task.settings, task.budget, path, wanted)
    except TensormoeError as error:
        raise located(error, f"worker {worker}") from None


def _check_inbox(inbox: str) -> None:
    if not os.path.isdir(inbox):
        raise CheckpointError(
            f"the output folder {os.path.dirname(inbox)!r} of this compression is not there. "
            f"{SHARED}"
        )
    if not os.access(inbox, os.W_OK):
        raise CheckpointError(
            f"the output folder {os.path.dirname(inbox)!r} can't be written. Let the workers run "
            "as a user who may."
        )


def _while_wanted(inbox: str) -> Callback:
    """Ends a search of which nobody waits for the result."""
    looked = monotonic()

    def told(_: Progress) -> None:
        nonlocal looked
        if monotonic() - looked > _LOOKS:
            _check_inbox(inbox)
            looked = monotonic()

    return told


def check_version(wanted: str, found: object, worker: str) -> None:
    if found != wanted:
        shown = found if isinstance(found, str) else f"none ({found})"
        raise ClusterError(
            f"workers must have the same tensormoe as this process, {wanted}; worker {worker} has "
            f"{shown}. Start it from the same environment."
        )
