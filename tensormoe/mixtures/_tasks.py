"""Tasks of a multi-gate mixture, in groups or not."""

from __future__ import annotations

from typing import Any

from tensormoe._validation import brief
from tensormoe.errors import SpecError

Tasks = tuple[str, ...]
"""Names of tasks."""


def as_tuple(values: Any) -> Any:
    """A list as a tuple; anything else as it is, to be refused by a check."""
    return tuple(values) if isinstance(values, list) else values


def record_of(routes: Any, stage: str) -> Any:
    """The record of a stage, by its name."""
    return getattr(routes, "groups", None) if stage == "first" else routes


def check_groups(groups: tuple[Tasks, ...] | None, tasks: Tasks) -> None:
    """Refuse groups that are no partition of the tasks.

    Raises:
        SpecError: a task that is in no group or in several, or an empty group.
    """
    if groups is None:
        return
    listed = isinstance(groups, tuple) and all(isinstance(group, tuple) for group in groups)
    found = [task for group in groups for task in group] if listed else []
    if not listed or not all(groups) or sorted(map(str, found)) != sorted(tasks):
        raise SpecError(
            f"groups must hold each of the tasks {tasks} once, and none must be empty; got "
            f"{brief(groups)}."
        )
