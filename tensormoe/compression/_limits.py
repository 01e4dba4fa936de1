"""Limits that are checked before a compression begins."""

from __future__ import annotations

import os
import shutil

from tensormoe.checkpoint._files import checkpoint_path
from tensormoe.compression._plan import CompressionPlan
from tensormoe.compression._resume import Work
from tensormoe.errors import CheckpointError, PlanError


def check_memory(plan: CompressionPlan, max_memory: int | None) -> None:
    if max_memory is None or plan.memory <= max_memory:
        return
    worst = max(plan.tried, key=lambda each: each.memory)
    raise PlanError(
        f"max_memory must be at least {plan.memory:,} bytes, for {worst.group.name!r} "
        f"({worst.group.experts} × {worst.group.in_features} × {worst.group.out_features}); got "
        f"{max_memory:,}. Raise it, lower the budget or the rank, or leave out the comparison."
    )


def check_apart(model: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Refuse an output that is the model."""
    source, target = (os.path.realpath(checkpoint_path(path)) for path in (model, output))
    if target in (source, os.path.dirname(source) if os.path.isfile(source) else source):
        raise CheckpointError(
            f"the output must be another folder than the model's; got {target!r} for both."
        )


def check_disk(plan: CompressionPlan, work: Work) -> None:
    """Refuse an output that does not fit on the disk."""
    needed = plan.output_bytes + sum(each.nbytes for each in plan.others)
    if plan.settings.dense:
        needed += sum(4 * each.parameters for each in plan.groups)
    if plan.settings.tolerance is not None:
        needed -= sum(4 * each.parameters for each in plan.groups)
    there = sum(
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(work.folder)
        for name in names
    )
    free = shutil.disk_usage(work.folder).free
    if needed - there > free:
        raise CheckpointError(
            f"the disk of {work.target!r} must have space for {needed - there:,} bytes; it has "
            f"{free:,}. Free some space or choose another output."
        )
