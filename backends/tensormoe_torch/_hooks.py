"""Hooks that users put on modules: kept where a module stays, moved where it is replaced."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Attributes of a module that hold hooks."""


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called when the module runs, forward or backward."""
    return any(vars(module).get(name) for name in TABLES)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give the hooks of one module to another; handles that remove them keep working."""
    for name in TABLES:
        # the table itself: handles hold a reference to it
        if name in vars(old):
            vars(new)[name] = vars(old)[name]
    vars(new)["_is_full_backward_hook"] = vars(old).get("_is_full_backward_hook")


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The module and all in it without their hooks, which come back afterwards."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for each in module.modules():
        values = vars(each)
        tables = {name: values[name] for name in TABLES if name in values}
        kept.append((values, tables))
        values.update({name: OrderedDict() for name in tables})
    try:
        yield
    finally:
        for values, tables in kept:
            values.update(tables)
